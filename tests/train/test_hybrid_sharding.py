"""Four gloo processes as two nodes, checkpoints in parts, and objectives killed on two processes.

Float32 on the CPU; tolerances of docs/many_processes.md. Processes are killed (SIGKILL) before the
third of four steps, after the checkpoint of the second.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.data.toy import make_toy
from bat.errors import UserError
from bat.io import read_jsonl
from bat.train.checkpoint_parts import read_parts
from bat.train.checkpointing import AtomicCheckpointIO, checkpoints, damaged, last_checkpoint
from tests.train.processes import Job, run, seen
from tests.train.test_many_processes import LOSS, TINY, WEIGHT, apart, furthest, step_losses

pytestmark = pytest.mark.slow

STEPS = 4
FSDP = ("hardware.strategy=fsdp", "hardware.checkpoint=sharded")
HSDP = ("hardware.num_nodes=0", "hardware.strategy=hsdp", "hardware.checkpoint=sharded")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, each by the name of its job."""
    root = tmp_path_factory.mktemp("runs")
    make_toy(root / "shards" / "toy")

    def job(name: str, *words: str, killed: int | None = None) -> Job:
        own = [f"out={root / name}", f"data.cache={root / 'shards'}", "model.depth=1"]
        merged = dict(w.split("=", 1) for w in [*TINY.split(), *own, *words])
        return Job(name, [f"{k}={v}" for k, v in merged.items()], killed=killed)

    def killed(jobs: list[Job], **how: int) -> None:
        with pytest.raises(RuntimeError, match="failed"):
            run(jobs, folder=root, **how)

    eat = ("hardware.strategy=ddp", "objective=eat")
    sslam = (*FSDP, "objective=sslam")
    run([job("hsdp", *HSDP)], world=4, nodes=2, folder=root)
    for name in ("on-1", "on-2"):  # as after two steps, killed while writing a checkpoint
        shutil.copytree(root / "hsdp", root / name, symlinks=True)
        newest = root / name / "checkpoints/step-00000004.ckpt"
        newest.rename(newest.with_name(".step-00000004.ckpt.tmp"))
    run([job("one"), job("on-1")], world=1, folder=root)
    killed([job("eat", *eat), job("sslam", *sslam), job("eat-cut", *eat, killed=2)], world=2)
    killed([job("eat-cut", *eat), job("sslam-cut", *sslam, killed=2)], world=2)
    run([job("sslam-cut", *sslam), job("on-2", *FSDP, "train.keep=1")], world=2, folder=root)
    return root


def whole(run: Path, step: int = STEPS) -> dict:
    path = run / "checkpoints" / f"step-{step:08d}.ckpt"
    return AtomicCheckpointIO().load_checkpoint(path)


def shapes(tree: Any) -> Any:
    """``tree`` with types and shapes in place of tensors."""
    return tree_map(lambda t: (type(t), getattr(t, "shape", t)), tree)


def assert_same(a: dict, b: dict) -> None:
    """Weights and moments of two checkpoints, to the last bit."""
    assert furthest(a["state_dict"], b["state_dict"]) == 0
    ours, theirs = (c["optimizer_states"][0]["state"] for c in (a, b))
    assert list(ours) == list(theirs)
    assert all(furthest(ours[i], theirs[i]) == 0 for i in ours)


def test_hsdp__two_nodes_give_the_losses_and_weights_of_one_process(runs: Path) -> None:
    alone = step_losses(runs, "one", 1)
    assert step_losses(runs, "hsdp", 4) == pytest.approx(alone, rel=LOSS)
    half, ours = (whole(runs / "hsdp", step)["state_dict"] for step in (2, 4))
    assert apart(whole(runs / "one")["state_dict"], ours) < WEIGHT
    assert apart(half, ours) > 100 * WEIGHT  # something was learned


