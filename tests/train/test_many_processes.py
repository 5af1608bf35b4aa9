"""Two gloo processes (and four, and one) on the CPU: DDP, FSDP2 and one process are one training.

All runs are made once, by a few groups of processes that do several in a row. Float32 on the CPU;
what differs is the order of additions. Losses agree to 1e-6 of themselves (seen: 1.4e-7), weights
to 1e-6 after 4 steps of at most 4e-4 (seen: 1.2e-7), but for the keys' bias: softmax does not see
it, its gradient is rounding, of which Adam makes whole steps (seen: 6e-5). DDP and FSDP2 on two
processes add the same numbers in the same order: they agree to the last bit.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bat
from bat.audio.decode import encode
from bat.data.index import open_index
from bat.data.toy import make_toy, toy_wave
from bat.io import read_jsonl
from bat.shard.write import write_shards
from bat.tasks.base import Row
from bat.train.nan_replay import replay
from tests.train.processes import Job, run, seen

pytestmark = pytest.mark.slow

TINY = (
    "recipe=toy hardware.accelerator=cpu hardware.devices=auto data.global_batch=8 data.batch=8 "
    "model.width=48 model.depth=2 model.heads=2 objective.decoder_depth=2 objective.mask.views=2 "
    "train.steps=4 train.save_every=2 train.log_every=1 online.every=0 log.progress=false"
)
TUNE = (
    "recipe=toy hardware.accelerator=cpu hardware.devices=auto data.global_batch=4 data.batch=4 "
    "folds=[1] drop_path=0 head.dropout=0 augment.noise_p=0 augment.mixup_p=0 augment.spec_freq=0 "
    "augment.spec_time=0 train.steps=3 train.log_every=1 log.progress=false"
)
DROPPING = ("model.drop_path=0.3", "data.workers=1", "data.batch=2")
STEPS, GLOBAL = 4, 8
LOSS, WEIGHT = 1e-6, 1e-6
EPOCH = 11  # clips of three unequal shards


def unequal_shards(folder: Path) -> Path:
    """11 clips in shards of 6, 4 and 1."""
    (folder / "audio").mkdir(parents=True)
    rows = []
    for i, seconds in enumerate([0.2] * 6 + [0.3] * 4 + [1.2]):
        path = folder / "audio" / f"{i:02d}.wav"
        wave = toy_wave("noise", seed=1, number=i, seconds=seconds)
        path.write_bytes(encode(wave, sample_rate=16_000, codec="wav"))
        rows.append(Row(path, f"clip{i:02d}", ("a",)))
    write_shards(rows, folder / "set", shard_bytes=52_000)
    index = open_index(folder / "set")
    sizes = torch.bincount(torch.as_tensor(index.shard.astype("int64"))).tolist()
    assert sorted(sizes) == [1, 4, 6]
    return folder / "set"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, each by the name of its job."""
    root = tmp_path_factory.mktemp("runs")
    make_toy(root / "shards" / "toy")
    shards = unequal_shards(root / "clips")

    def job(name: str, *words: str, command: str = "pretrain", **more) -> Job:
        own = [f"out={root / name}", f"data.cache={root / 'shards'}"]
        usual = (TINY if command == "pretrain" else TUNE).split()
        merged = dict(w.split("=", 1) for w in [*usual, *own, *words])
        if merged.get("objective") == "mae":
            del merged["objective.mask.views"]
        return Job(name, [f"{k}={v}" for k, v in merged.items()], command=command, **more)

    def half_done(name: str, other: str) -> None:
        """A copy of run ``name`` as it was after 2 steps."""
        shutil.copytree(root / name, root / other)
        (root / other / "checkpoints" / "step-00000004.ckpt").unlink()
        (root / other / "checkpoints" / "last.ckpt").unlink(missing_ok=True)

    ddp, fsdp = "hardware.strategy=ddp", "hardware.strategy=fsdp"
    encoder = f"checkpoint={root / 'one'}"
    alone = [
        job("one"),
        job("mae-one", "objective=mae"),
        job("tune-one", encoder, command="finetune"),
    ]
    pair = [
        job("ddp", ddp),
        job("ddp-accumulated", ddp, "data.batch=2"),
        job("fsdp", fsdp, "online.every=4", "online.steps=1"),
        job("fsdp-accumulated", fsdp, "data.batch=2"),
        job("mae-fsdp", fsdp, "objective=mae"),
        job("unequal", ddp, f"data.shards=[{shards}]", "data.global_batch=4", "online.every=0"),
        job("poisoned", fsdp, "train.steps=3", "train.save_every=1", poisoned=(1, 1)),
        job("tune-fsdp", encoder, fsdp, command="finetune"),
        job("dropping", ddp, *DROPPING),
    ]
    run(alone, world=1, folder=root)
    run(pair, world=2, folder=root)
    half_done("fsdp", "fsdp-on-1")
    half_done("fsdp", "fsdp-on-4")
    half_done("dropping", "dropping-on-2")
    run([job("fsdp-on-1")], world=1, folder=root)
    run([job("dropping-on-2", ddp, *DROPPING)], world=2, folder=root)
    run([job("fsdp-on-4", ddp)], world=4, folder=root)
    return root


