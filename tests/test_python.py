"""The Python interface: settings as a user gives them, results, and what a call leaves behind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bat
from bat.api import settle
from bat.cli import pretrain as command
from bat.config.compose import compose, words_from
from bat.config.schema import Pretrain, Probe
from tests.conftest import SMALL

TINY: dict[str, Any] = {"log.progress": False, "online.every": 0, "data.workers": 1} | {
    "model": {"width": 48, "depth": 2, "heads": 2},
    "objective": {"decoder_depth": 1, "mask": {"views": 2}},
    "train": {"steps": 6, "log_every": 2, "save_every": 2, "keep": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def run(folder: Path) -> bat.Result:
    return bat.pretrain(TINY, recipe="toy", out=folder / "run", data={"cache": folder / "data"})


EQUAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nested": ({"data": {"root": "a b", "clip_seconds": 2}}, ["data.root=a b",
               "data.clip_seconds=2"]),
    "dotted": ({"data.root": Path("x"), "data": {"batch": 3}}, ["data.root=x", "data.batch=3"]),
    "deep": ({"online": {"head": {"prototypes": np.int64(7)}}}, ["online.head.prototypes=7"]),
    "none": ({"data": {"root": None}, "out": None, "train": {}}, ["data.root=null", "out=null"]),
    "numbers": ({"optim": {"lr": 1e-5, "betas": (0.9, 0.95)}, "seed": 3},
                ["optim.lr=0.00001", "optim.betas=[0.9,0.95]", "seed=3"]),
    "words": ({"log.progress": False, "out": "null", "hardware": "cpu"},
              ["log.progress=false", "out='null'", "hardware=cpu"]),
    "lists": ({"data.shards": ["a", Path("b")], "online.methods": "cgp"},
              ["data.shards=[a,b]", "online.methods=[cgp]"]),
}  # fmt: skip


@pytest.mark.parametrize("case", EQUAL)
def test_settings__are_those_of_the_command_line(case: str) -> None:
    given, words = EQUAL[case]
    found = compose(Pretrain, "pretrain", ["recipe=toy", *words_from(given)])
    assert found == compose(Pretrain, "pretrain", ["recipe=toy", *words])


def test_pretrain__config_and_results_are_those_of_the_command(
    run: bat.Result, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, f"data.cache={folder}/data", "data.workers=1", f"out={folder}/other"]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    assert repr(run) == printed.strip().replace(f"{folder}/other", str(run.out))
    mine, theirs = ((p / "config.yaml").read_text() for p in (run.out, folder / "other"))
    assert mine == theirs.replace(f"{folder}/other", str(run.out))
    losses = [(row["step"], row["loss"]) for row in run.table]
    lines = map(json.loads, (folder / "other/metrics.jsonl").read_text().splitlines())
    assert losses == [(row["step"], row["loss"]) for row in lines if "loss" in row]
    assert [step for step, _ in losses] == [1, 2, 4, 6]
    assert run.checkpoint == run.out
    assert {p.name for p in run.figures} == {"curves.png", "masks.png"}
    assert run._repr_html_().count("<img src=") == 2


def test_probe_and_finetune__table_and_checkpoint_are_on_disk(
    run: bat.Result, folder: Path
) -> None:
    quick = {"recipe": "toy", "data.cache": folder / "data", "train.steps": 3,
             "log.progress": False}  # fmt: skip
    both = [run.checkpoint, "random"]
    probed = bat.probe(quick, checkpoint=both, method="cgp, linear", out=folder / "probed")
    results = json.loads((folder / "probed/summary.json").read_text())["encoders"]
    assert [(r["encoder"], r["method"]) for r in probed.table] == [
        (e, m) for e in results for m in ("cgp", "linear")
    ]
    for row in probed.table:
        entry = results[row["encoder"]]["results"][row["method"]]
        assert {k: row[k] for k in entry["mean"]} == entry["mean"]
        assert [row["low"], row["high"]] == entry["interval"]
    assert "best minus this" in repr(probed)
    assert probed.checkpoint is not None
    clip = sorted((folder / "data").rglob("*.flac"))[0]
    assert set(bat.predict(clip, probed.checkpoint)[0]["scores"]) == set(probed.summary["labels"])

    tuned = bat.finetune(quick, checkpoint=run.out, out=folder / "tuned", data={"workers": 0})
    assert [row["fold"] for row in tuned.table] == ["1", "2"]
    for row in tuned.table:
        saved = json.loads((folder / f"tuned/fold-{row['fold']}/result.json").read_text())
        assert row["accuracy"] == saved["metrics"]["accuracy"]
    assert tuned.checkpoint == folder / "tuned/fold-1"
    again = bat.finetune(quick, checkpoint=run.out, out=folder / "tuned", data={"workers": 0})
    assert again == tuned


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"data": {"cvs": "a.csv"}}, r"data\.cvs.*data\.csv"),
    "type": ({"seed": object()}, "seed is a object"),
    "value": ({"train.steps": "many"}, r"train\.steps=many"),
    "twice": ({"data.root": "a", "data": {"root": "b"}}, r"data\.root.*twice"),
    "recipe": ({"recipe": "toi"}, "toi.*toy"),
    "checkpoint": ({"checkpoint": "nowhere"}, "nowhere"),
    "method": ({"method": "linaer", "checkpoint": "random:tiny"}, "linaer.*linear"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes__are_raised_and_leave_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings, match = MISTAKES[case]
    mine = logging.NullHandler()
    monkeypatch.setattr(logging.getLogger("bat"), "handlers", [mine])
    with pytest.raises(bat.UserError, match=match) as caught:
        bat.probe({"recipe": "toy", "data.cache": tmp_path / "data"} | settings)
    assert len(caught.traceback) < 6  # as short as the message is clear
    assert logging.getLogger("bat").handlers == [mine]
    assert not (tmp_path / "runs").exists()


def test_devices__are_refused_with_the_command_or_one_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["recipe=toy", f"out={tmp_path}/run"]
    with pytest.raises(bat.UserError, match=r"torchrun --nproc-per-node=2 -m bat.cli.pretrain"):
        settle("pretrain", [*words, "hardware.devices=2"], alone=True)
    with pytest.raises(bat.UserError, match="fsdp"):
        settle("pretrain", [*words, "hardware.strategy=fsdp"], alone=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = settle("pretrain", [*words, "hardware=ddp"], alone=True).hardware
    assert (found.devices, found.strategy) == ("1", "auto")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    found = settle("pretrain", [*words, "hardware=ddp"], alone=True).hardware
    assert (found.devices, found.strategy) == ("auto", "ddp")


def test_call__leaves_handlers_filters_workers_and_files_as_they_were(folder: Path) -> None:
    def state() -> tuple[Any, ...]:
        signals = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        logger = logging.getLogger("bat")
        log = (list(logger.handlers), logger.level, logger.propagate)
        threads = {t.name for t in threading.enumerate()} - {"tqdm_monitor"}
        files = {os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.exists()}
        inside = {file for file in files if file.startswith(str(folder))}
        children = multiprocessing.active_children()
        return signals, log, list(warnings.filters), children, threads, inside

    before = state()
    out, data = folder / "left", {"cache": folder / "data", "workers": 2}
    small = {k: v for k, v in TINY.items() if k != "data.workers"}
    bat.pretrain(small, recipe="toy", out=out, data=data)
    assert state() == before
    with pytest.raises(bat.UserError, match="seed"):
        bat.pretrain(small, recipe="toy", out=out, data=data, seed=5)
    assert state() == before


def test_interrupt__saves_the_run_and_the_same_call_continues_it(folder: Path) -> None:
    out, ended = folder / "stopped", threading.Event()

    def press_stop() -> None:
        while not ended.is_set():
            if (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.005)

    long = TINY | {"train": {"steps": 8, "log_every": 1, "save_every": 8}}
    how = {"recipe": "toy", "out": out, "data": {"cache": folder / "data"}}
    presser = threading.Thread(target=press_stop)
    presser.start()
    try:
        with pytest.raises(KeyboardInterrupt, match="the same call continues"):
            bat.pretrain(long, **how)
    finally:
        ended.set()
        presser.join()
    assert not (out / "summary.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert multiprocessing.active_children() == []
    steps = [row["step"] for row in bat.pretrain(long, **how).table]
    assert steps == list(range(1, 9))


def test_import__is_light_and_help_has_the_signature() -> None:
    code = (
        "import sys, bat; assert set(bat.__all__) <= set(dir(bat)); "
        "assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules); import pydoc; "
        "print(pydoc.render_doc(bat.embed, renderer=pydoc.plaintext))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sample_rate: 'int | None' = None" in done.stdout, done.stderr
    assert "(n, D) float32" in done.stdout


def test_probe__lists_and_words_of_methods_are_equal() -> None:
    from bat.api import _as_flags

    for method in ("cgp,linear", ["cgp", "linear"], ("cgp", "linear")):
        given = {"recipe": "toy", "method": method, "checkpoint": [Path("a"), "random"]}
        found = compose(Probe, "probe", words_from(_as_flags("probe", given)))
        assert found.methods == ["cgp", "linear"]
        assert found.checkpoint == "a,random"
