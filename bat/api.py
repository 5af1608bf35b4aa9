"""Composes the settings of a run and starts it, for the commands and for Python.

``bat-NAME key=value ...`` and ``bat.NAME(key=value, ...)`` share ``settle`` and ``runner``: equal
settings give the same run, and either continues the other's. Python gets a ``Result`` instead of
the printed report, errors instead of exit codes, and one process: several are torchrun's.
"""

from __future__ import annotations

import base64
import gc
import html
import importlib
import json
import logging
import multiprocessing
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bat.errors import Interrupted, UserError

log = logging.getLogger("bat")

RUNS = {
    "pretrain": "bat.train.run_pretrain",
    "probe": "bat.eval.probe",
    "finetune": "bat.train.finetune",
}
"""Modules whose function of the command's name runs a configuration."""
SHOWN = 3
"""Greatest number of figures that a notebook shows."""
BANNERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")


def settle(command: str, words: list[str], *, check: bool = True, alone: bool = False) -> Any:
    """Returns the configuration of ``bat-COMMAND`` with ``words`` (``key=value``), checked.

    Without ``recipe=`` own data choose recipe ``own``, whose pre-training is completed by
    ``bat.train.proposals``. ``check``: also check what is found without torch (paths, the run
    folder). ``alone``: for this process alone. Raises ``UserError`` naming all problems.
    """
    from bat.config import schema
    from bat.config.compose import compose, compose_early

    kind: Any = getattr(schema, command.capitalize())
    own = ("data.csv", "data.root") if command == "pretrain" else ("data.csv",)
    keys = {word.partition("=")[0] for word in words if not word.endswith("=null")}
    if keys.intersection(own) and "recipe" not in keys:
        words = ["recipe=own", *words]
    if command == "probe":
        # read when torch is imported: idle threads sleep. By default they spin, and while other
        # programs use the cores a small step on two threads takes ten times as long
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    early = compose_early(kind, command, words)  # before torch is imported
    if early is not None:
        if check:
            from bat.eval.run_folder import check_first

            check_first(early)
        if alone and command != "probe":
            words = _for_one_process(command, early, words)
        if command == "pretrain" and early.recipe == "own":
            from bat.logs import start_logging
            from bat.train.proposals import propose

            start_logging()
            words = words + propose(compose_early(kind, command, words) or early, words)
    return compose(kind, command, words)


def runner(command: str, *, allow_pipe: bool = False) -> Callable[..., Path]:
    """Returns the function that runs a configuration of ``command`` and returns its folder.

    It takes ``dry_run``, ``force`` and ``say``, which receives the report instead of ``print``.
    """
    from bat.data.pipes import allow_pipes

    allow_pipes(allow_pipe)
    found: Callable[..., Path] = getattr(importlib.import_module(RUNS[command]), command)
    return found


def _for_one_process(command: str, config: Any, words: list[str]) -> list[str]:
    """Returns ``words`` for a run in this process, unless torchrun or Slurm started it.

    Raises ``UserError`` if several devices are asked for by number, or FSDP.
    """
    from bat.train.processes import launched, world_size

    hardware, world = config.hardware, world_size(config.hardware)
    if launched() or (world == 1 and hardware.strategy == "auto"):
        return words
    remedy = shlex.join(
        ["torchrun", f"--nproc-per-node={max(2, world)}", "-m", f"bat.cli.{command}", *words]
    )
    if hardware.shards or (world > 1 and hardware.devices != "auto"):
        raise UserError(
            f"hardware.devices={hardware.devices} hardware.strategy={hardware.strategy}: "
            f"bat.{command} trains in this process alone, on one device: say hardware.devices=1 "
            f"hardware.strategy=auto, or in a shell: {remedy}"
        )
    if world > 1:
        log.warning("one of %d devices trains, in this process; all of them: %s", world, remedy)
    alone = {"hardware.devices": "1", "hardware.num_nodes": "1", "hardware.strategy": "auto"}
    kept = [word for word in words if word.partition("=")[0] not in alone]
    return kept + [f"{key}={value}" for key, value in alone.items()]


