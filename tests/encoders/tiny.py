"""Tiny encoders for tests of what holds for all: one table, by the files of ``bat/encoders``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bat.encoders.base import Encoder, find_encoder
from bat.types import Grid

TINY: dict[str, dict[str, Any]] = {
    "bat": {"width": 32, "depth": 2, "heads": 2, "grid": Grid(16, 8)},
    "eat": {"width": 32, "depth": 2, "heads": 2, "grid": Grid(16, 8)},
    "beats": {"width": 32, "depth": 2, "heads": 2, "embed_width": 16, "mlp_width": 64},
    "audiomae": {"width": 48, "depth": 2, "heads": 2, "grid": Grid(6, 8)},
    "ast": {"width": 48, "depth": 2, "heads": 2, "grid": Grid(9, 12)},
    "dasheng": {"width": 48, "depth": 2, "heads": 2, "tokens": 30},
    "m2d": {"width": 48, "depth": 2, "heads": 2, "grid": Grid(4, 5)},
}
"""Constructor keywords, by encoder; ``hf`` is made by ``tiny_hf``."""
HF_WAVES = {
    **{"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "sew": "SEW"},
    **{"unispeech-sat": "UniSpeechSat", "data2vec": "Data2VecAudio"},
}
HF_KINDS = ("ast", "whisper", *HF_WAVES, "w2v-bert", "s2t", "moonshine", "parakeet", "seamless")


def tiny(name: str, *, seed: int = 0, **words: Any) -> Encoder:
    """An untrained encoder ``name`` with random weights."""
    torch.manual_seed(seed)
    return find_encoder(name)(**{**TINY[name], **words}).eval()


def tiny_hf(kind: str, folder: Path, *, task: str | None = None, **words: Any) -> Path:
    """Saves a random model of transformers and its extractor to ``folder`` and returns that.
    ``task``: class beside the encoder, such as ``ForCTC``. The caller skips without the package."""
    import transformers as t

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 48}
    waves = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "vocab_size": 12}
    waves |= {"num_conv_pos_embedding_groups": 4, **size}
    if kind == "ast":
        config = t.ASTConfig(**size, max_length=208, **words)
        front = t.ASTFeatureExtractor(max_length=208)
    elif kind == "whisper":
        config = t.WhisperConfig(
            **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2},
            **{"decoder_layers": 1, "decoder_attention_heads": 2, "encoder_ffn_dim": 48},
            **{"decoder_ffn_dim": 48, "vocab_size": 20, "max_source_positions": 100},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            **{"decoder_start_token_id": 1, **words},
        )
        front = t.WhisperFeatureExtractor(chunk_length=2)
    elif kind == "w2v-bert":
        config = t.Wav2Vec2BertConfig(**size, conv_depthwise_kernel_size=7)
        front = t.SeamlessM4TFeatureExtractor()
    elif kind == "seamless":
        config = t.SeamlessM4TConfig(
            **{"hidden_size": 32, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 2},
            **{"speech_encoder_intermediate_dim": 48, "encoder_layers": 1, "decoder_layers": 1},
            **{"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 9, "t2u_vocab_size": 9},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "t2u_decoder_layers": 1},
            **{"t2u_encoder_layers": 1, "t2u_encoder_ffn_dim": 8, "t2u_decoder_ffn_dim": 8},
            **{"t2u_encoder_attention_heads": 2, "t2u_decoder_attention_heads": 2},
            **{"upsample_initial_channel": 16, "unit_hifi_gan_vocab_size": 9, "unit_embed_dim": 4},
            **{"lang_embed_dim": 4, "spkr_embed_dim": 4, "upsample_rates": [2, 2]},
            **{"upsample_kernel_sizes": [4, 4], "variance_predictor_hidden_dim": 4},
        )
        front = t.SeamlessM4TFeatureExtractor()
    elif kind == "s2t":
        config = t.Speech2TextConfig(
            **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 20},
            **{"decoder_layers": 1, "decoder_attention_heads": 2, "encoder_ffn_dim": 48},
            **{"decoder_ffn_dim": 48, "conv_channels": 16},
        )
        front = t.Speech2TextFeatureExtractor()
    elif kind == "moonshine":
        config = t.MoonshineConfig(
            **{"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1, "hidden_size": 32},
            **{"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2},
            **{"encoder_num_key_value_heads": 2, "decoder_num_key_value_heads": 2},
            **{"intermediate_size": 48, "vocab_size": 20},
        )
        front = t.Wav2Vec2FeatureExtractor(do_normalize=False)
    elif kind == "parakeet":
        config = t.ParakeetEncoderConfig(**size, subsampling_conv_channels=16, conv_kernel_size=5)
        front = t.ParakeetFeatureExtractor()
    else:
        own = {"squeeze_factor": 2, "conv_kernel": (10, 3, 3, 3, 3, 2, 2)} if kind == "sew" else {}
        own |= {"conv_stride": (5, 2, 2, 2, 2, 2, 2)} if kind == "sew" else {}
        config = getattr(t, f"{HF_WAVES[kind]}Config")(**{**waves, **own, **words})
        front = t.Wav2Vec2FeatureExtractor(do_normalize=True)
    model = t.AutoModel.from_config(config)
    noise = torch.Generator().manual_seed(2)
    for p in model.parameters():  # tokens, biases and position codes begin as zeros
        if not p.any():
            torch.nn.init.normal_(p, 0, 0.2, generator=noise)
    if task is not None:
        name = type(model).__name__.removesuffix("Model") + task
        model = getattr(t, name)(config)
    model.save_pretrained(folder)
    front.save_pretrained(folder)
    return folder
