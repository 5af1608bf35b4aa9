"""Reads and writes all weights: strict names, versioned exports, safe unpickling.

An export is a folder with ``config.json`` (encoder settings and training) and
``model.safetensors`` holding ``student.encoder.*`` and ``teacher.encoder.*``: the names of the
paper's released weight file. Files and folders of other projects are read too: each file of
``bat/encoders`` says which it knows (``Encoder.matches``) and builds from them
(``Encoder.from_file``). Here only the wrapping is known: a state dict alone or one level down
(``model``, Lightning's ``state_dict``), prefixes of wrappers, a classifier, and a teacher beside
the student (``student.encoder.*`` / ``teacher.encoder.*``, the paper's training file with
``encoder`` / ``ema_encoder``, fairseq's ``_ema`` inside the state dict).
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import safe_globals

from bat import registry
from bat.encoders.base import Encoder, find_encoder
from bat.encoders.strict import in_short
from bat.errors import UserError
from bat.io import missing, replace_durably

log = logging.getLogger("bat")

FORMAT, VERSION = "bat-export", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"
"""Names the file of each tensor, where weights are sharded over several."""
Which = Literal["student", "teacher"]
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")
"""Prefixes added by wrappers; removed if all names have one."""
HEADS = ("head.", "fc_norm.")
"""Names of the classifier in a fine-tuned file."""
ROOTS = ("student.encoder.", "teacher.encoder.")
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
    """Name of its encoder: a file of ``bat/encoders``, or what an export's config says."""
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    """Keywords of the encoder, of an export of bat; None for another project's file."""
    settings: Mapping[str, Any] = {}
    """Another project's: ``config.json`` of its folder, or the mapping beside the weights."""


