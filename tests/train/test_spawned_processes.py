"""Loader processes that are spawned, not forked: on macOS, and from Python 3.14 on everywhere."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bat.data.plan import MixedPlan, Plan

SPAWN = """
import multiprocessing
import sys
from pathlib import Path

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from bat.cli import pretrain
    from bat.data.index import open_index
    from bat.data.stream import eval_loader
    from tests.toy import make_toy_shards

    index = open_index(make_toy_shards(Path("toy")))
    loader = eval_loader(index, batch=4, workers=1, sample_rate=16_000, clip_seconds=2.0)
    assert sum(len(batch.keys) for batch in loader) == 10
    run = "out=pre recipe=toy model.width=48 model.depth=1 model.heads=2 train.steps=2"
    run += " objective.decoder_depth=1 objective.mask.views=2 online.every=0 data.workers=1"
    sys.exit(pretrain.main([*run.split(), "log.progress=false"]))
"""


@pytest.mark.slow
def test_spawned_processes__load_and_train_as_forked_ones(tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text(SPAWN)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "spawned.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loader worker" not in done.stderr  # none died
    assert json.loads((tmp_path / "pre" / "summary.json").read_text())["steps"] == 2


def test_plans__are_sent_without_what_they_keep_and_give_the_same_order() -> None:
    plan = Plan(50, seed=3)
    order = plan.order(1)
    sent = pickle.dumps(plan)
    assert pickle.loads(sent).order(1).tolist() == order.tolist()
    assert len(sent) < order.nbytes + 1000
    mixed = MixedPlan([plan, Plan(20, seed=4)], [3, 1], seed=5)
    places = np.arange(300)
    clips = mixed.clips(places)
    assert pickle.loads(pickle.dumps(mixed)).clips(places).tolist() == clips.tolist()
