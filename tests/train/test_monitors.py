"""Monitors along a pre-training: against loops and hand-made matrices, and what a run leaves."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bat.audio.encode import encode
from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.errors import UserError
from bat.eval.collapse import effective_rank
from bat.eval.diagnostics import RANKME_EPS, knn_scores, lidar
from bat.eval.splits import Split
from bat.report.runs import curve, monitor_panels
from bat.train.monitors import Monitors
from bat.train.pretrain import build_objective
from bat.train.run_pretrain import pretrain
from bat.types import WaveBatch
from tests.reference import monitors as reference
from tests.train.runs import metrics, weights

OTHERS = ["online/{}/rankme", "online/{}/lidar"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_knn_scores__equal_the_loop_for_several_labels_a_clip() -> None:
    train, queries = draw(30, 8) + 0.5, draw(7, 8, seed=1) + 0.5
    labels = (draw(30, 4, seed=2) > 0.3).float()
    found = knn_scores(train, labels, queries, ks=(1, 10, 100))
    for k, scores in found.items():
        torch.testing.assert_close(scores, reference.knn(train, labels, queries, k=k))
    torch.testing.assert_close(found[100], reference.knn(train, labels, queries, k=30))


def test_rankme__identity_and_rank_one_by_hand_and_any_matrix_as_the_loop() -> None:
    assert effective_rank(torch.eye(64), eps=RANKME_EPS) == pytest.approx(64, abs=1e-2)
    p = 1 / 64 + 1e-3  # eps is added to the shares, which are not divided by their sum again
    assert effective_rank(torch.eye(64), eps=1e-3) == pytest.approx(math.exp(-64 * p * math.log(p)))
    one = torch.outer(torch.arange(1.0, 21), torch.arange(1.0, 9))
    assert effective_rank(one, eps=RANKME_EPS) == pytest.approx(1, abs=1e-3)
    x = draw(50, 12) + 1  # not centred
    wanted = reference.rankme(x, eps=RANKME_EPS)
    assert effective_rank(x, eps=RANKME_EPS) == pytest.approx(wanted, rel=1e-9)
    assert effective_rank(x - x.mean(0), eps=RANKME_EPS) > wanted + 0.1


def test_lidar__clips_on_axes_and_on_a_line_by_hand_and_any_views_as_the_loop() -> None:
    axes = torch.eye(6)[:, None].expand(6, 3, 6)  # six clips, all views of a clip equal
    assert lidar(axes) == pytest.approx(5, abs=1e-3)  # n - 1
    line = (torch.arange(6.0)[:, None] * draw(6))[:, None].expand(6, 3, 6)
    assert lidar(line) == pytest.approx(1, abs=1e-3)
    for n, D in ((20, 6), (5, 9)):
        x = draw(n, 1, D) + 0.3 * draw(n, 4, D, seed=1) * torch.arange(1, D + 1)
        wanted = reference.lidar(x, delta=1e-4, eps=1e-8)
        assert lidar(x) == pytest.approx(wanted, rel=1e-6)
    assert math.isnan(lidar(x * math.nan))


def made(*words: str, splits=(), clips: int = 4) -> Monitors:
    small = ["recipe=toy", "data.batch=2", "hardware.precision=32-true", *words]
    config = compose(Pretrain, "pretrain", small)
    task = SimpleNamespace(metric="accuracy", multi_label=False)
    return Monitors(config, task=task, splits=splits, ids=np.arange(clips))  # type: ignore[arg-type]


def batch_of(*clips: int, waves: Tensor | None = None) -> WaveBatch:
    """Waves, by default one sample each: the clip's number."""
    at, keys = torch.tensor(clips), [str(c) for c in clips]
    waves = at[:, None].float() if waves is None else waves
    lengths = torch.full_like(at, waves.shape[1])
    return WaveBatch(waves, lengths, torch.zeros(len(clips), 1), keys, at, [])


