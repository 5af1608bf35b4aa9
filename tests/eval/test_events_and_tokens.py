"""Tasks of events and tokens, from rows, shards and CSVs to probes, fine-tuning and reports."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bat.config.compose import compose
from bat.config.probing import Protocol
from bat.config.schema import Finetune, Probe
from bat.config.sections import Optim
from bat.data.index import open_index
from bat.data.table import ShardTable, scan
from bat.errors import UserError
from bat.eval.candidates import Plan
from bat.eval.features import FeatureBank
from bat.eval.heads import load_head
from bat.eval.prepare import open_probing, permuted, prepare
from bat.eval.probe import probe
from bat.eval.report import report
from bat.eval.scoring import Scorer, detected, greedy
from bat.eval.search import cross_validate
from bat.eval.splits import Split
from bat.eval.targets import TokenTargets, outputs, steps_needed
from bat.nn.losses import against, ctc
from bat.probes.base import build_probe
from bat.report.sections import sections
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.tasks import toy_events, toy_tokens
from bat.tasks.base import Row, load_task
from bat.tasks.events import Detection, Event
from bat.tasks.synthetic import write_wav
from bat.train.finetune import finetune
from bat.train.supervised import Supervised
from bat.types import WaveBatch
from tests.reference.ctc import ctc as slow_ctc


@pytest.fixture
def settings(encoder: Path, tmp_path_factory: pytest.TempPathFactory):
    """``settings("key=value", ..., schema=Probe)``: a tiny run of a toy recipe."""
    cache = tmp_path_factory.getbasetemp() / "toys"

    def build(*words: str, schema=Probe):
        given = [f"checkpoint={encoder}", f"data.cache={cache}", "log.progress=false",
                 "train.steps=6", "hardware=cpu"]  # fmt: skip
        if schema is Probe:
            given += ["bootstrap=100", "diagnostics.encoder=false", "protocol.lrs=[0.01]"]
        merged = dict(word.split("=", 1) for word in [*given, *words])
        command = "probe" if schema is Probe else "finetune"
        return compose(schema, command, [f"{k}={v}" for k, v in merged.items()])

    return build


def test_ctc__random_targets_equal_the_sum_over_paths() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 3)
    targets = torch.tensor([[1, 2, -1], [2, 2, -1], [1, 2, 1]])
    steps = [5, 3, 4]
    inside = torch.arange(5) < torch.tensor(steps)[:, None]
    each = [
        slow_ctc(row[:T], [n for n in target if n > 0]) / sum(n > 0 for n in target)
        for row, T, target in zip(logits, steps, targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(ctc(logits, targets, inside=inside), torch.stack(each).mean())
    torch.testing.assert_close(
        against(ctc, logits, targets, inside=inside), ctc(logits, targets, inside=inside)
    )


def test_ctc__a_text_that_does_not_fit_counts_as_nothing() -> None:
    logits = torch.randn(1, 2, 3, requires_grad=True)
    loss = ctc(logits, torch.tensor([[1, 1]]))  # needs three patches
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_tokens__outputs_are_those_of_training_and_others_are_errors() -> None:
    labels = outputs(["ab", "ba"], toy_tokens.TASK)
    assert labels == ["<blank>", "a", "b"]
    made = TokenTargets({"x": "abba", "y.z": "c"}, labels=labels, kind="characters")
    batch = WaveBatch(torch.zeros(2, 8), torch.tensor([8, 8]), torch.zeros(2, 0), ["x", "y_z"],
                      torch.arange(2), [])  # fmt: skip
    batch.keys[1] = next(key for key in made._numbers if key != "x")
    assert made(batch, 3).tolist() == [[1, 2, 2, 1], [3, -1, -1, -1]]
    assert made.names[3] == "c"
    assert steps_needed("abba") == 5
    assert made.too_long("x", 4)
    assert not made.too_long("x", 5)
    assert greedy([0, 1, 1, 0, 1, 2, 2, 0]) == [1, 1, 2]
    words = replace(toy_tokens.TASK, tokens="words")
    assert outputs(["do re", "mi do"], words) == ["<blank>", "do", "mi", "re"]


def test_detected__runs_above_the_threshold_after_the_median_are_events() -> None:
    p = np.array([[0.9, 0.0], [0.0, 0.6], [0.7, 0.6], [0.8, 0.6], [0.9, 0.0], [0.0, 0.9]])
    found = detected(p, Detection(), hop_seconds=0.16)
    # medians: 0 .7 .7 .8 .8 0, and 0 .6 .6 .6 .6 0
    assert found == [(pytest.approx(0.16), pytest.approx(0.8), c) for c in (0, 1)]
    start = detected(p, Detection(edge="start"), hop_seconds=0.16)
    assert start[0][1] == pytest.approx(0.64)
    plain = detected(p, Detection(median=1, threshold=0.9), hop_seconds=1.0)
    assert plain == [(0.0, 1.0, 0), (4.0, 5.0, 0), (5.0, 6.0, 1)]


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    for i in range(4):
        write_wav(tmp_path / f"{i}.wav", np.full(32_000, 0.1 * (i + 1)))
    events = (Event(0.25, 0.75, ("a",)), Event(0.9, 1.5, ("b",)))
    return [
        Row(tmp_path / "0.wav", "zero", ("a", "b"), split="train", events=events),
        Row(tmp_path / "1.wav", "one", (), split="train", events=()),
        Row(tmp_path / "2.wav", "two", ("b",), split="test", events=(Event(0, 2, ("b",)),)),
        Row(tmp_path / "3.wav", "three", (), split="test", text="à bas"),
    ]


def test_shards__events_and_texts_come_back(rows: list[Row], tmp_path: Path) -> None:
    write_shards(rows, tmp_path / "out")
    index = open_index(tmp_path / "out")
    number = {index.key(i): i for i in range(4)}
    for row in rows[:3]:
        assert index.events[number[row.key]] == row.events
    assert index.texts == {number["three"]: "à bas"}
    (table,) = (tmp_path / "out").glob("*.idx.npz")
    loaded = ShardTable.load(table, table.with_name(table.name.replace(".idx.npz", ".tar")))
    assert loaded is not None
    assert loaded.agrees(scan(table.with_name(table.name.replace(".idx.npz", ".tar"))))
    again = open_rows(tmp_path / "out").rows  # shards of shards
    assert {row.key: (row.events, row.text) for row in again} == {
        row.key: (row.events, row.text) for row in rows
    }


def test_shards__pieces_have_the_events_that_are_in_them(rows: list[Row], tmp_path: Path) -> None:
    write_shards([rows[0], rows[3]], tmp_path / "out", clip_seconds=1.0)
    index = open_index(tmp_path / "out")
    found = {index.key(i): index.events.get(i) for i in range(len(index))}
    assert found["zero_00000"] == (Event(0.25, 0.75, ("a",)), Event(0.9, 1.0, ("b",)))
    assert found["zero_00001"] == (Event(0.0, 0.5, ("b",)),)
    labels = {index.key(i): index.labels(i) for i in range(len(index))}
    assert [index.vocabulary[c] for c in labels["zero_00001"]] == ["b"]
    assert not index.texts  # a text is of the whole


@pytest.mark.parametrize("clip_seconds", [None, 1.0])
def test_shards__event_after_the_end_leaves_its_recording_out(
    rows: list[Row], tmp_path: Path, clip_seconds: float | None
) -> None:
    late = replace(rows[0], events=(Event(0.1, 0.2, ("a",)), Event(2.5, 3.0, ("b",), line=7)))
    manifest = write_shards([late, rows[1]], tmp_path / "out", clip_seconds=clip_seconds)
    index = open_index(tmp_path / "out")
    assert {index.key(i)[:3] for i in range(len(index))} == {"one"}
    assert {entry["key"][:4] for entry in manifest.left_out} == {"zero"}
    assert all("2.5 s (line 7)" in entry["reason"] for entry in manifest.left_out)


RECIPES = {"toy_events": "event_f1", "toy_tokens": "token_error_rate"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_probe__toy_task_runs_resumes_and_is_reported(recipe: str, settings, tmp_path) -> None:
    out = tmp_path / "run"
    probe(settings(f"recipe={recipe}", f"out={out}", "methods=[linear,cgp]"))
    summary = json.loads((out / "summary.json").read_text())
    metric, lower = RECIPES[recipe], recipe == "toy_tokens"
    assert (summary["metric"], summary["target"]) == (metric, recipe.removeprefix("toy_"))
    ranks = [row["mean"] for row in summary["ranking"]]
    assert ranks == sorted(ranks, reverse=not lower)
    (section,) = sections([summary])
    means = [row.entry["mean"][metric] for row in section.ranking]
    assert means == ranks
    best, other = section.ranking
    for low, high in ((-0.2, -0.1), (0.1, 0.2)):  # of the best minus the other
        section.difference = lambda one, two, low=low, high=high: {"interval": [low, high]}
        assert section.leads(best, [other]) == ((high < 0) if lower else (low > 0))
    (entry,) = summary["encoders"].values()
    for method in ("linear", "cgp"):
        result = entry["results"][method]
        assert 0 <= result["mean"][metric] <= 1.5
        assert result["interval"] is not None
        head, meta = load_head(*out.glob(f"heads/*/{method}-test-0"))
        assert head.classes == len(meta["labels"]) == (5 if lower else 3)
        assert head.level == "frame"
    lines = (out / "results.jsonl").read_text()
    probe(settings(f"recipe={recipe}", f"out={out}", "methods=[linear,cgp]"))
    assert (out / "results.jsonl").read_text() == lines  # nothing is trained twice
    page = report([out]).html.read_text()
    assert ("token error rate" if lower else "event onset F1") in page


@pytest.mark.parametrize("recipe", RECIPES)
def test_finetune__toy_task_runs(recipe: str, settings, tmp_path) -> None:
    out = tmp_path / "run"
    mixup = ["augment.mixup_p=0.9"] * (recipe == "toy_events")
    finetune(settings(f"recipe={recipe}", f"out={out}", *mixup, "train.save_every=3",
                      schema=Finetune))  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    (entry,) = summary["results"].values()
    assert 0 <= entry["mean"][RECIPES[recipe]] <= 1.5
    head, meta = load_head(out / "fold-test" / "head")
    assert head.classes == len(meta["labels"])
    rows = [json.loads(line) for line in (out / "fold-test/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def test_shards__ask_the_same_as_the_task_itself(settings, tmp_path) -> None:
    for recipe, task in (("toy_events", toy_events), ("toy_tokens", toy_tokens)):
        task.make(tmp_path / recipe)
        read, vocabulary = load_task(recipe).read(tmp_path / recipe)
        write_shards(read, tmp_path / f"{recipe}-shards", vocabulary=vocabulary)
        one = prepare(settings(f"recipe={recipe}"))
        shards = f"data.shards=[{tmp_path / f'{recipe}-shards'}]"
        other = prepare(settings(f"recipe={recipe}", shards))
        assert one.labels == other.labels
        assert one.targets_of.digest == other.targets_of.digest
        assert one.splits[0].train.tolist() == other.splits[0].train.tolist()


def test_csv__texts_are_tokens_for_both_commands(settings, tmp_path) -> None:
    toy_tokens.make(tmp_path / "toy")
    table = tmp_path / "toy/texts.csv"
    table.write_text(table.read_text().replace("path,split,text", "path,split,Transcript"))
    words = ["recipe=own", f"data.csv={table}", "level=frame"]
    data = open_probing(settings(*words, "train.epochs=0", "train.min_steps=0"))
    assert data.task.target == "tokens"
    assert data.labels == ("<blank>", "a", "b", "c", "d")
    tuned = prepare(settings(*words, "data.roll=false", "optim.warmup_steps=1", schema=Finetune))
    toy = prepare(settings("recipe=toy_tokens", schema=Finetune))
    assert tuned.labels == toy.labels
    assert tuned.task.metrics == toy.task.metrics


def test_csv__is_packed_with_its_events_and_texts(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(
        "path,label,onset,offset\n0.wav,a,0.1,0.4\n0.wav,b,1,1.5\n1.wav,,,\n"
    )
    found = open_rows(tmp_path / "e.csv").rows
    assert [[e[:3] for e in row.events or ()] for row in found] == [
        [(0.1, 0.4, ("a",)), (1.0, 1.5, ("b",))], [],
    ]  # fmt: skip
    (tmp_path / "t.csv").write_text("path,text\n0.wav,hello\n1.wav,there you\n")
    assert [row.text for row in open_rows(tmp_path / "t.csv").rows] == ["hello", "there you"]


def test_prepare__clips_with_too_long_texts_are_left_out_and_counted(settings, tmp_path) -> None:
    toy_tokens.make(tmp_path)
    table = tmp_path / "texts.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1] + "a" * 40
    table.write_text("\n".join(lines))
    ready = prepare(settings("recipe=toy_tokens", f"data.root={tmp_path}"))
    assert len(ready.splits[0].train) == toy_tokens.CLIPS["train"] - 1
    (said,) = (line for line in ready.notices if "text that is longer" in line)
    assert said.startswith("1 of 40 clips")
    assert "1 left out of training" in said


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("recipe=toy_tokens level=clip", "level=frame"),
        ("recipe=toy_tokens data.roll=true", "data.roll"),
        ("recipe=toy_tokens protocol.metric=map", "protocol.metric"),
        ("recipe=toy_tokens loss=bce", "loss=bce"),
        ("recipe=toy_events loss=ce", "loss=ce"),
    ],
)
def test_open_probing__what_does_not_fit_is_refused(words: str, key: str, settings) -> None:
    with pytest.raises(UserError, match=key):
        open_probing(settings(*words.split()))
    with pytest.raises(UserError, match="mixup_p"):
        finetune(settings("recipe=toy_tokens", "augment.mixup_p=0.5", schema=Finetune))


def test_permuted__events_and_texts_are_dealt_anew(settings) -> None:
    for recipe, name in (("toy_events", "events"), ("toy_tokens", "texts")):
        data = open_probing(settings(f"recipe={recipe}"))
        before, after = getattr(data, name), getattr(permuted(data, seed=1), name)
        assert before.keys() == after.keys()
        assert sorted(before.values()) == sorted(after.values())
        assert before != after
        assert data.hash != permuted(data, seed=1).hash


def test_augmented__labels_of_patches_are_mixed_and_stay_nan_beyond_both_clips(settings) -> None:
    ready = prepare(settings("recipe=toy_events", "augment.mixup_p=1.0", "drop_path=0",
                             schema=Finetune))  # fmt: skip
    asked = torch.tensor([[1.0, 0, torch.nan], [0, 1.0, 1.0]])[..., None]  # (2, T, 1)
    module = Supervised(ready.config, backbone=ready.backbone, head=torch.nn.Linear(1, 1),  # type: ignore[arg-type]
                        loss=ready.loss, frames=None, fold="test",
                        targets_of=lambda batch, T: torch.nn.functional.pad(
                            asked, (0, 0, 0, T - 3), value=torch.nan))  # fmt: skip
    batch = WaveBatch(torch.randn(2, 8_000), torch.tensor([8_000, 8_000]), torch.zeros(2, 3),
                      ["x", "y"], torch.arange(2), [])  # fmt: skip
    _, targets, _ = module.augmented(batch, torch.Generator().manual_seed(0))
    shares = targets[0, 0], targets[1, 1]
    assert all(0 < share < 1 for share in shares)
    torch.testing.assert_close(targets[0, :2].sum(), torch.tensor(1.0))
    assert not targets[:, 2].isnan().any()  # known of one of the two
    assert targets[:, 3:].isnan().all()


def test_cross_validate__the_rate_with_the_lowest_error_is_chosen() -> None:
    """Patches that say their token: a rate of next to nothing learns none of it, 0.3 all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4, (12, 5), generator=generator)  # one every second patch
    patches = torch.zeros(12, 1, 11, 1, 4)
    for i, row in enumerate(tokens.tolist()):
        spread = [n for token in row for n in (0, token)] + [0]
        patches[i, 0, torch.arange(11), 0, torch.tensor(spread)] = 5.0
    texts = {f"k{i}": "".join("abc"[n - 1] for n in row) for i, row in enumerate(tokens.tolist())}
    labels = outputs(texts.values(), toy_tokens.TASK)
    targets_of = TokenTargets(texts, labels=labels, kind="characters")
    bank = FeatureBank(patches=patches, cls=None, targets=tokens, ids=np.arange(12),
                       keys=list(texts), skipped={})  # fmt: skip
    scorer = Scorer(("token_error_rate",), multi_label=True, targets_of=targets_of)
    plan = Plan(
        build=lambda m: build_probe(m, classes=4, width=4, depth=1, has_cls=False, level="frame",
                                    norm=False, dropout=0.0),
        loss=ctc, optim=Optim(warmup_steps=0, weight_decay=0.0), steps=60, batch=8,
        multi_label=True, metric="token_error_rate", scorer=scorer, bootstrap=100,
        protocol=Protocol(lrs=[1e-6, 0.3]),
    )  # fmt: skip
    held = Split("test", np.arange(6), np.arange(9, 12), np.arange(6, 9), "part")
    (fold_result,) = cross_validate(bank, [held], ["linear"], plan)
    assert fold_result.selected["lr"] == 0.3
    assert fold_result.selected["validation"] == fold_result.metrics["token_error_rate"] == 0.0
    assert fold_result.replicates == [0.0] * 100


def test_metrics__a_task_may_name_its_own(settings) -> None:
    data = open_probing(settings("recipe=toy_events"))
    wrong = replace(data.task, metrics=("wer",))
    with pytest.raises(UserError, match="wer"):
        Scorer.of(wrong, None)
