"""Predictions with heads of both commands: those of the evaluation, windows, events, text."""

import csv
import json
import math
from collections import defaultdict

import numpy as np
import pytest
import soundfile
import torch

import bat
from bat.cli import finetune, probe
from bat.cli import predict as cli
from bat.data.parts import Part
from bat.data.toy import make_toy
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.heads import save_head
from bat.eval.loading import weights_digest
from bat.interfaces.models import find_heads, load_model
from bat.interfaces.predict import predict_files
from bat.metrics.events import Events
from bat.metrics.ranking import evaluate
from bat.probes.base import build_probe
from bat.tasks import toy_events
from bat.tasks.base import load_task
from bat.types import Grid
from bat.weights import export

QUICK = ["train.log_every=2", "log.progress=false"]
LIGHT = ["diagnostics.maps=0", "diagnostics.encoder=false", "bootstrap=0"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def checkpoint(work):
    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(13, 8))
    weights = {"student": model.state_dict()}
    folder = work / "tiny/export"
    export(folder, backbone="bat", encoder=model.config(), weights=weights, meta={})
    return work / "tiny"


@pytest.fixture(scope="module")
def toy(work):
    """The toy set: ``{path: (label, fold)}``."""
    rows, _ = load_task("toy").read(make_toy(work / "toy"))
    return {str(row.path): (row.labels[0], row.fold) for row in rows}


@pytest.fixture(scope="module")
def probed(work, checkpoint, toy):
    out = work / "probed"
    words = ["recipe=toy", f"checkpoint={checkpoint}", f"data.root={work}/toy", f"out={out}"]
    assert probe.main([*words, *QUICK, *LIGHT, "train.steps=12", "--method", "cgp,linear"]) == 0
    return out


@pytest.fixture(scope="module")
def tuned(work, checkpoint, toy):
    out = work / "tuned"
    words = ["recipe=toy", f"checkpoint={checkpoint}", f"data.root={work}/toy", f"out={out}"]
    assert finetune.main([*words, *QUICK, "train.steps=4"]) == 0
    return out


def _read(file):
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _metrics(lines, toy, fold):
    """Metrics of the scores of a held-out fold."""
    logits, targets = [], []
    for line in lines:
        label, own = toy[line.pop("path")]
        if own == fold:
            start, end = line.pop("start"), line.pop("end")
            assert (start, end) == ("0", "2")
            logits.append([math.log(float(score)) for score in line.values()])
            targets.append([float(name == label) for name in line])
    return evaluate(torch.tensor(logits), torch.tensor(targets), multi_label=False)


@pytest.mark.parametrize("kind", ["cgp", "linear", "tuned"])
def test_predict__gives_what_the_evaluation_found(probed, tuned, toy, work, tmp_path, kind):
    folder = tuned / "fold-2" if kind == "tuned" else probed / f"heads/tiny/{kind}-2-0"
    (head,) = find_heads(folder)
    out = tmp_path / "scores.csv"
    predict_files([work / "toy"], out, checkpoint=folder, batch=7)
    lines = _read(out)
    assert [line["path"] for line in lines] == sorted(toy)
    metrics = json.loads((head / "config.json").read_text())["metrics"]
    found = _metrics(lines, toy, 2)
    for name in ("accuracy", "map", "auroc"):
        assert found[name] == pytest.approx(metrics[name]), name


def test_predict__short_clips_are_padded_as_in_the_run(probed):
    model = load_model(probed / "heads/tiny/cgp-1-0")
    wave = np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(wave)[None], frames=208)
        want = model.head(features).softmax(1)[0].tolist()
    assert features.patches.shape[2] == 13
    (answer,) = bat.predict(wave, probed / "heads/tiny/cgp-1-0", sample_rate=16_000)
    assert [answer["scores"][label] for label in model.meta["labels"]] == pytest.approx(want)


def test_predict__folds_are_averaged_if_asked(probed, tuned, toy, tmp_path):
    clips = sorted(toy)[:3]
    for run, pattern in ((probed, "heads/tiny/cgp-*"), (tuned, "")):
        folds = find_heads(run / pattern if pattern else run, average=True)
        assert len(folds) == 2
        each = [bat.predict(clips, fold) for fold in folds]
        mean = bat.predict(clips, run / pattern if pattern else run, average=True)
        for one, two, both in zip(*each, mean, strict=True):
            for label, score in both["scores"].items():
                want = (one["scores"][label] + two["scores"][label]) / 2
                assert score == pytest.approx(want, abs=1e-6)
    for run, average, named in ((probed, False, "cgp-1-0"), (probed, True, "linear-2-0"),
                                (tuned, False, "fold-2/head")):  # fmt: skip
        with pytest.raises(UserError, match=named):
            find_heads(run, average=average)


