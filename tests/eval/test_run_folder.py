"""The run folder: its lock, other settings, leftovers."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.data.bad_clips import BadClips, merged_states
from bat.errors import UserError
from bat.eval.run_folder import default_out, run_folder
from bat.lock import LOCK, hold
from bat.logs import start_logging
from bat.types import Skipped, WaveBatch


def test_run_folder__other_settings_are_refused_unless_forced(
    small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with run_folder(small(out=out), out) as begin:
        assert (out / LOCK).exists()
        begin()
    logging.getLogger("bat").propagate = True
    with (
        pytest.raises(UserError, match=r"(?s)- optim.lr: 0.001.*\+ optim.lr: 0.5.*--force"),
        run_folder(small("optim.lr=0.5", out=out), out),
    ):
        pass
    words = ["optim.lr=0.5", "health.stall_seconds=60", "train.save_minutes=5"]
    with run_folder(small(*words, out=out), out, force=True) as begin:
        begin()
        assert "lr: 0.5" in (out / "config.yaml").read_text()
    assert "by --force" in caplog.text
    with run_folder(small("optim.lr=0.5", out=out), out):  # health and save_minutes are safe
        pass
    assert not (out / LOCK).exists()


def test_run_folder__in_use_is_refused(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with hold(out), pytest.raises(UserError, match="in use"), run_folder(small(out=out), out):
        pass
    assert not (out / "config.yaml").exists()


def test_run_folder__leftovers_of_an_interrupted_start(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in (".config.yaml.host-1-ab.tmp", LOCK, "train.log"):
        (out / name).write_text("")
    with run_folder(small(out=out), out) as begin:
        begin()
    assert (out / "config.yaml").is_file()


def test_run_folder__credentials_are_not_written(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for signature in ("aaaa1111", "bbbb2222"):
        url = f"https://me:pw123@host/a.tar?X-Amz-Signature={signature}"
        with run_folder(small(f"data.shards='{url}'", out=out), out) as begin:
            begin()
            text = (out / "config.yaml").read_text()
        assert signature not in text
        assert "pw123" not in text
        assert "host/a.tar" in text


def test_merged_states__counts_add_up() -> None:
    states = []
    for rank in range(2):
        clips = BadClips()
        skipped = [Skipped(f"k{rank}", "s.tar", "corrupt", "why", 0)]
        clips.add(WaveBatch(None, None, None, ["a", "b"], None, skipped))
        states.append(clips.state_dict())
    merged = json.loads(json.dumps(merged_states(states)))
    assert merged["seen"] == 6
    assert merged["kinds"] == {"corrupt": 2}
    assert merged["shards"] == {"s.tar": 2}
    assert set(merged["keys"]) == {"k0", "k1"}
    assert merged_states(states[:1]) == states[0]


def test_compose__settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.global_batch is for bat-pretrain"):
        compose(Probe, "probe", ["recipe=toy", "data.global_batch=8"])
    with pytest.raises(UserError, match=r"health\.collapse is for bat-pretrain"):
        compose(Finetune, "finetune", ["recipe=toy", "health.collapse=stop"])


def test_run_folder__nothing_is_written_before_begin(small, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "run"
    with pytest.raises(UserError, match="late"), run_folder(small(out=out), out):
        raise UserError("late")
    assert not (tmp_path / "runs").exists()
    with run_folder(small(out=out), out) as begin:
        begin()
    before = {p: p.read_bytes() for p in out.iterdir()}
    start_logging()  # as every command does first
    with pytest.raises(UserError, match="late"), run_folder(small("log.project=x", out=out), out):
        raise UserError("late")
    assert before == {p: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "made by hand").mkdir()
    with hold(tmp_path / "made by hand"):
        pass
    assert (tmp_path / "made by hand").is_dir()


@pytest.mark.parametrize(("schema", "command"), [(Probe, "probe"), (Finetune, "finetune")])
def test_default_out__tables_of_one_name_differ(schema, command) -> None:
    def out(csv: str) -> Path:
        return default_out(compose(schema, command, ["recipe=own", f"data.csv={csv}", RUN]))

    found = [out(csv) for csv in ("birds/labels.csv", "frogs/labels.csv", "./birds//labels.csv")]
    assert found[0] == found[2] != found[1]
    assert all("labels" in path.name and "my-run" in path.name for path in found)


RUN = "checkpoint=runs/my-run/export"


def test_check_first__imports_no_torch(tmp_path: Path) -> None:
    """A faulty CSV, a checkpoint that is not there, no data and a folder in use."""
    (tmp_path / "a.csv").write_text("path,label\nnone.wav,x\n")
    code = """
import sys
from pathlib import Path
from bat.cli import finetune, pretrain, probe
from bat.lock import hold
csv = ["data.csv=a.csv", "checkpoint=random"]
assert probe.main(csv) == finetune.main(csv) == 2
nowhere = ["recipe=toy", "checkpoint=nowhere"]
assert probe.main(nowhere) == finetune.main(nowhere) == 2
assert pretrain.main(["recipe=as2m"]) == pretrain.main(["recipe=esc10", "data.root=absent"]) == 2
with hold(Path("runs/pretrain-toy")):
    assert pretrain.main(["recipe=toy"]) == 2
assert not Path("runs").exists()
sys.exit(", ".join({"torch", "lightning"} & set(sys.modules)) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for said in ("none.wav", "nowhere does not", "no data given", "absent does not", "in use"):
        assert said in done.stderr
