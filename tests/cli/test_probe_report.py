"""bat-probe report: folders in, a page and a table out; what is no run is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.cli.probe_report import main
from bat.eval.report import read_summary, report
from bat.report.plots import plot_layer_gates
from tests.report.probe_summaries import summary


def write_run(folder: Path, given: dict[str, Any], *, pictures: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(given), encoding="utf-8")
    if pictures:
        for name in ("comparison.png", "A/layer-gates.png"):
            plot_layer_gates({"cgp": [[0.2, 0.8]]}, folder / "plots" / name)
    return folder


def test_report__of_one_run_lies_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", summary(), pictures=True)
    assert main([str(run)]) == 0
    assert {p.name for p in run.iterdir()} == {"summary.json", "plots", "report.html", "report.md"}
    shown = capsys.readouterr().out
    assert f"page      {run}/report.html\ntable     {run}/report.md" in shown
    assert "95% bootstrap interval" in shown
    html = (run / "report.html").read_text(encoding="utf-8")
    assert 'alt="Every probe of every encoder"' in html
    assert 'alt="Layer gates: A"' in html
    assert (run / "report.md").read_text(encoding="utf-8").startswith("# Probes of esc10\n")


def test_report__several_runs_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one", summary(encoders=["A"]), pictures=True)
    write_run(tmp_path / "two", summary(encoders=["B"], draw=1))
    write_run(tmp_path / "x" / "two", summary(task="scv2"))  # of the same name, another task
    assert main(["one", "two/summary.json", "x/two"]) == 0
    table = Path("probe-report/report.md").read_text(encoding="utf-8")
    assert "| probe | A | B |" in table
    assert "## scv2" in table
    html = Path("probe-report/report.html").read_text(encoding="utf-8")
    assert html.count("<section") == 2
    assert html.count("<img") == 2
    assert main(["one", "two", "--out", "deep/there"]) == 0
    assert {p.name for p in Path("deep/there").iterdir()} == {"report.html", "report.md"}


def _unfinished(run: Path) -> None:
    (run / "results.jsonl").write_text("{}\n")
    (run / "summary.json").unlink()


def _edited(*keys: str, value: Any = None) -> Any:
    def edit(run: Path) -> None:
        path = run / "summary.json"
        whole = json.loads(path.read_text())
        at = whole
        for key in keys[:-1]:
            at = at[key]
        if value is None:
            del at[keys[-1]]
        else:
            at[keys[-1]] = value
        path.write_text(json.dumps(whole))

    return edit


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: (run / "summary.json").unlink(), "has no summary.json: it is no run of"),
        (_unfinished, "is not finished: the same bat-probe command continues it"),
        (lambda run: (run / "summary.json").write_text('{"task": '), "is damaged"),
        (lambda run: (run / "summary.json").write_text("[" * 100_000), "is damaged"),
        (lambda run: (run / "summary.json").write_text('{"step": 7}'), "is not of bat-probe"),
        (_edited("encoders"), "(of bat 0.6.0) is of another version or was edited"),
        (_edited("metric", value="purity"), "purity"),
        (_edited("splits", value=[3]), "was edited"),
        (_edited("encoders", "A", "digest"), "'digest'"),
        (_edited("encoders", "A", "results", "cgp", "folds", "1", value=3), "was edited"),
    ],
)
def test_report__what_is_no_whole_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, expected: str
) -> None:
    run = write_run(tmp_path / "run", summary())
    damage(run)
    before = set(run.iterdir())
    assert main([str(run)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("bat-probe report: error: ")
    assert str(run) in shown
    assert expected in shown
    assert set(run.iterdir()) == before


def test_report__folders_that_cannot_be_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", summary())
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 2
    assert "file is no folder" in capsys.readouterr().err
    assert main([str(run), str(tmp_path / "run" / ".." / "run")]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_pictures__that_are_none_or_of_other_encoders_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run", summary(encoders=["B"]), pictures=True)  # theirs are A's
    plot_layer_gates({"cgp": [[0.2, 0.8]]}, run / "plots" / "B" / "folds.png")
    (run / "plots" / "gates.png").write_text("<svg onload=alert(1)>")
    html = report([run]).html.read_text(encoding="utf-8")
    assert "gates.png is no PNG" in caplog.text
    assert 'alt="Every probe of every encoder"' in html
    assert 'alt="Results by held-out fold: B"' in html
    assert html.count("<img") == 2
    given = summary(encoders=["A"]) | {"unfinished": ["B"]}  # comparisons are of the run before
    run = write_run(tmp_path / "unfinished", given, pictures=True)
    plot_layer_gates({"cgp": [[0.2, 0.8]]}, run / "plots" / "my-own.png")
    html = report([run]).html.read_text(encoding="utf-8")
    assert 'alt="Every probe of every encoder"' not in html
    assert 'alt="Layer gates: A"' in html
    assert 'alt="My own"' in html


def test_report__credentials_are_not_shown(tmp_path: Path) -> None:
    given = summary(encoders=["A"])
    given["encoders"]["A"]["checkpoint"] = "https://user:hunter2@host/a.safetensors"
    run = write_run(tmp_path / "run", given)
    made = report([run])
    for path in (made.html, made.markdown):
        assert "hunter2" not in path.read_text(encoding="utf-8")
    assert "hunter2" not in made.text
    clean = summary(encoders=["A"])
    assert read_summary(write_run(tmp_path / "clean", clean)) == json.loads(json.dumps(clean))


def test_report__differences_are_paired(tmp_path: Path) -> None:
    """Replicates that move together leave a narrow difference, however wide each interval is."""
    given = summary(encoders=["A"], methods=["linear", "cgp"], folds=["1", "2"], seeds=[0])
    rng = np.random.default_rng(0)
    for fold in ("1", "2"):
        for method, level in (("linear", 0.6), ("cgp", 0.65)):
            entry = given["encoders"]["A"]["results"][method]
            entry["mean"]["accuracy"] = level
            entry["folds"][fold]["0"]["accuracy"] = level
    run = write_run(tmp_path / "run", given)
    lines = []
    for fold in ("1", "2"):
        shared = rng.normal(0, 0.1, 200)
        for method, level in (("linear", 0.6), ("cgp", 0.65), ("curve@1", 0.1)):
            values = level + shared + rng.normal(0, 0.001, 200)
            row = {"encoder": "A", "method": method, "fold": fold, "seed": 0}
            row |= {"metrics": {"accuracy": level}, "replicates": values.tolist()}
            lines.append(json.dumps(row))
    (run / "results.jsonl").write_text("\n".join(lines) + "\n")
    html = report([run]).html.read_text(encoding="utf-8")
    [shown] = [cell for cell in html.split("<td>") if cell.startswith("+5.00 [")]
    low, high = (float(v) for v in shown[7 : shown.index("]")].split(", "))
    assert 4.6 < low < 5 < high < 5.4
    (run / "results.jsonl").write_text("\n".join(lines[:-1]) + '\n{"encoder"\n')
    assert "best minus this" not in report([run]).html.read_text(encoding="utf-8")


def test_help__is_light() -> None:
    code = (
        "import sys\n"
        "from bat.cli.probe_report import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'omegaconf'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: bat-probe report" in done.stdout
