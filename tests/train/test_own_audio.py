"""Recipe ``own``: any folder of audio, proposals from data and hardware, resuming, online.csv."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bat.cli import pretrain as command
from bat.config.compose import compose, compose_early, from_yaml
from bat.config.schema import Pretrain
from bat.encoders.bat import BAT
from bat.eval.run_folder import default_out, open_data
from bat.train import proposals
from bat.train.online import hold_out
from bat.train.pretrain_data import open_stream
from bat.train.proposals import Machine, in_words, proposal, propose
from bat.types import Grid
from bat.weights import export
from tests.train.runs import metrics

CPU, GPU = Machine(2, 0.0), Machine(16, 80.0, 2)
SMALL = ["model.width=48", "model.depth=2", "model.heads=2", "objective.decoder_depth=1"]
SMALL += ["data.clip_seconds=1", "data.batch=4", "objective.mask.views=2", "train.steps=2"]
SMALL += ["objective.decoder_width=48", "hardware=cpu", "log.progress=false", "data.workers=0"]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixed formats, rates, channels and lengths, nested; an empty file and a text file."""
    root = tmp_path_factory.mktemp("own") / "recordings"
    rng = np.random.default_rng(0)
    made = [
        ("a.wav", 8_000, 0.3, 1), ("x/b.flac", 44_100, 2.0, 2), ("x/y/c.ogg", 22_050, 2.0, 1),
        ("x/y/d.wav", 16_000, 65.0, 1), ("e.flac", 48_000, 3.0, 1),
    ]  # fmt: skip
    if "MP3" in soundfile.available_formats():
        made.append(("f.mp3", 32_000, 2.0, 1))
    for name, rate, seconds, channels in made:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        wave = 0.1 * rng.standard_normal((round(rate * seconds), channels))
        soundfile.write(root / name, wave, rate)
    (root / "empty.wav").touch()
    (root / "notes.txt").write_text("not audio")
    return root


def early(*words: str) -> Pretrain:
    config = compose_early(Pretrain, "pretrain", ["recipe=own", *words])
    assert config is not None
    return config


