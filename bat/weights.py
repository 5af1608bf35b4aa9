"""Reads and writes all weights: strict names, versioned exports, safe unpickling.

An export is a folder with ``config.json`` (encoder settings and training) and
``model.safetensors`` holding ``student.encoder.*`` and ``teacher.encoder.*``: the names of the
paper's released weight file. Also read: the paper's training file (``encoder`` / ``decoder`` /
``ema_encoder``), its ``student.encoder.*`` file, its hub folder, a bare encoder, EAT and SSLAM
files of fairseq and their hub folders, and Lightning's training checkpoints, including bat's.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, _weights_only_unpickler

from bat import registry
from bat.encoders.base import Encoder, find_encoder
from bat.errors import UserError
from bat.io import replace_durably

log = logging.getLogger("bat")

FORMAT, VERSION = "bat-export", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Which = Literal["student", "teacher"]
PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")
"""Prefixes added by wrappers; removed if all names have one."""
HEADS = ("head.", "fc_norm.")
"""Names of the classifier in a fine-tuned file."""
STAND_INS = re.compile(
    r"(argparse|omegaconf|fairseq|numpy|pathlib|typing|collections)\..+"
    r"|builtins\.(object|dict|list|tuple|frozenset|int|float|bool|str|bytes)"
    r"|copyreg\._reconstructor"
)
"""Classes and functions stored beside the weights in other projects' files. Each is replaced by an
empty class; any other name that PyTorch does not consider safe is refused."""
MAX_PICKLE, MAX_JSON = 1 << 26, 1 << 24
"""Size limit in bytes."""

_PICKLES = (".pt", ".pth", ".ckpt", ".bin")


@dataclass
class EncoderFile:
    """Contents of a weight file, before a model is built."""

    path: Path
    backbone: str
    """``bat`` or ``eat`` or the name in an export's config."""
    config: dict[str, Any] | None
    """Keywords of the backbone; None if the file does not state them."""
    state: dict[str, Tensor]
    meta: dict[str, Any]
    """Remaining keys of an export's ``config.json``."""
    heads: int | None = None
    """Attention heads, if a file without ``config`` states them."""


