"""Transcripts: alignments, error rates equal to jiwer's, the CSV of utterances, their pictures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.eval.fit import Predictions
from bat.eval.probe import probe
from bat.eval.targets import TokenTargets
from bat.eval.transcripts import Piece, columns_of, runs, utterances, words_of
from bat.metrics.text import Text, align, edits
from bat.nn.losses import NOTHING
from bat.tasks.synthetic import SAMPLE_RATE, generator, sound, write_wav
from bat.tasks.toy_tokens import PITCHES_HZ
from bat.train.finetune import finetune


def random_words(rng: np.random.Generator, most: int) -> list[str]:
    """Up to ``most`` words of two letters and an apostrophe, so that many agree."""
    return ["".join(rng.choice(list("ab'"), rng.integers(1, 4))) for _ in range(rng.integers(most))]


def test_rates__equal_jiwer_in_a_thousand_random_cases() -> None:
    jiwer = pytest.importorskip("jiwer", reason="jiwer is not installed: pip install jiwer")
    rng = np.random.default_rng(0)
    said, heard, whole = [], [], Text()
    for _ in range(1_000):
        one, other = random_words(rng, 9) or ["a"], random_words(rng, 9)
        text = Text()
        for metric in (text, whole):
            metric.update(list(" ".join(other)), list(" ".join(one)))
        found = text.compute()
        said.append(" ".join(one))
        heard.append(" ".join(other))
        assert found["wer"] == pytest.approx(jiwer.wer(said[-1], heard[-1]), abs=1e-12)
        assert found["cer"] == pytest.approx(jiwer.cer(said[-1], heard[-1]), abs=1e-12)
        counts = jiwer.process_words(said[-1], heard[-1])
        pairs = align(other, one)
        wrong = [(a, b) for a, b in pairs if a != b]
        assert len(wrong) == counts.substitutions + counts.insertions + counts.deletions
    assert whole.compute()["wer"] == pytest.approx(jiwer.wer(said, heard), abs=1e-12)
    assert whole.compute()["cer"] == pytest.approx(jiwer.cer(said, heard), abs=1e-12)


def test_align__random_pairs_have_the_fewest_edits_and_keep_both_orders() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        one, other = random_words(rng, 7), random_words(rng, 7)
        pairs = align(other, one)
        assert [a for a, _ in pairs if a is not None] == one
        assert [b for _, b in pairs if b is not None] == other
        assert sum(a != b for a, b in pairs) == edits(other, one)
    assert align(["sit", "on"], ["sat", "on", "the"]) == [
        ("sat", "sit"), ("on", "on"), ("the", None),
    ]  # fmt: skip


def test_utterances__words_have_the_times_of_their_steps() -> None:
    """Two clips of two patches of 0.16 s, four steps a patch: 40 ms a step."""
    labels = ["<blank>", " ", "a", "b"]
    made = TokenTargets({"x": "ab a", "y": "b"}, labels=labels, kind="characters")
    best = torch.tensor([0, 2, 2, 3, 1, 0, 2, 0, 3, 0, 3, 3, 0, 0, 0, 0])
    found = Predictions(
        {}, torch.tensor([[2, 3, 1, 2], [3, NOTHING, NOTHING, NOTHING]]),
        torch.tensor([0, 0, 1, 1]), 2,
    )  # fmt: skip
    logits = torch.nn.functional.one_hot(best, 4).float()
    one, two = utterances(logits, found, made, ["x", "y"], hop_seconds=0.16)
    assert (one.reference, one.hypothesis, one.edits, one.words) == ("ab a", "ab a", 0, 2)
    assert (two.reference, two.hypothesis, two.edits, two.wer) == ("b", "bb", 1, 1.0)
    word, last = words_of(one.heard)
    assert word == ("ab", pytest.approx(0.04), pytest.approx(0.16))
    assert last == ("a", pytest.approx(0.24), pytest.approx(0.28))
    assert list(runs([3, 3, 0, 3])) == [(3, 0, 1), (3, 3, 3)]
    columns = columns_of(two, by_words=False)["columns"]
    assert [(c["reference"], c["hypothesis"]) for c in columns] == [(None, "b"), ("b", "b")]
    assert not utterances(logits, found, made, ["x"], hop_seconds=0.16)  # whose they are is unknown
    assert words_of([Piece("do", 0, 1), Piece("re", 1, 2)])[1].text == "re"


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of two to four tones of 0.25 s with pauses, each a word of one letter."""
    root = tmp_path_factory.mktemp("tones")
    lines = ["path,split,text"]
    splits = {"train": 72, "valid": 12, "test": 16}
    for number, split in enumerate(s for s, count in splits.items() for _ in range(count)):
        rng = generator(7, number)
        text = rng.choice(list(PITCHES_HZ), rng.integers(2, 5))
        parts = [np.zeros(round(rng.uniform(0.05, 0.15) * SAMPLE_RATE))]
        for letter in text:
            parts.append(0.5 * sound(PITCHES_HZ[letter] * rng.uniform(0.97, 1.03), 0.25))
            parts.append(np.zeros(round(rng.uniform(0.12, 0.2) * SAMPLE_RATE)))
        wave = np.concatenate(parts)
        write_wav(root / f"{number}.wav", wave + 1e-3 * rng.standard_normal(len(wave)))
        lines.append(f"{number}.wav,{split},{' '.join(text)}")
    (root / "tones.csv").write_text("\n".join(lines) + "\n")
    return root / "tones.csv"


