"""Speech Commands from its public layout to accuracy: lists, silence by seeking, class order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bat.config.compose import compose
from bat.config.schema import Probe
from bat.data.files import index_files, read_row
from bat.data.stream import eval_loader
from bat.data.windows import cut_into_windows
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.prepare import prepare
from bat.tasks import scv2
from bat.types import Grid
from tests.tasks.shards import probe_files_and_shards

SECONDS = {"doing_the_dishes": 10.5, "white_noise": 10.0}
"""Ten whole seconds each: 8 of training, 1 of validation, 1 of test."""
NAMES = ("a_nohash_0.wav", "a_nohash_1.wav", "b_nohash_0.wav")


def noise(name: str) -> np.ndarray:
    rng = np.random.default_rng(len(name))
    return np.round(rng.uniform(-3000, 3000, round(16_000 * SECONDS[name]))) / 32768


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The archive's layout with four words, three clips each: train, valid, test."""
    top = tmp_path / "speech_commands"
    for k, word in enumerate(("yes", "go", "bed", "zero")):
        (top / word).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            t = np.arange(9_000 + 3_500 * i) / 16_000
            soundfile.write(top / word / name, 0.2 * np.sin(2000 * (k + 1) * t), 16_000)
    (top / "_background_noise_").mkdir()
    for name in SECONDS:
        soundfile.write(top / "_background_noise_" / f"{name}.wav", noise(name), 16_000)
    (top / "_background_noise_" / "README.md").write_text("noise\n")
    for file, name in zip(scv2.LISTS, NAMES[1:], strict=True):
        lines = [f"{word}/{name}\n" for word in ("yes", "go", "bed", "zero")]
        (top / file).write_text("".join(lines))
    return top


def test_rows__classes_splits_and_keys_are_those_published(root: Path) -> None:
    found = scv2.TASK.open(root)
    names = "yes no up down left right on off stop go unknown silence"
    assert " ".join(found.vocabulary) == names
    counts = Counter((row.split, row.labels) for row in found.rows)
    for split, seconds in (("train", 8), ("valid", 1), ("test", 1)):
        assert counts[split, ("yes",)] == counts[split, ("go",)] == 1
        assert counts[split, ("unknown",)] == 2  # bed, zero
        assert counts[split, ("silence",)] == 2 * seconds
    by_key = {row.key: row for row in found.rows}
    assert by_key["bed__b_nohash_0"].split == "test"
    last = by_key["silence__doing_the_dishes__09"]
    assert (last.start_seconds, last.seconds, last.split) == (9.0, 1.0, "test")


def test_silence__counts_of_the_published_lengths(tmp_path: Path) -> None:
    counts: Counter[str | None] = Counter()
    for i, seconds in enumerate((95, 61, 61, 60, 61, 60)):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, np.zeros(8 * seconds + 3), 8)  # 8 Hz: small
        counts.update(row.split for row in scv2._silence(path))
    assert counts == {"train": 319, "valid": 40, "test": 39}


def test_silence__is_read_by_seeking_and_equals_the_second(root: Path) -> None:
    found = scv2.TASK.open(root)
    index, left_out = index_files(found.rows, found.vocabulary)
    assert not left_out
    number = {index.key(i): i for i in range(len(index))}
    i = number["silence__white_noise__07"]
    assert (index.frames[i], index.rate[i]) == (16_000, 16_000)
    loader = eval_loader(index, np.array([i]), batch=1, sample_rate=16_000, clip_seconds=1.0)
    (batch,) = loader
    wanted = noise("white_noise")[7 * 16_000 : 8 * 16_000]
    np.testing.assert_array_equal(batch.waves[0].numpy(), wanted.astype(np.float32))
    row = next(row for row in found.rows if row.key == "silence__white_noise__07")
    assert len(read_row(row)) < 33_000  # of 320,044 bytes
    # windows of the index keep the parts with their clips
    cut = cut_into_windows(index, 0.4)
    parts = [k for k in range(len(cut)) if "white_noise__07" in cut.key(k)]
    assert len(parts) == 3
    assert all(cut.read(k).data == read_row(row) for k in parts)