class Fixed(nn.Module):
    """Targets of two positions: 0 or 2 by turns, and always 7; a loss of the clip's number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def local_targets(self, batch: WaveBatch) -> tuple[str, Tensor]:
        assert not self.training
        first = 2 * (batch.positions % 2)
        return "error", torch.stack([first, torch.full_like(first, 7)], 1)[..., None].float()

    def forward(self, batch: WaveBatch) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        return {"error": batch.waves.mean() + 0 * torch.rand(())}


def test_position__worked_example() -> None:
    parts = [batch_of(0, 1, 2), batch_of(3)]
    stream = SimpleNamespace(loader=lambda ids, *, batch: iter(parts))
    objective, before = Fixed(), torch.get_rng_state()
    found = made().of_objective(objective, stream)  # type: ignore[arg-type]
    # position 0: 0 2 0 2, unbiased variance 4/3; position 1: 0; the clips' losses: 0 1 2 3
    assert found["online/objective/position_only_loss"] == pytest.approx(2 / 3)
    assert found["online/objective/local_loss"] == pytest.approx(1.5)
    assert objective.training
    assert torch.equal(before, torch.get_rng_state())
    objective.local_targets = lambda batch: None  # type: ignore[method-assign,assignment,return-value]
    assert made().of_objective(objective, stream) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["masked_latent", "eat", "sslam", "mae"])
def test_local_targets__are_of_a_scalar_of_forward(name: str) -> None:
    words = ["recipe=toy", f"objective={name}", "model.width=48", "model.depth=2", "model.heads=2"]
    objective = build_objective(compose(Pretrain, "pretrain", words)).eval()
    batch = batch_of(0, 1, 2, waves=0.1 * draw(3, 32_000))
    with torch.no_grad():
        scalar, targets = objective.local_targets(batch)  # type: ignore[misc]
        scalars = objective(batch)
    assert scalar in scalars
    assert targets.shape[:2] == (6 if name == "sslam" else 3, 13 * 8)
    if "loss_position_only" in scalars:
        assert float(targets.var(0).mean()) == pytest.approx(float(scalars["loss_position_only"]))


@pytest.mark.parametrize("permuted", [False, True])
def test_knn__finds_classes_and_permuted_labels_give_chance(permuted: bool) -> None:
    classes = torch.arange(400) % 5
    features = 3 * torch.eye(5)[classes].repeat(1, 2) + draw(400, 10)
    if permuted:
        classes = classes[torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    train = np.arange(400) < 300
    split = Split("1", np.flatnonzero(train), np.flatnonzero(~train))
    monitors = made(splits=[split], clips=400)
    found = monitors._scored(features, torch.eye(5)[classes], train, ~train)
    assert next(iter(found)) == "accuracy"
    for key in ("accuracy", "accuracy_k10", "accuracy_k100", "accuracy_k200"):
        assert found[key] < 0.35 if permuted else found[key] > 0.9, key


def test_run__monitors_of_both_encoders_change_nothing_else(small, tmp_path: Path) -> None:
    words = ["online.every=2", "online.steps=1", "train.steps=2", "objective.ema.start=0.5"]
    pretrain(small(*words, out=tmp_path / "run"))
    rows = {r["step"]: r for r in metrics(tmp_path / "run") if "online/cgp/accuracy" in r}
    assert list(rows) == [0, 2]
    both = [form.format(name) for form in OTHERS for name in ("teacher", "student")]
    knn = [f"online/{name}/knn/accuracy" for name in ("teacher", "student")]
    losses = ["online/objective/local_loss", "online/objective/position_only_loss"]
    assert all(math.isfinite(r[key]) for r in rows.values() for key in [*both, *knn, *losses])
    start, end = rows[0], rows[2]
    for form in [*OTHERS, "online/{}/knn/accuracy"]:
        assert start[form.format("teacher")] == start[form.format("student")]
    assert end["online/teacher/rankme"] != end["online/student/rankme"]
    assert (tmp_path / "run" / "plots" / "monitors.png").is_file()
    assert "the monitors took" in (tmp_path / "run" / "train.log").read_text()
    pretrain(small(*words, "online.monitors=[]", out=tmp_path / "without"))
    assert not (tmp_path / "without" / "plots" / "monitors.png").exists()
    left, right = weights(tmp_path / "run"), weights(tmp_path / "without")
    assert all(torch.equal(left[name], right[name]) for name in left)
    bare = [r for r in metrics(tmp_path / "without") if "online/cgp/accuracy" in r]
    assert bare == [{k: v for k, v in rows[r["step"]].items() if k in r} for r in bare]
    assert not any(k.startswith(("online/teacher", "online/objective")) for r in bare for k in r)


def test_run__without_labels_knn_is_left_out_and_said_once(small, tmp_path: Path) -> None:
    (tmp_path / "wavs").mkdir()
    lines = ["path"]
    for i in range(4):
        data = encode(0.1 * draw(16_000, seed=i).numpy(), sample_rate=16_000, codec="flac")
        (tmp_path / "wavs" / f"{i}.flac").write_bytes(data)
        lines.append(f"{i}.flac")
    (tmp_path / "wavs" / "all.csv").write_text("\n".join(lines))
    words = ["task=folder", f"data.root={tmp_path / 'wavs' / 'all.csv'}", "train.steps=1"]
    words += ["online.every=1", "online.encoders=[student]", "data.batch=2"]
    with pytest.raises(UserError, match=r"labelled clips[^$]*online\.methods=\[\]"):
        pretrain(small(*words, out=tmp_path / "none"))
    pretrain(small(*words, "online.methods=[]", out=tmp_path / "run"))
    assert (tmp_path / "run" / "train.log").read_text().count("knn is left out") == 1
    rows = [r for r in metrics(tmp_path / "run") if "online/student/rankme" in r]
    assert [r["step"] for r in rows] == [0, 1]
    assert not any("knn" in key or "teacher" in key for r in rows for key in r if "online" in key)
    assert not (tmp_path / "run" / "plots" / "probe_curve.png").exists()


def test_settings__unknown_names_list_the_known() -> None:
    words = ["recipe=toy", "online.monitors=[knn,rank]", "online.encoders=[pupil]"]
    with pytest.raises(UserError) as caught:
        compose(Pretrain, "pretrain", words)
    said = str(caught.value)
    assert "'rank': choose of knn, rankme, lidar, position" in said
    assert "'pupil': choose of teacher, student" in said
    with pytest.raises(UserError, match=r"online\.methods and online\.monitors are empty"):
        compose(Pretrain, "pretrain", ["recipe=toy", "online.methods=[]", "online.monitors=[]"])


def test_report__reads_runs_of_before_and_of_now() -> None:
    old = {"step": 0, "online/cgp/accuracy": 0.5, "online/cgp/accuracy_std": 0.1,
           "online/cgp/gate": [0.4, 0.6]}  # fmt: skip
    new = old | {"step": 5, "online/teacher/knn/accuracy": 0.4, "online/teacher/rankme": 3.0,
                 "online/objective/local_loss": None, "online/seconds": 2.0}  # fmt: skip
    found = [(r["step"], r["method"], r["accuracy"]) for r in curve([old, new])]
    assert found == [(0, "cgp", 0.5), (5, "cgp", 0.5), (5, "teacher/knn", 0.4)]
    assert monitor_panels([old, new]) == {"RankMe": {"teacher": [(5, 3.0)]}}