def settings(tones: Path, schema, *words: str):
    given = [f"data.csv={tones}", "level=frame", "head.hidden=64", "head.dropout=0.0",
             "data.batch=16", "hardware=cpu", "log.progress=false", "data.workers=0",
             f"data.cache={tones.parent / 'cache'}", "checkpoint=random:tiny"]  # fmt: skip
    if schema is Probe:
        given += ["methods=[asr]", "train.epochs=0", "train.min_steps=0", "optim.warmup_steps=15",
                  "train.steps=160", "protocol.lrs=[0.003]", "protocol.look_every=40",
                  "diagnostics.encoder=false", "bootstrap=100",
                  f"features.folder={tones.parent / 'features'}"]  # fmt: skip
    merged = dict(word.split("=", 1) for word in [*given, *words])
    command = "probe" if schema is Probe else "finetune"
    return compose(schema, command, ["recipe=own", *(f"{k}={v}" for k, v in merged.items())])


def summary_of(out: Path) -> dict:
    (entry,) = json.loads((out / "summary.json").read_text())["encoders"].values()
    return entry["results"]["asr"]["mean"]


def test_probe__sequences_of_tones_are_transcribed_and_listed(tones: Path, tmp_path: Path) -> None:
    """A planted signal: a random encoder's patches tell tones apart, and asr finds their order."""
    out = probe(settings(tones, Probe, f"out={tmp_path / 'run'}"))
    wer = summary_of(out)["wer"]
    assert wer < 0.2
    (listed,) = out.glob("utterances/random-tiny/asr-test-0.csv")
    with listed.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert rows[0]["key"] == "84"
    assert {len(row["reference"].split()) for row in rows} <= {2, 3, 4}
    total = sum(int(row["edits"]) for row in rows) / sum(int(row["words"]) for row in rows)
    assert total == pytest.approx(wer)
    for row in rows:
        assert int(row["edits"]) == edits(row["hypothesis"].split(), row["reference"].split())
    assert (out / "plots/random-tiny/transcripts-asr.png").is_file()


def test_probe__permuted_texts_give_chance(tones: Path, tmp_path: Path) -> None:
    words = ["permute_labels=true", f"out={tmp_path / 'run'}", "train.steps=100"]
    assert summary_of(probe(settings(tones, Probe, *words)))["wer"] > 0.5


def test_finetune__lists_and_draws_transcripts(tones: Path, tmp_path: Path) -> None:
    words = ["method=asr", "data.roll=false", "train.steps=2", "optim.warmup_steps=1",
             "train.save_every=2", "validate_every=1", f"out={tmp_path / 'run'}"]  # fmt: skip
    fold = finetune(settings(tones, Finetune, *words)) / "fold-test"
    result = json.loads((fold / "result.json").read_text())
    with (fold / "utterances.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    edited = sum(int(row["edits"]) for row in rows)
    assert edited / sum(int(row["words"]) for row in rows) == pytest.approx(
        result["metrics"]["wer"]
    )
    assert (fold / "plots/transcripts.png").is_file()