def test_predict__top_and_python_agree(probed, toy, tmp_path):
    folder, clips = probed / "heads/tiny/cgp-1-0", sorted(toy)[:4]
    predict_files(clips, tmp_path / "top.csv", checkpoint=folder, top=2)
    lines = _read(tmp_path / "top.csv")
    assert [line["rank"] for line in lines] == ["1", "2"] * 4
    found = bat.predict(clips, folder, top=2)
    assert [label for answer in found for label in answer["scores"]] == [
        line["label"] for line in lines
    ]
    waves = [soundfile.read(clip, dtype="float32") for clip in clips]
    arrays = bat.predict([w for w, _ in waves], folder, sample_rate=waves[0][1], top=2)
    for one, two in zip(found, arrays, strict=True):
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-5)


def test_predict__windows_have_times_and_a_mean(probed, toy, tmp_path):
    folder, clips = probed / "heads/tiny/linear-1-0", sorted(toy)[:3]
    waves = [soundfile.read(clip, dtype="float32") for clip in clips]
    rate = waves[0][1]
    long = np.concatenate([w[: 2 * rate] for w, _ in waves])
    soundfile.write(tmp_path / "long.wav", np.stack([long, long], 1), rate, subtype="FLOAT")
    paths = [tmp_path / "long.wav", clips[0]]
    predict_files(paths, tmp_path / "w.csv", checkpoint=folder, window=2.0)
    lines = _read(tmp_path / "w.csv")
    assert [(line["start"], line["end"]) for line in lines] == [
        ("0", "2"), ("2", "4"), ("4", "6"), ("0", "2")]  # fmt: skip
    alone = bat.predict([w[: 2 * rate] for w, _ in waves], folder, sample_rate=rate)
    for line, answer in zip(lines, alone, strict=False):
        for label, score in answer["scores"].items():
            assert float(line[label]) == pytest.approx(score, abs=1e-4)
    how = {"checkpoint": folder, "window": 2.0, "average_windows": True}
    predict_files(paths, tmp_path / "m.csv", **how)
    mean = _read(tmp_path / "m.csv")
    assert [(line["start"], line["end"]) for line in mean] == [("0", "6"), ("0", "2")]
    for label in alone[0]["scores"]:
        want = np.mean([answer["scores"][label] for answer in alone])
        assert float(mean[0][label]) == pytest.approx(want, abs=1e-4)


@pytest.fixture(scope="module")
def detector(work, checkpoint):
    """A run at frame level on the toy events, and its held-out rows by path."""
    data, out = work / "toy_events", work / "detector"
    toy_events.make(data)
    words = ["recipe=toy_events", f"checkpoint={checkpoint}", f"data.root={data}", f"out={out}"]
    own = ["methods=[cgp]", "train.steps=150", "head.prototypes=32"]
    assert probe.main([*words, *QUICK, *LIGHT, *own]) == 0
    rows, _ = load_task("toy_events").read(data)
    return out, {str(row.path): row for row in rows if row.split == "test"}


def test_predict__events_are_those_of_the_evaluation(detector, tmp_path):
    run, held = detector
    (folder,) = find_heads(run)
    predict_files(list(held), tmp_path / "events.csv", checkpoint=run)
    found = defaultdict(list)
    for line in _read(tmp_path / "events.csv"):
        onset, offset, score = (float(line[name]) for name in ("onset", "offset", "score"))
        assert 0 <= onset < offset <= 3.0
        assert 0.4 < score <= 1
        found[line["path"]].append((onset, offset, toy_events.CLASSES.index(line["label"])))
    metric = Events(classes=3)
    for path, row in held.items():
        true = [(e.onset_seconds, e.offset_seconds, toy_events.CLASSES.index(n))
                for e in row.events for n in e.labels]  # fmt: skip
        metric.update(found[path], true)
    metrics = json.loads((folder / "config.json").read_text())["metrics"]
    for name in ("event_f1", "segment_f1"):
        assert metric.compute()[name] == pytest.approx(metrics[name], abs=1e-6)
        assert metrics[name] > 0.1
    assert not bat.predict(list(held), run, threshold=1.0)


def test_predict__events_do_not_break_between_windows(detector):
    wave = np.concatenate([toy_events.clip(number)[0] for number in range(3)]).astype(np.float32)
    how = {"sample_rate": toy_events.SAMPLE_RATE, "window": 3.0, "threshold": 0.0}
    found = bat.predict(wave, detector[0], **how)
    assert [(e["onset"], e["offset"]) for e in found] == [(0.0, pytest.approx(9.0))] * 3
    model = load_model(*find_heads(detector[0]))
    with torch.no_grad():
        p = model.head(model.backbone(torch.from_numpy(wave[None, :40_960])))[0].sigmoid()  # (T, C)
    assert len(p) == 17  # the last patch starts where the clip ends
    found = bat.predict(wave[:40_960], detector[0], threshold=0.0, sample_rate=16_000)
    scores = {event["label"]: event["score"] for event in found}
    assert list(map(scores.get, toy_events.CLASSES)) == pytest.approx(p[:16].mean(0).tolist())
    scores = bat.predict(wave, detector[0], answer="scores", window=3.0, sample_rate=16_000)
    assert [(s["start"], s["end"]) for s in scores] == [(0, 3), (3, 6), (6, 9)]


