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
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import safe_globals

from bat import registry
from bat.encoders.base import Encoder, demand, find_encoder, in_short
from bat.encoders.bat import hub_keywords
from bat.encoders.eat import HUB_FIXED
from bat.errors import UserError
from bat.io import replace_durably

log = logging.getLogger("bat")

FORMAT, VERSION = "bat-export", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Which = Literal["student", "teacher"]
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")
"""Prefixes added by wrappers; removed if all names have one."""
HEADS = ("head.", "fc_norm.")
"""Names of the classifier in a fine-tuned file."""
FOREIGN = re.compile(
    r"(argparse|omegaconf|fairseq|numpy|pathlib|typing|collections)\..+"
    r"|builtins\.(object|dict|list|tuple|frozenset|int|float|bool|str|bytes)"
    r"|copyreg\._reconstructor"
)
"""Classes and functions stored beside the weights in other projects' files. Each is replaced by an
empty class; any other name that PyTorch does not consider safe is refused."""
REMEDY = "If you trust it, torch.save its weights alone, in the usual format, and give that file"
MAX_JSON = 1 << 24
"""Size limit of ``config.json`` in bytes."""


class EncoderFile(NamedTuple):
    """Contents of a weight file, before a model is built."""

    backbone: str
    """``bat`` or ``eat`` or the name in an export's config."""
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    """Keywords of the backbone; None if the file does not state them."""
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
    unfinished = (path / "config.yaml").is_file()
    hint = ": the run has not finished (its export is written at the end)" if unfinished else ""
    raise UserError(f"{path} holds no {WEIGHTS}, nor does its export/ folder{hint}")


def is_export(path: Path) -> bool:
    """Returns True if ``path``, as returned by ``resolve``, is an export of bat."""
    return path.is_dir() and read_json(path / CONFIG).get("format") == FORMAT


def load_encoder(checkpoint: str, *, weights: str, heads: int | None) -> Encoder:
    """Loads an encoder; see ``bat.load_encoder``."""
    name, path = registry.split_checkpoint(checkpoint)
    where = resolve(path)
    if name is not None and "." in name and not is_export(where):
        return find_encoder(name).from_weights(read_tensors(where), config=None, heads=heads)
    file = read_encoder(where, weights)
    if name not in (None, file.backbone):
        raise UserError(f"{where} holds encoder '{file.backbone}', not '{name}': say {where} alone")
    if name is None and "." in file.backbone:
        raise UserError(
            f"{where} wants encoder '{file.backbone}', code from outside bat: where you trust it, "
            f"say {file.backbone}:{path}, which imports it"
        )
    heads = file.heads if heads is None else heads
    return find_encoder(file.backbone).from_weights(file.state, config=file.config, heads=heads)


def read_encoder(path: str | Path, weights: str = "student") -> EncoderFile:
    """Reads one encoder. ``weights`` selects student or teacher if a file holds both.

    Raises ``UserError`` if it is missing, unreadable, ambiguous or of an unknown format.
    """
    if weights not in ("student", "teacher"):
        raise UserError(f"weights='{weights}': student or teacher")
    path = resolve(path)
    if path.is_dir():
        return _read_folder(path, weights)
    held = read_tensors(path)
    parts = {}
    if _layout(held) is None:
        parts = {n: v for n, v in held.items() if isinstance(v, dict) and _layout(v)}
    if {"encoder", "ema_encoder"} <= set(parts):  # the paper's training file
        args = held.get("args")
        heads = args.get("num_heads") if isinstance(args, dict) else None
        part = parts["encoder" if weights == "student" else "ema_encoder"]
        return EncoderFile(*_pick(part, path, "student"), heads=heads)
    if len(parts) > 1:
        raise UserError(
            f"{path} holds several encoders, {', '.join(map(repr, parts))}: torch.save the one "
            "that you mean alone, and give that file"
        )
    return EncoderFile(*_pick(next(iter(parts.values()), held), path, weights))


def _read_folder(folder: Path, weights: str) -> EncoderFile:
    file = folder / CONFIG
    settings = read_json(file)
    kind, version = settings.get("format"), settings.get("version")
    model = settings.get("model_type")
    backbone: Any = "eat"
    config = heads = None
    if kind == FORMAT:
        if version != VERSION or version is True:
            raise UserError(f"{folder}: export of version {in_short(version)}, here {VERSION}")
        backbone, config = settings.get("backbone"), settings.get("encoder")
        if not isinstance(backbone, str) or not isinstance(config, dict):
            raise UserError(f"{file} does not say its backbone and encoder")
    elif model == "bat":
        backbone, config = model, hub_keywords(settings, str(file))
    elif "model_variant" in settings or model in ("eat", "sslam"):
        demand(settings, HUB_FIXED, str(file))
        heads = settings.get("num_heads")
    else:
        raise UserError(
            f"{file}: format is {in_short(kind)} and model_type {in_short(model)}; known are the "
            f"format {FORMAT!r} and the hub folders of bat and eat. Of another encoder with their "
            f"names, give {folder / WEIGHTS} itself"
        )
    _, state = _pick(read_tensors(folder / WEIGHTS), folder, weights)
    return EncoderFile(backbone, state, config, heads)


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


