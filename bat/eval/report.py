"""Reads, checks and combines runs of ``bat-probe`` for ``bat-probe report``.

A run is a folder with a ``summary.json``; pictures come from its ``plots`` (``plots/ENCODER`` holds
those of one encoder; folders of encoders missing from the summary are ignored). If
``results.jsonl`` holds resamples, the differences between the best probe and all others are taken
on the same draws (paired). torch is needed only for resamples.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bat.errors import UserError
from bat.redact import redact_tree
from bat.report.page import COMPARISONS, Picture, write_page
from bat.report.sections import sections
from bat.report.tables import as_markdown, as_text

log = logging.getLogger("bat")
PNG = b"\x89PNG\r\n\x1a\n"
OUT = "probe-report"


class Report(NamedTuple):
    """Files and text of a report."""

    html: Path
    markdown: Path
    text: str
    """The report as text for the terminal."""


def report(runs: Sequence[str | Path], *, out: str | Path | None = None) -> Report:
    """Writes ``report.html`` and ``report.md`` of probe runs.

    ``out``: a folder; if omitted, the run's own for one run, else ``probe-report``. Raises
    ``UserError`` for a folder that is no finished probe run of this version, or cannot be written.
    """
    folders = [_folder(Path(run)) for run in runs]
    twice = [f for i, f in enumerate(folders) if f.resolve() in [g.resolve() for g in folders[:i]]]
    if twice:
        raise UserError(f"{twice[0]} is given twice: name each run once")
    names = [folder.resolve().name for folder in folders]
    summaries = []
    for folder, name in zip(folders, names, strict=True):
        unique = name if names.count(name) == 1 else str(folder)
        summaries.append({**read_summary(folder), "run": unique})
    found = sections(summaries)
    alone = [section.summaries[0]["run"] for section in found if len(section.summaries) == 1]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["run"] in alone:
            summary["differences"] = differences(folder, summary)
    pictures = {s["run"]: _pictures(f, s) for f, s in zip(folders, summaries, strict=True)}
    target = Path(out) if out is not None else folders[0] if len(folders) == 1 else Path(OUT)
    title = f"Probes of {', '.join(dict.fromkeys(section.title for section in found))}"
    page, markdown = target / "report.html", target / "report.md"
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_page(page, title=title, summaries=summaries, pictures=pictures)
        markdown.write_text(f"# {title}\n\n{as_markdown(summaries)}", encoding="utf-8")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"the report cannot be written ({error.strerror}: {error.filename}): give --out FOLDER"
        ) from error
    return Report(page, markdown, as_text(summaries))


def _folder(run: Path) -> Path:
    run = run.parent if run.name == "summary.json" and run.is_file() else run
    if not run.is_dir():
        raise UserError(f"{run} is no folder of a bat-probe run: name the one given as its out=")
    if not (run / "summary.json").is_file():
        if (run / "results.jsonl").is_file():
            raise UserError(f"{run} is not finished: the same bat-probe command continues it")
        raise UserError(f"{run} has no summary.json: it is no run of bat-probe")
    return run


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads the ``summary.json`` of a probe run, with credentials removed.

    Raises ``UserError`` if it is damaged, of another command, or in another version's format.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it and run the same bat-probe command again"
        ) from error
    if not isinstance(summary, dict) or not {"task", "level"} <= set(summary):
        raise UserError(f"{path} is not of bat-probe: name the folder of a probe run")
    summary = dict(redact_tree(summary))
    try:  # a page written nowhere reads all that a report shows
        metric, encoders = summary["metric"], summary["encoders"].values()
        if any(metric not in r["mean"] for e in encoders for r in e["results"].values()):
            raise KeyError(metric)
        write_page(Path(os.devnull), title="", summaries=[{**summary, "run": ""}])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} (of bat {summary.get('version')}) is of another version or was edited "
            f"({type(error).__name__}: {error}): run bat-probe again with this version"
        ) from error
    return summary


def _pictures(folder: Path, summary: dict[str, Any]) -> list[Picture]:
    """Returns the pictures, those of all encoders first; a file that is no PNG is left out.

    Such a file is named in the log. For an unfinished run, comparisons are left out: they belong
    to the run before.
    """
    plots = folder / "plots"
    old = COMPARISONS if summary.get("unfinished") else ()
    paths = [path for path in sorted(plots.glob("*.png")) if path.stem not in old]
    paths += [p for p in sorted(plots.glob("*/*.png")) if p.parent.name in summary["encoders"]]
    found = []
    for path in paths:
        with path.open("rb") as file:
            whole = file.read(len(PNG)) == PNG
        if whole:
            found.append(Picture(path, "" if path.parent == plots else path.parent.name))
        else:
            log.warning("%s is no PNG: left out of the report", path)
    return found


def differences(folder: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns ``Section.pairs`` on the same draws of the same held-out clips: ``{"of": [encoder,
    method], "minus": [encoder, method], "difference", "interval"}``."""
    path = folder / "results.jsonl"
    section = sections([summary])[0]
    if len(section.rows) < 2 or not path.is_file():
        return []
    draws: dict[tuple[str, str], dict[tuple[str, str], tuple[float, list[float]]]] = {}
    try:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            fold, seed = str(row["fold"]), str(row["seed"])
            results = summary["encoders"].get(row["encoder"], {}).get("results", {})
            evaluated = results.get(row["method"], {}).get("folds", {})  # those requested this time
            if row.get("replicates") and seed in evaluated.get(fold, {}):
                values = (row["metrics"][summary["metric"]], row["replicates"])
                draws.setdefault((row["encoder"], row["method"]), {})[fold, seed] = values
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): no paired differences in the report", path, error)
        return []
    found = []
    for one, other in section.pairs():
        a, b = (draws.get((row.encoder, row.method), {}) for row in (one, other))
        if a and a.keys() == b.keys():
            names = {"of": [one.encoder, one.method], "minus": [other.encoder, other.method]}
            found.append({**names, **_paired(a, b, summary["confidence"])})
    return found


def _paired(
    one: dict[tuple[str, str], tuple[float, list[float]]],
    other: dict[tuple[str, str], tuple[float, list[float]]],
    confidence: float,
) -> dict[str, Any]:
    import numpy as np

    from bat.metrics.bootstrap import difference

    value = float(np.mean([one[place][0] - other[place][0] for place in one]))
    a, b = (np.mean([draws[place][1] for place in one], axis=0) for draws in (one, other))
    return {"difference": value, "interval": list(difference(a, b, confidence, at=value))}
