"""Transcripts: alignments, error rates equal to jiwer's, the CSV of utterances, their pictures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bat.config.compose import compose
from bat.config.probing import Protocol
from bat.config.schema import Finetune, Probe
from bat.config.sections import Optim
from bat.encoders.bat import BAT
from bat.eval.candidates import Plan
from bat.eval.fit import Predictions
from bat.eval.probe import probe
from bat.eval.scoring import Scorer
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.eval.targets import TokenTargets
from bat.eval.transcripts import Piece, columns_of, runs, utterances, words_of
from bat.metrics.text import Text, align, edits
from bat.nn.losses import NOTHING, ctc
from bat.probes.base import build_probe
from bat.tasks import csv as csv_task
from bat.tasks.base import Task
from bat.tasks.synthetic import generator, sound, write_wav
from bat.train.finetune import finetune
from bat.types import Grid
from bat.weights import export
from tests.eval.conftest import bank_of


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


@pytest.mark.parametrize("permuted", [False, True])
def test_asr__learns_the_order_of_planted_patches_and_chance_of_permuted_texts(
    permuted: bool,
) -> None:
    """Six patches a clip, each of one of four vectors in noise; no vector twice in a row."""
    rng, D, n = np.random.default_rng(0), 24, 90
    steps = rng.integers(1, 4, (n, 6)).cumsum(1) % 4  # a step is never 0
    vectors = rng.standard_normal((4, D))
    patches = vectors[steps] + 0.1 * rng.standard_normal((n, 6, D))
    said = steps[rng.permutation(n)] if permuted else steps
    texts = {str(i): "".join("abcd"[k] for k in row) for i, row in enumerate(said)}
    targets_of = TokenTargets(texts, labels=["<blank>", *"abcd"], kind="characters")
    bank = bank_of(
        torch.from_numpy(patches).float()[:, None, :, None], None, torch.from_numpy(said + 1)
    )
    scorer = Scorer(("token_error_rate",), multi_label=True, targets_of=targets_of)
    plan = Plan(
        build=lambda m: build_probe(m, classes=5, width=D, depth=1, has_cls=False, level="frame",
                                    hidden=24, dropout=0.0),
        loss=ctc, optim=Optim(lr=0.004, warmup_steps=10, decay="matrices"), steps=150, batch=16,
        multi_label=True, metric="token_error_rate", scorer=scorer,
        protocol=Protocol(lrs=[], look_every=50),
    )  # fmt: skip
    held = Split("test", np.arange(60), np.arange(75, 90), np.arange(60, 75), "split")
    (result,) = cross_validate(bank, [held], ["asr"], plan)
    rate = result.metrics["token_error_rate"]
    assert rate > 0.5 if permuted else rate < 0.1


PITCHES_HZ = {"low": 300.0, "tenor": 700.0, "alto": 1_500.0, "high": 3_500.0}
TONES = Task(
    name="tones",
    rows=lambda root: csv_task.read(root / "tones.csv").rows,
    target="tokens",
    metrics=("wer", "cer"),
    tokens="words",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of three to five tones of 0.32 s, a word each, and a narrow random encoder with one
    patch for all frequencies: the head averages over frequency, where an untrained encoder hides
    the pitch."""
    root = tmp_path_factory.mktemp("tones")
    torch.manual_seed(0)
    model = BAT(width=48, depth=2, heads=2, grid=Grid(64, 1), frontend={"n_mels": 16})
    made = {"backbone": "bat", "encoder": model.config(), "meta": {}}
    export(root / "encoder", weights={"student": model.state_dict()}, **made)
    lines = ["path,split,text"]
    splits = {"train": 72, "valid": 12, "test": 16}
    for number, split in enumerate(s for s, count in splits.items() for _ in range(count)):
        rng, words = generator(7, number), []
        for _ in range(rng.integers(3, 6)):  # never twice the same
            words.append(str(rng.choice([name for name in PITCHES_HZ if [name] != words[-1:]])))
        wave = np.concatenate([0.5 * sound(PITCHES_HZ[word], 0.32) for word in words])
        write_wav(root / f"{number}.wav", wave + 1e-3 * rng.standard_normal(len(wave)))
        lines.append(f"{number}.wav,{split},{' '.join(words)}")
    (root / "tones.csv").write_text("\n".join(lines) + "\n")
    return root


def settings(root: Path, schema, *words: str):
    given = [f"data.root={root}", "task=tests.eval.test_transcripts.TONES", "level=frame",
             "head.hidden=32", "head.dropout=0.0", "data.batch=16", "hardware=cpu",
             "log.progress=false", "data.workers=0", f"data.cache={root / 'cache'}",
             f"checkpoint={root / 'encoder'}"]  # fmt: skip
    if schema is Probe:
        given += ["methods=[asr]", "optim.warmup_steps=15", "train.steps=450",
                  "protocol.lrs=[0.003]", "protocol.look_every=100", "bootstrap=100",
                  "diagnostics.encoder=false", f"features.folder={root / 'features'}"]  # fmt: skip
    merged = dict(word.split("=", 1) for word in [*given, *words])
    command = "probe" if schema is Probe else "finetune"
    return compose(schema, command, ["recipe=toy_tokens", *(f"{k}={v}" for k, v in merged.items())])


def summary_of(out: Path) -> dict:
    (entry,) = json.loads((out / "summary.json").read_text())["encoders"].values()
    return entry["results"]["asr"]["mean"]


@pytest.mark.timeout(900)  # twenty seconds on an idle core
def test_probe__sequences_of_tones_are_transcribed_and_listed(root: Path, tmp_path: Path) -> None:
    """A planted signal: patches of a random encoder differ by tone; asr learns their order."""
    out = probe(settings(root, Probe, f"out={tmp_path / 'run'}"))
    wer = summary_of(out)["wer"]
    assert wer < 0.2
    (listed,) = out.glob("utterances/*/asr-test-0.csv")
    with listed.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert rows[0]["key"] == "84"
    assert {len(row["reference"].split()) for row in rows} <= {3, 4, 5}
    total = sum(int(row["edits"]) for row in rows) / sum(int(row["words"]) for row in rows)
    assert total == pytest.approx(wer)
    for row in rows:
        assert int(row["edits"]) == edits(row["hypothesis"].split(), row["reference"].split())
    assert list(out.glob("plots/*/transcripts-asr.png"))


def test_probe__permuted_texts_give_chance(root: Path, tmp_path: Path) -> None:
    words = ["permute_labels=true", f"out={tmp_path / 'run'}", "train.steps=300"]
    assert summary_of(probe(settings(root, Probe, *words)))["wer"] > 0.5


def test_finetune__lists_and_draws_transcripts(root: Path, tmp_path: Path) -> None:
    words = ["method=asr", "data.roll=false", "train.steps=2", "optim.warmup_steps=1",
             "train.save_every=2", "validate_every=1", f"out={tmp_path / 'run'}"]  # fmt: skip
    fold = finetune(settings(root, Finetune, *words)) / "fold-test"
    result = json.loads((fold / "result.json").read_text())
    with (fold / "utterances.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    edited = sum(int(row["edits"]) for row in rows)
    assert edited / sum(int(row["words"]) for row in rows) == pytest.approx(
        result["metrics"]["wer"]
    )
    assert (fold / "plots/transcripts.png").is_file()