def resolve(path: str | Path) -> Path:
    """Returns the export folder or weight file of a run folder, an export folder or a file.

    For a fine-tuning it is the export of its only fold.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist: give a run, an export or a weight file")
    if path.is_file():
        return path
    for folder in (path, path / "export"):
        if (folder / WEIGHTS).is_file():
            return folder
    tuned = sorted(file.parent for file in path.glob(f"fold-*/export/{WEIGHTS}"))
    if len(tuned) == 1:
        return tuned[0]
    if tuned:
        raise UserError(
            f"{path} is a fine-tuning with an encoder for each held-out fold: name one of "
            f"{', '.join(map(str, tuned))}"
        )
    hint = ""
    if (path / "config.yaml").is_file():
        hint = ": the run has not finished (its export is written at the end)"
    raise UserError(f"{path} holds no {WEIGHTS}, nor does its export/ folder{hint}")


def is_export(path: Path) -> bool:
    """Returns True if ``path``, as returned by ``resolve``, is an export of bat."""
    return path.is_dir() and read_json(path / CONFIG).get("format") == FORMAT


def read_encoder(path: str | Path, weights: Which = "student") -> EncoderFile:
    """Reads one encoder. ``weights`` selects student or teacher if a file holds both.

    Raises ``UserError`` if it is missing, unreadable, ambiguous or of an unknown format.
    """
    if weights not in ("student", "teacher"):
        raise UserError(f"weights='{weights}': student or teacher")
    path = resolve(path)
    if path.is_dir():
        return _read_folder(path, weights)
    held = read_tensors(path)
    parts = {} if _layout(held) else {k: v for k, v in held.items() if isinstance(v, dict)}
    inside = [name for name, part in parts.items() if _layout(part)]
    if {"encoder", "ema_encoder"} <= set(inside):  # the paper's training file
        part = held["encoder" if weights == "student" else "ema_encoder"]
        args = held.get("args")
        heads = args.get("num_heads") if isinstance(args, dict) else None
        backbone, state = _pick(part, path, "student")
        return EncoderFile(path, backbone, None, state, _training_meta(held), heads)
    if len(inside) > 1:
        raise UserError(
            f"{path} holds several encoders, {', '.join(map(repr, inside))}: save the one you mean "
            f"alone, torch.save({_loading(path)}[{inside[0]!r}], 'encoder.pt'), and give that file"
        )
    backbone, state = _pick(held[inside[0]] if inside else held, path, weights)
    return EncoderFile(path, backbone, None, state, {})


def load_encoder(checkpoint: str, *, weights: str, heads: int | None) -> Encoder:
    """Loads an encoder; see ``bat.load_encoder``."""
    name, path = registry.split_checkpoint(checkpoint)
    where = resolve(path)
    if name is not None and "." in name and not is_export(where):
        return find_encoder(name).from_weights(read_tensors(where), config=None, heads=heads)
    file = read_encoder(where, weights)  # type: ignore[arg-type]
    if name not in (None, file.backbone):
        raise UserError(f"{where} holds encoder '{file.backbone}', not '{name}': say {where} alone")
    if name is None and "." in file.backbone:
        raise UserError(
            f"{where} wants encoder '{file.backbone}', code from outside bat: where you trust it, "
            f"say {file.backbone}:{path}, which imports it"
        )
    heads = file.heads if heads is None else heads
    return find_encoder(file.backbone).from_weights(file.state, config=file.config, heads=heads)


def read_tensors(path: Path) -> dict[str, Any]:
    """Returns the mapping in a ``.safetensors`` or PyTorch file, tensors on the CPU, safely."""
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    if path.suffix not in _PICKLES:
        known = " ".join((".safetensors", *_PICKLES))
        raise UserError(f"{path}: unknown kind of weight file; known: {known}")
    try:
        held = _load_torch(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise any
        why = re.sub(r".*WeightsUnpickler error:\s*", "", str(error), flags=re.DOTALL)
        hint = ": torch.save it again, with its usual pickle_protocol" if "operand" in why else ""
        raise UserError(
            f"{path} cannot be read without running code from it, or is damaged "
            f"({type(error).__name__}: {_few(why.splitlines()[:1])}){hint}"
        ) from error
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__}, not a mapping of weights")
    return held


def export(
    folder: Path,
    *,
    backbone: str,
    encoder: dict[str, Any],
    weights: dict[str, dict[str, Tensor]],
    meta: dict[str, Any],
) -> Path:
    """Writes an export folder, each file atomically, the weights first. Returns ``folder``.

    ``encoder``: keywords of the backbone (JSON). ``weights``: state dicts of the encoders,
    ``student`` and optionally ``teacher``, all built with these keywords. ``meta``: further entries
    (training, labels).
    """
    tensors = {
        f"{who}.encoder.{name}": tensor.detach().cpu().contiguous()
        for who, state in weights.items()
        for name, tensor in state.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        replace_durably(temporary, folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {folder / WEIGHTS}: {error}. Checkpoints are untouched; make room, "
            "then run the same command again"
        ) from error
    config = {"format": FORMAT, "version": VERSION, "backbone": backbone, "encoder": encoder}
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps({**config, **meta}, indent=2) + "\n", encoding="utf-8")
    replace_durably(temporary, folder / CONFIG)
    return folder


def _read_folder(folder: Path, weights: Which) -> EncoderFile:
    config = read_json(folder / CONFIG)
    if config.get("format") == FORMAT:
        if config.get("version") != VERSION or config["version"] is True:
            raise UserError(
                f"{folder} is export version {_short(config.get('version'))}; this bat reads "
                f"{VERSION}"
            )
        backbone, encoder = config.get("backbone"), config.get("encoder")
        if not isinstance(backbone, str) or not isinstance(encoder, dict):
            raise UserError(f"{folder / CONFIG} does not say its backbone and encoder")
        meta = {k: v for k, v in config.items() if k not in ("backbone", "encoder")}
        state = _pick(read_tensors(folder / WEIGHTS), folder, weights)[1]
        return EncoderFile(folder, backbone, encoder, state, meta)
    if config.get("model_type") == "bat":
        keywords = _of_hub(config, folder / CONFIG)
        found, state = _pick(read_tensors(folder / WEIGHTS), folder, weights)
        if found != "bat":
            raise UserError(f"{folder / CONFIG} says model_type bat, {WEIGHTS} holds {found}'s")
        return EncoderFile(folder, "bat", keywords, state, {})
    if "model_variant" in config or config.get("model_type") in ("eat", "sslam"):
        _demand(config, EAT_FIXED, folder / CONFIG)
        found, state = _pick(read_tensors(folder / WEIGHTS), folder, weights)
        return EncoderFile(folder, found, None, state, {}, config.get("num_heads"))
    raise UserError(
        f"{folder / CONFIG}: format is {_short(config.get('format'))} and model_type "
        f"{_short(config.get('model_type'))}; known are the format {FORMAT!r} and the hub folders "
        f"of bat and eat. Of another encoder with their names, give {folder / WEIGHTS} itself"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in ``path``. Raises ``UserError`` if there is none, or a huge one."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path} is larger than {MAX_JSON} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def check_numbers(state: dict[str, Tensor], what: str) -> None:
    """Raises ``UserError`` naming the tensors of ``state`` that are not floating point or contain
    NaN or infinity."""
    whole = [f"{n} ({t.dtype})" for n, t in state.items() if not t.is_floating_point()]
    if whole:
        raise UserError(f"{what}: not floating point: {_few(whole)}")
    bad = [n for n, t in state.items() if not t.isfinite().all()]
    if bad:
        raise UserError(
            f"{what}: NaN or infinity in {_few(bad)}: it comes of a training that diverged, or is "
            "damaged"
        )


HUB_FIXED = {
    **{"qkv_bias": True, "layer_norm_eps": 1e-6, "pos_trainable": False},
    **{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    **{"f_min": 0, "top_db": 80, "feature_normalization": "per_sample_minmax_after_db"},
}
"""Fixed settings of the encoder, with the names of the config in BAT's hub folder."""
EAT_FIXED = {
    **{"layer_norm_first": False, "norm_eps": 1e-6, "norm_affine": True, "qkv_bias": True},
    **{"in_chans": 1, "mel_bins": 128},
}


