"""The event tasks, from small files in their public layouts to the rows and the final metric."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.data.stream import eval_loader
from bat.errors import UserError
from bat.eval.prepare import Prepared, prepare
from bat.eval.scoring import detected
from bat.eval.targets import FrameTargets
from bat.metrics.events import Events
from bat.metrics.ranking import Micro, evaluate
from bat.tasks import dcase16, desed, urban_sed
from bat.tasks.base import load_task
from bat.tasks.events import Detection, Event
from bat.train.finetune import finetune
from bat.types import WaveBatch
from tests.tasks.layouts import FSD50K, MAKERS, SPASS
from tests.tasks.shards import probe_files_and_shards

SPLITS = {
    "dcase16": {"train": 4, "valid": 4, "test": 4},
    "desed": {"train": 5, "weak": 2, "valid": 5, "test": 5, "public": 5},
    "fsd50k": {"train": 6, "valid": 2, "test": 3},
    "spass": {"train": 36, "test": 14},
    "urban_sed": {"train": 4, "valid": 4, "test": 4},
}
CLASSES = {
    "dcase16": dcase16.CLASSES,
    "desed": desed.CLASSES,
    "fsd50k": FSD50K,
    "spass": SPASS,
    "urban_sed": urban_sed.CLASSES,
}


@pytest.fixture
def settings(encoder: Path, tmp_path: Path) -> Callable[..., Any]:
    """``settings(task, "key=value", ...)``: a short run of the task's recipe on its small files."""

    def build(task: str, *words: str) -> Any:
        given = [
            f"recipe={task}", f"checkpoint={encoder}", f"data.cache={tmp_path / 'cache'}",
            f"data.root={tmp_path / task}", "log.progress=false", "hardware=cpu", "data.workers=0",
            "protocol=validated", "protocol.look_every=0", "protocol.lrs=[0.03]",
            "protocol.prototype_lrs=[0.03]", "optim.lr=0.03", "train.steps=4", "seeds=1",
            "optim.warmup_steps=1", "data.batch=4", "bootstrap=100", "head.prototypes=32",
            "diagnostics.encoder=false", "diagnostics.maps=1",
        ]  # fmt: skip
        merged = dict(word.split("=", 1) for word in [*given, *words])
        return compose(Probe, "probe", [f"{k}={v}" for k, v in merged.items()])

    return build


@pytest.mark.parametrize("task", MAKERS)
def test_task__reads_its_public_layout(task: str, tmp_path: Path) -> None:
    found = load_task(task).open(MAKERS[task](tmp_path / task))
    assert Counter(row.split for row in found.rows) == SPLITS[task]
    assert found.vocabulary == list(CLASSES[task])  # by name, in the order of the outputs
    assert all(row.path.is_file() for row in found.rows)
    assert MAKERS[task](tmp_path / task)  # writes equal files


def test_tasks__class_orders_are_those_of_the_data_sets() -> None:
    assert load_task("dcase16").label_sets == (frozenset(dcase16.CLASSES),)
    for names in (dcase16.CLASSES, desed.CLASSES, urban_sed.CLASSES):
        assert list(names) == sorted(names, key=str.lower)
    assert [len(c) for c in (dcase16.CLASSES, desed.CLASSES, urban_sed.CLASSES)] == [11, 10, 10]
    assert dcase16.CLASSES[5] == "keysDrop"
    assert desed.CLASSES[-1] == "Vacuum_cleaner"
    assert urban_sed.CLASSES[6] == "gun_shot"
    task = load_task("dcase16")
    assert (task.frames, task.metric, task.selection_metric) == (12_000, "event_f1", "map_micro")
    assert task.detection == Detection(threshold=0.3, median=3, edge="start", collar_seconds=0.2)