def _pick(part: dict[Any, Any], path: Path, weights: str) -> tuple[str, dict[str, Tensor]]:
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
    odd = [
        name
        for name, value in state.items()
        if not isinstance(value, Tensor)
        or (value.layout, value.device.type) != (torch.strided, "cpu")
    ]
    if odd:
        raise UserError(f"{path}: these entries are not tensors: {_few(odd)}")
    file = path / WEIGHTS if path.is_dir() else path
    size = sum(t.numel() * t.element_size() for t in state.values())
    if size > 2 * file.stat().st_size:  # twice: two names may stand for one tensor
        raise UserError(
            f"{path}: its tensors repeat a few numbers up to {size} bytes, more than the file has"
        )
    return backbone, {name: tensor.detach() for name, tensor in state.items()}


def _no_encoder(part: dict[Any, Any], path: Path) -> str:
    """Describes the unknown names in ``path``, and where among them an encoder may be."""
    for value in [part, *part.values()]:
        names = [n for n in value if isinstance(n, str)] if isinstance(value, dict) else []
        found = [re.fullmatch(r"(.+\.)(cls_token|extra_tokens)", name) for name in names]
        prefixes = [match[1] for match in found if match]
        if prefixes:
            beside = [n for n in names if not n.startswith(tuple(prefixes))]
            return (
                f"{path}: its encoder lies under {' or '.join(map(repr, prefixes[:10]))}"
                f"{f', beside {_few(beside)}' if beside else ''}: torch.save the tensors of one "
                "alone, names without what stands before, and give that file"
            )
    names = [str(name) for name in list(part)[:6]]
    return f"{path} holds no encoder that is known (bat, eat). It holds {_few(names) or 'nothing'}"


class _StandIn:
    """Replaces a class named in a pickle: accepts any arguments and stores nothing."""

    def __new__(cls, *_: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Replaces ``collections.defaultdict``; accepts its entries."""
    return {}


def read_tensors(path: Path) -> dict[str, Any]:
    """Returns the mapping in a ``.safetensors`` or PyTorch file, tensors on the CPU.

    Nothing in the file is run or imported. Raises ``UserError`` if it cannot be read so.
    """
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    if path.suffix not in PICKLES:
        known = " ".join((".safetensors", *PICKLES))
        raise UserError(f"{path}: unknown kind of weight file; known: {known}")
    try:
        held = _load_torch(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise any
        why = re.sub(r".*WeightsUnpickler error:\s*", "", str(error), flags=re.DOTALL)
        raise UserError(
            f"{path} cannot be read without running code from it, or is damaged "
            f"({type(error).__name__}: {_few(why.splitlines()[:1])}). {REMEDY}"
        ) from error
    if not isinstance(held, dict):
        raise UserError(f"{path} holds a {type(held).__name__}, not a mapping of weights")
    return held


def _load_torch(path: Path) -> Any:
    """Calls ``torch.load(weights_only=True)`` with empty objects for ``FOREIGN`` names."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch decides
    if zipped:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            size = sum(part.file_size for part in parts)
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            if packed or size > path.stat().st_size:
                raise UserError(f"{path}: its parts are compressed or overlap: torch.save it again")
            damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path} is damaged: {damaged} does not have its checksum")
    empty: dict[str, Any] = {}
    while True:
        try:
            with safe_globals([(made, name) for name, made in empty.items()]):
                # mapped: a storage is then part of the file, whatever length the pickle states
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked is None:
                raise
            name = asked[1] if "." in asked[1] else f"builtins.{asked[1]}"  # torch omits that
            if name in empty or not FOREIGN.fullmatch(name):
                raise UserError(
                    f"{path} cannot be read without running code from it: it asks for "
                    f"{_few([name])}. {REMEDY}"
                ) from error
            empty[name] = _plain_dict if name == "collections.defaultdict" else _StandIn


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
    config = {"format": FORMAT, "version": VERSION, "backbone": backbone, "encoder": encoder}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        replace_durably(temporary, folder / WEIGHTS)
        temporary = folder / f".{CONFIG}.tmp"
        temporary.write_text(json.dumps({**config, **meta}, indent=2) + "\n", encoding="utf-8")
        replace_durably(temporary, folder / CONFIG)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write to {folder}: {error}. Checkpoints are untouched; make room, then run "
            "the same command again"
        ) from error
    return folder


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


def _few(names: list[str]) -> str:
    """Formats a file's names for a message: the first few, shortened, no control characters."""
    more = f", ... and {len(names) - 10} more" if len(names) > 10 else ""
    shown = ("".join(c if c.isprintable() else "?" for c in name[:100]) for name in names[:10])
    return ", ".join(shown) + more