@dataclass(frozen=True, repr=False)
class Result:
    """Outcome of ``bat.pretrain``, ``bat.probe`` or ``bat.finetune``, read from its run folder."""

    command: str
    """``pretrain``, ``probe`` or ``finetune``."""
    out: Path
    """Run folder. The same call continues or returns the run in it."""
    summary: dict[str, Any]
    """``summary.json``."""
    table: list[dict[str, Any]]
    """Rows for ``pandas.DataFrame``. Pre-training: the logged steps, with loss and rates; probing:
    a row a probe and encoder (metrics as fractions, ``NAME_std``, ``low`` and ``high`` of the main
    metric); fine-tuning: a row a fold."""
    figures: list[Path]
    """PNG files."""
    checkpoint: Path | None
    """To go on with: the pre-trained run or the first fold (``checkpoint=``, ``bat.load_encoder``,
    ``bat.predict``); of a probing the best probe's head (``bat.predict``)."""
    report: str
    """Text that the command prints at its end: tables, places, what to do next."""

    def __repr__(self) -> str:
        return self.report

    def _repr_html_(self) -> str:
        """Returns the report and the first figures, for a notebook."""
        parts = [f"<pre>{html.escape(self.report)}</pre>"]
        for file in self.figures[:SHOWN]:
            data = base64.b64encode(file.read_bytes()).decode()
            name = html.escape(str(file))
            parts.append(
                f'<img src="data:image/png;base64,{data}" alt="{name}" title="{name}" '
                'style="max-width: 100%">'
            )
        if more := [str(file) for file in self.figures[SHOWN:]]:
            parts.append(f"<pre>{html.escape(chr(10).join(['more figures:', *more]))}</pre>")
        return "\n".join(parts)


def pretrain(
    settings: Mapping[str, Any] | None = None,
    /,
    *,
    dry_run: bool = False,
    force: bool = False,
    allow_pipe: bool = False,
    **keywords: Any,
) -> Result:
    """Pre-trains an encoder without labels, as ``bat-pretrain`` with the same settings.

    >>> run = bat.pretrain(data={"root": "recordings/"}, train={"steps": 2000})  # doctest: +SKIP
    >>> encoder = bat.load_encoder(run.checkpoint)  # doctest: +SKIP

    Args:
        settings, keywords: the settings of the command (``bat-pretrain --settings``):
            ``recipe="toy"``, ``out="runs/x"``; a section is a mapping (``data={"root": ...}``) or a
            dotted key of ``settings`` (``{"data.root": ...}``); a name picks a fragment
            (``model="S"``). Values: text, numbers, None, paths, lists.
        dry_run: build everything and compute one batch; nothing is written, the result is empty.
        force: continue the run in ``out`` with other settings.
        allow_pipe: run the commands of ``data.shards=pipe:COMMAND``.

    Returns:
        ``Result``. An existing run in ``out`` is continued, a finished one returned.

    Raises:
        UserError: settings or data that do not fit; the message names the remedy.
        KeyboardInterrupt: at Ctrl-C, or when a notebook interrupts: the run is saved after the
            step, and the same call continues it (a second one stops without saving).
        bat.errors.Interrupted: another signal or a stalled loader; saved likewise.
    """
    how = {"dry_run": dry_run, "force": force, "allow_pipe": allow_pipe}
    return _run("pretrain", [settings or {}, keywords], **how)


def probe(
    settings: Mapping[str, Any] | None = None,
    /,
    *,
    dry_run: bool = False,
    force: bool = False,
    **keywords: Any,
) -> Result:
    """Probes frozen encoders, as ``bat-probe`` with the same settings.

    >>> found = bat.probe(checkpoint="RUN", data={"csv": "labels.csv"}, method=["cgp", "linear"])
    ... # doctest: +SKIP
    >>> pandas.DataFrame(found.table)  # doctest: +SKIP

    Args:
        settings, keywords: as for ``bat.pretrain`` (``bat-probe --settings``). ``checkpoint``: one
            encoder or a list (``["RUN", "random"]``). ``method``: as the flag: names or a list.
        dry_run, force: as for ``bat.pretrain``.

    Returns:
        ``Result``. Probes, encoders and seeds that ``out`` lacks are added.

    Raises:
        UserError: settings or data that do not fit.
        KeyboardInterrupt: finished folds are kept; the same call continues.
    """
    return _run("probe", [settings or {}, keywords], dry_run=dry_run, force=force)