def _noise(samples):
    """Noise whose loudness and pitch change with every time patch."""
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.choice([0.0, 0.1, 1.0], 1 + samples // 2_560), 2_560)[:samples]
    return (np.sin(np.cumsum(rng.uniform(0, 3, samples) * loud)) * loud).astype(np.float32)


def test_predict__text_is_the_best_output_of_each_patch(checkpoint, tmp_path):
    encoder = bat.load_encoder(checkpoint)
    torch.manual_seed(2)
    head = build_probe("linear", classes=4, width=16, depth=2, has_cls=True, level="frame")
    with torch.no_grad():
        tokens = encoder(torch.from_numpy(_noise(60_000))[None]).patches[-1, 0].mean(1)  # (T, D)
        head.fc.bias -= head.fc(head.norm(tokens)).mean(0)  # no output is best everywhere
    meta = {
        "task": "toy_tokens", "target": "tokens", "labels": ["<blank>", "a", "é", "c"],
        "encoder": {"checkpoint": str(checkpoint), "digest": weights_digest(encoder)},
        "frames": None, "clip_seconds": 4.0}  # fmt: skip
    folder = save_head(
        tmp_path / "heads/e/linear-1-0", head.eval(), name="linear", head={}, meta=meta
    )
    waves = [_noise(60_000)[:n] for n in (60_000, 5_000, 30_720)]
    want = []
    for wave in waves:
        with torch.no_grad():
            best = head(encoder(torch.from_numpy(wave)[None]))[0].argmax(1).tolist()
        text = "".join("-aéc"[n] for i, n in enumerate(best) if not i or n != best[i - 1])
        want.append(text.replace("-", ""))
    assert "é" in want[0]
    assert len(want[0]) > 4
    for number, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{number}.wav", wave, 16_000, subtype="FLOAT")
    predict_files([tmp_path], tmp_path / "text.csv", checkpoint=folder)
    assert [line["text"] for line in _read(tmp_path / "text.csv")] == want
    assert [answer["text"] for answer in bat.predict(waves, folder, sample_rate=16_000)] == want


def test_predict__resumes_and_two_processes_agree(probed, work, tmp_path, monkeypatch):
    how = {"checkpoint": probed / "heads/tiny/cgp-1-0", "batch": 8}
    predict_files([work / "toy"], tmp_path / "one.csv", **how)
    predict_files([work / "toy"], tmp_path / "two.csv", part=Part(1, 2), **how)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        predict_files([work / "toy"], tmp_path / "two.csv", **how)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


BAD = {
    "encoder alone": ("tiny", {}, "holds no head"),
    "missing": ("nowhere", {}, "nowhere does not exist"),
    "text": ("probed/heads/tiny/cgp-1-0", {"answer": "text"}, "answer=text"),
    "events": ("probed/heads/tiny/cgp-1-0", {"answer": "events"}, "level=frame"),
    "threshold": ("probed/heads/tiny/cgp-1-0", {"threshold": 0.3}, "threshold"),
    "window": ("probed/heads/tiny/cgp-1-0", {"window": 5.0}, "window=5"),
    "whole": ("probed/heads/tiny/cgp-1-0", {"window": "whole"}, "window=whole"),
    "top": ("probed/heads/tiny/cgp-1-0", {"top": 0}, "top=0"),
    "moved": ("probed/heads/tiny/cgp-1-0", {"encoder": "gone"}, "gone"),
}


@pytest.mark.parametrize("case", BAD)
def test_predict__mistakes_are_named_and_leave_nothing(probed, work, tmp_path, case):
    name, how, match = BAD[case]
    with pytest.raises(UserError, match=match):
        predict_files([work / "toy"], tmp_path / "p.csv", checkpoint=work / name, **how)
    assert not list(tmp_path.iterdir())


def test_predict__another_encoder_is_refused(probed, work, toy, tmp_path):
    torch.manual_seed(9)
    other = BAT(width=16, depth=2, heads=2, grid=Grid(13, 8))
    weights = {"student": other.state_dict()}
    export(tmp_path / "e", backbone="bat", encoder=other.config(), weights=weights, meta={})
    folder, clip = probed / "heads/tiny/cgp-1-0", sorted(toy)[0]
    with pytest.raises(UserError, match="another encoder"):
        bat.predict(clip, folder, encoder=str(tmp_path / "e"))
    moved = bat.predict(clip, folder, encoder=str(work / "tiny/export"))
    assert moved == bat.predict(clip, folder)


def test_predict_command__prints_no_traceback(probed, work, tmp_path, capsys):
    words = [str(work / "toy"), "--out", str(tmp_path / "s.csv"), "--workers", "0"]
    assert cli.main([*words, "--checkpoint", str(probed)]) == 2
    assert "--average" in capsys.readouterr().err
    head = str(probed / "heads/tiny/linear-1-0")
    assert cli.main([*words, "--checkpoint", head, "--top", "1"]) == 0
    assert len(_read(tmp_path / "s.csv")) == 10
