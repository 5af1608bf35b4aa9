"""Audio encoders of the package transformers, with their own feature extractors.

``hf:FOLDER_OR_NAME``: a folder saved by ``save_pretrained``, or the name of a hub repository, the
only case in which anything is fetched. Blocks are what the model returns as ``hidden_states``,
without the first entry. Two kinds are known:

    waves   Wav2Vec2, HuBERT, WavLM and others with ``conv_kernel`` and ``conv_stride``: F = 1, one
            time patch a ``hop`` of samples, T = 1 + (S - field) // hop
    fixed   AST (patch grid; class token: the mean of its two, as its own pooling) and Whisper's
            encoder (F = 1), whose input always has the same number of frames. Each clip is padded
            to it as its extractor does, encoded whole, and the tokens of its own time are
            returned; longer clips are cut into chunks

Departures: up to one hop of samples at the end, which make no token, is left out (a group norm
over time would see them); dropout is the file's, but layer drop and SpecAugment on hidden states
are off. A decoder and heads beside the encoder are set aside.

``inputs`` of the fixed kind are rows of frames, (B, rows, mels): for each chunk one row that is
the padding of that clip, then the frames of the time patches.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bat.encoders.base import Encoder, Samples, keywords_of, load_strictly
from bat.errors import UserError
from bat.types import Features

log = logging.getLogger("bat")

HUB = True
"""``hf:NAME`` need not be a path (``bat.registry.hub_names``)."""
OFF = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False}
UNUSED = ("masked_spec_embed",)
"""Parameters that act in the model's own pre-training alone; published files lack them."""


class Fixed(NamedTuple):
    """Sizes of an encoder whose input has a fixed number of frames."""

    time: int
    freq: int
    frames: int
    """Frames of the input."""
    step: int
    """Frames from one time patch to the next."""
    rows: int
    """Frames that time patches reach beyond ``step`` times their number (may be negative)."""
    window: int
    """Samples of the first frame."""
    hop: int
    """Samples from frame to frame."""
    centred: bool
    """Frames are centred, else complete; a last patch may be partly padding."""

    def need(self, patches: int) -> int:
        """Returns the frames that differ from padding in a clip of ``patches`` time patches."""
        return patches * self.step + self.rows