def test_rows__events_labels_and_odd_cases(tmp_path: Path) -> None:
    rows = {r.key: r for r in load_task("dcase16").open(MAKERS["dcase16"](tmp_path / "d")).rows}
    assert rows["train-0"].events == (
        Event(0.32, 0.96, ("clearthroat",)), Event(1.28, 1.76, ("cough",)),
    )  # fmt: skip
    assert rows["test-silent"].events == ()  # in no JSON, and judged all the same
    found = load_task("desed").open(MAKERS["desed"](tmp_path / "e"))
    rows = {row.key: row for row in found.rows}
    assert rows["train-weak-0"].labels == ("Alarm_bell_ringing", "Blender")
    assert rows["train-weak-0"].events is None  # its times are not known
    assert rows["validation-validation-none"].events == ()
    assert len(found.left_out) == 4
    assert "4 clips" in found.notes[0]
    rows = {row.key: row for row in load_task("fsd50k").open(MAKERS["fsd50k"](tmp_path / "f")).rows}
    assert rows["dev-101"].labels == ("Sound_001", "Sound_003")
    spass = load_task("spass").open(MAKERS["spass"](tmp_path / "s"))
    assert "no split is published" in spass.notes[0]
    assert spass.rows[0].labels == ("source 00", "source 01")


def test_dcase16__waveform_frames_and_target_by_hand(tmp_path: Path, settings: Any) -> None:
    """120 s with a 1-kHz tone from 2.0 to 3.0 s: 12,001 frames, of which the last is cut off."""
    from bat.tasks.synthetic import write_wav

    root = MAKERS["dcase16"](tmp_path / "dcase16") / "tasks/dcase2016_task2-hear2021-full"
    at = np.arange(32_000, 48_000)
    wave = np.zeros(120 * 16_000)
    wave[at] = 0.5 * np.sin(2 * np.pi * 1_000 * at / 16_000)
    write_wav(root / "48000/test/0.wav", wave)
    listed = json.loads((root / "test.json").read_text())
    listed["0.wav"] = [{"label": "phone", "start": 2000.0, "end": 3000.0}]
    (root / "test.json").write_text(json.dumps(listed))
    ready: Prepared[Any] = prepare(settings("dcase16", "level=frame"))
    assert ready.frames == 12_000
    number = next(i for i in range(12) if ready.index.key(i) == "test-0")
    (batch,) = eval_loader(
        ready.index, np.array([number]), batch=1, sample_rate=16_000, clip_seconds=120.0, workers=0
    )
    assert batch.waves.shape == (1, 1_920_000)
    assert batch.lengths.tolist() == [1_920_000]
    x = ready.backbone.inputs(batch.waves, batch.lengths, frames=ready.frames)
    assert x.shape == (1, 1, 12_000, 128)
    loud = x[0, 0] > 0.9
    frames = loud.any(1).nonzero().flatten()
    assert abs(int(frames.min()) - 200) <= 3  # 10 ms a frame, windows of 64 ms
    assert abs(int(frames.max()) - 300) <= 3
    # mel 1 kHz = 1000; 128 bins up to mel 8 kHz = 2840: 1000 / 2840 * 129 - 1 = bin 44.4
    assert set(loud[250].nonzero().flatten().tolist()) & {44, 45}
    assert not x[0, 0, 400:11_990].any()  # 80 dB below: the floor, which min-max makes 0
    assert ready.targets_of is not None
    target = ready.targets_of(batch, 750)
    assert target.shape == (1, 750, 11)
    on = target[0].nonzero().tolist()  # 13 x 160 = 2080 ms is the first start within, 18 x 160 last
    assert on == [[t, dcase16.CLASSES.index("phone")] for t in range(13, 19)]


