"""The data module in a real Lightning run: interrupted and resumed equals uninterrupted."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bat.data.index import Index, open_index
from bat.data.module import AudioData
from bat.data.plan import Plan, make_plan
from bat.data.stream import eval_loader
from bat.errors import UserError
from bat.types import WaveBatch
from tests.data.test_stream import spoil

Seen = list[tuple[list[int], list[str], float]]


class PowerCutError(Exception):
    pass


class Recorder(LightningModule):
    """A model that notes what it is fed and fails at will."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: Seen = []
        self.fail_at = fail_at

    def training_step(self, batch: WaveBatch, batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise PowerCutError
        self.seen.append((batch.positions.tolist(), batch.keys, float(batch.waves.sum())))
        return self.weight.sum() * batch.waves.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Save a checkpoint at the n-th ('batch' | 'epoch' | 'exception', n)."""

    def __init__(self, path: Path, moment: tuple[str, int]) -> None:
        self.path, self.moment, self.count = path, moment, 0

    def _hit(self, trainer: Trainer, what: str) -> None:
        if what == self.moment[0]:
            self.count += 1
            if self.count == self.moment[1]:
                trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._hit(trainer, "batch")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._hit(trainer, "epoch")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self._hit(trainer, "exception")


def data(index: Index, **kw: Any) -> AudioData:
    settings: dict[str, Any] = {
        "index": index,
        "batch": 3,
        "batches": 4,
        "sample_rate": 16_000,
        "clip_seconds": 0.3,
        "seed": 1,
        "roll": True,
    }
    settings |= kw
    ids = settings.pop("train_ids", None)
    return AudioData(plan=make_plan(index, ids, seed=settings["seed"]), **settings)


def fit(
    model: Recorder,
    module: AudioData,
    *,
    steps: int,
    accumulate: int = 1,
    save: SaveAt | None = None,
    resume: Path | None = None,
) -> None:
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[save] if save else None,
    )
    trainer.fit(model, module, ckpt_path=resume, weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(toy_shards: Path) -> Seen:
    model = Recorder()
    fit(model, data(open_index(toy_shards)), steps=11)
    assert len(model.seen) == 11
    return model.seen


@pytest.mark.parametrize(
    ("moment", "done", "workers"),
    [
        (("batch", 3), 3, 1),
        (("batch", 4), 4, 0),  # the last batch of an epoch
        (("batch", 5), 5, 0),  # the first of the second
        (("epoch", 1), 4, 1),
        (("exception", 1), 6, 1),
    ],
)
def test_audio_data__resumed_equals_uninterrupted(
    toy_index: Index,
    tmp_path: Path,
    uninterrupted: Seen,
    moment: tuple[str, int],
    done: int,
    workers: int,
) -> None:
    save = SaveAt(tmp_path / "a.ckpt", moment)
    first = Recorder(fail_at=6 if moment[0] == "exception" else None)
    with suppress(PowerCutError):
        fit(first, data(toy_index, workers=workers), steps=9, save=save)
    assert first.seen == uninterrupted[: len(first.seen)]
    second = Recorder()
    fit(second, data(toy_index, workers=workers), steps=11, resume=save.path)
    assert second.seen == uninterrupted[done:]


def test_audio_data__stream_is_the_plan_over_lightnings_epochs(
    uninterrupted: Seen, toy_index: Index
) -> None:
    assert [p for positions, _, _ in uninterrupted for p in positions] == list(range(33))
    keys = [key for _, batch, _ in uninterrupted for key in batch]
    plan = Plan(10, seed=1)
    assert keys == [toy_index.key(int(c)) for e in range(4) for c in plan.order(e)][:33]


@pytest.mark.parametrize("epoch", [12, 36])
def test_audio_data__resumed_with_another_split_of_the_batch(
    toy_index: Index, tmp_path: Path, epoch: int
) -> None:
    """Six clips a step as 2 x 3, then as 1 x 6, then as 3 x 2: the same clips, step by step."""
    whole = Recorder()
    fit(whole, data(toy_index, batches=epoch // 3), steps=6, accumulate=2)
    clips = [key for _, batch, _ in whole.seen for key in batch]
    assert len(clips) == 36
    at = SaveAt(tmp_path / "a.ckpt", ("batch", 4))
    fit(Recorder(), data(toy_index, batches=epoch // 3), steps=2, accumulate=2, save=at)
    second, again = Recorder(), SaveAt(tmp_path / "b.ckpt", ("batch", 2))
    module = data(toy_index, batch=6, batches=epoch // 6)
    fit(second, module, steps=4, resume=at.path, save=again)
    assert [k for _, b, _ in second.seen for k in b] == clips[12:24]
    assert module.batches_done() == 4
    third = Recorder()
    module = data(toy_index, batch=2, batches=epoch // 2)
    fit(third, module, steps=6, accumulate=3, resume=again.path)
    assert [k for _, b, _ in third.seen for k in b] == clips[24:36]


def stub(module: AudioData, *, rank: int, world: int, done: int, accumulate: int = 1) -> AudioData:
    """``module`` as if in a run of ``world`` ranks that saved after ``done`` micro-batches."""
    counts = {"ready": done, "started": done, "processed": done, "completed": done - 1}
    progress = SimpleNamespace(total=SimpleNamespace(**counts), current=SimpleNamespace(**counts))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return module


def test_audio_data__two_ranks_then_one_then_two_keep_the_global_batches(toy_index: Index) -> None:
    def positions(module: AudioData, state: dict[str, Any]) -> list[int]:
        module.load_state_dict(state)
        return sorted(p for batch in module.train_dataloader() for p in batch.positions.tolist())

    state = stub(data(toy_index), rank=0, world=2, done=5).state_dict()
    one = stub(data(toy_index, batch=6, batches=2), rank=0, world=1, done=5)
    assert positions(one, state) == list(range(30, 42))
    one = stub(data(toy_index, batches=4), rank=0, world=1, done=5, accumulate=2)
    assert positions(one, state) == list(range(30, 42))
    counts = vars(one.trainer.fit_loop.epoch_loop.batch_progress.current)  # type: ignore[union-attr]
    assert counts == {"ready": 10, "started": 10, "processed": 10, "completed": 9}
    state = stub(one, rank=0, world=1, done=14, accumulate=2).state_dict()
    both = []
    for rank in range(2):
        both += positions(stub(data(toy_index, batches=2), rank=rank, world=2, done=14), state)
    assert sorted(both) == list(range(42, 54))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 2}, "written with seed 1, this run has 2"),
        ({"batch": 4}, "written with global batch 3, this run has 4"),
        ({"train_ids": np.arange(9)}, "written with order 10 clips"),
        ({"train_ids": np.arange(10)[::-1]}, "written with order 10 clips"),
    ],
)
def test_audio_data__another_stream_is_refused(
    toy_index: Index, change: dict[str, Any], says: str
) -> None:
    state = data(toy_index).state_dict()
    with pytest.raises(UserError, match=says):
        data(toy_index, **change).load_state_dict(state)


def test_audio_data__position_between_micro_batches_is_refused(toy_index: Index) -> None:
    state = stub(data(toy_index, batch=2), rank=0, world=1, done=4, accumulate=3).state_dict()
    module = stub(data(toy_index, batch=6), rank=0, world=1, done=4)
    module.load_state_dict(state)
    with pytest.raises(UserError, match="stands at clip 8, which micro-batches of 6"):
        module.train_dataloader()


def test_audio_data__eval_loader_over_a_fold(toy_index: Index) -> None:
    ids = toy_index.clips_in_fold(2)
    loader = eval_loader(toy_index, ids, batch=2, sample_rate=16_000, clip_seconds=0.5, workers=1)
    for _ in range(2):
        batches = list(loader)
        assert [len(b.keys) for b in batches] == [2, 2, 1]
        assert [k for b in batches for k in b.keys] == [toy_index.key(int(i)) for i in ids]
        assert [p for b in batches for p in b.positions.tolist()] == list(range(5))


def test_audio_data__loaders_leave_the_runs_random_state_alone(toy_index: Index) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(data(toy_index).train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def spoilt(toy_shards: Path, tmp_path: Path) -> Index:
    """The toy set with three of ten clips overwritten."""
    shutil.copytree(toy_shards, tmp_path / "spoilt")
    index = open_index(tmp_path / "spoilt")
    spoil(index, 0, 4, 7)
    return index


def test_audio_data__bad_clips_are_replaced_and_counted(spoilt: Index) -> None:
    model, module = Recorder(), data(spoilt, max_bad=1.0)
    fit(model, module, steps=10)
    bad = module.bad_clips
    assert bad.seen >= 30 + bad.bad >= 39
    assert set(bad.keys) == {spoilt.key(i) for i in (0, 4, 7)}
    assert bad.kinds == {"corrupt": bad.bad}
    assert bad.summary() == f"{bad.bad} of {bad.seen} clips unreadable ({bad.bad} corrupt)"
    assert all(len(keys) == 3 and not set(keys) & set(bad.keys) for _, keys, _ in model.seen)
    module.gather = lambda thing: [thing, thing]  # a checkpoint has the counts of all processes
    both = module.state_dict()["bad_clips"]
    assert (both["seen"], both["kinds"]) == (2 * bad.seen, {"corrupt": 2 * bad.bad})


@pytest.mark.parametrize("workers", [0, 1])
def test_audio_data__too_many_bad_clips_stop_the_run(spoilt: Index, workers: int) -> None:
    module = data(spoilt, batches=100, workers=workers)
    with pytest.raises(UserError, match=r"more than max_bad=0.05 \(the first: .*Check the data"):
        fit(Recorder(), module, steps=100)
    assert 100 <= module.bad_clips.seen < 110


def test_audio_data__who_is_told_of_too_many_bad_clips_ends_the_run_himself(spoilt: Index) -> None:
    """So that several processes end together: nothing is raised within one's batch."""
    module, told = data(spoilt, batches=100), list[Exception]()
    module.on_error = told.append
    fit(Recorder(), module, steps=60)
    assert "more than max_bad=0.05" in str(told[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_audio_data__nothing_readable_is_one_clear_error(spoilt: Index, workers: int) -> None:
    module = data(spoilt, train_ids=np.array([0, 4]), workers=workers, max_bad=1.0)
    with pytest.raises(UserError, match=r"unreadable \(\d+ corrupt\), too many in a row"):
        fit(Recorder(), module, steps=3)


def test_audio_data__settings_out_of_range(toy_index: Index) -> None:
    with pytest.raises(UserError, match="stream: the selection is empty"):
        data(toy_index, train_ids=np.array([], np.int64))
    with pytest.raises(UserError, match="max_bad=5"):
        data(toy_index, max_bad=5)
    with pytest.raises(UserError, match="clip_seconds=0"):
        data(toy_index, clip_seconds=0)


def test_audio_data__ranks_with_different_streams_are_refused(toy_index: Index) -> None:
    """Another order on one node (another setting, another copy of the data) loses clips."""
    module = stub(data(toy_index), rank=0, world=2, done=0)
    module.gather = lambda thing: [thing, dict(thing)]
    module.train_dataloader()
    module.gather = lambda thing: [thing, {**thing, "order": "10 clips, windows of 3"}]
    with pytest.raises(UserError, match="rank 1 has order 10 clips, windows of 3, rank 0 10 clips"):
        module.train_dataloader()
