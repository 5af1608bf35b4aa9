"""Checkpoints: whole or absent, read back, pruned only once a newer one is safe."""

import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from bat.errors import UserError
from bat.train import checkpointing
from bat.train.checkpointing import (
    AtomicCheckpointIO,
    checkpoints,
    damaged,
    last_checkpoint,
    snapshot,
)
from bat.train.run_pretrain import pretrain
from bat.train.stopping import Stopping


def names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_a_snapshot_is_a_copy_that_later_steps_do_not_change() -> None:
    tree = {"a": torch.ones(3), "b": [torch.zeros(2), {"c": 1}], "d": (torch.ones(1), "x")}
    held = snapshot(tree)
    tree["a"].add_(1)
    tree["b"][1]["c"] = 2
    assert torch.equal(held["a"], torch.ones(3))
    assert held["b"][1] == {"c": 1}
    assert held["d"][1] == "x"
    assert isinstance(held["d"], tuple)


def test_what_is_saved_is_the_state_of_the_moment_though_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    original = torch.save

    def slow(*args, **keywords):
        assert gate.wait(10)
        original(*args, **keywords)

    monkeypatch.setattr(checkpointing.torch, "save", slow)
    io = AtomicCheckpointIO(background=True)
    weight = torch.ones(4)
    target = tmp_path / "checkpoints" / "step-00000001.ckpt"
    io.save_checkpoint({"w": weight}, target)
    weight.add_(1)
    assert not target.exists()
    gate.set()
    io.wait()
    assert torch.equal(torch.load(target, weights_only=True)["w"], torch.ones(4))


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_flipped_byte_or_a_lost_end_is_noticed(tmp_path: Path, where: float) -> None:
    path = tmp_path / "checkpoints" / "step-00000002.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.randn(50_000)}, path)
    AtomicCheckpointIO().save_checkpoint(
        {"w": torch.randn(50)}, path.with_name("step-00000001.ckpt")
    )
    assert damaged(path) == ""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)
    assert damaged(path)
    assert last_checkpoint(tmp_path) == path.with_name("step-00000001.ckpt")
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data[: int(len(data) * where)])
    assert damaged(path)


def test_what_does_not_read_back_never_gets_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says yes and writes something else."""
    original = torch.save

    def lies(data, path):
        original(data, path)
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(content)

    target = tmp_path / "checkpoints" / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(9)}, target)
    monkeypatch.setattr(checkpointing.torch, "save", lies)
    later = target.with_name("step-00000002.ckpt")
    with pytest.raises(UserError, match=r"does not read back .*step-00000001.ckpt is untouched"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.randn(50_000)}, later)
    assert names(tmp_path) == [target.name]


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    original = torch.save

    def save(data, path):
        if "step-00000004" not in str(path):
            return original(data, path)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.getsignal(signal.SIGXFSZ)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))  # a file may not grow
        try:
            assert handler == signal.SIG_IGN
            return original(data, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.torch, "save", save)
        with pytest.raises(
            UserError, match=r"cannot write checkpoint .*4.ckpt.*2.ckpt is untouched; free some"
        ):
            pretrain(small("train.steps=20", out=out))
    assert names(out) == ["last.ckpt", "step-00000002.ckpt"]
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    pretrain(small("train.steps=20", out=out))


def test_kept_are_the_latest_and_every_nth(small, tmp_path: Path) -> None:
    words = ["train.steps=12", "train.keep=2", "train.keep_every=4"]
    pretrain(small(*words, out=tmp_path / "run"))
    steps = [int(p.stem[5:]) for p in checkpoints(tmp_path / "run")]
    assert steps == [12, 10, 8, 4]


def test_a_damaged_later_checkpoint_does_not_push_whole_ones_out(small, tmp_path: Path) -> None:
    from bat.errors import Interrupted

    out, original = tmp_path / "run", Stopping.on_train_batch_end

    def ask(self, *args):
        if args[0].global_step == 3:
            self.ask("a test")
        original(self, *args)

    config = small("train.keep=1", out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stopping, "on_train_batch_end", ask)
        with pytest.raises(Interrupted):
            pretrain(config)
    (good,) = checkpoints(out)
    broken = good.with_name("step-00000009.ckpt")
    broken.write_bytes(good.read_bytes()[:5000])
    pretrain(config)
    assert names(out) == ["damaged-step-00000009.ckpt", "last.ckpt", "step-00000006.ckpt"]
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_leftovers_of_a_cut_write_are_swept(small, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    config = small("train.steps=2", out=tmp_path / "run")
    pretrain(config)
    (folder / ".step-00000004.ckpt.tmp").write_bytes(b"half")
    pretrain(config)
    assert names(tmp_path / "run") == ["last.ckpt", "step-00000002.ckpt"]


def test_the_summary_says_what_checkpoints_cost(small, tmp_path: Path) -> None:
    import json

    pretrain(small(out=tmp_path / "run"))
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())["checkpoints"]
    assert facts["written"] == 3
    assert facts["mb"] > 1
    assert 0 < facts["stall_seconds"] < 60
    assert facts["longest_stall_seconds"] <= facts["stall_seconds"]


def test_where_no_checkpoint_loads_the_run_does_not_begin_anew_by_itself(
    small, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pretrain(small(out=out))
    for path in checkpoints(out):
        content = path.read_bytes()[:1000]
        path.unlink()
        path.write_bytes(content)
    metrics = (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"none of the checkpoints .* loads .*--force"):
        pretrain(small(out=out))
    assert (out / "metrics.jsonl").read_text() == metrics
    pretrain(small(out=out), force=True)
    assert last_checkpoint(out) == checkpoints(out)[0]


def test_what_the_writing_thread_meets_is_told(tmp_path: Path, monkeypatch) -> None:
    def save(*args):
        raise MemoryError("none left")

    monkeypatch.setattr(checkpointing.torch, "save", save)
    told: list[UserError] = []
    io = AtomicCheckpointIO(background=True, failed=told.append)
    io.save_checkpoint({}, tmp_path / "checkpoints" / "step-00000001.ckpt")
    io.wait()
    assert "none left" in str(told[0])