@pytest.fixture
def settings(tmp_path: Path):
    from bat.weights import export

    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(7, 8))
    made = {"backbone": "bat", "encoder": model.config(), "meta": {}}
    encoder = export(tmp_path / "export", weights={"student": model.state_dict()}, **made)

    def build(*words: str) -> Probe:
        given = [f"checkpoint={encoder}", f"data.cache={tmp_path / 'c'}", "recipe=scv2",
                 "hardware=cpu", "log.progress=false", "train.steps=6", "data.workers=0",
                 "data.batch=8", "protocol.look_every=3", "optim.warmup_steps=1", "bootstrap=100",
                 f"features.folder={tmp_path / 'f'}", "diagnostics.encoder=false",
                 "methods=[linear]"]  # fmt: skip
        merged = dict(word.split("=", 1) for word in [*given, *words])
        return compose(Probe, "probe", [f"{k}={v}" for k, v in merged.items()])

    return build


def test_clip__wave_frames_and_target_by_hand(root: Path, settings) -> None:
    ready = prepare(settings(f"data.root={root}"))
    assert (ready.frames, ready.config.data.clip_seconds) == (112, 1.0)
    (i,) = (i for i in range(len(ready.index)) if ready.index.key(i) == "go__a_nohash_0")
    assert ready.index.targets(i).tolist() == [0] * 9 + [1, 0, 0]
    wave = np.zeros(16_000, np.float32)
    t = np.arange(9_000) / 16_000
    wave[:9_000] = np.round(0.2 * np.sin(4000 * t) * 32768) / 32768
    loader = eval_loader(ready.index, np.array([i]), batch=1, sample_rate=16_000, clip_seconds=1.0)
    (batch,) = loader
    assert batch.lengths.tolist() == [9_000]
    np.testing.assert_allclose(batch.waves[0].numpy(), wave, atol=1.01 / 32768)
    x = ready.backbone.inputs(batch.waves, batch.lengths, frames=112)  # (1, 1, 112, 128)
    # silence up to 1 s is signal: 101 frames of it, then zero frames
    whole = ready.backbone.inputs(batch.waves, torch.tensor([16_000]), frames=112)
    assert torch.equal(x, whole)
    assert not x[0, 0, 101:].any()
    assert x[0, 0, :101].max() == pytest.approx(1.0, abs=1e-5)
    assert ready.backbone.patches_of(112) == 7


def test_probe__runs_from_files_and_shards_with_the_same_numbers(
    root: Path, settings, tmp_path: Path
) -> None:
    summary = probe_files_and_shards("scv2", root, tmp_path, settings)
    assert summary["metric"] == "accuracy"
    assert tuple(summary["labels"]) == scv2.CLASSES
    assert "step selected on the clips of the split valid" in summary["how"]
    (split,) = summary["splits"]
    assert (split["train"], split["valid"], split["test"]) == (20, 6, 6)
    (entry,) = summary["encoders"].values()
    (chosen,) = entry["results"]["linear"]["selected"].values()
    assert chosen["step"] in (3, 6)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda top: (top / "testing_list.txt").unlink(), ["lacks testing_list.txt", "v0.02"]),
        (lambda top: (top / "yes" / NAMES[2]).unlink(),
         ["1 files", "yes/b_nohash_0.wav", "unpack"]),
        (lambda top: (top / "_background_noise_" / "white_noise.wav").write_bytes(b"RIFF"),
         ["white_noise.wav cannot be read", "unpack"]),
    ],
)  # fmt: skip
def test_rows__what_is_wrong_is_named(root: Path, damage, words) -> None:
    damage(root)
    with pytest.raises(UserError) as error:
        scv2.TASK.open(root)
    assert all(word in str(error.value) for word in words), str(error.value)