class HF(Encoder):
    """An encoder of transformers. ``config``: of the model; ``extractor``: of its feature
    extractor, both as they are saved; ``code``: folder or name with the model's own code, run only
    if ``trust_remote_code``."""

    def __init__(
        self,
        *,
        config: dict[str, Any],
        extractor: dict[str, Any],
        code: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        made = _transformers()
        if code is not None:
            own = _configured(code, trust_remote_code)
            front = _extractor(code, trust_remote_code)
        else:
            try:
                own = made.AutoConfig.for_model(**config)
                front = getattr(made, extractor["feature_extractor_type"])(**extractor)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"encoder: not settings of transformers: {error}") from error
        net = made.AutoModel.from_config(own, trust_remote_code=code is not None)
        self._set(net, front, code, trust_remote_code)

    def _set(self, net: Any, front: Any, code: str | None, trusted: bool) -> None:
        self.net: Any = net.get_encoder() if net.config.is_encoder_decoder else net
        if hasattr(self.net, "masked_spec_embed"):
            self.net.masked_spec_embed = None
        self.extractor, self.code, self.trusted = front, code, trusted
        own = net.config
        self.sample_rate = int(front.sampling_rate)
        self.width, self.depth = int(own.hidden_size), int(own.num_hidden_layers)
        self.heads = int(own.num_attention_heads)
        self.fixed = _fixed(own, front)
        self.max_patches = None if self.fixed is None else self.fixed.time
        self.has_cls = hasattr(own, "time_stride")
        self.field, self.hop = 1, 1
        if self.fixed is not None:
            self.field, self.hop = self.fixed.window, self.fixed.step * self.fixed.hop
        elif hasattr(own, "conv_kernel"):
            for kernel, stride in zip(
                reversed(own.conv_kernel), reversed(own.conv_stride), strict=True
            ):
                self.field = (self.field - 1) * stride + kernel
                self.hop *= stride
        else:
            raise UserError(
                f"hf: an encoder of the kind '{own.model_type}' ({type(front).__name__}) is not "
                "known here: those of waves with convolutions, AST and Whisper are. "
                "docs/add_an_encoder.md says how to write one"
            )

    @property
    def hop_seconds(self) -> float:
        return self.hop / self.sample_rate

    def time_patches(self, samples: Samples) -> Samples:
        one = self.fixed
        if one is None:
            return 1 + _at_least(samples - self.field, 0) // self.hop
        chunk = one.time * self.hop
        whole, rest = samples // chunk, samples % chunk
        if one.centred:
            last = -(-rest // self.hop)
        else:
            frames = 1 + _at_least(rest - one.window, 0) // one.hop
            last = (1 + _at_least(-(-(frames - one.need(1)) // one.step), 0)) * (rest > 0)
        return _at_least(whole * one.time + last, 1)

    def inputs(
        self, waveform: Tensor, lengths: Tensor | None = None, *, frames: int | None = None
    ) -> Tensor:
        """Maps (B, S) or (S,) to normalised samples (B, S'), or rows of frames (B, rows, mels)."""
        if frames is not None:
            raise UserError("frames: encoders of transformers take clips at their own length")
        waveform = torch.atleast_2d(waveform)
        if waveform.dim() != 2 or not waveform.is_floating_point():
            raise UserError(
                f"waveform of shape {tuple(waveform.shape)}: give floats (B, S) or (S,)"
            )
        S = waveform.shape[1]
        own = [S] * len(waveform) if lengths is None else lengths.clamp(1, S).tolist()
        made = [
            self.first(self._extract(row[:samples])[None], self.time_patches(samples))[0]
            for row, samples in zip(waveform.detach().float().cpu(), own, strict=True)
        ]
        rows = max(len(one) for one in made)
        out = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))) for x in made]
        return torch.stack(out).to(waveform.device)

    def _extract(self, wave: Tensor) -> Tensor:
        """Maps one clip (S,) to its input for ``features``, without a batch axis."""
        chunk = len(wave) if self.fixed is None else self.fixed.time * self.hop
        parts = []
        for part in wave.split(chunk):
            part = F.pad(part, (0, max(0, self.field - len(part))))
            with torch.autocast("cpu", enabled=False):  # some extractors are written in torch
                held = self.extractor(
                    part.numpy(), sampling_rate=self.sample_rate, return_tensors="np"
                )
            x = torch.as_tensor(held[self.net.main_input_name][0]).float()
            if self.fixed is None:
                return x
            x = x if len(x) == self.fixed.frames else x.T  # (frames, mels)
            if len(x) != self.fixed.frames:
                raise UserError(
                    f"hf: the extractor makes {tuple(x.shape)}, the model takes "
                    f"{self.fixed.frames} frames: they do not belong together"
                )
            pad, rows = x[-1:], self.fixed.need(self.fixed.time)
            x = torch.cat([x, pad.expand(max(0, rows - len(x)), -1)])[:rows]
            parts += [pad, x]
        return torch.cat(parts)

    def first(self, inputs: Tensor, patches: int) -> Tensor:
        one = self.fixed
        if one is None:
            return inputs[:, : (patches - 1) * self.hop + self.field]
        whole = (patches - 1) // one.time
        rest = patches - whole * one.time
        return inputs[:, : whole * (1 + one.need(one.time)) + 1 + one.need(rest)]

    def features(self, inputs: Tensor, *, entry: bool = False) -> Features:
        """Returns the hidden states of all blocks, (L, B, T, F, D)."""
        assert not entry, "has_queries is False"
        if self.fixed is None:
            x = self._blocks(inputs)
            if x.shape[2] != 1 + (inputs.shape[1] - self.field) // self.hop:
                raise UserError("hf: the model's blocks have another length than its convolutions")
            return Features(x.unsqueeze(3), None)
        one = self.fixed
        patches, classes = [], []
        for chunk in inputs.split(1 + one.need(one.time), dim=1):
            pad, x = chunk[:, :1], chunk[:, 1:]
            T = (x.shape[1] - one.rows) // one.step
            x = torch.cat([x, pad.expand(-1, max(0, one.frames - x.shape[1]), -1)], dim=1)
            x = x[:, : one.frames]  # (B, frames, mels)
            out = self._blocks(
                x.transpose(1, 2) if self.net.main_input_name != "input_values" else x
            )
            tokens = one.time * one.freq
            grid = out[:, :, -tokens:].unflatten(2, (one.freq, one.time))  # frequency-major
            patches.append(grid.transpose(2, 3)[:, :, :T])  # (L, B, T, F, D)
            if self.has_cls:
                classes.append(out[:, :, :-tokens].mean(2))  # (L, B, D)
        cls = torch.stack(classes).mean(0) if classes else None
        return Features(torch.cat(patches, dim=2), cls)

    def _blocks(self, x: Tensor) -> Tensor:
        """Runs the model -> (L, B, N, D)."""
        found = self.net(x, output_hidden_states=True).hidden_states
        if found is None or len(found) != self.depth + 1:
            raise UserError(f"hf: the model returns no hidden_states of its {self.depth} blocks")
        return torch.stack(found[1:])

    def layer_of(self, name: str) -> int:
        found = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
        if found:
            return int(found[1]) + 1
        return self.depth + 1 if name.startswith(("net.layer_norm.", "net.layernorm.")) else 0

    def config(self) -> dict[str, Any]:
        return {
            "config": json.loads(self.net.config.to_json_string(use_diff=False)),
            "extractor": json.loads(self.extractor.to_json_string()),
            "code": self.code,
            "trust_remote_code": self.trusted,
        }

    @classmethod
    def from_weights(
        cls, state: Mapping[str, Tensor], *, config: dict[str, Any] | None, heads: int | None
    ) -> Self:
        """Builds from an export of bat; a folder of transformers is opened by ``open``."""
        if config is None:
            raise UserError("an encoder of transformers needs its folder: say hf:FOLDER")
        model = cls(**keywords_of(cls, config, "encoder"))
        load_strictly(model, state, "the weight file")
        return model

    @classmethod
    def open(cls, name: str, *, trust_remote_code: bool = False) -> Self:
        """Reads a folder of transformers, or fetches the hub's repository ``name``."""
        path = Path(name).expanduser()
        here = path.exists()
        if not here and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
            raise UserError(f"hf:{name} does not exist: give a folder that save_pretrained wrote")
        where = str(path) if here else name
        made, own = _transformers(), _configured(where, trust_remote_code)
        code = where if getattr(own, "auto_map", None) and trust_remote_code else None
        front = _extractor(where, trust_remote_code)
        common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": here}
        common |= {"config": own, "dtype": torch.float32, "ignore_mismatched_sizes": True}
        said, bars = made.logging.get_verbosity(), made.logging.is_progress_bar_enabled()
        made.logging.set_verbosity_error()  # what is amiss is said below
        made.logging.disable_progress_bar()
        try:
            net, info = made.AutoModel.from_pretrained(where, output_loading_info=True, **common)
        except Exception as error:  # any, of its many loaders
            raise _unreadable(where, here, error) from error
        finally:
            made.logging.set_verbosity(said)
            if bars:
                made.logging.enable_progress_bar()
        encoder = cls.__new__(cls)
        Encoder.__init__(encoder)
        encoder._set(net, front, code, trust_remote_code)
        part = "encoder." if net.config.is_encoder_decoder else ""
        odd = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        lost = {*info["missing_keys"], *odd}
        lost = {n for n in lost if n.startswith(part) and not n.endswith(UNUSED)}
        if lost:
            raise UserError(
                f"{where}: these weights are not in its files, or of another shape, and would be "
                f"random: {', '.join(sorted(lost)[:20])}"
            )
        if aside := sorted(info["unexpected_keys"]):
            log.warning("%s: set aside, no part of the encoder: %s", where, ", ".join(aside[:10]))
        return encoder


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "encoders of the kind hf need the package transformers: pip install 'bat-audio[hf]'"
        ) from error
    return transformers