def test_dcase16__events_targets_and_metrics_are_the_golden_ones(golden: Path) -> None:
    data = json.loads((golden / "sed.json").read_text())
    for case in data["tokens_to_events"]["cases"]:
        how = Detection(case["threshold"], case["filter_size"], edge="start")
        p = np.array(case["predictions"])[:, None]
        found = detected(p, how, hop_seconds=case["patch_stride_ms"] / 1000)
        assert [[*map(float, e[:2])] for e in found] == [pytest.approx(e) for e in case["events"]]
    asked = data["targets"]
    names = list(asked["class_index"])
    events = tuple(
        Event(e["start_ms"] / 1000, e["end_ms"] / 1000, (e["label"],)) for e in asked["events"]
    )
    made = FrameTargets({"x": events}, labels=names, patch_hop_ms=160, sample_rate=16_000)
    none = torch.zeros(1, 0)
    long = torch.tensor([120 * 16_000])
    target = made(WaveBatch(torch.zeros(1, 1), long, none, ["x"], torch.arange(1), []), 750)[0]
    for c, name in enumerate(names):
        assert target[:, c].nonzero().flatten().tolist() == asked["target_active"][name]
    whole = data["test_set_metric"]
    metric = Events(classes=3, collar_seconds=whole["t_collar"])
    number = {name: c for c, name in enumerate(whole["labels"])}
    rows, truth = [], []
    for file, logits in whole["logits"].items():
        logits = torch.tensor(logits)
        known = tuple(
            Event(e["start"] / 1000, e["end"] / 1000, (e["label"],))
            for e in whole["reference_events"][file]
        )
        how = Detection(whole["threshold"], whole["filter_size"], edge="start")
        p = logits.sigmoid().double().numpy()
        reference = [(e[0], e[1], number[e[2][0]]) for e in known]
        metric.update(detected(p, how, hop_seconds=0.16), reference)
        made = FrameTargets({"x": known}, labels=whole["labels"], patch_hop_ms=160,
                            sample_rate=16_000)  # fmt: skip
        rows.append(logits)
        batch = WaveBatch(torch.zeros(1, 1), long, none, ["x"], torch.arange(1), [])
        truth.append(made(batch, 750)[0])
    said = whole["metrics"]
    assert 100 * metric.compute()["event_f1"] == pytest.approx(said["onset_f1_micro"])
    x, y = torch.cat(rows), torch.cat(truth)
    found = evaluate(x, y, multi_label=True)
    micro = Micro(multi_label=True)
    micro.update(x, y)
    values = {"f1_macro": found["f1"], "mAP_macro": found["map"], "f1_micro": found["f1_micro"],
              "mAP_micro": micro.compute()["map_micro"]}  # fmt: skip
    for name, value in values.items():
        assert 100 * value == pytest.approx(said[name], abs=1e-4), name


RUNS = [("dcase16", "frame"), ("urban_sed", "frame"), ("desed", "frame"), ("desed", "clip"),
        ("fsd50k", "clip"), ("spass", "clip")]  # fmt: skip


@pytest.mark.parametrize(("task", "level"), RUNS)
def test_probe__runs_to_the_final_metric_and_shards_give_the_same(
    task: str, level: str, settings: Any, tmp_path: Path
) -> None:
    words = [f"level={level}", f"loss={'task' if level == 'frame' else 'asl'}"]
    words += ["frames=208", "data.clip_seconds=2.0"] * (task == "dcase16")  # of 12,000
    if (task, level) == ("desed", "clip"):
        words.append("data.split=train,weak")
    MAKERS[task](tmp_path / task)
    summary = probe_files_and_shards(
        task, tmp_path / task, tmp_path, lambda *more: settings(task, *words, *more)
    )
    wanted = load_task(task).metric if level == "frame" else "map"
    assert summary["metric"] == wanted
    assert summary["labels"] == list(CLASSES[task])
    assert summary["splits"][0]["valid"] > 0
    (entry,) = summary["encoders"].values()
    found = entry["results"]["cgp"]["mean"]
    assert 0 <= found[wanted] <= 1
    if level == "frame":
        assert {"segment_f1", "psds1", "psds2"} <= set(found)


def test_finetune__an_event_csv_needs_no_word_on_rolls_and_ends_in_event_metrics(
    encoder: Path, tmp_path: Path
) -> None:
    lines = ["path,label,onset,offset,split"]
    for row in load_task("urban_sed").open(MAKERS["urban_sed"](tmp_path / "u")).rows:
        lines += [f"{row.path},{e.labels[0]},{e[0]},{e[1]},{row.split}" for e in row.events or ()]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    words = [
        "recipe=own", f"data.csv={tmp_path}/events.csv", f"checkpoint={encoder}", "data.batch=4",
        f"data.cache={tmp_path / 'cache'}", "log.progress=false", "hardware=cpu", "data.workers=0",
        "level=frame", "train.steps=2", "train.save_every=2", "optim.warmup_steps=1",
        f"out={tmp_path / 'run'}",
    ]  # fmt: skip
    config = compose(Finetune, "finetune", words)
    assert config.data.roll is None  # labels of whole clips would be rolled
    out = finetune(config)
    found = json.loads((out / "summary.json").read_text())["results"]["linear"]["mean"]
    assert {"event_f1", "segment_f1", "map"} <= set(found)


