"""Folds and splits: validation clips, drawn folds, checks of both and of labels."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.config.compose import compose
from bat.config.probing import Protocol
from bat.config.schema import Finetune, Probe
from bat.data.index import Index
from bat.data.toy import toy_wave
from bat.errors import UserError
from bat.eval.prepare import open_probing, permute_labels
from bat.eval.splits import DRAWN_FOLDS, Split, check_labels, check_splits, how, make_splits
from bat.shard.write import write_shards
from bat.tasks.base import Row, load_task


def test_make_splits__impossible_folds_are_errors(index):
    with pytest.raises(UserError, match="no clip has fold 3"):
        make_splits(index, [3])
    with pytest.raises(UserError, match="holds nothing out"):
        make_splits(index, [])
    one = SimpleNamespace(folds=[1], splits=[])
    with pytest.raises(UserError, match="two folds are needed"):
        make_splits(one)
    with pytest.raises(UserError, match="neither folds nor a train and a test split"):
        make_splits(Fake([(0,), (1,)], split=["train", "train"]))


def test_make_splits__splits():
    ids = {"train": np.array([0, 1]), "test": np.array([2])}
    index = SimpleNamespace(folds=[], splits=["test", "train"], clips_in_split=ids.__getitem__)
    (held,) = make_splits(index)
    assert held.name == "test"
    assert held.train.tolist() == [0, 1]
    assert held.test.tolist() == [2]
    with pytest.raises(UserError, match="the data has no folds"):
        make_splits(index, [1])


def test_make_splits__a_fraction_that_nothing_is_drawn_by_is_refused():
    ids = {"train": np.array([0, 1]), "valid": np.array([3]), "test": np.array([2])}
    index = SimpleNamespace(folds=[], splits=list(ids), clips_in_split=ids.__getitem__)
    with pytest.raises(UserError, match=r"protocol\.fraction=0\.3: .* on a split of the data"):
        make_splits(index, protocol=Protocol(fraction=0.3))
    assert make_splits(index, protocol=Protocol())[0].valid.tolist() == [3]


def test_check_labels__number_of_classes(index):
    check_labels(load_task("toy"), index)
    with pytest.raises(UserError, match="'esc10' has 10 classes, the data has 5"):
        check_labels(load_task("esc10"), index)
    with pytest.raises(UserError, match=r"1 of 3 clips have no label \(the first: b\)"):
        check_labels(load_task("toy"), _Unlabelled())


def test_check_labels__lists_unknown_labels():
    own, in_esc50 = load_task("esc10").label_sets

    def index(names):
        return SimpleNamespace(
            classes=10, vocabulary=sorted(names), labels_per_clip=np.ones(3, np.int64)
        )

    for names in (own, in_esc50):
        check_labels(load_task("esc10"), index(names))
    said = "lacks dog_bark, rain; the task does not know cat, snow. Point data.root"
    with pytest.raises(UserError, match=said):
        check_labels(load_task("esc10"), index(own - {"dog_bark", "rain"} | {"cat", "snow"}))


class _Unlabelled:
    classes, vocabulary, labels_per_clip = 5, list("abcde"), np.array([1, 0, 1])

    def __len__(self):
        return 3

    def key(self, i):
        return "abc"[i]


class Fake:
    """Of an index, what splits are made of. ``labels``: those of each clip, as indices."""

    def __init__(self, labels, fold=None, split=None):
        self.labels_per_clip = np.array([len(found) for found in labels])
        self.label_ids = np.array([c for found in labels for c in found], np.int32)
        self.classes = int(self.label_ids.max()) + 1
        self.vocabulary = [f"class{c}" for c in range(self.classes)]
        self.fold = np.array(fold if fold is not None else [-1] * len(labels), np.int16)
        self.folds = sorted({int(f) for f in self.fold if f >= 0})
        self.splits = sorted(set(split or ()) - {""})
        numbers = {name: i for i, name in enumerate(self.splits)}
        self.split = np.array([numbers.get(name, -1) for name in split or ()])

    clips_in_split, counted_splits = Index.clips_in_split, Index.counted_splits

    def __len__(self):
        return len(self.fold)


def single(*counts, **words):
    """An index of so many clips of each class, class after class."""
    return Fake([(c,) for c, count in enumerate(counts) for _ in range(count)], **words)


def labels_of(index, ids):
    """(C,) clips of each class among ``ids``, one label a clip."""
    return np.bincount(index.label_ids[ids], minlength=index.classes).tolist()


def test_make_splits__next_fold_is_for_validation():
    index = Fake([(i % 2,) for i in range(14)], fold=[3, 3, 5, 5, 9, 9] * 2 + [-1, -1])
    splits = make_splits(index, protocol=Protocol())
    assert [(r.name, r.valid_is) for r in splits] == [("3", "fold"), ("5", "fold"), ("9", "fold")]
    fold = index.fold
    assert [set(fold[r.test]) for r in splits] == [{3}, {5}, {9}]
    assert [set(fold[r.valid]) for r in splits] == [{5}, {9}, {3}]
    assert [set(fold[r.train]) for r in splits] == [{9}, {3}, {5}]
    (alone,) = make_splits(index, [9], protocol=Protocol())
    assert np.array_equal(alone.valid, splits[2].valid)


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "val"])
def test_make_splits__split_for_validation(name):
    index = Fake([(i % 2,) for i in range(9)], split=["train"] * 4 + [name] * 2 + ["test"] * 3)
    (held,) = make_splits(index, protocol=Protocol())
    assert (held.train.tolist(), held.valid.tolist()) == ([0, 1, 2, 3], [4, 5])
    assert (held.test.tolist(), held.valid_is) == ([6, 7, 8], "split")
    (plain,) = make_splits(index)
    assert plain.valid is None
    assert plain.train.tolist() == [0, 1, 2, 3]  # the split's clips are nobody's then


def test_make_splits__part_for_validation():
    index = single(20, 10, 5, 2, 1, fold=([1, 2] * 19))
    for held in make_splits(index, protocol=Protocol(fraction=0.3), seed=4):
        assert held.valid_is == "part"
        others = np.flatnonzero(index.fold != int(held.name))
        assert sorted([*held.train, *held.valid]) == others.tolist()
        assert len(held.valid) == round(0.3 * len(others))
        learned = labels_of(index, held.train)
        had = labels_of(index, others)
        assert all(now or not before for now, before in zip(learned, had, strict=True))
        share = np.array(labels_of(index, held.valid)[:2]) / had[:2]
        assert np.all(np.abs(share - 0.3) <= 0.11)  # within one clip of ten


def test_make_splits__part_depends_on_seed_and_fold():
    index = single(60, 60, split=(["train"] * 40 + ["test"] * 20) * 2)

    def part(seed):
        (held,) = make_splits(index, protocol=Protocol(), seed=seed)
        return held.valid.tolist()

    assert part(1) == part(1) != part(2)
    assert len(part(1)) == 16
    folds = single(60, 60, fold=[1, 2] * 60)
    first, second = make_splits(folds, protocol=Protocol(), seed=1)
    assert (first.valid // 2).tolist() != (second.valid // 2).tolist()


def test_make_splits__part_leaves_a_clip_of_each_class():
    tiny = single(2, 1, 3, split=["train", "train", "train", "train", "test", "test"])
    (held,) = make_splits(tiny, protocol=Protocol(fraction=0.01))
    assert len(held.valid) == 1
    assert labels_of(tiny, held.valid) == [1, 0, 0]
    (half,) = make_splits(single(3, 3, split=["train"] * 4 + ["test"] * 2),
                          protocol=Protocol(fraction=0.99))  # fmt: skip
    assert (len(half.train), len(half.valid)) == (2, 2)
    bare = single(1, 1, 2, split=["train", "train", "test", "test"])
    with pytest.raises(UserError, match=r"2 training clip\(s\), one a class.*protocol=bat"):
        make_splits(bare, protocol=Protocol())


def test_make_splits__part_with_several_labels():
    rng = np.random.default_rng(0)
    labels = [tuple(np.flatnonzero(row)) for row in rng.random((60, 8)) < 0.2]
    labels += [(7, 8), (8, 9), (9,), ()]
    index = Fake(labels, split=["train"] * 62 + ["test"] * 2)
    (held,) = make_splits(index, protocol=Protocol(fraction=0.5), multi_label=True)
    train = {c for i in held.train for c in labels[i]}
    assert train == {c for found in labels[:62] for c in found}
    assert len(held.valid) == 31


def test_make_splits__drawn_folds_are_even():
    index = single(11, 7, 5, 23)
    splits = make_splits(index, draw=DRAWN_FOLDS, protocol=Protocol(), seed=3)
    assert [(r.name, r.drawn, r.valid_is) for r in splits] == [
        (str(f), True, "fold") for f in range(1, 6)
    ]
    held = np.array([labels_of(index, r.test) for r in splits])
    assert held.sum(0).tolist() == [11, 7, 5, 23]
    assert np.all(held.max(0) - held.min(0) <= 1)
    assert np.ptp(held.sum(1)) <= 1
    again = make_splits(index, [2], draw=DRAWN_FOLDS, seed=3)
    assert np.array_equal(again[0].test, splits[1].test)
    other = make_splits(index, [2], draw=DRAWN_FOLDS, seed=4)
    assert not np.array_equal(again[0].test, other[0].test)


def test_make_splits__drawn_folds_of_rare_classes():
    assert len(make_splits(single(9, 3), draw=5)) == 3
    with pytest.raises(UserError, match="class 'class1' has a single clip, so no folds"):
        make_splits(single(9, 1), draw=5)
    several = Fake([(0,), (0, 1), (0,), (0,), ()])  # two clips a fold at least
    assert [len(r.test) for r in make_splits(several, draw=5, multi_label=True)] == [3, 2]
    with pytest.raises(UserError, match="neither folds nor"):
        make_splits(single(9, 3))
    split = single(3, 3, split=["train", "test", "test"] * 2)
    assert [r.name for r in make_splits(split, draw=5)] == ["test"]


def test_how__says_what_was_selected_where():
    two, three = (single(6, 6, fold=[*range(1, k + 1)] * (12 // k)) for k in (2, 3))

    def said(index, protocol, **words):
        return how(make_splits(index, protocol=protocol, **words), protocol)

    none = said(three, Protocol(selection="none"))
    assert (
        none
        == said(three, None)
        == (
            "weights after the last step, evaluated on each held-out fold in turn (1, 2, 3; folds "
            "the data's own); nothing was selected on them"
        )
    )
    assert said(three, Protocol(lrs=[1e-3, 1e-2], weight_decays=[0, 1], look_every=5)) == (
        "learning rate and weight decay and step selected on the fold after the held-out one, "
        "which took no part in training; evaluated on each held-out fold in turn (1, 2, 3; folds "
        "the data's own), once"
    )
    part = said(two, Protocol(prototype_lrs=[1e-3, 1e-2], fraction=0.25))
    assert part.startswith("learning rate selected on 25 % of the training clips, which took")
    assert "nothing was selected" in said(two, Protocol())
    split = single(4, 4, split=["train", "train", "dev", "test"] * 2)
    assert said(split, Protocol(look_every=1)) == (
        "step selected on the clips of the split valid, which took no part in training; evaluated "
        "on the clips of the test split, once"
    )
    many = single(12, 12, fold=[*range(1, 13)] * 2)
    assert "in turn (12 folds; folds the data's own)" in said(many, None)
    assert "folds drawn here" in said(single(4, 4), None, draw=4)


def test_check_splits__meaningless_folds_are_errors():
    def check(index, *, multi_label=False):
        return check_splits(make_splits(index), index, multi_label=multi_label)

    assert check(single(4, 4, fold=[1, 2] * 4)) == []
    with pytest.raises(UserError, match="fold 2 has a single held-out clip"):
        check(Fake([(0, 1), (0,), (1,)], fold=[2, 1, 1]), multi_label=True)
    with pytest.raises(UserError, match=r"fold 1 has training clips of 1 class\(es\)"):
        check(single(2, 4, fold=[1, 1, 1, 1, 2, 2]))
    with pytest.raises(UserError, match=r"'class1' has held-out clips, but no training clip, in"):
        check(single(4, 2, 4, fold=[1, 1, 2, 2, 1, 1, 1, 1, 2, 2]))
    with pytest.raises(UserError, match=r"fold 1 \(and 1 more classes\): deal its clips"):
        check(single(4, 2, 2, 4, fold=[1, 1, 2, 2, 1, 1, 1, 1, 1, 1, 2, 2]))


def test_check_splits__class_left_to_validation():
    index = single(6, 4, 6, fold=[1, 2, 3, 1, 2, 3, 1, 1, 2, 2, 1, 2, 3, 1, 2, 3])
    assert len(check_splits(make_splits(index), index, multi_label=False)) == 1  # none in fold 3
    splits = make_splits(index, protocol=Protocol())
    with pytest.raises(UserError, match=r"'class1' .* in fold 1: its other clips are"):
        check_splits(splits, index, multi_label=False)


def test_check_splits__empty_fold_is_an_error():
    index, none = single(4, 4), np.empty(0, np.int64)
    held = Split("1", np.arange(4), np.arange(4, 8))
    for what, words in {"training": "train", "held-out": "test", "validation": "valid"}.items():
        with pytest.raises(UserError, match=f"fold 1 has no {what} clips"):
            check_splits([replace(held, **{words: none})], index, multi_label=False)


def test_check_splits__names_classes_without_clips():
    labels = [(0, 1), (1, 2), (0,), (1,), (0, 3), (1, 3), (0,), (1,)]
    index = Fake(labels, fold=[1, 1, 1, 1, 2, 2, 2, 2])
    said = check_splits(make_splits(index), index, multi_label=True)
    assert said == [
        "no training clip where they are held out, so chance at best: 'class2' ("
        "fold 1), 'class3' (fold 2)",
        "no held-out clip, so left out of that mean: 'class3' (fold 1), 'class2' (fold 2)",
    ]
    many = Fake([(0, *range(2, 10)), (1,), (0,), (1,)], fold=[1, 1, 2, 2])
    assert (
        "'class6' (fold 1) and 3 more" in check_splits(make_splits(many), many, multi_label=True)[0]
    )


def test_make_splits__named_split():
    splits = ["train-balanced"] * 2 + ["train-unbalanced"] * 3 + ["test"] * 2 + [""]
    index = Fake([(i % 2,) for i in range(8)], split=splits)
    (held,) = make_splits(index, split="train-balanced")
    assert (held.train.tolist(), held.test.tolist()) == ([0, 1], [5, 6])
    (held,) = make_splits(index, split="train-balanced,train-unbalanced")
    assert held.train.tolist() == [0, 1, 2, 3, 4]
    counts = "test 2, train-balanced 2, train-unbalanced 3, 1 clips without a split"
    for split, says in (
        ("auto", f"neither folds nor a train and a test split.*{counts}.*data.split=NAME"),
        ("train", f"no clip has split 'train': .*{counts}"),
        ("train-balanced,test", f"'test', which is held out.*{counts}"),
        ("all", f"'all', which is held out.*{counts}"),
    ):
        with pytest.raises(UserError, match=says):
            make_splits(index, split=split)
    with pytest.raises(UserError, match=r"data.split=train-balanced: the data has no splits but f"):
        make_splits(Fake([(0,), (1,)], fold=[1, 2]), split="train-balanced")


@pytest.fixture(scope="module")
def audioset(tmp_path_factory):
    """Two clips in each of AudioSet's three tables."""
    root = tmp_path_factory.mktemp("audioset")
    names = "".join(f"{i},/m/{i},class {i}\n" for i in range(527))
    (root / "class_labels_indices.csv").write_text(f"index,mid,display_name\n{names}")
    for table in ("balanced_train", "unbalanced_train", "eval"):
        lines = [f'{table}-{i}, 0.000, 10.000, "/m/{i}"\n' for i in range(2)]
        (root / f"{table}_segments.csv").write_text("".join(lines))
        for i in range(2):
            wave = toy_wave("tone", seed=0, number=i, seconds=0.2)
            data = encode(wave, sample_rate=16_000, codec="flac")
            (root / f"{table}-{i}.flac").write_bytes(data)
    return root


