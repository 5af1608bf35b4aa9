"""Probes a task over its published files and over the shards that ``bat-shard`` makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bat.cli.shard import main
from bat.eval.probe import probe


def probe_files_and_shards(
    task: str, root: Path, folder: Path, settings: Callable[..., Any]
) -> dict[str, Any]:
    """Returns ``summary.json`` of both runs, whose results must be equal.

    ``settings("key=value", ...)`` composes a run; ``folder`` takes the shards and the outputs.
    """
    shards = folder / "shards"
    assert main([str(root), str(shards), "--task", task, "--jobs", "1"]) == 0
    sources = {"files": [f"data.root={root}"], "shards": [f"data.shards=[{shards}]"]}
    sources["shards"].append("data.root=null")
    summaries = []
    for name, words in sources.items():
        probe(settings(*words, f"out={folder / f'run-{name}'}"))
        summaries.append(json.loads((folder / f"run-{name}" / "summary.json").read_text()))
    first, second = (next(iter(s["encoders"].values()))["results"] for s in summaries)
    assert first.keys() == second.keys()
    assert all(first[method]["mean"] == second[method]["mean"] for method in first)
    summary: dict[str, Any] = summaries[0]
    return summary
