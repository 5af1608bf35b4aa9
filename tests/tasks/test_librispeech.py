"""LibriSpeech from its public layouts to transcripts: splits, texts, tokens, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bat.config.compose import compose
from bat.config.schema import Probe
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.prepare import open_probing, prepare
from bat.eval.scoring import greedy
from bat.eval.targets import TokenTargets, outputs
from bat.metrics.text import Text
from bat.tasks import librispeech
from bat.tasks.base import load_task
from bat.types import Grid, WaveBatch
from tests.tasks.shards import probe_files_and_shards

TEXTS = {
    "train-clean-100": {
        "19-198-0000": "HELLO WORLD",
        "19-198-0001": "IT'S FINE",
        "26-495-0000": "GO",
    },
    "dev-clean": {"84-121123-0000": "GO NOW", "84-121123-0001": "YES"},
    "test-clean": {"1089-134686-0000": "HE HOPED", "1089-134686-0001": "STUFF IT INTO YOU"},
}  # fmt: skip
TASK = librispeech.TASK


def wave(key: str) -> np.ndarray:
    """16-bit samples of 1.2 to 1.7 s, different for each key."""
    rng = np.random.default_rng(sum(map(ord, key)))
    return np.round(rng.uniform(-8000, 8000, 19_200 + 1_600 * (ord(key[-1]) % 6))) / 32768


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The layout of OpenSLR 12."""
    for part, texts in TEXTS.items():
        for key, text in texts.items():
            speaker, chapter, _ = key.split("-")
            folder = tmp_path / "LibriSpeech" / part / speaker / chapter
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{key}.flac", wave(key), 16_000)
            with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as file:
                file.write(f"{key} {text}\n")
    (tmp_path / "LibriSpeech" / "SPEAKERS.TXT").write_text("; about\n")
    return tmp_path


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory):
    from bat.weights import export

    folder = tmp_path_factory.mktemp("e")
    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(4, 8))
    made = {"backbone": "bat", "encoder": model.config(), "meta": {}}
    encoder = export(folder / "export", weights={"student": model.state_dict()}, **made)

    def build(*words: str) -> Probe:
        given = [f"checkpoint={encoder}", f"data.cache={folder / 'c'}", "recipe=librispeech",
                 "hardware=cpu", "log.progress=false", "train.steps=4", "data.workers=0",
                 "protocol.look_every=2", "optim.warmup_steps=1", "head.hidden=6", "bootstrap=100",
                 f"features.folder={folder / 'f'}", "diagnostics.encoder=false"]  # fmt: skip
        merged = dict(word.split("=", 1) for word in [*given, *words])
        return compose(Probe, "probe", [f"{k}={v}" for k, v in merged.items()])

    return build


def test_rows__of_the_published_folders(root: Path) -> None:
    found = TASK.open(root)
    assert {row.key: (row.split, row.text) for row in found.rows} == {
        key: (librispeech.PARTS[part], text)
        for part, texts in TEXTS.items()
        for key, text in texts.items()
    }
    assert found.vocabulary == []
    assert not found.notes
    again = TASK.open(root / "LibriSpeech")
    assert again.rows == found.rows
    extra = root / "LibriSpeech" / "dev-other"
    extra.mkdir()
    assert "dev-other" in TASK.open(root).notes[0]


def test_rows__of_the_hub_are_the_same(root: Path, tmp_path_factory) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    hub = tmp_path_factory.mktemp("hub")
    files = {row.key: row.path.read_bytes() for row in TASK.open(root).rows}
    names = dict(zip(TEXTS, ("train.100", "validation", "test"), strict=True))
    for layout in ("clean/{}/0000.parquet", "data/{}-00000-of-00001.parquet"):
        for part, texts in {**TEXTS, "train.360": {"1-2-3": "NO"}}.items():
            path = hub / layout.format(names.get(part, part))
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    "file": f"{key}.flac",
                    "audio": {"bytes": files.get(key, b"x"), "path": f"{key}.flac"},
                    "text": text,
                    "speaker_id": 1,
                    "chapter_id": 2,
                    "id": key,
                }
                for key, text in texts.items()
            ]
            pq.write_table(pa.Table.from_pylist(rows), path)
        folder = hub / layout.split("/")[0]
        found = TASK.open(folder)
        said = {row.key: (row.split, row.text) for row in found.rows}
        assert said == {row.key: (row.split, row.text) for row in TASK.open(root).rows}
        assert "train.360" in found.notes[0]