def test_hsdp__splits_within_a_node_and_writes_each_part_once(runs: Path) -> None:
    folder = runs / "hsdp/checkpoints/step-00000004.ckpt"
    parts = [load_file(file) for file in sorted(folder.glob("shard-*"))]
    assert len(parts) == 4
    name = "state_dict/objective.student.encoder.blocks.0.mlp.fc1.weight"
    halves = [part[name] for part in parts if name in part]
    assert [tuple(half.shape) for half in halves] == [(96, 48)] * 2  # of 192 rows, two a node
    assert torch.equal(torch.cat(halves), whole(runs / "hsdp")["state_dict"][name[11:]])


@pytest.mark.parametrize(("name", "world"), [("on-1", 1), ("on-2", 2)])
def test_parts__of_two_nodes_resume_on_fewer_processes(runs: Path, name: str, world: int) -> None:
    assert step_losses(runs, name, world) == pytest.approx(
        step_losses(runs, "one", 1)[2:], rel=LOSS
    )
    assert apart(whole(runs / name)["state_dict"], whole(runs / "one")["state_dict"]) < WEIGHT
    assert not [*(runs / name / "checkpoints").glob(".*")]


def test_parts__are_rotated_and_last_is_the_newest(runs: Path) -> None:
    folder = runs / "on-2/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["last.ckpt", "step-00000004.ckpt"]
    assert (folder / "last.ckpt").resolve() == folder / "step-00000004.ckpt"
    assert (runs / "on-1/checkpoints/last.ckpt").is_file()  # one process writes a file


def test_parts__and_export_equal_the_plain_files(runs: Path) -> None:
    parts, file = whole(runs / "hsdp"), whole(runs / "one")
    assert parts.keys() == file.keys()
    assert (
        parts["optimizer_states"][0]["param_groups"] == file["optimizer_states"][0]["param_groups"]
    )
    for part in ("state_dict", "optimizer_states"):
        assert shapes(parts[part]) == shapes(file[part])
    exported = load_file(runs / "hsdp/export/model.safetensors")
    held = {n.removeprefix("objective."): t for n, t in parts["state_dict"].items()}
    assert exported
    assert all(torch.equal(t, held[name]) for name, t in exported.items())


def test_parts__damage_is_noticed(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs / "hsdp", out, symlinks=True)
    newest, before = checkpoints(out)
    (part, *_) = sorted(newest.glob("shard-*"))
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    with pytest.raises(OSError, match=rf"{part.name} does not have its checksum"):
        read_parts(newest)
    with pytest.raises(UserError, match=r"step-00000004.*move it away"):
        AtomicCheckpointIO().load_checkpoint(newest)
    part.write_bytes(data[:-8])
    assert part.name in damaged(newest)
    assert last_checkpoint(out) == before
    (before / "parts.json").unlink()  # it is written last
    with pytest.raises(UserError, match=r"none of the checkpoints.*parts\.json"):
        last_checkpoint(out)


@pytest.mark.parametrize("name", ["eat", "sslam"])
def test_objectives__killed_on_two_processes_and_resumed_give_the_same_run(
    runs: Path, name: str
) -> None:
    before, after = seen(runs, name, 1), seen(runs, f"{name}-cut", 1)
    assert [r["loss"] for r in after] == [r["loss"] for r in before[-len(after) :]]
    assert_same(whole(runs / name), whole(runs / f"{name}-cut"))
    steps = [
        [row["loss"] for row in read_jsonl(runs / r / "metrics.jsonl") if "loss" in row]
        for r in (name, f"{name}-cut")
    ]
    assert steps[0] == steps[1]
    assert len(steps[0]) == STEPS


def test_settings__parts_without_a_split_model_are_refused() -> None:
    words = ["recipe=toy", "hardware.strategy=ddp", "hardware.checkpoint=sharded"]
    with pytest.raises(UserError, match=r"checkpoint=sharded with strategy=ddp.*strategy=fsdp"):
        compose(Pretrain, "pretrain", words)
