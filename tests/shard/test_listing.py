"""The table of what is missing, damaged or short of a list that states lengths."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bat.cli.shard import main
from bat.config.compose import compose
from bat.config.schema import Finetune, Pretrain, Probe
from bat.data.index import open_index
from bat.eval.splits import make_splits
from bat.train.pretrain_data import open_stream
from tests.shard.files import audio

TABLES = {
    "balanced_train": ("b1", "b2", "gone"),
    "unbalanced_train": ("u1", "u2", "bad"),
    "eval": ("e1", "e2", "brief"),
}


@pytest.fixture
def audioset(tmp_path: Path) -> Path:
    """AudioSet's three tables: a segment without a file, one of noise, one of 0.3 s of 0.5 s."""
    root = tmp_path / "audioset"
    (root / "clips").mkdir(parents=True)
    names = "".join(f"{i},/m/{i},Sound {i}\n" for i in range(527))
    (root / "class_labels_indices.csv").write_text("index,mid,display_name\n" + names)
    for table, keys in TABLES.items():
        lines = [f'{k}, 30.000, 30.500, "/m/{i % 2}"' for i, k in enumerate(keys)]
        (root / f"{table}_segments.csv").write_text("\n".join(["# Segments", *lines, ""]))
        for seed, key in enumerate(k for k in keys if k != "gone"):
            data = audio(seed, seconds=0.3 if key == "brief" else 0.45)
            (root / f"clips/Y{key}.wav").write_bytes(b"RIFF" if key == "bad" else data)
    return root


def test_listing__names_what_is_missing_damaged_or_short_by_split(
    audioset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(audioset), str(tmp_path / "out"), "--jobs", "1"]) == 0
    with (tmp_path / "out/listing.csv").open(newline="") as file:
        found = {row["key"]: row for row in csv.DictReader(file)}
    assert {key: (row["split"], row["state"]) for key, row in found.items()} == {
        "Ygone": ("train-balanced", "missing"),
        "Ybad": ("train-unbalanced", "damaged"),
        "Ybrief": ("test", "short"),
    }
    assert (found["Ybrief"]["seconds"], found["Ybrief"]["listed_seconds"]) == ("0.300", "0.5")
    assert found["Ybad"]["reason"].startswith("corrupt: ")
    printed = capsys.readouterr().out
    assert "train-balanced: 3 listed, 2 whole, 1 missing, 0 damaged, 0 short" in printed
    assert "test: 3 listed, 2 whole, 0 missing, 0 damaged, 1 short" in printed
    assert main([str(audioset), str(tmp_path / "cut"), "--clip-seconds", "0.2"]) == 0
    assert not (tmp_path / "cut/listing.csv").exists()  # pieces are not what is listed


@pytest.mark.parametrize(
    ("schema", "command", "recipe", "keys"),
    [
        (Probe, "probe", "as20k", "b1 b2"),
        (Finetune, "finetune", "as20k", "b1 b2"),
        (Probe, "probe", "as2m", "u1 u2"),
        (Finetune, "finetune", "as2m", "u1 u2"),
    ],
)
def test_recipes__train_on_their_own_table_alone_and_are_judged_on_the_evaluation_set(
    audioset: Path, tmp_path: Path, schema: type, command: str, recipe: str, keys: str
) -> None:
    assert main([str(audioset), str(tmp_path / "out"), "--jobs", "1"]) == 0
    config = compose(schema, command, [f"recipe={recipe}", "checkpoint=random"])
    index = open_index(tmp_path / "out")
    (held,) = make_splits(index, split=config.data.split)
    train, test = ([index.key(int(i)) for i in ids] for ids in (held.train, held.test))
    assert train == [f"Y{key}" for key in keys.split()]
    assert sorted(test) == ["Ybrief", "Ye1", "Ye2"]


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ((), {"Yu1", "Yu2"}),
        (("data.split=train-balanced,train-unbalanced",), {"Yb1", "Yb2", "Yu1", "Yu2"}),
    ],
)
def test_pretraining__reads_the_unbalanced_table_or_both(
    audioset: Path, tmp_path: Path, more: tuple[str, ...], keys: set[str]
) -> None:
    words = ["recipe=as2m", "hardware=cpu", "model=tiny", f"data.root={audioset}", *more]
    words += [f"data.cache={tmp_path}", "data.workers=0", "log.progress=false"]
    found = open_stream(compose(Pretrain, "pretrain", words))
    assert found.index is not None
    assert {found.index.key(int(i)) for i in found.data.plan.ids} == keys


def test_recipe_as2m__probes_are_balanced_and_none_is_drawn_twice_an_epoch() -> None:
    config = compose(Probe, "probe", ["recipe=as2m", "checkpoint=random"])
    assert (config.data.balance, config.data.epoch_clips, config.data.batch) == (
        "class",
        200_000,
        96,
    )