def _demand(config: dict[str, Any], fixed: dict[str, Any], file: Path) -> None:
    wrong = [k for k, v in fixed.items() if k in config and config[k] != v]
    if wrong:
        said = ", ".join(f"{k}={_short(config[k])} (here {fixed[k]!r})" for k in wrong)
        raise UserError(f"{file} describes another encoder than this bat has: {said}")


def _of_hub(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns the keywords of ``BAT`` for the config of its hub folder."""
    _demand(config, HUB_FIXED, file)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "input_shape", "patch_size")
    absent = [name for name in names if name not in config]
    if absent:
        raise UserError(f"{file} does not say {', '.join(absent)}")
    sides, patch = config["input_shape"], config["patch_size"]
    patch = patch if isinstance(patch, list) else [patch, patch]
    numbers = [*sides, *patch] if isinstance(sides, list) else []
    if (
        len(numbers) != 4
        or any(type(x) is not int or x < 1 for x in numbers)
        or (patch[0] != patch[1] or sides[0] % patch[0] or sides[1] % patch[1])
    ):
        raise UserError(
            f"{file}: input_shape={_short(sides)} and patch_size={_short(config['patch_size'])} "
            "are no whole number of square patches"
        )
    chunk = config.get("chunk_time_patches", 64)
    if type(chunk) is not int or not 1 <= chunk <= 1 << 20:
        raise UserError(f"{file}: chunk_time_patches={_short(chunk)}: a whole number of patches")
    first = config.get("layer_norm_first", False)
    said = {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "patch": patch[0],
        "grid": [min(chunk, sides[0] // patch[0]), sides[1] // patch[1]],
        "norm_order": ("post", "pre")[first] if isinstance(first, bool) else first,
        "layer_scale": config.get("init_scale_values"),
    }
    others = {"gate": "use_gate", "drop_path": "drop_path_rate"}
    others |= {name: name for name in ("mlp_ratio", "pre_norm")}
    said |= {own: config[theirs] for own, theirs in others.items() if theirs in config}
    front = ("sample_rate", "n_fft", "hop_length", "n_mels")
    said["frontend"] = {name: config[name] for name in front if name in config}
    return said


def _layout(part: dict[Any, Any]) -> str | None:
    """Returns the format of the names without prefixes: ``bat``, ``eat``, ``beats`` or None."""
    if not all(isinstance(name, str) for name in part):
        return None
    names = _plain(part)[0]
    roots = ("student.encoder.", "teacher.encoder.")
    if "cls_token" in names or any(n.removeprefix("objective.").startswith(roots) for n in names):
        return "bat"
    if "extra_tokens" in names or any(n.startswith("modality_encoders.") for n in names):
        return "eat"
    return "beats" if "post_extract_proj.weight" in names else None


def _plain(part: dict[Any, Any]) -> tuple[dict[str, Any], str, list[str]]:
    """Returns ``part`` without shared prefixes and without a classifier; the prefixes; and the
    classifier's names."""
    found, removed, aside = dict(part), "", list[str]()
    for _ in range(len(PREFIXES) + 1):
        heads = [n for n in found if n.startswith(HEADS)]
        if len(heads) < len(found):
            aside += [removed + n for n in heads]
            found = {n: v for n, v in found.items() if not n.startswith(HEADS)}
        prefix = next((p for p in PREFIXES if found and all(n.startswith(p) for n in found)), "")
        if not prefix:
            break
        found, removed = {n.removeprefix(prefix): v for n, v in found.items()}, removed + prefix
    return found, removed, aside


def _pick(part: dict[Any, Any], path: Path, weights: Which) -> tuple[str, dict[str, Tensor]]:
    """Returns the format and the requested encoder of a flat mapping, prefixes removed."""
    backbone = _layout(part)
    if backbone is None:
        raise UserError(_no_encoder(part, path))
    if backbone == "beats":
        raise UserError(f"{path} holds a BEATs encoder, which this bat does not read: bat and eat")
    state, removed, aside = _plain(part)
    if removed:
        log.warning("%s: took '%s' off all %d names", path, removed, len(state))
    if aside:
        log.warning("%s: set aside, no part of the encoder: %s", path, _few(aside))
    teacher = state.pop("_ema", None)
    if backbone == "bat" and "cls_token" not in state:
        prefix = f"{weights}.encoder."
        state = {n.removeprefix("objective."): t for n, t in state.items()}
        state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        state = _plain(state)[0]
    elif weights == "teacher":
        if not isinstance(teacher, dict):
            raise UserError(f"{path} holds one encoder, no teacher: say weights=student")
        state = _plain(teacher)[0]
    if not state:
        hint = ": say weights=student" if weights == "teacher" else ""
        raise UserError(f"{path} holds no {weights} encoder ({weights}.encoder.*){hint}")
    return backbone, _tensors(state, path)


def _no_encoder(part: dict[Any, Any], path: Path) -> str:
    """Describes the unknown names in ``path`` and how to make a file that can be read."""
    inner = [(f"[{key!r}]", value) for key, value in part.items() if isinstance(value, dict)]
    for place, value in [("", part), *inner]:
        names = [name for name in value if isinstance(name, str)]
        ends = (".cls_token", ".extra_tokens")
        prefixes = [n[: -len(e) + 1] for n in names for e in ends if n.endswith(e)]
        if prefixes:
            beside = [n for n in names if not n.startswith(tuple(prefixes))]
            return (
                f"{path}: its encoder lies under {' or '.join(map(repr, prefixes[:10]))}"
                f"{f', beside {_few(beside)}' if beside else ''}. Save the one you mean alone, "
                f"torch.save({{k.removeprefix({prefixes[0]!r}): v for k, v in {_loading(path)}"
                f"{place}.items() if k.startswith({prefixes[0]!r})}}, 'encoder.pt'), and give that "
                "file"
            )
    names = [str(name) for name in list(part)[:6]]
    return f"{path} holds no encoder that is known (bat, eat). It holds {_few(names) or 'nothing'}"


def _loading(path: Path) -> str:
    """Returns Python code that reads ``path``."""
    path = path / WEIGHTS if path.is_dir() else path
    how = "safetensors.torch.load_file" if path.suffix == ".safetensors" else "torch.load"
    return f"{how}({path.name!r})"


def _tensors(mapping: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Returns ``mapping`` if it has plain tensors only, together no larger than the file."""
    bad = [
        name
        for name, value in mapping.items()
        if not isinstance(value, Tensor)
        or (value.layout, value.device.type) != (torch.strided, "cpu")
    ]
    if bad:
        raise UserError(f"{path}: these entries are not tensors: {_few(bad)}")
    file = path / WEIGHTS if path.is_dir() else path
    size = sum(t.numel() * t.element_size() for t in mapping.values())
    if size > 2 * file.stat().st_size:  # twice: two names may stand for one tensor
        raise UserError(
            f"{path}: its tensors repeat a few numbers up to {size} bytes, more than the file has"
        )
    return {name: tensor.detach() for name, tensor in mapping.items()}


class _StandIn:
    """Replaces a class named in a pickle: accepts any arguments and stores nothing."""

    def __new__(cls, *_: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Replaces ``collections.defaultdict``; accepts its entries."""
    return {}


def _load_torch(path: Path) -> Any:
    """Calls ``torch.load(weights_only=True)`` with empty objects for ``STAND_INS``."""
    with path.open("rb") as file:
        start = file.read(262)
    zipped = start.startswith(b"PK\x03\x04")
    if zipped:
        _check_zip(path)
    elif start[257:] == b"ustar":
        raise UserError(f"{path} is a tar, as torch wrote before 0.2: torch.save it again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = _names_in(path, zipped)
        foreign = sorted(n for n in wanted if not STAND_INS.fullmatch(n))
        if foreign:
            raise UserError(
                f"{path} cannot be read without running code from it: it asks for "
                f"{_few(foreign)}. If you trust it, save its weights alone with "
                "torch.load(..., weights_only=False) and torch.save, and give that file"
            )
        empty: list[Any] = [
            (_plain_dict if n == "collections.defaultdict" else _StandIn, n) for n in wanted
        ]
        with torch.serialization.safe_globals(empty):
            # mapped: a storage is then part of the file, whatever length the pickle states
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _names_in(path: Path, zipped: bool) -> set[str]:
    """Returns the names in the pickle that PyTorch does not consider safe."""
    if zipped:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    with path.open("rb") as file:  # the format before torch 1.6: four pickles, then the numbers
        found = [_weights_only_unpickler.get_globals_in_pkl(file) for _ in range(4)]
    return set().union(*found) - set(_weights_only_unpickler._get_allowed_globals())


def _check_zip(path: Path) -> None:
    """Refuses a zip whose parts are compressed, overlap, or have wrong checksums."""
    with zipfile.ZipFile(path) as packed:
        parts = packed.infolist()
        if any(part.filename.endswith("/constants.pkl") for part in parts):
            raise UserError(f"{path} is a TorchScript program: torch.save its state_dict() instead")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or (
            sum(part.file_size for part in parts) > path.stat().st_size
        ):
            raise UserError(f"{path}: its parts are compressed or overlap: torch.save it again")
        if any(p.filename.endswith("/data.pkl") and p.file_size > MAX_PICKLE for p in parts):
            raise UserError(f"{path}: its pickle is larger than {MAX_PICKLE} bytes")
        damaged = packed.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged: {damaged} does not have its checksum")


def _training_meta(held: dict[str, Any]) -> dict[str, Any]:
    steps = held.get("optimized_steps")
    return {"steps": steps} if isinstance(steps, int) else {}


def _few(names: list[str]) -> str:
    """Formats a file's names for a message: the first few, shortened, no control characters."""
    more = f", ... and {len(names) - 10} more" if len(names) > 10 else ""
    shown = ("".join(c if c.isprintable() else "?" for c in name[:100]) for name in names[:10])
    return ", ".join(shown) + more


def _short(value: Any) -> str:
    """Formats a value of a file for a message."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."
