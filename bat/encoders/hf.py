"""Audio encoders of the package transformers, with their own feature extractors.

``hf:FOLDER_OR_NAME``: a folder saved by ``save_pretrained``, or the name of a hub repository, the
only case in which anything is fetched. Blocks are what the model returns as ``hidden_states``,
without the first entry. Two kinds of input are known:

    own length  Wav2Vec2, HuBERT, Wav2Vec2-BERT, Moonshine, ... and models with code of their own:
                any whose hidden states are (B, T, D), T in even steps of time; F = 1
    fixed       AST (patch grid; class token: the mean of its two, as its own pooling) and Whisper's
                encoder (F = 1), whose input always has the same number of frames. Each clip is
                padded to it as its extractor does, encoded whole, and the tokens of its own time
                are returned; longer clips are cut into chunks

The steps of the first kind are measured when the model is loaded (``_steps``): extractor and model
are each a map of lengths, n -> 1 + (n - field) // hop, as any stack of windows and strided
convolutions is. Clips are extracted one by one, and run with those of as many tokens, without
padding and so without masks. Other models are refused with the reason.

Departures: up to one hop at the end, which makes no token, is left out (a norm over time would see
it); dropout is the file's, but layer drop and SpecAugment on hidden states are off. Set aside are a
decoder, heads, and an adapter, which would shorten the last block's output.

``inputs`` of the first kind are samples (B, S) or frames (B, n, K); of the second, rows of frames
(B, rows, mels): for each chunk one row that is the padding of that clip, then the frames of the
time patches.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bat.encoders.base import Encoder, Samples
from bat.encoders.strict import keywords_of, load_strictly
from bat.errors import UserError
from bat.types import Features

log = logging.getLogger("bat")

HUB = True
"""``hf:NAME`` need not be a path (``bat.registry.hub_names``)."""
OFF = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False}
UNUSED = ("masked_spec_embed",)
"""Parameters that act in the model's own pre-training alone; published files lack them."""
PARTS = ("speech_encoder", "audio_encoder", "audio_tower", "audio_model")
"""Names of the audio encoder in models of text, images and audio."""
HEADS = ("num_attention_heads", "encoder_attention_heads", "speech_encoder_attention_heads")


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
        self.whole_config, self.net = net.config, _audio_part(net)
        for name in ("masked_spec_embed", "adapter"):
            if hasattr(self.net, name):
                setattr(self.net, name, None)
        self.extractor, self.code, self.trusted = front, code, trusted
        own = self.net.config
        self.sample_rate = int(front.sampling_rate)
        heads = (getattr(own, name, None) for name in HEADS)
        self.heads = next((number for number in heads if isinstance(number, int)), None)
        self.fixed = _fixed(own, front)
        self.max_patches = None if self.fixed is None else self.fixed.time
        self.has_cls = hasattr(own, "time_stride")
        self.mels_first = self.net.main_input_name == "input_features"
        if self.fixed is not None:
            self.field, self.hop = self.fixed.window, self.fixed.step * self.fixed.hop
            self.width, self.depth = int(own.hidden_size), int(own.num_hidden_layers)
        else:
            self._measure()

    def _measure(self) -> None:
        """Finds the steps of extractor and model, width and depth; ``UserError`` without any."""
        rate = self.sample_rate
        self.mels_first, self.field, self.hop, self.shortest = False, 1, 1, 1
        training = self.net.training
        self.net.eval()
        try:
            one, two = (self._extract(torch.zeros(n * rate)) for n in (1, 2))
            if len(one) == len(two):
                self.mels_first, one, two = True, one.T, two.T
            if len(one) >= len(two):
                raise UserError("its extractor makes as much of one second as of two")
            steps = (1, 1, 1)
            if one.dim() > 1:
                steps = _steps(lambda n: len(self._extract(torch.zeros(n))), rate)
            shapes = self._shapes(one[None])
            if len({*shapes}) > 1 or len(shapes[0]) != 3:
                raise UserError(f"its hidden_states are {shapes}, not (B, T, D) all")
            self.depth, self.width = len(shapes) - 1, shapes[0][2]
            own: Any = getattr(self.net, "_get_feat_extract_output_lengths", None)
            field, hop, least = _steps(
                lambda n: self._shapes(one.new_zeros(1, n, *one.shape[1:]))[0][1],
                len(one),
                own and (lambda n: int(own(torch.tensor([n]))[0])),
            )
        except Exception as error:  # any, of its many models
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"hf: '{self.whole_config.model_type}' with {type(self.extractor).__name__} cannot "
                f"be read: {why}. docs/add_an_encoder.md says how to write an encoder"
            ) from error
        finally:
            self.net.train(training)
        self.units = (field, hop, least)
        self.shortest = max(steps[2], steps[0] + (least - 1) * steps[1])
        self.field, self.hop = steps[0] + (field - 1) * steps[1], hop * steps[1]

    def _shapes(self, x: Tensor) -> list[tuple[int, ...]]:
        """Returns the shapes of the model's hidden states for ``x``, computed without its numbers
        where its code allows that."""
        state = dict([*self.net.named_parameters(), *self.net.named_buffers()])
        empty = {name: tensor.to("meta") for name, tensor in state.items()}
        with torch.no_grad():
            try:
                found = functional_call(
                    self.net,
                    empty,
                    (self._given(x.to("meta")),),
                    {"output_hidden_states": True},
                )
            except (NotImplementedError, RuntimeError, ValueError):
                found = self.net(self._given(x), output_hidden_states=True)
        if getattr(found, "hidden_states", None) is None:
            raise UserError("it returns no hidden_states")
        return [tuple(block.shape) for block in found.hidden_states]

    def _given(self, x: Tensor) -> Tensor:
        """Returns ``x`` with the axes that the model takes."""
        return x.transpose(1, 2) if self.mels_first else x

    @property
    def hop_seconds(self) -> float:
        return self.hop / self.sample_rate

    def time_patches(self, samples: Samples) -> Samples:
        one = self.fixed
        if one is None:
            return 1 + (_at_least(samples, self.shortest) - self.field) // self.hop
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
        least = self.shortest if self.fixed is None else self.field
        parts = []
        for part in wave.split(chunk):
            part = F.pad(part, (0, max(0, least - len(part))))
            with torch.autocast("cpu", enabled=False):  # some extractors are written in torch
                held = self.extractor(
                    part.numpy(), sampling_rate=self.sample_rate, return_tensors="np"
                )
            mask = held.pop("attention_mask", None)
            name = self.net.main_input_name
            x = torch.as_tensor(held[name if name in held else next(iter(held))][0]).float()
            x = x.T if self.mels_first else x  # (frames, mels)
            if self.fixed is None:
                own = len(x) if mask is None or len(mask[0]) != len(x) else int(mask[0].sum())
                return x[:own]
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
            field, hop, least = self.units
            return inputs[:, : max(least, (patches - 1) * hop + field)]
        whole = (patches - 1) // one.time
        rest = patches - whole * one.time
        return inputs[:, : whole * (1 + one.need(one.time)) + 1 + one.need(rest)]

    def features(self, inputs: Tensor, *, entry: bool = False) -> Features:
        """Returns the hidden states of all blocks, (L, B, T, F, D)."""
        assert not entry, "has_queries is False"
        if self.fixed is None:
            field, hop, _ = self.units
            x = self._blocks(inputs)
            if x.shape[2] != 1 + (inputs.shape[1] - field) // hop:
                raise UserError(f"hf: {x.shape[2]} tokens of an input of {inputs.shape[1]} steps")
            return Features(x.unsqueeze(3), None)
        one = self.fixed
        patches, classes = [], []
        for chunk in inputs.split(1 + one.need(one.time), dim=1):
            pad, x = chunk[:, :1], chunk[:, 1:]
            T = (x.shape[1] - one.rows) // one.step
            x = torch.cat([x, pad.expand(-1, max(0, one.frames - x.shape[1]), -1)], dim=1)
            x = x[:, : one.frames]  # (B, frames, mels)
            out = self._blocks(x)
            tokens = one.time * one.freq
            grid = out[:, :, -tokens:].unflatten(2, (one.freq, one.time))  # frequency-major
            patches.append(grid.transpose(2, 3)[:, :, :T])  # (L, B, T, F, D)
            if self.has_cls:
                classes.append(out[:, :, :-tokens].mean(2))  # (L, B, D)
        cls = torch.stack(classes).mean(0) if classes else None
        return Features(torch.cat(patches, dim=2), cls)

    def _blocks(self, x: Tensor) -> Tensor:
        """Runs the model -> (L, B, N, D)."""
        found = self.net(self._given(x), output_hidden_states=True).hidden_states
        if found is None or len(found) != self.depth + 1:
            raise UserError(f"hf: the model returns no hidden_states of its {self.depth} blocks")
        return torch.stack(found[1:])

    def layer_of(self, name: str) -> int:
        stacks = [
            path
            for path, part in self.named_modules()  # of lists as long, convolutions come first
            if isinstance(part, nn.ModuleList) and len(part) == self.depth
        ]
        found = re.match(rf"{re.escape(stacks[-1])}\.(\d+)\.", name) if stacks else None
        if found:
            return int(found[1]) + 1
        return self.depth + 1 if name.startswith(("net.layer_norm.", "net.layernorm.")) else 0

    def config(self) -> dict[str, Any]:
        return {
            "config": json.loads(self.whole_config.to_json_string(use_diff=False)),
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
        part = next(
            (f"{name}." for name, m in net.named_modules() if name and m is encoder.net), ""
        )
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


def _audio_part(net: Any) -> Any:
    """Returns the audio encoder in a model: a part of that name, or the encoder of two."""
    for name in PARTS:
        if hasattr(net, name):
            return getattr(net, name)
    return net.get_encoder() if net.config.is_encoder_decoder else net


def _steps(
    count: Callable[[int], int], near: int, guess: Callable[[int], int] | None = None
) -> tuple[int, int, int]:
    """Returns field, hop and least n with ``count(n) = 1 + (n - field) // hop`` for all n from
    ``least`` on, judged by values of n to three times ``near``. ``guess``: a function that may be
    the same and is cheaper."""
    count(near)  # an error here is the user's to read
    count = _counted(count)
    for one in (count,) if guess is None else (_counted(guess), count):
        k = one(near)
        first = _least(one, k, 0, near)
        hop = _least(one, k + 1, near, 2 * near) - first
        field = first - (k - 1) * hop
        start = _least(one, 1, max(field, 1) - 1, first)
        sizes = (start, near // 2 + 1, near * 4 // 3, 3 * near - 1)
        if all(count(n) == 1 + (n - field) // hop for n in sizes if n >= start):
            return field, hop, start
    raise UserError("its tokens are not even steps of time: a grid of patches, or tokens beside")


def _counted(count: Callable[[int], int]) -> Callable[[int], int]:
    """Returns ``count`` with a memory, 0 for what it does not take (less than one token)."""

    @functools.cache
    def at(n: int) -> int:
        try:
            return count(n)
        except Exception:
            return 0

    return at


def _least(count: Callable[[int], int], k: int, low: int, high: int) -> int:
    """Returns the smallest n in (low, high] with ``count(n) >= k``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= k else (middle, high)
    return high


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
