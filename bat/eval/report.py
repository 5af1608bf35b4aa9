"""Reads, checks and combines runs of ``bat-probe`` for ``bat-probe report``.

A run is a folder with a ``summary.json``; pictures come from its ``plots`` (``plots/ENCODER`` holds
those of one encoder; folders of encoders missing from the summary are ignored). If
``results.jsonl`` holds resamples, the differences between the best probe and all others are taken
on the same draws (paired). torch is needed only for resamples.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bat.errors import UserError
from bat.metrics.base import families
from bat.redact import redact_tree
from bat.report.page import COMPARISONS, Picture, write_page
from bat.report.sections import TITLES, sections
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
    names = _names(folders)
    summaries = [
        {**read_summary(folder), "run": name} for folder, name in zip(folders, names, strict=True)
    ]
    found = sections(summaries)
    alone = [section.summaries[0]["run"] for section in found if len(section.summaries) == 1]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["run"] in alone:
            summary["differences"] = differences(folder, summary)
    pictures = {s["run"]: _pictures(f, s) for f, s in zip(folders, summaries, strict=True)}
    target = Path(out) if out is not None else folders[0] if len(folders) == 1 else Path(OUT)
    tasks = dict.fromkeys(section.title for section in found)
    title = f"Probes of {', '.join(tasks)}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        page = write_page(
            target / "report.html", title=title, summaries=summaries, pictures=pictures
        )
        markdown = target / "report.md"
        markdown.write_text(f"# {title}\n\n{as_markdown(summaries)}", encoding="utf-8")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"the report cannot be written ({error.strerror}: {error.filename}): give --out FOLDER"
        ) from error
    return Report(page, markdown, as_text(summaries))


def _folder(run: Path) -> Path:
    if run.name == "summary.json" and run.is_file():
        return run.parent
    if not run.exists():
        raise UserError(f"{run} does not exist: name the folder of a bat-probe run (its out=)")
    if not run.is_dir():
        raise UserError(f"{run} is no folder: name the folder of a bat-probe run (its out=)")
    if (run / "summary.json").is_file():
        return run
    if (run / "results.jsonl").is_file():
        raise UserError(f"{run} is not finished: the same bat-probe command continues it")
    raise UserError(f"{run} has no summary.json: it is no run of bat-probe")


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the folders' own names, or whole paths if two are equal."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads the ``summary.json`` of a probe run, with credentials removed.

    Raises ``UserError`` if it is damaged, of another command, or in another version's format.
    """
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it and run the same bat-probe command again"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(summary, dict) or not {"task", "level"} <= set(summary):
        raise UserError(f"{path} is not of bat-probe: name the folder of a probing run")
    if wrong := _wrong(summary):
        made = summary.get("version", "an unknown version")
        raise UserError(
            f"{path} (of bat {made}) {wrong}: it is of another version or was edited; run "
            "bat-probe again with this version"
        )
    return dict(redact_tree(summary))


FORM: dict[str, Any] = {
    "task": str, "metric": str, "level": str, "protocol": dict, "how": str, "clips": int,
    "labels": list, "rounds": list, "seeds": list, "control": str, "confidence": (int, float),
    "encoders": dict, "device": str, "version": str, "seconds": object,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "checkpoint": object, "weights": object, "digest": str, "backbone": str, "width": int,
    "depth": int, "heads": object, "has_cls": bool, "patch_hop_ms": (int, float), "cls_rule": str,
    "features": (dict, type(None)), "bad_clips": dict, "seconds": dict, "results": dict,
}  # fmt: skip
RESULT: dict[str, Any] = {
    "parameters": int, "mean": dict, "std": dict, "std_over": str, "folds": dict,
    "interval": (list, type(None)),
}  # fmt: skip
FEATURES: dict[str, Any] = {"cache": str, "why": str, "gb": (int, float)}
CLASSES: dict[str, Any] = {"ap": list, "auroc": list, "positives": list}
OF_LABELS = tuple(name for name, metric in families().items() if metric.takes == "labels")
"""Metrics that come with values per class."""
ROUND: dict[str, Any] = {"name": str, "train": int, "valid": int, "test": int}


def _wrong(summary: dict[str, Any]) -> str:
    """Returns what a summary lacks or has in another form, in words; empty if it is valid."""
    if found := _misfit(summary, FORM | {k: dict for k in ("head", "optim") if k in summary}):
        return found
    if summary["metric"] not in TITLES and "better" not in summary:  # a metric from outside
        return f"has the metric {summary['metric']!r}, not one of {', '.join(TITLES)}"
    for row in summary["rounds"]:
        if found := _misfit(row, ROUND):
            return f"{found} of a round"
    for name, encoder in summary["encoders"].items():
        if found := _misfit(encoder, ENCODER):
            return f"{found} of encoder {name!r}"
        features = encoder["features"]
        if features is not None and (found := _misfit(features, FEATURES)):
            return f"{found} of the features of encoder {name!r}"
        for method, entry in encoder["results"].items():
            found = _misfit(entry, RESULT) or _misfit(entry["mean"], {summary["metric"]: object})
            for seeds in entry["folds"].values() if not found else ():
                for metrics in seeds.values() if isinstance(seeds, dict) else [seeds]:
                    found = found or _misfit(metrics, {})
                    if found or not ("per_class" in metrics or summary["metric"] in OF_LABELS):
                        continue
                    found = _misfit(metrics, {"absent": list, "per_class": dict})
                    found = found or _misfit(metrics["per_class"], CLASSES)
                    if not found and len(metrics["per_class"]["ap"]) != len(summary["labels"]):
                        found = f"has {len(metrics['per_class']['ap'])} classes"
            if found:
                return f"{found} of probe {method!r} on encoder {name!r}"
    return ""


def _misfit(values: Any, form: dict[str, Any]) -> str:
    if not isinstance(values, dict):
        return f"has {type(values).__name__} where keys with values belong"
    for key, kind in form.items():
        if key not in values:
            return f"lacks {key!r}"
        if not isinstance(values[key], kind):
            return f"holds {type(values[key]).__name__} as {key!r}"
    return ""


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
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            place = (str(row["fold"]), str(row["seed"]))
            of = summary["encoders"].get(row["encoder"], {}).get("results", {})
            judged = of.get(row["method"], {}).get("folds", {})  # those requested this time
            if row.get("replicates") and place[1] in judged.get(place[0], {}):
                values = (row["metrics"][summary["metric"]], row["replicates"])
                draws.setdefault((row["encoder"], row["method"]), {})[place] = values
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