def test_tokens__equal_the_reference(golden: Path) -> None:
    told = json.loads((golden / "ctc/tokenizer.json").read_text())
    names = outputs([], TASK)
    assert names == told["chars"]
    assert len(names) == told["vocab_size"] == 29
    for case in told["encode"]:
        text = TASK.text_of(case["text"])
        made = TokenTargets({"k": text}, labels=names, kind="characters")
        batch = WaveBatch(torch.zeros(1, 1), torch.ones(1), torch.zeros(1, 0), ["k"],
                          torch.zeros(1), [])  # fmt: skip
        assert made(batch, 1)[0].tolist() == case["ids"]
        assert text == case["decoded"]
    for case in (*told["greedy_paths"], *told["greedy_random"]):
        assert "".join(names[n] for n in greedy(case["argmax_path"])) == case["text"]


def test_lengths_and_rates__equal_the_reference(golden: Path) -> None:
    told = json.loads((golden / "ctc/tokenizer.json").read_text())
    encoder = BAT(width=16, depth=1, heads=2, grid=Grid(64, 8))
    for case in told["asr_lengths"]:
        patches = encoder.time_patches(case["samples"])
        assert 16 * patches == case["padded_frames"]
        assert 8 * patches == case["ctc_input_length"]
    rates = told["error_rates"]
    text = Text()
    for one, other in zip(rates["hyps"], rates["refs"], strict=True):
        text.update(list(one), list(other))
    found = text.compute()
    assert 100 * found["wer"] == pytest.approx(rates["wer_percent"])
    assert 100 * found["cer"] == pytest.approx(rates["cer_percent"])


def test_clip__wave_frames_and_target_by_hand(root: Path, settings) -> None:
    ready = prepare(settings(f"data.root={root}"))
    index, (held,) = ready.index, ready.splits
    assert (len(held.train), len(held.valid), len(held.test)) == (3, 2, 2)
    assert ready.labels == ("<blank>", " ", "'", *"abcdefghijklmnopqrstuvwxyz")
    from bat.data.stream import eval_loader

    (number,) = (i for i in range(len(index)) if index.key(i) == "19-198-0001")
    loader = eval_loader(index, np.array([number]), batch=1, sample_rate=16_000, clip_seconds=36.0)
    (batch,) = loader
    samples = wave("19-198-0001")
    assert batch.lengths.tolist() == [len(samples)] == [20_800]
    np.testing.assert_array_equal(batch.waves[0, : len(samples)].numpy(), samples)
    # 1 + 20800 // 160 = 131 frames, 9 patches of 16, 72 steps of 20 ms
    assert ready.backbone.time_patches(20_800) == 9
    #                                    i   t   s   '  s  ' '  f  i   n   e  (a is 3)
    assert ready.targets_of(batch, 9)[0, :9].tolist() == [11, 22, 2, 21, 1, 8, 11, 16, 7]


def test_probe__runs_from_folders_and_shards_with_the_same_numbers(
    root: Path, settings, tmp_path: Path
) -> None:
    summary = probe_files_and_shards("librispeech", root, tmp_path, settings)
    assert (summary["metric"], summary["target"]) == ("wer", "tokens")
    assert "step selected on the clips of the split valid" in summary["how"]
    (entry,) = summary["encoders"].values()
    assert set(entry["results"]["asr"]["mean"]) == {"wer", "cer", "token_error_rate"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda top: (top / "dev-clean").rename(top / "away"), ["lacks dev-clean", "OpenSLR 12"]),
        (lambda top: next(top.glob("test-clean/*/*/*0001.flac")).unlink(),
         ["1 utterances", "test-clean/1089-134686-0001.flac", "unpack"]),
        (lambda top: next(top.glob("dev-clean/*/*/*.txt")).open("a").write("84-121123-0002\n"),
         ["1 transcripts are empty", "84-121123.trans.txt line 3", "remove"]),
    ],
)  # fmt: skip
def test_rows__what_is_wrong_is_named(root: Path, damage, words) -> None:
    damage(root / "LibriSpeech")
    with pytest.raises(UserError) as error:
        TASK.open(root)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_prepare__long_and_empty_texts_are_counted_and_left_out(root: Path, settings) -> None:
    table = next(root.glob("LibriSpeech/train-clean-100/19/*/*.txt"))
    table.write_text(f"19-198-0000 {'AB' * 40}\n19-198-0001 1234\n")
    ready = prepare(settings(f"data.root={root}"))
    assert len(ready.splits[0].train) == 1
    long, empty = (line for line in ready.notices if "left out of training" in line)
    assert long.startswith("1 of 7 clips have a text that is longer")
    assert "8 outputs each" in long
    assert "19-198-0000" in long
    assert "empty (the first: 19-198-0001)" in empty
    with pytest.raises(UserError, match="asr gives 8 outputs"):
        open_probing(settings("recipe=toy_events", "methods=[asr]"))
    assert load_task("librispeech").metric == "wer"