BALANCED, UNBALANCED = {"train-balanced": 2}, {"train-unbalanced": 2}


@pytest.mark.parametrize(
    ("command", "recipe", "wanted"),
    [
        (Probe, "as20k", BALANCED),
        (Finetune, "as20k", BALANCED),
        (Finetune, "as2m", UNBALANCED),
        (Finetune, "as2m data.split=train-balanced,train-unbalanced", BALANCED | UNBALANCED),
    ],
)
def test_audioset__recipes_train_on_their_split(audioset, tmp_path, command, recipe, wanted):
    name = "probe" if command is Probe else "finetune"
    words = [*f"recipe={recipe}".split(), "checkpoint=random", "log.progress=false"]
    words += [f"data.root={audioset}", f"data.cache={tmp_path}"]
    config = compose(command, name, words)
    data = open_probing(config)
    (held,) = data.splits
    of = [data.index.splits[i] for i in data.index.split]
    assert {split: of.count(split) for split in {of[i] for i in held.train}} == wanted
    assert {of[i] for i in held.test} == {"test"}
    assert any(f"trained on split {config.data.split}; " in line for line in data.notices)


def test_audioset__plain_splits_if_named(tmp_path):
    """``20k/train/*.tar`` and ``20k/test/*.tar``, as confit publishes them."""
    files = []
    for i in range(4):
        files.append(tmp_path / f"{i}.flac")
        wave = toy_wave("tone", seed=0, number=i, seconds=0.2)
        files[i].write_bytes(encode(wave, sample_rate=16_000, codec="flac"))
    names = [f"class {i}" for i in range(527)]
    for split, some in (("train", files[:2]), ("test", files[2:])):
        rows = [Row(path, path.stem, (names[i],)) for i, path in enumerate(some)]
        write_shards(rows, tmp_path / "20k" / split, vocabulary=names)
    words = ["recipe=as20k", f"data.shards={tmp_path / '20k'}", "checkpoint=random"]
    with pytest.raises(UserError, match=r"no clip has split 'train-balanced': .*test 2, train 2"):
        open_probing(compose(Probe, "probe", words))
    (held,) = open_probing(compose(Probe, "probe", [*words, "data.split=train"])).splits
    assert (len(held.train), len(held.test)) == (2, 2)


def test_permute_labels__gives_clips_the_labels_of_others(index):
    before = [index.labels(i) for i in range(len(index))]
    other = permute_labels(index, seed=3)
    after = [other.labels(i) for i in range(len(index))]
    assert sorted(after) == sorted(before) == sorted(index.labels(i) for i in range(len(index)))
    assert after != before
    assert other.hash != index.hash
    assert [other.key(i) for i in range(10)] == [index.key(i) for i in range(10)]
    assert not np.array_equal(permute_labels(index, seed=4).label_ids, other.label_ids)