def values_of(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def test_own__a_folder_without_a_recipe_is_trained_on_and_resumes_with_its_proposals(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"data.root={recordings}", *SMALL]
    assert command.main(words) == 0
    out = default_out(early(*words))
    said = capfd.readouterr().err
    assert "files, 74.3 s (0.3 s to 65 s each)" in said
    assert said.count("empty.wav, empty") == 1
    config = from_yaml(Pretrain, out / "config.yaml")
    assert (config.recipe, config.data.windows, config.frontend.frames) == ("own", True, 128)
    assert (config.optim.warmup_steps, config.objective.ema.steps) == (1, 2)
    assert [r["step"] for r in metrics(out) if "loss" in r] == [1, 2]
    assert all(np.isfinite(r["loss"]) for r in metrics(out) if "loss" in r)
    assert (out / "plots" / "masks.png").exists()
    monkeypatch.setattr(proposals, "machine_of", lambda config: GPU)  # another proposal, made anew
    new = [*words, "out=new"]
    assert values_of(propose(early(*new), new))["objective.ema.start"] == "0.999"
    resumed = values_of(propose(early(*words), words))
    assert (resumed["objective.ema.start"], resumed["data.cache_waves_gb"]) == ("0.99", "1.0")
    assert not {"model.width", "train.steps", "data.batch"} & set(resumed)
    assert command.main(words) == 0
    assert "nothing to do" in capfd.readouterr().err


def test_own__short_recordings_are_padded_and_long_ones_seen_whole(recordings: Path) -> None:
    words = [f"data.root={recordings}", f"data.cache={recordings.parent / 'cache'}", *SMALL]
    stream = open_stream(compose(Pretrain, "pretrain", ["recipe=own", *words])).data
    index, dataset = stream.index, stream.dataset
    n = len(index)
    assert n == len(stream.plan) == 1 + 2 + 2 + 65 + 3 + 2 * ("f" in map(index.key, range(n)))
    batch = dataset.batch([(i, i) for i in range(n)])
    assert (len(batch.keys), batch.skipped) == (n, [])
    lengths = dict(zip(batch.keys, batch.lengths.tolist(), strict=True))
    assert lengths["a"] == 4_800  # 0.3 s at 16 kHz, then silence
    assert batch.waves[batch.keys.index("a"), 4_800:].abs().max() == 0
    assert {length for key, length in lengths.items() if key != "a"} == {16_000}


class Clips:
    """An index of clips of these lengths, in seconds."""

    def __init__(self, *seconds: float) -> None:
        self.frames = (np.array(seconds) * 16_000).astype(int)
        self.rate = np.full(len(seconds), 16_000)
        self.seconds = np.array(seconds)

    def __len__(self) -> int:
        return len(self.frames)


@pytest.mark.parametrize(
    ("clips", "machine", "expected"),
    [
        (Clips(*[1.5] * 50), CPU, ("tiny", 2.0, 224, 16, 25)),
        (Clips(*[4.0] * 50, 65), CPU, ("tiny", 5.0, 512, 16, 25)),
        (Clips(*[3600.0] * 100), CPU, ("tiny", 5.0, 512, 16, 2500)),
        (Clips(*[3600.0] * 2), GPU, ("S", 10.0, 1024, 80, 1200)),
        (Clips(*[10.0] * 100_000), GPU, ("B", 10.0, 1024, 40, 120_000)),
        (Clips(0.3), CPU, ("tiny", 2.0, 224, 4, 100)),
    ],
)
def test_proposal__follows_the_rules(clips: Clips, machine: Machine, expected: tuple) -> None:
    config = early()
    values = proposal(config, clips, machine)
    width = {"tiny": 192, "S": 384, "B": 768}[expected[0]]
    names = ("model.width", "data.clip_seconds", "frontend.frames", "data.batch", "train.steps")
    assert tuple(values[name] for name in names) == (width, *expected[1:])
    assert values["optim.warmup_steps"] < values["train.steps"] == values["objective.ema.steps"]
    words = ["recipe=own", *(f"{key}={value}" for key, value in values.items())]
    assert compose(Pretrain, "pretrain", words).model.width == width  # no problems
    assert len(in_words(values, config, clips, machine)) == 3


def test_propose__leaves_what_the_user_gives(recordings: Path, tmp_path: Path) -> None:
    common = [f"data.root={recordings}", f"data.cache={tmp_path}", f"out={tmp_path / 'run'}"]

    def proposed(*words: str) -> dict[str, str]:
        return values_of(propose(early(*common, *words), [*common, *words]))

    assert {"model.width", "objective.ema.steps", "data.batch"} <= set(proposed())
    assert not {k for k in proposed("model=S") if k.startswith("model")}
    assert not {k for k in proposed("model.depth=3") if k.startswith("model")}
    assert not {k for k in proposed("objective=mae") if k.startswith("objective")}
    assert proposed("data.clip_seconds=3")["frontend.frames"] == "320"
    assert proposed("frontend.frames=224")["data.clip_seconds"] == "2.24"
    assert proposed("train.steps=50")["optim.warmup_steps"] == "5"
    other = BAT(width=64, depth=3, heads=1, grid=Grid(32, 8), gate=False)
    file = export(tmp_path / "x", backbone="bat", encoder=other.config(),
                  weights={"student": other.state_dict()}, meta={})  # fmt: skip
    found = proposed(f"init={file}")
    assert (found["model.width"], found["model.depth"], found["model.gate"]) == ("64", "3", "false")
    assert (found["frontend.frames"], found["data.clip_seconds"]) == ("512", "5.0")


def test_online__labels_in_a_csv_probe_a_run_on_unlabelled_audio(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["path,label"]
    for i in range(8):
        soundfile.write(f"{i}.wav", 0.1 * np.sin(np.arange(8_000) * (0.1 + i % 2)), 16_000)
        lines.append(f"{i}.wav,{'low' if i % 2 else 'high'}")
    Path("labels.csv").write_text("\n".join(lines))
    words = [f"data.root={recordings}", *SMALL, "online.csv=labels.csv", "online.steps=2"]
    words += ["online.head.prototypes=8", "out=run", "online.methods=[linear]"]
    assert command.main(words) == 0
    assert from_yaml(Pretrain, Path("run/config.yaml")).online.every == 1
    rows = [r for r in metrics(Path("run")) if "online/linear/accuracy" in r]
    assert [r["step"] for r in rows] == [0, 1, 2]
    task, index = open_data("folder", replace(early(*words).data, root=None, csv="labels.csv"))
    assert (task.name, index.classes) == ("csv", 2)


class Labelled:
    """An index of clips with one label each, and the file that each is a window of."""

    def __init__(self, labels: list[int], shard: list[int] | None = None) -> None:
        self.label_ids, self.label_ptr = np.array(labels), np.arange(len(labels) + 1)
        self.shard = np.array(shard or range(len(labels)))
        self.starts = None if shard is None else np.zeros(len(labels))


def test_hold_out__has_all_classes_and_never_parts_a_recording() -> None:
    clips = np.arange(20)
    assert hold_out(Labelled([0, 1] * 10), clips).tolist() == [True] * 4 + [False] * 16
    small = hold_out(Labelled([0] * 6 + [1, 1]), np.arange(8))
    assert small.tolist() == [True] + [False] * 5 + [True, False]
    index = Labelled([0] * 10 + [1] * 10, [*[0] * 4, *[1] * 6, *[2] * 9, 3])
    held = hold_out(index, np.random.default_rng(0).permutation(20))
    files = index.shard[np.random.default_rng(0).permutation(20)]
    assert not set(files[held]) & set(files[~held])
    assert {index.label_ids[c] for c in np.random.default_rng(0).permutation(20)[held]} == {0, 1}