def _configured(where: str, trusted: bool) -> Any:
    """Returns the model's configuration; runs its own code only if ``trusted``."""
    here = Path(where).exists()
    file = Path(where) / "config.json"
    if here and not file.is_file():
        raise UserError(f"{where} holds no config.json: give a folder that save_pretrained wrote")
    try:
        own = _transformers().AutoConfig.from_pretrained(
            where, trust_remote_code=trusted, local_files_only=here
        )
    except Exception as error:
        raise _unreadable(where, here, error) from error
    for key, value in OFF.items():
        if hasattr(own, key):
            setattr(own, key, value)
    return own


def _extractor(where: str, trusted: bool) -> Any:
    here = Path(where).exists()
    try:
        return _transformers().AutoFeatureExtractor.from_pretrained(
            where, trust_remote_code=trusted, local_files_only=here
        )
    except Exception as error:
        raise _unreadable(where, here, error) from error


def _unreadable(where: str, here: bool, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return UserError(
            f"{where} comes with code of its own: where you trust it, say trust_remote_code=true "
            "(--trust-remote-code), which runs it"
        )
    if not here and isinstance(error, OSError):
        return UserError(
            f"{where} is no folder here, and the hub cannot be reached or has no such repository: "
            "give a folder that save_pretrained wrote"
        )
    return UserError(f"{where} cannot be read by transformers: {text[:300]}")


def _fixed(own: Any, front: Any) -> Fixed | None:
    """Returns the sizes of AST's or Whisper's input; None for other kinds."""
    if hasattr(own, "time_stride"):
        patch, step = int(own.patch_size), int(own.time_stride)
        frames, mels = int(own.max_length), int(own.num_mel_bins)
        time = (frames - patch) // step + 1
        freq = (mels - patch) // int(own.frequency_stride) + 1
        ms = int(front.sampling_rate) // 1000
        return Fixed(time, freq, frames, step, patch - step, 25 * ms, 10 * ms, False)
    if hasattr(own, "max_source_positions") and hasattr(front, "nb_max_frames"):
        time, hop = int(own.max_source_positions), int(front.hop_length)
        beyond = -(-int(front.n_fft) // (2 * hop)) + 2  # centred frames that touch the clip
        return Fixed(time, 1, 2 * time, 2, beyond, 1, hop, True)
    return None


def _at_least(x: Samples, least: int) -> Samples:
    return x.clamp(min=least) if isinstance(x, Tensor) else max(x, least)


ENCODER = HF