def resolve(path: str | Path) -> Path:
    """Returns the export folder or weight file of a run folder, an export folder or a file.

    For a fine-tuning it is the export of its only fold.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"checkpoint {missing(path)}: give a run (bat runs lists them), an export or a weight "
            "file"
        )
    if path.is_file():
        return path
    for folder in (path, path / "export"):
        if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
            return folder
    tuned = sorted(file.parent for file in path.glob(f"fold-*/export/{WEIGHTS}"))
    if len(tuned) == 1:
        return tuned[0]
    if tuned:
        raise UserError(
            f"{path} is a fine-tuning with an encoder for each held-out fold: name one of "
            f"{', '.join(map(str, tuned))}"
        )
    if (path / "heads").is_dir():
        raise UserError(
            f"{path} is a probe run, which keeps heads and no encoder: give the checkpoint that it "
            "probed (its config.yaml names it)"
        )
    unfinished = (path / "config.yaml").is_file()
    hint = (
        "the run has not finished (its export is written at the end; the same command continues it)"
        if unfinished
        else "give a run (bat runs lists them), an export or a weight file"
    )
    raise UserError(f"{path} holds no {WEIGHTS}, nor does its export/ folder: {hint}")


def is_export(path: Path) -> bool:
    """Returns True if ``path``, as returned by ``resolve``, is an export of bat."""
    file = path / CONFIG
    return path.is_dir() and file.exists() and read_json(file).get("format") == FORMAT


def holds_export(path: str) -> bool:
    """Returns True if ``path`` exists and leads to an export of bat."""
    try:
        return is_export(resolve(path))
    except UserError:
        return False


def load_encoder(
    checkpoint: str, *, weights: str, heads: int | None, trust_remote_code: bool = False
) -> Encoder:
    """Loads an encoder; see ``bat.load_encoder``."""
    name, path = registry.split_checkpoint(checkpoint)
    if registry.takes_hub_names(name) and not holds_export(path):
        assert name is not None
        opened = find_encoder(name).open(path, trust_remote_code=trust_remote_code)
        if opened is not None:
            return opened
    where = resolve(path)
    file = read_encoder(where, weights, name)
    if file.config is None:
        return find_encoder(file.backbone).from_file(
            file.state, settings=file.settings, path=where, heads=heads
        )
    if name not in (None, file.backbone):
        raise UserError(f"{where} holds encoder '{file.backbone}', not '{name}': say {where} alone")
    if name is None and "." in file.backbone:
        raise UserError(
            f"{where} wants encoder '{file.backbone}', code from outside bat: where you trust it, "
            f"say {file.backbone}:{path}, which imports it"
        )
    config = file.config
    if "trust_remote_code" in config:  # the user's word, not the file's
        config = {**config, "trust_remote_code": trust_remote_code}
    return find_encoder(file.backbone).from_weights(file.state, config=config, heads=heads)


def read_encoder(
    path: str | Path, weights: str = "student", name: str | None = None
) -> EncoderFile:
    """Reads one encoder. ``weights`` selects student or teacher if a file holds both; ``name`` is
    the encoder of another project's file, None: the one of ``bat/encoders`` that knows it.

    Raises ``UserError`` if it is missing, unreadable, ambiguous or of an unknown format.
    """
    if weights not in ("student", "teacher"):
        raise UserError(f"weights='{weights}': student or teacher")
    path = resolve(path)
    held = read_all(path)
    if not path.is_dir():
        stored = (held.get(key) for key in ("cfg", "config", "args"))
        settings = next((found for found in stored if isinstance(found, dict)), {})
        return _find(held, settings, path, weights, name)
    settings = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    kind, version = settings.get("format"), settings.get("version")
    if kind is None and "format" not in settings:
        return _find(held, settings, path, weights, name)
    if kind != FORMAT:
        raise UserError(f"{path / CONFIG}: format is {in_short(kind)}; known is {FORMAT!r}")
    if version != VERSION or version is True:
        raise UserError(f"{path}: export of version {in_short(version)}, here {VERSION}")
    backbone, config = settings.get("backbone"), settings.get("encoder")
    if not isinstance(backbone, str) or not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} does not say its backbone and encoder")
    return EncoderFile(backbone, _tensors(_of(held, path, weights), path), config)


def _find(
    held: dict[Any, Any], settings: Mapping[str, Any], path: Path, weights: str, name: str | None
) -> EncoderFile:
    """Returns the requested encoder of another project's file: the mapping ``held`` itself is its
    state dict, or one of its values is."""
    if name is not None and "." in name:  # from outside bat: its names are its own
        states = [p for p in [held, *held.values()] if _is_state(p)]
        if not states:
            raise UserError(_no_encoder(held, settings, path))
        return EncoderFile(name, _tensors(states[0], path), settings=settings)
    knows = {key: _readers(part, settings) for key, part in held.items() if _is_state(part)}
    parts = [key for key, readers in knows.items() if readers]
    if _readers(held, settings):
        part: Any = held
    elif {"encoder", "ema_encoder"} <= set(parts):  # the paper's training file
        part, weights = held["encoder" if weights == "student" else "ema_encoder"], "student"
    elif len(parts) > 1:
        raise UserError(
            f"{path} holds several encoders, {', '.join(map(repr, parts))}: torch.save the one "
            "that you mean alone, and give that file"
        )
    elif parts:
        part = held[parts[0]]
    elif name is not None and (_is_state(held) or len(knows) == 1):
        part = held if _is_state(held) else held[next(iter(knows))]
    else:
        raise UserError(_no_encoder(held, settings, path))
    if name is None:
        readers = _readers(part, settings)
        if len(readers) > 1:
            raise UserError(
                f"{path} may hold {' or '.join(readers)}, which name their weights alike: say "
                f"which, {' or '.join(f'{reader}:{path}' for reader in readers)}"
            )
        name = readers[0]
    return EncoderFile(name, _tensors(_of(part, path, weights), path), settings=settings)


def _is_state(part: Any) -> bool:
    """Returns True if ``part`` is a mapping with tensors by name."""
    return (
        isinstance(part, dict)
        and all(isinstance(name, str) for name in part)
        and any(isinstance(value, Tensor) for value in part.values())
    )


def _readers(part: dict[Any, Any], settings: Mapping[str, Any]) -> list[str]:
    """Returns the encoders of ``bat/encoders`` that say they read ``part``, a state dict."""
    if not _is_state(part):
        return []
    state, _, aside = _plain(part)
    for root in ROOTS:
        own = {n.removeprefix("objective."): v for n, v in state.items()}
        own = {n.removeprefix(root): v for n, v in own.items() if n.startswith(root)}
        if own:
            state, _, aside = _plain(own)
            break
    names = {*state, *(name for name in aside.values())}
    return [n for n in registry.known("encoders") if find_encoder(n).matches(names, settings)]


def _plain(part: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Returns ``part`` without shared prefixes and without a classifier; the prefixes; and the
    classifier's names with and without them."""
    found, removed, aside = dict(part), "", dict[str, str]()
    for _ in range(len(PREFIXES) + 1):
        heads = [n for n in found if n.startswith(HEADS)]
        if len(heads) < len(found):
            aside |= {removed + n: n for n in heads}
            found = {n: v for n, v in found.items() if not n.startswith(HEADS)}
        prefix = next((p for p in PREFIXES if found and all(n.startswith(p) for n in found)), "")
        if not prefix:
            break
        found, removed = {n.removeprefix(prefix): v for n, v in found.items()}, removed + prefix
    return found, removed, aside