def state(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step-{step:08d}.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Greatest difference of two state dicts of the same names."""
    assert list(a) == list(b)
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """``furthest``, the keys' bias left out."""

    def seen_by_softmax(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        biases = {n: t.chunk(3) for n, t in state.items() if n.endswith("attn.qkv.bias")}
        assert biases
        return {**state, **{n: torch.cat([q, v]) for n, (q, _, v) in biases.items()}}

    return furthest(seen_by_softmax(a), seen_by_softmax(b))


def step_losses(root: Path, name: str, world: int, micro: int = 1) -> list[float]:
    """Mean loss of each step over ranks and micro-batches."""
    rows = [[r["loss"] for r in seen(root, name, rank)] for rank in range(world)]
    means = torch.tensor(rows).mean(0)
    return means.view(-1, micro).mean(1).tolist()


CASES = [("ddp", 1), ("ddp-accumulated", 2), ("fsdp", 1), ("fsdp-accumulated", 2)]


@pytest.mark.parametrize(("name", "micro"), CASES)
def test_two_processes__give_the_losses_and_weights_of_one(runs: Path, name: str, micro: int):
    alone = step_losses(runs, "one", 1)
    assert len(alone) == STEPS
    assert step_losses(runs, name, 2, micro) == pytest.approx(alone, rel=LOSS)
    assert apart(state(runs / name), state(runs / "one")) < WEIGHT
    moved = apart(state(runs / name), state(runs / name, 2))
    assert moved > 100 * WEIGHT, "hardly anything was learned: the comparison says nothing"


def test_mae__two_sharded_processes_give_the_losses_and_weights_of_one(runs: Path):
    alone = step_losses(runs, "mae-one", 1)
    assert step_losses(runs, "mae-fsdp", 2) == pytest.approx(alone, rel=LOSS)
    assert apart(state(runs / "mae-fsdp"), state(runs / "mae-one")) < WEIGHT


def test_fsdp__gives_the_weights_of_ddp_to_the_last_bit(runs: Path):
    assert furthest(state(runs / "fsdp"), state(runs / "ddp")) == 0
    assert furthest(state(runs / "fsdp-accumulated"), state(runs / "ddp-accumulated")) == 0


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_metrics__loss_and_gradient_norm_are_those_of_one_process(runs: Path, name: str):
    def rows(run: str) -> list[dict]:
        return [r for r in read_jsonl(runs / run / "metrics.jsonl") if "loss" in r]

    assert [r["step"] for r in rows(name)] == [1, 2, 3, 4]
    for ours, alone in zip(rows(name), rows("one"), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=LOSS)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(("name", "micro"), CASES)
def test_stream__clips_and_masks_differ_between_ranks_and_are_those_of_one(
    runs, name: str, micro: int
):
    def by_position(run: str, rank: int) -> dict[int, tuple]:
        found = {}
        for row in seen(runs, run, rank):
            for i, place in enumerate(row["positions"]):
                found[place] = (row["keys"][i], row["masks"][i])
        return found

    first, second, alone = by_position(name, 0), by_position(name, 1), by_position("one", 0)
    assert not set(first) & set(second)
    assert {**first, **second} == alone
    assert set(alone) == set(range(STEPS * GLOBAL))
    masks = [tuple(mask) for _, mask in alone.values()]
    assert len(set(masks)) == len(masks), "two clips of the stream got the same masks"


def test_accumulation__gradients_travel_once_a_step(runs: Path):
    syncs = [row["syncs"] for row in seen(runs, "ddp-accumulated", 0)]
    assert syncs == [False, True] * STEPS
    scattered = [row["scattered"] for row in seen(runs, "fsdp-accumulated", 0)]
    units = 4  # two blocks, the decoder, the rest
    assert scattered == [units * (k // 2) for k in range(2 * STEPS)]
    assert [row["scattered"] for row in seen(runs, "fsdp", 0)] == [units * k for k in range(STEPS)]


def test_stream__unequal_shards_neither_hang_nor_drop_nor_repeat(runs: Path):
    keys: dict[int, str] = {}
    for rank in range(2):
        rows = seen(runs, "unequal", rank)
        assert [len(r["keys"]) for r in rows] == [2] * STEPS  # equal work in every step
        for row in rows:
            for place, key in zip(row["positions"], row["keys"], strict=True):
                assert place not in keys
                keys[place] = key
    assert sorted(keys) == list(range(4 * STEPS))
    for epoch in range(4 * STEPS // EPOCH):
        own = [keys[p] for p in range(epoch * EPOCH, (epoch + 1) * EPOCH)]
        assert sorted(own) == [f"clip{i:02d}" for i in range(EPOCH)]


@pytest.mark.parametrize(("name", "world"), [("fsdp-on-1", 1), ("fsdp-on-4", 4)])
def test_checkpoint__of_two_resumes_with_one_and_with_four(runs: Path, name: str, world: int):
    assert step_losses(runs, name, world, len(seen(runs, name, 0)) // 2) == pytest.approx(
        step_losses(runs, "one", 1)[2:], rel=LOSS
    )
    assert apart(state(runs / name), state(runs / "one")) < WEIGHT
    places = [p for rank in range(world) for r in seen(runs, name, rank) for p in r["positions"]]
    assert sorted(places) == list(range(2 * GLOBAL, STEPS * GLOBAL))  # nothing twice, nothing left


def test_checkpoint__of_fsdp_is_one_plain_file_of_ddps_form(runs: Path):
    path = "checkpoints/step-00000004.ckpt"
    ddp, fsdp = (torch.load(runs / r / path, weights_only=True) for r in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    assert all(type(t) is torch.Tensor for t in fsdp["state_dict"].values())
    ours, theirs = fsdp["optimizer_states"][0], ddp["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, moments in theirs["state"].items():
        assert furthest(ours["state"][number], moments) == 0


def test_export__of_fsdp_is_one_plain_file_equal_to_ddps(runs: Path):
    folders = [runs / r / "export" for r in ("fsdp", "ddp")]
    files = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert files[0] == files[1] == ["config.json", "model.safetensors"]
    fsdp, ddp = (load_file(folder / "model.safetensors") for folder in folders)
    assert {n: t.shape for n, t in fsdp.items()} == {n: t.shape for n, t in ddp.items()}
    assert furthest(dict(sorted(fsdp.items())), dict(sorted(ddp.items()))) == 0
    teacher = bat.load_encoder(runs / "fsdp", weights="teacher")
    assert teacher(torch.zeros(1, 32_000)).patches.shape[:2] == (2, 1)


def test_online__probes_run_under_fsdp(runs: Path):
    rows = read_jsonl(runs / "fsdp" / "metrics.jsonl")
    probed = [r["step"] for r in rows if "online/cgp/accuracy" in r]
    assert probed == [0, 4]


def test_guard__nan_on_one_rank_skips_the_step_on_all(runs: Path):
    path = "poisoned/checkpoints/step-{:08d}.ckpt"
    one, two, three = (
        torch.load(runs / path.format(step), weights_only=True) for step in (1, 2, 3)
    )
    assert furthest(one["state_dict"], two["state_dict"]) == 0  # teacher too
    for number, moments in one["optimizer_states"][0]["state"].items():
        assert furthest(moments, two["optimizer_states"][0]["state"][number]) == 0
    assert furthest(two["state_dict"], three["state_dict"]) > 0
    assert all(torch.isfinite(t).all() for t in three["state_dict"].values())
    kept = replay(runs / "poisoned" / "nan" / "2")  # the loss became NaN after it was recorded
    assert [rank for rank, *_ in kept.losses] == [0, 1]
    for _, _, loss, then in kept.losses:
        assert abs(loss - then) <= LOSS * then


def test_finetune__fsdp_gives_the_head_and_encoder_of_one_process(runs: Path):
    alone, ours = runs / "tune-one" / "fold-1", runs / "tune-fsdp" / "fold-1"
    for file in ("export/model.safetensors", "head/model.safetensors"):
        a, b = (dict(sorted(load_file(folder / file).items())) for folder in (alone, ours))
        assert (furthest if "head" in file else apart)(a, b) < WEIGHT
    results = [json.loads((r / "result.json").read_text()) for r in (alone, ours)]
    assert results[0]["metrics"].keys() == results[1]["metrics"].keys()
    assert step_losses(runs, "tune-fsdp", 2) == pytest.approx(
        step_losses(runs, "tune-one", 1), rel=LOSS
    )


def test_resume__as_many_processes_give_the_same_run_bit_for_bit(runs: Path) -> None:
    """Random numbers of each rank and worker, accumulation, moments, the teacher."""
    whole, parts = (
        torch.load(runs / name / "checkpoints" / "step-00000004.ckpt", weights_only=True)
        for name in ("dropping", "dropping-on-2")
    )
    assert furthest(whole["state_dict"], parts["state_dict"]) == 0
    moments = [run["optimizer_states"][0]["state"] for run in (whole, parts)]
    for number, own in moments[0].items():
        assert all(torch.equal(t, moments[1][number][name]) for name, t in own.items())
    for rank in (0, 1):
        before, after = (seen(runs, name, rank) for name in ("dropping", "dropping-on-2"))
        assert len(after) == len(before) // 2  # two steps of four
        again = [(row["loss"], row["keys"], row["masks"]) for row in after]
        assert again == [(r["loss"], r["keys"], r["masks"]) for r in before[len(after) :]]
    lines = [read_jsonl(runs / name / "metrics.jsonl") for name in ("dropping", "dropping-on-2")]
    losses = [[(r["step"], r["loss"]) for r in rows if "loss" in r] for rows in lines]
    assert losses[0] == losses[1]
