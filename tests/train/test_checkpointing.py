"""Checkpoints and metrics: whole or absent, read back, pruned only once a newer one is safe."""

import json
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bat.errors import UserError
from bat.io import read_jsonl
from bat.train import checkpointing
from bat.train.checkpointing import (
    AtomicCheckpointIO,
    checkpoints,
    damaged,
    last_checkpoint,
    snapshot,
    step_of,
)
from bat.train.run_pretrain import pretrain
from bat.train.trainer import JsonLines
from tests.train.runs import run_and_cut


def names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def step_path(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}.ckpt"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full as soon as a file is longer."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_snapshot__is_a_copy_that_later_steps_do_not_change() -> None:
    tree = {"a": torch.ones(3), "b": [torch.zeros(2), {"c": 1}], "d": (torch.ones(1), "x")}
    held = snapshot(tree)
    tree["a"].add_(1)
    tree["b"][1]["c"] = 2
    assert torch.equal(held["a"], torch.ones(3))
    assert held["b"][1] == {"c": 1}
    assert held["d"][1] == "x"
    assert isinstance(held["d"], tuple)


def test_background__saves_the_state_of_the_moment_and_reports_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    original = torch.save

    def slow(checkpoint, *args):
        assert gate.wait(10)
        if not checkpoint:
            raise MemoryError("none left")
        original(checkpoint, *args)

    monkeypatch.setattr(checkpointing.torch, "save", slow)
    told: list[UserError] = []
    io = AtomicCheckpointIO(background=True, failed=told.append)
    weight, target = torch.ones(4), step_path(tmp_path, 1)
    io.save_checkpoint({"w": weight}, target)
    weight.add_(1)
    assert not target.exists()
    gate.set()
    io.wait()
    assert torch.equal(torch.load(target, weights_only=True)["w"], torch.ones(4))
    io.save_checkpoint({}, step_path(tmp_path, 2))
    io.wait()
    assert "none left" in str(told[0])


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_damaged__flipped_bit_or_lost_end_is_noticed(tmp_path: Path, where: float) -> None:
    first, path = step_path(tmp_path, 1), step_path(tmp_path, 2)
    AtomicCheckpointIO().save_checkpoint({"w": torch.randn(50_000)}, path)
    AtomicCheckpointIO().save_checkpoint({"w": torch.randn(50)}, first)
    assert damaged(path) == ""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)
    assert damaged(path)
    assert last_checkpoint(tmp_path) == first
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data[: int(len(data) * where)])
    assert damaged(path)


def test_save__what_does_not_read_back_never_gets_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says yes and writes something else; then one that is full."""
    original = torch.save

    def lies(data, path):
        original(data, path)
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(content)

    state = {"w": torch.randn(50_000)}
    AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(9)}, step_path(tmp_path, 1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.torch, "save", lies)
        with pytest.raises(UserError, match=r"does not read back .*step-00000001.ckpt is untouche"):
            AtomicCheckpointIO().save_checkpoint(state, step_path(tmp_path, 2))
    with (
        files_of_at_most(100_000),
        pytest.raises(UserError, match=r"cannot write checkpoint.*free some space"),
    ):
        AtomicCheckpointIO().save_checkpoint(state, step_path(tmp_path, 2))
    assert names(tmp_path) == ["step-00000001.ckpt"]


def test_pretrain__full_disk_ends_it_and_leaves_the_checkpoint_before(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "run", torch.save

    def save(data, path):
        if "step-00000004" not in str(path):
            return original(data, path)
        with files_of_at_most(100_000):
            return original(data, path)

    config = small("train.steps=20", "train.save_every=2", "train.keep=2", out=out)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.torch, "save", save)
        with pytest.raises(UserError, match=r"cannot write .*4.ckpt.*2.ckpt is untouched; free"):
            pretrain(config)
    assert names(out) == ["last.ckpt", "step-00000002.ckpt"]
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    pretrain(config)


def test_pretrain__keeps_the_latest_and_every_nth_and_sets_damaged_ones_aside(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    config = small("train.steps=12", "train.keep=2", "train.keep_every=4", out=out)
    run_and_cut(monkeypatch, config, at=5)
    assert [step_of(p) for p in checkpoints(out)] == [4, 2]
    for step in (8, 99):  # they would push whole ones out
        step_path(out, step).write_bytes(step_path(out, 4).read_bytes()[:5000])
    (out / "checkpoints" / ".step-00000006.ckpt.tmp").write_bytes(b"half")
    pretrain(config)
    kept = [f"step-{step:08d}.ckpt" for step in (4, 8, 10, 12)]
    aside = ["damaged-step-00000008.ckpt", "damaged-step-00000099.ckpt"]
    assert names(out) == [*aside, "last.ckpt", *kept]
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12


def test_pretrain__does_not_begin_anew_by_itself_where_no_checkpoint_loads(
    small, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pretrain(small("train.steps=2", out=out))
    for path in checkpoints(out):
        content = path.read_bytes()[:1000]
        path.unlink()
        path.write_bytes(content)
    metrics = (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"none of the checkpoints .* loads .*--force"):
        pretrain(small("train.steps=2", out=out))
    assert (out / "metrics.jsonl").read_text() == metrics
    pretrain(small("train.steps=2", out=out), force=True)
    assert last_checkpoint(out) == checkpoints(out)[0]


def test_json_lines__rewinding_drops_what_comes_after_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in (1, 2, 3):
        lines.log_metrics({"loss": step / 2, "bad": float("nan")}, step=step)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    lines.rewind(2)
    wanted = [{"step": 1, "loss": 0.5, "bad": None}, {"step": 2, "loss": 1.0, "bad": None}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == wanted
    lines.rewind(0)
    assert path.read_text() == ""


def test_json_lines__what_a_full_disk_refused_is_written_once_there_is_room(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log_metrics({"loss": 1.0}, step=1)
    size = path.stat().st_size
    with files_of_at_most(size + 5):  # room for half a line
        lines.log_metrics({"loss": 2.0}, step=2)
        lines.log_metrics({"loss": 3.0}, step=3)
        assert path.stat().st_size == size
    lines.log_metrics({"loss": 4.0}, step=4)
    assert [r["loss"] for r in read_jsonl(path)] == [1.0, 2.0, 3.0, 4.0]
