"""Fine-tuning that selects its step on validation clips, and noise on padded waveforms."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from bat import load_encoder
from bat.config.compose import compose
from bat.config.schema import Finetune
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.features import FeatureStream
from bat.eval.fit import predictions
from bat.eval.heads import load_head
from bat.eval.prepare import prepare
from bat.train import fitting
from bat.train.finetune import Folds, finetune
from bat.train.selection import Selection, load_selected, selected
from bat.types import Grid, WaveBatch
from bat.weights import export


class Silent:
    """A clock and a log that are not there."""

    def say(self, line: str) -> None: ...


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [
        ("accuracy", [0.5, 0.7, 0.6, 0.7, 0.1], 4),  # of equals the later
        ("wer", [0.5, 0.2, 0.6, 0.2, 0.9], 4),  # lower is better
        ("map", [float("nan"), 0.1, 0.0], 2),
        ("accuracy", [0.0, 0.0], 2),
    ],
)
def test_selection__the_best_weights_are_kept(tmp_path, metric, values, step) -> None:
    module = torch.nn.Linear(1, 1)
    chosen = Selection(tmp_path, every=1, metric=metric, evaluate=dict, metrics=Silent())  # type: ignore[arg-type]
    for number, value in enumerate(values, start=1):
        torch.nn.init.constant_(module.weight, number)
        chosen.record(module, number, {metric: value, "per_class": {}})
    assert selected(tmp_path) == {"step": step, "validation": values[step - 1]}
    load_selected(module, tmp_path)
    assert module.weight.item() == step
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(values) + 1))
    (tmp_path / "best.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"best\.safetensors is damaged"):
        selected(tmp_path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(8, 8))
    return export(
        tmp_path_factory.mktemp("run") / "export",
        backbone="bat", encoder=model.config(), weights={"student": model.state_dict()}, meta={},
    )  # fmt: skip


@pytest.fixture
def config(encoder, tmp_path, tmp_path_factory):
    def build(*words: str) -> Finetune:
        cache = tmp_path_factory.getbasetemp() / "toys"
        own = ["recipe=toy_tokens", f"checkpoint={encoder}", f"data.cache={cache}", "hardware=cpu",
               f"out={tmp_path}/run", "train.steps=6", "train.save_every=3", "validate_every=2",
               "optim.warmup_steps=1", "optim.lr=0.01", "log.progress=false"]  # fmt: skip
        merged = dict(w.split("=", 1) for w in [*own, *words])
        return compose(Finetune, "finetune", [f"{k}={v}" for k, v in merged.items()])

    return build


class _KilledError(Exception):
    pass


class _Kill(Callback):
    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 5:
            raise _KilledError


def test_finetune__validates_selects_and_resumes(config, tmp_path, monkeypatch) -> None:
    """The weights of the best step are exported and evaluated, also after an interruption."""
    whole = finetune(config(f"out={tmp_path}/whole"))
    fold = whole / "fold-test"
    result = json.loads((fold / "result.json").read_text())
    rows = [json.loads(line) for line in (fold / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    best = min(row["token_error_rate"] for row in rows)
    later = max(row["step"] for row in rows if row["token_error_rate"] == best)
    assert result["selected"] == {"step": later, "validation": best}
    assert "step selected on the clips of the split valid" in result["how"]
    assert not (fold / "best.safetensors").exists()

    ready = prepare(config(f"checkpoint={fold}/export"))
    head, _ = load_head(fold / "head")
    for part, wanted in (("valid", best), ("test", result["metrics"]["token_error_rate"])):
        stream = FeatureStream(load_encoder(fold / "export"), ready.index, frames=None,
                               clip_seconds=4.0, targets_of=ready.targets_of)  # fmt: skip
        ids = getattr(ready.splits[0], part)
        found = predictions({"head": head}, stream.once(ids, batch=8))
        values = ready.scorer.values(found.logits["head", ""], found, stream, ids)
        assert values["token_error_rate"] == pytest.approx(wanted, abs=1e-6), part

    build, kills = fitting.build_trainer, []

    def dying(**words):
        trainer = build(**words)
        if not kills:
            kills.append(trainer.callbacks.append(_Kill()))
        return trainer

    monkeypatch.setattr(fitting, "build_trainer", dying)
    with pytest.raises(_KilledError):
        finetune(config(f"out={tmp_path}/parts"))
    parts = finetune(config(f"out={tmp_path}/parts")) / "fold-test"
    again = json.loads((parts / "result.json").read_text())
    assert (again["selected"], again["metrics"]) == (result["selected"], result["metrics"])
    assert (parts / "validation.jsonl").read_text() == (fold / "validation.jsonl").read_text()


def test_validate_every__does_not_go_with_fsdp(config) -> None:
    with pytest.raises(UserError, match=r"validate_every=2 with hardware\.strategy=fsdp"):
        config("hardware.strategy=fsdp")


def test_noise__is_added_to_the_zeros_that_pad_the_waveform(config) -> None:
    """A clip of 0.25 s padded to 1 s: noise all over it, and none in the zero frames after that."""
    words = ["pad=clip", "data.clip_seconds=1.0", "frames=112", "augment.noise_p=1.0",
             "validate_every=0", "method=linear"]  # fmt: skip
    ready = prepare(config(*words))
    module = Folds(ready, ready.config.out or "run").module(ready.splits[0])  # type: ignore[arg-type]
    waves = torch.zeros(2, 16_000)
    waves[:, :4_000] = torch.randn(2, 4_000, generator=torch.Generator().manual_seed(0))
    batch = WaveBatch(waves, torch.tensor([4_000, 4_000]), torch.zeros(2, 0),
                      [ready.index.key(0)] * 2, torch.arange(2), [])  # fmt: skip
    x, *_ = module.augmented(batch, torch.Generator().manual_seed(0))
    quiet = module.backbone.inputs(waves, batch.lengths, frames=112)
    assert not quiet[:, 0, 30:].any()
    assert (x[:, 0, 30:101].mean((1, 2)) > 0.1).all()
    assert not x[:, 0, 101:].any()