def finetune(
    settings: Mapping[str, Any] | None = None,
    /,
    *,
    dry_run: bool = False,
    force: bool = False,
    **keywords: Any,
) -> Result:
    """Fine-tunes an encoder on labels, as ``bat-finetune`` with the same settings.

    >>> tuned = bat.finetune(checkpoint="RUN", data={"csv": "labels.csv"})  # doctest: +SKIP
    >>> bat.predict("clip.wav", tuned.checkpoint)  # doctest: +SKIP

    Args:
        settings, keywords, dry_run, force: as for ``bat.pretrain`` (``bat-finetune --settings``).

    Returns:
        ``Result``.

    Raises:
        UserError, KeyboardInterrupt, bat.errors.Interrupted: as ``bat.pretrain``.
    """
    return _run("finetune", [settings or {}, keywords], dry_run=dry_run, force=force)


def _run(
    command: str,
    given: Iterable[Mapping[str, Any]],
    *,
    dry_run: bool,
    force: bool,
    allow_pipe: bool = False,
) -> Result:
    """Runs ``command`` with the settings ``given`` in this process."""
    from bat.config.compose import words_from

    said: list[str] = []
    try:
        with _contained():
            flags = [_as_flags(command, settings) for settings in given]
            words = [word for settings in flags for word in words_from(settings)]
            config = settle(command, words, alone=True)
            run = runner(command, allow_pipe=allow_pipe)
            out = run(config, dry_run=dry_run, force=force, say=said.append)
    except UserError as error:  # the message is enough
        raise error.with_traceback(None) from None
    except Interrupted as error:
        if not str(error).startswith("SIGINT"):
            raise
        raise KeyboardInterrupt(f"{error}: saved, the same call continues") from None
    if dry_run:
        return Result(command, out, {}, [], [], None, "dry run: nothing was trained")
    return _read(command, out, "\n".join(said).strip())


def _as_flags(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``settings`` with what the command line takes as flags and lists with commas."""
    found = {key: value for key, value in settings.items() if (key, value) != ("recipe", None)}
    if command == "probe":
        if "method" in found:
            found["methods"] = found.pop("method")
        if isinstance(found.get("methods"), str):
            found["methods"] = [name.strip() for name in found["methods"].split(",")]
        if isinstance(found.get("checkpoint"), list | tuple):
            found["checkpoint"] = ",".join(map(str, found["checkpoint"]))
    return found


@contextmanager
def _contained() -> Iterator[None]:
    """Leaves log handlers, warning filters, process groups and children as they were."""
    logger = logging.getLogger("bat")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers = []
    levels = {name: logging.getLogger(name).level for name in BANNERS}
    children = set(multiprocessing.active_children())
    dist = sys.modules.get("torch.distributed")
    theirs = dist is not None and dist.is_available() and dist.is_initialized()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        if not theirs and "bat.train.processes" in sys.modules:
            sys.modules["bat.train.processes"].destroy_groups()
        gc.collect()  # loaders end their processes
        for child in set(multiprocessing.active_children()) - children:
            child.terminate()  # a traceback holds its loader
            child.join()


def _read(command: str, out: Path, report: str) -> Result:
    """Reads the result of a finished run."""
    from bat.io import read_jsonl

    file = out / "summary.json"  # other processes than the first may be earlier than it
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    table: list[dict[str, Any]] = []
    checkpoint: Path | None = out
    if command == "pretrain":
        table = [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]
    elif command == "finetune":
        for method, entry in summary.get("results", {}).items():
            for fold, seeds in entry["folds"].items():
                row = {"method": method, "fold": fold}
                table += [row | _scalars(metrics) for metrics in seeds.values()]
        checkpoint = out / f"fold-{table[0]['fold']}" if table else None
    else:
        for name, encoder in summary.get("encoders", {}).items():
            table += [_row(name, m, e) for m, e in encoder["results"].items() if "@" not in m]
        names = [f"{r['encoder']}/{r['method']}-*" for r in summary.get("ranking", [])]
        checkpoint = next((p for n in names for p in sorted(out.glob(f"heads/{n}"))), None)
    places = ("plots/*.png", "plots/*/*.png", "fold-*/plots/*.png")
    figures = [path for place in places for path in sorted(out.glob(place))]
    return Result(command, out, summary, table, figures, checkpoint, report)


def _row(encoder: str, method: str, entry: dict[str, Any]) -> dict[str, Any]:
    low, high = entry["interval"] or (None, None)
    std = {f"{name}_std": value for name, value in entry["std"].items()}
    spread = std if entry["std_over"] != "none" else {}
    first = {"encoder": encoder, "method": method, "parameters": entry["parameters"]}
    return first | entry["mean"] | spread | {"low": low, "high": high}


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
