"""The launch files: processes get what they need, a saved run is told apart from a failed one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bat.data.toy import make_toy

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch"

SRUN = """#!/bin/sh
# Slurm's srun as far as it matters: two tasks on one node, the greatest of their exit codes
while [ "${1#-}" != "$1" ]; do echo "$1" >> "$STUB/srun-options"; shift; done
export SLURM_JOB_ID=4242 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0
export SLURM_NODELIST=localhost SLURM_JOB_NAME=bat
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; a=$?; wait $second; b=$?
[ $a -gt $b ] && exit $a
exit $b
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder first in PATH, with an ``srun`` and a ``scontrol``."""
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "srun").write_text(SRUN)
    (folder / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$STUB/scontrol-said"\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


def environment(stub: Path, **more: str) -> dict[str, str]:
    path = f"{stub}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "STUB": str(stub), "SLURM_JOB_ID": "4242", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


@pytest.mark.slow
def test_slurm_starts_one_run_of_its_tasks(stub: Path, tmp_path: Path):
    make_toy(tmp_path / "shards" / "toy")
    words = ["recipe=toy", f"out={tmp_path / 'run'}", f"data.cache={tmp_path / 'shards'}"]
    words += ["hardware.accelerator=cpu", "hardware.precision=32-true", "hardware.compile=off"]
    words += ["model.width=48", "model.depth=1", "model.heads=2", "objective.decoder_depth=1"]
    words += ["train.steps=2", "online.every=0", "log.progress=false", "data.global_batch=4"]
    command = [sys.executable, "-m", "bat.cli.pretrain"]
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *command, *words],
        env=environment(stub), cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 clips a step: 2 a micro-batch x 1 accumulated x 2 device(s)" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert "--wait=600" in (stub / "srun-options").read_text()
    assert not (stub / "scontrol-said").exists()


@pytest.mark.parametrize("code", [75, 2])
def test_slurm_requeues_what_says_resume_me_and_nothing_else(stub: Path, code: int):
    (stub / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "x"], env=environment(stub), timeout=30)
    assert done.returncode == code
    said = stub / "scontrol-said"
    assert (said.read_text() if said.exists() else "") == ("requeue 4242\n" if code == 75 else "")


def test_slurm_array_gives_each_job_its_part(stub: Path):
    (stub / "srun").write_text('#!/bin/sh\nshift\n"$@"\n')
    command = ["bash", LAUNCH / "array.sbatch", "echo", "bat-shard", "in", "out"]
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "64", "SLURM_ARRAY_JOB_ID": "7"}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        own = environment(stub, **array, **more)
        return subprocess.run(command, env=own, capture_output=True, text=True, timeout=30)

    done = run(SLURM_ARRAY_TASK_COUNT="64")
    assert (done.returncode, done.stdout) == (0, "bat-shard in out --part 3/64\n")
    assert run(SLURM_ARRAY_TASK_COUNT="2").returncode == 2  # how many parts there were is unknown
    assert run(SLURM_ARRAY_TASK_COUNT="2", PARTS="80").stdout == "bat-shard in out --part 3/80\n"
    (stub / "srun").write_text("#!/bin/sh\nexit 75\n")
    assert run(SLURM_ARRAY_TASK_COUNT="64").returncode == 75
    assert (stub / "scontrol-said").read_text() == "requeue 7_3\n"


STAND_IN = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *a: asked.append(1))
rank = os.environ["RANK"]
open(os.path.join(os.environ["STUB"], "started-" + rank), "w").write(" ".join(sys.argv[1:]))
if "fail" in sys.argv and rank == "1":
    sys.exit(2)
while not asked and "finish" not in sys.argv:
    time.sleep(0.05)
sys.exit(75 if asked else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("word", "code"), [("", 75), ("finish", 0), ("fail", 2)])
def test_torchrun_hands_signals_down_and_exit_codes_up(stub: Path, word: str, code: int):
    """With a stand-in for the command, quick to start."""
    package = stub / "bat" / "cli"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "pretrain.py").write_text(STAND_IN)
    own = environment(stub, PYTHONPATH=str(stub), PROCESSES="2")
    script = subprocess.Popen([LAUNCH / "torchrun.sh", "bat-pretrain", word], env=own, cwd=stub)
    try:
        started = [stub / f"started-{rank}" for rank in range(2)]
        deadline = time.monotonic() + 60
        while not all(f.exists() and f.read_text() for f in started):
            assert time.monotonic() < deadline, "the processes did not start"
            time.sleep(0.05)
        if not word:
            script.send_signal(signal.SIGTERM)
        assert script.wait(60) == code
    finally:
        script.kill()
    assert started[0].read_text().split()[-1] == "hardware.num_nodes=0"


def test_torchrun_knows_its_commands():
    done = subprocess.run(
        [LAUNCH / "torchrun.sh", "rm"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "usage" in done.stderr