def test_desed__weak_clips_have_no_place_at_frame_level(settings: Any, tmp_path: Path) -> None:
    MAKERS["desed"](tmp_path / "desed")
    with pytest.raises(UserError, match=r"2 of 17 clips have labels, but no events.*data\.split"):
        prepare(settings("desed", "level=frame", "loss=task", "data.split=train,weak"))
    ready: Prepared[Any] = prepare(settings("desed", "level=frame", "loss=task"))
    assert len(ready.splits[0].train) == 5
    (absent,) = (line for line in ready.notices if "no held-out clip" in line)
    assert "'Dog'" in absent  # of ten classes four sound


@pytest.mark.parametrize(
    ("task", "spoil", "says"),
    [
        ("dcase16", "test.json:9.wav", "1 listed audio file.*48000/test/9.wav.*complete"),
        ("dcase16", "test.json:dgo", "1 line.*label that is no class.*'dgo', test.json, 0.wav"),
        ("urban_sed", "annotations/test/soundscape_test_uniform0.txt:0.1\t0.5\tdgo\n2\t1\tsiren",
         "(?s)1 line.*'dgo'.*uniform0.txt line 1.*1 event.*2 to 1, .*line 2"),
        ("urban_sed", "annotations/test/x.txt:0\t1\tsiren", "1 listed audio.*audio/test/x.wav"),
        ("urban_sed", "annotations/test/soundscape_test_uniform0.txt:0 1 siren", "TAB.*line 1"),
        ("desed", "metadata/validation/validation.tsv:filename\tonset\n0.wav\t1",
         "validation.tsv lacks event_label, offset"),
        ("desed", "metadata/train/weak.tsv:filename\tevent_labels\n0.wav\tdgo", "'dgo'.*line 2"),
        ("fsd50k", "FSD50K.ground_truth/eval.csv:fname,labels,mids\n7,dgo,/m/1",
         "(?s)1 listed audio.*eval_audio/7.wav.*1 line.*'dgo', eval.csv line 2"),
        ("fsd50k", "FSD50K.ground_truth/vocabulary.csv:0,a,/m/0\n2,b,/m/2", "vocabulary.csv"),
        ("spass", "1_MatrixLabelsMarket.csv:audio_filename,class\n99.wav,bird", "Market: 99.wav"),
    ],
)  # fmt: skip
def test_mistakes__are_named_and_counted(task: str, spoil: str, says: str, tmp_path: Path) -> None:
    root = MAKERS[task](tmp_path / task)
    name, _, content = spoil.partition(":")
    if task == "dcase16":
        root = root / "tasks/dcase2016_task2-hear2021-full"
        listed = json.loads((root / name).read_text())
        event = {"label": "phone", "start": 0, "end": 100}
        listed["0.wav"] = [event | {"label": "dgo"}] if content == "dgo" else [event]
        listed |= {} if content == "dgo" else {content: [event]}
        content = json.dumps(listed)
    (root / name).write_text(content)
    with pytest.raises(UserError, match=says):
        load_task(task).open(root)


@pytest.mark.parametrize("task", MAKERS)
def test_root__without_the_files_says_which_and_where_they_are_published(
    task: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"lacks .* of {task} .*Zenodo.* downloads nothing"):
        load_task(task).open(tmp_path / "empty")


def test_event__that_begins_after_its_recording_is_refused(settings: Any, tmp_path: Path) -> None:
    root = MAKERS["urban_sed"](tmp_path / "urban_sed")
    table = root / "annotations/test/soundscape_test_uniform0.txt"
    table.write_text("2.5\t3.0\tsiren\n0\t1\tsiren\n")
    with pytest.raises(
        UserError, match=r"1 event\(s\) begin after .*onset 2.5, .*uniform0 has 2 s"
    ):
        prepare(settings("urban_sed", "level=frame", "loss=task"))