def _of(part: dict[str, Any], path: Path, weights: str) -> dict[str, Any]:
    """Returns the ``weights`` of a state dict, without prefixes, classifier and teacher."""
    state, removed, aside = _plain(part)
    if removed:
        log.warning("%s: took '%s' off all %d names", path, removed, len(state))
    if aside:
        log.warning("%s: set aside, no part of the encoder: %s", path, _few(list(aside)))
    teacher = state.pop("_ema", None)
    state = {n.removeprefix("objective."): t for n, t in state.items()}
    if any(name.startswith(ROOTS) for name in state):
        prefix = f"{weights}.encoder."
        state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        if not state:
            hint = ": say weights=student" if weights == "teacher" else ""
            raise UserError(f"{path} holds no {weights} encoder ({prefix}*){hint}")
        return _plain(state)[0]
    if weights == "teacher":
        if not isinstance(teacher, dict):
            raise UserError(f"{path} holds one encoder, no teacher: say weights=student")
        return _plain(teacher)[0]
    return state


def _tensors(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Returns ``state`` if its values are plain tensors not larger than their file."""
    odd = [
        name
        for name, value in state.items()
        if not isinstance(value, Tensor)
        or (value.layout, value.device.type) != (torch.strided, "cpu")
    ]
    if odd:
        raise UserError(f"{path}: these entries are not tensors: {_few(odd)}")
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    size = sum(t.numel() * t.element_size() for t in state.values())
    if size > 2 * sum(
        file.stat().st_size for file in files
    ):  # twice: two names may stand for one tensor
        raise UserError(
            f"{path}: its tensors repeat a few numbers up to {size} bytes, more than the file has"
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def _no_encoder(held: dict[Any, Any], settings: Mapping[str, Any], path: Path) -> str:
    """Describes the unknown names in ``path``, and where among them an encoder may be."""
    for part in [held, *held.values()]:
        if not _is_state(part):
            continue
        below: dict[str, dict[str, Any]] = {}  # names below each prefix of one to three words
        for name, value in part.items():
            words = name.split(".")
            for depth in range(1, min(4, len(words))):
                rest = ".".join(words[depth:])
                below.setdefault(name.removesuffix(rest), {})[rest] = value
        prefixes = [p for p, inner in below.items() if _readers(inner, {})]
        if prefixes:
            beside = [n for n in part if not n.startswith(tuple(prefixes))]
            return (
                f"{path}: its encoder lies under {' or '.join(map(repr, prefixes[:10]))}"
                f"{f', beside {_few(beside)}' if beside else ''}: torch.save the tensors of one "
                "alone, names without what stands before, and give that file"
            )
    names = [str(name) for name in list(held)[:6]]
    model = settings.get("model_type")
    said = "" if model is None else f", model_type {in_short(model)} of its settings included"
    return (
        f"{path} holds no encoder that is known by its names{said}: it holds "
        f"{_few(names) or 'nothing'}. If it is one of {', '.join(registry.known('encoders'))}, say "
        "which, ENCODER:PATH"
    )


def read_all(folder: Path) -> dict[str, Any]:
    """Returns what a weight file holds (``read_tensors``), or a folder, as ``resolve`` returns it:
    the tensors of its ``model.safetensors``, or of the shards in the index."""
    if folder.is_file():
        return read_tensors(folder)
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    index = folder / INDEX
    shards: dict[str, list[str]] = {}
    places = read_json(index).get("weight_map")
    for name, file in places.items() if isinstance(places, dict) else ():
        plain = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file
        if not plain or not (folder / file).is_file():
            raise UserError(f"{index}: {_few([name])} lies in {in_short(file)}: no file beside it")
        shards.setdefault(file, []).append(name)
    if not shards:
        raise UserError(f"{index} has no weight_map with the file of each tensor")
    held: dict[str, Any] = {}
    for file, names in shards.items():
        found = read_tensors(folder / file)
        if odd := sorted(set(names) ^ set(found)):
            raise UserError(
                f"{folder / file} and {INDEX} disagree about {_few(odd)}: fetch the folder again"
            )
        held |= found
    return held


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
