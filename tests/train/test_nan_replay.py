"""Steps that are not finite are kept, and `bat debug` names the first such tensor of each."""

import json
import shutil

import pytest
import torch

from bat.cli import bat
from bat.config.compose import compose
from bat.config.schema import Finetune, Pretrain
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.train import module as training
from bat.train.finetune import finetune
from bat.train.guard import spread_nan
from bat.train.nan_record import records
from bat.train.nan_replay import Replay, replay
from bat.train.pretrain import Pretraining
from bat.train.run_pretrain import pretrain
from bat.train.supervised import Supervised
from bat.types import Grid
from bat.weights import export
from tests.conftest import SMALL

BLOCK = {
    "masked_latent": "objective.student.encoder.blocks.1",
    "mae": "objective.student.encoder.blocks.1",
    "finetune": "backbone.blocks.1",
}
LAST = {
    "masked_latent": "objective.student.decoder.out_proj",
    "mae": "objective.student.decoder.out_proj",
    "finetune": "head.fc",
}
PLANTED = {2: "memory", 3: "weight", 4: "batch", 5: "forward", 6: "backward"}


def plant(fault: str, module: torch.nn.Module, kind: str, batch) -> None:
    weights = dict(module.get_submodule(BLOCK[kind]).named_parameters())
    if fault == "weight":
        weights["mlp.fc2.weight"][3, 4] = torch.nan
    elif fault == "batch":
        batch.waves[1, 77] = torch.inf
    elif fault == "forward":
        weights["attn.qkv.weight"].mul_(1e30)  # queries times keys are 1e60
    elif fault == "backward":  # the loss is 1e31, a gradient above 1e14 * 1e28
        module.get_submodule(LAST[kind]).weight.mul_(1e15)
        weights["norm1.weight"].mul_(1e-28)
        weights["norm1.bias"].mul_(1e-28)
        weights["mlp.fc1.weight"].mul_(1e28)


@pytest.fixture(scope="module", params=BLOCK)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A training of each kind with a fault in each of five steps: (kind, folder of the records)."""
    kind, base = request.param, tmp_path_factory.mktemp("nan")
    out, cls = base / "run", Supervised if request.param == "finetune" else Pretraining
    words = ["recipe=toy", f"out={out}", f"data.cache={base / 'shards'}", "train.steps=8",
             "train.log_every=1", "log.progress=false", "health.keep_nan=5",
             "train.save_every=100"]  # fmt: skip
    step, before, spoil = cls.training_step, {}, []

    def training_step(self, batch, batch_idx):
        if before:
            self.load_state_dict(before)
        before.clear()
        if fault := PLANTED.get(batch_idx):
            before.update({n: t.clone() for n, t in self.state_dict().items()})
            with torch.no_grad():
                plant(fault, self, kind, batch)
        spoil[:] = [fault == "memory"]
        return step(self, batch, batch_idx)

    def spread(loss):
        return spread_nan(loss) * (torch.nan if spoil[0] else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "training_step", training_step)
        patch.setattr(training, "spread_nan", spread)
        if kind == "finetune":
            model = BAT(width=48, depth=2, heads=2, grid=Grid(13, 8))
            state = {"student": model.state_dict()}
            export(base / "encoder", backbone="bat", encoder=model.config(), weights=state, meta={})
            words += [
                f"checkpoint={base}/encoder",
                "folds=[1]",
                "data.batch=3",
                "train.accumulate=1",
            ]
            finetune(compose(Finetune, "finetune", words))
            return kind, out / "fold-1" / "nan"
        own = [w for w in SMALL if w.split("=")[0] not in {x.split("=")[0] for x in words}]
        if kind == "mae":
            own = [w for w in own if "mask.views" not in w] + ["objective=mae"]
        pretrain(compose(Pretrain, "pretrain", [*words, *own]))
        return kind, out / "nan"


def test_record__is_complete_and_without_pickle(run) -> None:
    _, folder = run
    assert [p.name for p in records(folder.parent)] == ["3", "4", "5", "6", "7"]
    assert {p.name for p in (folder / "3").iterdir()} == {
        "record.json", "settings.yaml", "weights.safetensors", "batch-rank0.json",
        "batch-rank0.safetensors",
    }  # fmt: skip


def again(run, fault: str) -> Replay:
    (index,) = [index for index, planted in PLANTED.items() if planted == fault]
    found = replay(run[1] / str(index + 1))
    ((rank, micro_batch, loss, recorded),) = found.losses
    assert (rank, micro_batch) == (0, index)
    assert loss == recorded  # bit for bit, or None: not finite
    assert (loss is not None) == (fault in ("memory", "backward"))
    return found


def test_replay__finite_step_is_the_recorded_one(run) -> None:
    found = again(run, "memory")
    assert found.finding is None
    assert "hardware.precision=32-true" in found.lines()[-1]


def test_replay__names_the_weight(run) -> None:
    finding = again(run, "weight").finding
    assert (finding.kind, finding.where) == ("weight", f"{BLOCK[run[0]]}.mlp.fc2.weight")
    assert "1 NaN, 0 inf" in finding.tensor


def test_replay__names_the_clip(run) -> None:
    found = again(run, "batch")
    assert (found.finding.kind, found.finding.where) == ("batch", "waves")
    assert "0 NaN, 1 inf" in found.finding.tensor
    keys = json.loads((run[1] / "5/batch-rank0.json").read_text())["micro_batches"][0]["keys"]
    assert found.keys == [keys[1]]


def test_replay__names_module_and_range_of_an_overflow(run) -> None:
    finding = again(run, "forward").finding
    assert (finding.kind, finding.where) == ("forward", f"{BLOCK[run[0]]}.attn")
    assert "e+3" in "".join(finding.inputs)


def test_replay__names_module_of_an_overflow_in_backward(run) -> None:
    finding = again(run, "backward").finding
    assert (finding.kind, finding.where) == ("backward", f"{BLOCK[run[0]]}.mlp.fc1")
    assert finding.operation.startswith("linear")
    assert "0 NaN" in finding.tensor


def test_debug__prints_it_and_names_records_near_a_wrong_folder(run, capsys, tmp_path) -> None:
    folder = run[1]
    assert bat.main(["debug", str(folder / "6")]) == 0
    shown = capsys.readouterr().out
    assert f"first     forward of {BLOCK[run[0]]}.attn" in shown
    assert "try " in shown
    assert bat.main(["debug", str(folder.parent)]) == 2
    assert f"bat debug {folder / '3'}" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere"):
        replay(tmp_path / "nowhere")
    shutil.copytree(folder / "6", tmp_path / "6")
    (tmp_path / "6" / "weights.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        replay(tmp_path / "6")
