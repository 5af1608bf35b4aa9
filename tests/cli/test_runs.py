"""bat runs: the table, the comparison and the page of runs in every state."""

import html
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bat.cli import bat
from bat.config.compose import compose, to_yaml
from bat.config.schema import Pretrain
from bat.errors import Interrupted, UserError
from bat.eval.run_folder import run_folder
from bat.lock import hold, is_held
from bat.report.runs import Run
from tests.conftest import BLANK


def make(folder: Path, kind: str = "pretrain", *, steps: int = 40, **files: object) -> Path:
    """Writes the files of a run by hand: ``rows`` of metrics, ``summary``, ``log``."""
    folder.mkdir(parents=True)
    section = {"pretrain": "objective: {name: mae}", "probe": "methods: [cgp]"}[kind]
    (folder / "config.yaml").write_text(
        f"{section}\nrecipe: toy\ncheckpoint: runs/a,random\nmodel: {{backbone: bat, width: 48, "
        f"depth: 2}}\ntrain: {{steps: {steps}}}\ndata: {{root: x}}\n"
    )
    rows = "".join(json.dumps(row) + "\n" for row in files.get("rows", []))  # type: ignore[attr-defined]
    (folder / "metrics.jsonl").write_text(rows + '{"step": 9')  # a line that is being written
    (folder / "train.log").write_text(str(files.get("log", "")))
    if "summary" in files:
        (folder / "summary.json").write_text(json.dumps(files["summary"]))
    return folder


LOSSES = [{"step": s, "loss": 2 - s / 40, "clips_per_second": 5.0} for s in (2, 20)]
ONLINE = [{"step": s, "online/cgp/accuracy": a, "online/cgp/accuracy_std": 0.9} for s, a in
          ((0, 0.2), (10, 0.7), (20, 0.6))]  # fmt: skip

HEALTH = {"step": 20, "health/student_rank": 3.0, "health/student_std": 0.4}
STALL = {"step": 20, "event": "stall", "message": "no batch for 9 s"}
SUMMARY = {"steps": 20, "data": {"hash": "f00d"}, "seconds": 9, "device": "cpu", "version": "0.1.0"}


def test_table__shows_kind_step_state_and_best_of_all_runs_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "deep/a", rows=LOSSES + ONLINE, log="x ERROR failed: y\nx INFO again\n")
    make(tmp_path / "b", rows=LOSSES, summary={"steps": 20}, log="x INFO y\nx ERROR failed: y\n")
    make(tmp_path / "c", rows=LOSSES, summary={"steps": 40})
    result = {"mean": {"token_error_rate": 0.3}}
    results = {"cgp": result, "linear": {"mean": {"token_error_rate": 0.2}}}
    make(tmp_path / "d", "probe", summary={"metric": "token_error_rate",
         "encoders": {"a": {"results": results}}, "unfinished": []})  # fmt: skip
    (tmp_path / "e").mkdir()
    (tmp_path / "e/config.yaml").write_text("[1]")
    assert bat.main(["runs", str(tmp_path), "--json"]) == 0
    found = {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert [row["state"] for row in found.values()] == ["failed", "done", "done", "interrupted"]
    assert list(found) == ["b", "c", "d", "a"]
    a, d = found["a"], found["d"]
    assert (a["kind"], a["step"], a["steps"], a["loss"]) == ("pretrain", 20, 40, 1.5)
    assert a["best"] == {"metric": "accuracy", "value": 0.7, "method": "cgp", "step": 10}
    assert (d["kind"], d["steps"], d["encoder"]) == ("probe", None, "a,random")
    assert d["best"]["value"] == 0.2  # an error rate: lower is better
    assert bat.main(["runs", str(tmp_path)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("deep/a")]
    for word in ("pretrain", "toy", "48x2", "interrupted", "20/40", "1.500", "cgp 70.00 accuracy"):
        assert word in line


def test_state__is_running_while_another_process_holds_the_lock(tmp_path: Path) -> None:
    run = make(tmp_path / "a", rows=LOSSES)
    code = "import sys, pathlib; from bat.lock import hold\n"
    code += "with hold(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = (run / ".lock").read_bytes()
        assert Run(run).state == "running"
        assert (run / ".lock").read_bytes() == before
        other.kill()
        other.wait()
    assert (run / ".lock").is_file()
    assert Run(run).state == "interrupted"
    with hold(run):
        assert is_held(run)
        assert is_held(run)  # the first look has not released it


def test_compare__prints_what_differs_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("a"), rows=LOSSES, steps=40)
    make(Path("b"), rows=LOSSES + ONLINE, steps=80)
    assert bat.main(["runs", "compare", "a", "b"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "train.steps 40 80" in lines
    assert not any(line.startswith("model.width") for line in lines)
    assert Path("compare.png").read_bytes()[:4] == b"\x89PNG"
    assert bat.main(["runs", "compare", "a", "nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    assert bat.main(["runs", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err


def test_report__shows_a_training_and_how_to_repeat_it(tmp_path, small) -> None:
    run = make(tmp_path / "run", rows=[*LOSSES, *ONLINE, HEALTH, STALL], summary=SUMMARY)
    config = small("train.steps=20", "data.root=<b>", out=run)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "plots").mkdir()
    (run / "plots/masks.png").write_bytes(BLANK)
    before = {path.name for path in run.iterdir()}
    assert bat.main(["runs", "report", str(run)]) == 0
    assert {path.name for path in run.iterdir()} == before | {"report.html"}
    page = (run / "report.html").read_text()
    (command,) = [line for line in page.splitlines() if line.startswith("bat-pretrain")]
    words = shlex.split(html.unescape(command.removesuffix("</pre>")))[1:]
    assert to_yaml(compose(Pretrain, "pretrain", words)) == to_yaml(config)
    for text in ("done: step 20 of 20, loss 1.500", "70.00 accuracy", "no batch for 9 s", "f00d"):
        assert text in page, text
    assert page.count("data:image/png;base64,") == 4  # losses, probes, health, masks
    assert "<b>" not in page
    assert bat.main(["runs", "report", str(make(tmp_path / "p", "probe"))]) == 2


def test_a_run_that_fails__says_so_in_its_log_until_it_resumes(tmp_path: Path, small) -> None:
    def end(error: BaseException) -> str:
        config = small(out=tmp_path / "run")
        with pytest.raises(type(error)), run_folder(config, tmp_path / "run") as begin:
            _begin_and(begin, error)
        return Run(tmp_path / "run").state

    assert end(UserError("the data\nis gone")) == "failed"
    assert end(Interrupted("SIGTERM")) == "interrupted"


def _begin_and(begin: Callable[[], None], error: BaseException) -> None:
    begin()
    logging.getLogger("bat").info("begins")
    raise error
