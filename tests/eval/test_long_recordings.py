"""Recordings longer than a clip, from files and shards: all windows are read, each counts once."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bat.audio.decode import decode
from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.data.files import index_files
from bat.data.index import open_index
from bat.data.stream import eval_loader
from bat.data.windows import Window, cut_into_windows
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.fit import Predictions
from bat.eval.joining import join_windows
from bat.eval.prepare import open_probing, prepare
from bat.eval.probe import probe
from bat.eval.targets import FrameTargets
from bat.metrics.ranking import Classification
from bat.seeding import derive_seed
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.train.finetune import finetune
from bat.types import Grid, WaveBatch
from bat.weights import export

RATE, RECORDINGS, LONG = 16_000, 36, 6.0


def write(folder: Path) -> Path:
    """Weak noise of 6 s, a tone or loud noise in the second or the last; every third of 0.8 s."""
    rng = np.random.default_rng(0)
    labels, events = ["path,label,split"], ["path,label,onset,offset,split"]
    for i in range(RECORDINGS):
        seconds, c = (0.8 if i % 3 == 2 else LONG), i // 3 % 2
        onset = (1.12, 5.12, 0.0)[i % 3]  # whole patches of 0.16 s
        wave = 0.01 * rng.standard_normal(round(seconds * RATE))
        at = slice(round(onset * RATE), round((onset + 0.8) * RATE))
        times = np.arange(at.stop - at.start) / RATE
        tone, burst = 0.5 * np.sin(2 * np.pi * 600 * times), 0.3 * rng.standard_normal(len(times))
        wave[at] += (tone, burst)[c]
        soundfile.write(folder / f"{i}.wav", wave, RATE)
        split = ("train", "train", "test")[i // 3 % 3]
        labels.append(f"{i}.wav,{'ab'[c]},{split}")
        events.append(f"{i}.wav,{'ab'[c]},{onset},{onset + 0.79:.2f},{split}")
    (folder / "labels.csv").write_text("\n".join(labels))
    (folder / "events.csv").write_text("\n".join(events))
    for name in ("labels", "events"):
        found = open_rows(folder / f"{name}.csv")
        write_shards(found.rows, folder / name, vocabulary=found.vocabulary)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = BAT(width=48, depth=2, heads=2, grid=Grid(8, 8))
    folder = tmp_path_factory.mktemp("encoder") / "export"
    weights = {"student": model.state_dict()}
    return export(folder, backbone="bat", encoder=model.config(), weights=weights, meta={})


@pytest.fixture(scope="module")
def settings(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Probe]:
    folder = tmp_path_factory.mktemp("caches")

    def build(*words: str, schema: type = Probe) -> Probe:
        given = ["recipe=own", f"checkpoint={encoder}", "hardware=cpu", "data.workers=0",
                 "log.progress=false", "data.clip_seconds=1", f"data.cache={folder}",
                 "train.steps=100", "data.batch=12"]  # fmt: skip
        if schema is Probe:
            given += ["protocol=bat", "optim.lr=0.03", "optim.warmup_steps=0", "methods=[cgp]",
                      "head.prototypes=50",
                      "diagnostics.encoder=false", "diagnostics.maps=0", "bootstrap=100",
                      "train.epochs=0", f"features.folder={folder}"]  # fmt: skip
        merged = dict(word.split("=", 1) for word in [*given, *words])
        words = tuple(f"{key}={value}" for key, value in merged.items())
        return compose(schema, "probe" if schema is Probe else "finetune", list(words))

    return build


def from_shards(data: Path, name: str) -> list[str]:
    return ["task=folder", f"data.shards=[{data / name}]"]


@pytest.fixture(scope="module")
def run(data: Path, settings: Callable[..., Probe], tmp_path_factory: pytest.TempPathFactory):
    """``run("key=value", ...)`` -> its folder and the one result."""

    def made(*words: str) -> tuple[Path, dict]:
        out = tmp_path_factory.mktemp("run") / "out"
        probe(settings(*words, f"out={out}"))
        return out, json.loads((out / "results.jsonl").read_text().splitlines()[-1])

    return made


@pytest.fixture(scope="module")
def from_files(data: Path, run) -> tuple[Path, dict]:
    return run(f"data.csv={data}/labels.csv", "window_scores=true")


def scores(out: Path) -> dict[str, np.ndarray]:
    """The listed probabilities of each recording, (windows, classes)."""
    (file,) = out.glob("scores/*/cgp-test-0.csv")
    found: dict[str, list[list[float]]] = {}
    with file.open() as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row["recording"], []).append([float(row["a"]), float(row["b"])])
    return {key: np.array(rows) for key, rows in found.items()}


def test_probe__a_sound_in_one_window_is_found(data: Path, from_files, run) -> None:
    out, result = from_files
    assert result["metrics"]["map"] > 0.99
    summary = json.loads((out / "summary.json").read_text())
    assert summary["clips"] == RECORDINGS
    said = next(line for line in summary["notices"] if "longer than 1 s" in line)
    assert "24 of 36" in said
    assert "144 windows" in said
    out, result = run(f"data.csv={data}/labels.csv", "data.windows=false")
    assert result["metrics"]["map"] < 0.9  # the start of a long one is noise
    said = json.loads((out / "summary.json").read_text())["notices"]
    assert any("only their start is evaluated" in line for line in said)


def test_metrics__count_a_recording_once_and_intervals_draw_recordings(from_files) -> None:
    out, result = from_files
    found = scores(out)
    assert sorted(map(len, found.values())) == [1] * 4 + [6] * 8
    mean = {key: p.mean(0) for key, p in found.items()}
    true = [int(re.match(r"\d+", key)[0]) // 3 % 2 for key in mean]
    targets = torch.eye(2)[true]
    metric = Classification(multi_label=False)
    metric.update(torch.tensor(np.stack(list(mean.values()))).log(), targets)
    assert metric.compute()["map"] == pytest.approx(result["metrics"]["map"])
    draws = metric.replicates("accuracy", resamples=100, seed=derive_seed(0, "test", "resamples"))
    assert result["replicates"] == pytest.approx(draws.tolist(), abs=1e-6)


def test_probe__shards_and_streamed_features_give_the_same_numbers(
    data: Path, from_files, run
) -> None:
    out, result = run(*from_shards(data, "labels"), "features.cache=off", "window_scores=true")
    ours, theirs = (list(scores(folder).values()) for folder in (out, from_files[0]))
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)
    assert result["metrics"]["map"] == pytest.approx(from_files[1]["metrics"]["map"])


def test_probe__events_late_in_a_recording_are_detected(data: Path, run) -> None:
    """Every test recording is long, and none has an event in its first second: what reads the
    start alone finds nothing."""
    lines = (data / "events.csv").read_text().splitlines()
    short = {f"{i}.wav" for i in range(2, RECORDINGS, 3)}
    late = [line for line in lines if not line.endswith("test") or line.split(",")[0] not in short]
    (data / "late.csv").write_text("\n".join(late))
    out, result = run(f"data.csv={data}/late.csv", "level=frame", "optim.lr=0.1")
    assert result["metrics"]["segment_f1"] > 0.5  # NaN with data.windows=false
    said = json.loads((out / "summary.json").read_text())["notices"]
    assert any("joined in time" in line for line in said)


@pytest.mark.parametrize("level", ["clip", "frame"])
def test_finetune__reads_all_windows_and_evaluates_recordings(
    data: Path, settings, tmp_path: Path, level: str
) -> None:
    out, name = tmp_path / "run", "labels" if level == "clip" else "events"
    more = ["window_scores=true"] if level == "clip" else ["data.roll=false"]
    more += [f"data.csv={data}/{name}.csv", f"out={out}", f"level={level}", "train.steps=2"]
    finetune(settings(*more, "optim.warmup_steps=0", "data.batch=4", schema=Finetune))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["clips"] == RECORDINGS
    if level == "clip":
        assert len((out / "fold-test" / "scores.csv").read_text().splitlines()) == 1 + 8 * 6 + 4


def test_frame_targets__of_windows_are_those_of_the_whole_recording(data: Path, settings) -> None:
    ready = prepare(settings(f"data.csv={data}/events.csv", "level=frame"))
    assert ready.places is not None
    whole = FrameTargets(ready.events, labels=ready.labels, patch_hop_ms=160.0, sample_rate=RATE)

    def targets(made: FrameTargets, key: str, seconds: float) -> torch.Tensor:
        n = round(seconds * RATE)
        batch = WaveBatch(torch.zeros(1, n), torch.tensor([n]), torch.zeros(1, 2), [key],
                          torch.zeros(1), [])  # fmt: skip
        return made(batch, 38)[0]

    for key, (recording, start) in ready.places.items():
        seconds = min(1.0, (LONG if start or len(recording) else 0.8) - start)
        ours = targets(ready.targets_of, key, seconds)
        first = round(start / 0.16)
        known = ~ours.isnan().any(1)
        expected = targets(whole, recording, LONG)[first : first + int(known.sum())]
        torch.testing.assert_close(ours[: len(expected)], expected)
        assert start == pytest.approx(first * 0.16)


def test_join_windows__an_event_across_a_border_stays_one_and_gaps_stay_in_place() -> None:
    """Windows of 3 patches every 2 patches; the third of five cannot be read."""
    keys = ["x", "x@2", "x@6", "x@8", "y"]
    starts = [0.0, 2.0, 6.0, 8.0, 0.0]
    places = {key: Window(key[0], start) for key, start in zip(keys, starts, strict=True)}
    clips = torch.arange(5).repeat_interleave(3)
    logits = torch.arange(15.0)[:, None]
    found = Predictions({}, logits.clone(), clips, total=5)
    joined, found = join_windows(logits, found, keys, places, multi_label=True, hop_seconds=1.0)
    assert found.keys == ["x", "y"]
    assert found.total == 2
    assert found.patches.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 0, 1, 2]
    assert joined[:, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]
    assert found.clips.tolist() == [0] * 10 + [1] * 3
    assert torch.equal(found.targets, joined)
    with pytest.raises(UserError, match="cannot be read"):
        join_windows(logits, found, keys, places, multi_label=True, hop_seconds=1.0)


@pytest.mark.parametrize("multi_label", [True, False])
def test_join_windows__labels_get_the_mean_probability(multi_label: bool) -> None:
    torch.manual_seed(0)
    logits, targets = 30 * torch.randn(4, 3), torch.eye(3)[[0, 0, 0, 1]]
    places = {k: Window(k[0], 0.0) for k in ("x", "x@1", "x@2", "y")}
    joined, found = join_windows(
        logits, Predictions({}, targets, None, total=4), list(places), places,
        multi_label=multi_label,
    )  # fmt: skip
    share = torch.sigmoid if multi_label else (lambda x: x.softmax(1))
    torch.testing.assert_close(share(joined)[0], share(logits.double())[:3].mean(0))
    torch.testing.assert_close(joined[1], logits[3].double())
    assert torch.equal(found.targets, targets[[0, 3]])


def test_open_probing__texts_of_long_recordings_are_refused(data: Path, settings) -> None:
    table = data / "texts.csv"
    lines = [f"{i}.wav,ab,{('train', 'test')[i % 2]}" for i in range(6)]
    table.write_text("\n".join(["path,text,split", *lines]))
    words = [f"data.csv={table}", "level=frame"]
    with pytest.raises(UserError, match=r"4 of 6 .*data.clip_seconds=6"):
        open_probing(settings(*words))
    assert open_probing(settings(*words, "data.clip_seconds=6")).task.target == "tokens"


def test_index__windows_in_a_tar_are_read_by_seeking(data: Path) -> None:
    rng = np.random.default_rng(1)
    wave = rng.uniform(-0.5, 0.5, 50 * RATE).astype(np.float32)
    (data / "big").mkdir()
    soundfile.write(data / "big" / "x.flac", wave, RATE)
    found = open_rows(data / "big")
    write_shards(found.rows, data / "tar", vocabulary=found.vocabulary)
    index = cut_into_windows(open_index(data / "tar"), 5.0)
    whole, _ = soundfile.read(data / "big" / "x.flac", dtype="float32")
    part = index.audio(3)
    assert not isinstance(part, bytes)
    with part.open() as file:
        assert file.read(4) == b"fLaC"
        assert file.seek(-4, 2) == part.size - 4
        assert len(file.read()) == 4
    start = int(index.starts[3])
    window = decode(part, sample_rate=RATE, start_seconds=start / RATE, max_seconds=5.0)
    np.testing.assert_array_equal(window, whole[start : start + 5 * RATE])
    with (data / "tar").glob("*.tar").__next__().open("r+b") as tar:
        tar.seek(int(index.offset[3]) - 500)
        tar.write(b"other")
    with pytest.raises(OSError, match="another clip"):
        index.audio(3)


@pytest.mark.parametrize("place", ["file", "tar"])
def test_eval_loader__memory_does_not_grow_with_the_recording(tmp_path: Path, place: str) -> None:
    """Ten minutes are 38 MB decoded and 19 MB as a file; two windows of 10 s 1.3 MB."""
    (tmp_path / "big").mkdir()
    rng = np.random.default_rng(0)
    wave = rng.integers(-9_000, 9_000, 600 * RATE, dtype=np.int16)
    soundfile.write(tmp_path / "big" / "x.wav", wave, RATE)
    found = open_rows(tmp_path / "big")
    if place == "tar":
        write_shards(found.rows, tmp_path / "tar", vocabulary=found.vocabulary)
        index = open_index(tmp_path / "tar")
    else:
        index, _ = index_files(found.rows, found.vocabulary, windows=True)
    cut_into_windows(index, 10.0)
    tracemalloc.start()
    heard = 0
    for batch in eval_loader(index, batch=2, sample_rate=RATE, clip_seconds=10.0):
        assert not batch.skipped
        heard += int(batch.lengths.sum())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert heard == len(wave)
    assert peak < 6e6
