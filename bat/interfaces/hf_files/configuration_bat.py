"""Configuration of the Better Audio Transformer (BAT) for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class BatConfig(PretrainedConfig):
    """Settings of a BAT encoder; the defaults are Base.

    Args:
        input_shape: frames and mel bins of one chunk. Longer inputs are cut into chunks.
        patch_size: frames and mel bins a side of a patch.
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio, layer_norm_eps: as in ViT.
        drop_path_rate: drop path of the last block in training; the others rise linearly from 0.
        pre_norm: a LayerNorm stands before the first block.
        layer_norm_first: blocks are pre-norm instead of post-norm.
        init_scale_values: initial value of the blocks' layer scale; None: no layer scale.
        use_gate: attention outputs are multiplied by a sigmoid gate of the block's input.
        pos_layout: ``grid``, ``eat`` (halves of the channels exchanged), or ``reference``, the
            order of the paper's table (which the weights contain).
        chunk_time_patches: time patches of one chunk.
        frontend: settings of the feature extractor; ``sample_rate`` to ``feature_normalization``
            describe it.
        head_norm, head_dropout: LayerNorm and dropout before the classifier.
    """

    model_type = "bat"

    def __init__(
        self,
        input_shape: list[int] | tuple[int, int] = (1024, 128),
        patch_size: int = 16,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_norm_eps: float = 1e-6,
        pre_norm: bool = True,
        layer_norm_first: bool = False,
        init_scale_values: float | None = None,
        use_gate: bool = True,
        pos_trainable: bool = False,
        pos_layout: str = "reference",
        chunk_time_patches: int = 64,
        sample_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 160,
        n_mels: int = 128,
        f_min: float = 0.0,
        top_db: float | None = 80.0,
        feature_normalization: str = "per_sample_minmax_after_db",
        frontend: dict[str, Any] | None = None,
        head_norm: bool = True,
        head_dropout: float = 0.2,
        **kwargs: Any,
    ) -> None:
        self.input_shape = list(input_shape)
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.layer_norm_eps = layer_norm_eps
        self.pre_norm = pre_norm
        self.layer_norm_first = layer_norm_first
        self.init_scale_values = init_scale_values
        self.use_gate = use_gate
        self.pos_trainable = pos_trainable
        self.pos_layout = pos_layout
        self.chunk_time_patches = chunk_time_patches
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.n_mels = n_mels
        self.f_min = f_min
        self.top_db = top_db
        self.feature_normalization = feature_normalization
        self.frontend = frontend
        self.head_norm = head_norm
        self.head_dropout = head_dropout
        super().__init__(**kwargs)
