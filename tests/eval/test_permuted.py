"""Permuted labels: the same labels, on other clips, and chance is what is left."""

import numpy as np

from bat.data.index import open_index
from bat.eval.prepare import permute_labels
from tests.toy import make_toy_shards


def test_labels_are_dealt_anew_and_nothing_else_changes(tmp_path):
    index = open_index(make_toy_shards(tmp_path, seconds=0.2))
    before = [index.labels(i) for i in range(len(index))]
    other = permute_labels(index, seed=3)
    after = [other.labels(i) for i in range(len(index))]
    assert sorted(after) == sorted(before)
    assert after != before
    assert [index.labels(i) for i in range(len(index))] == before
    assert other.hash != index.hash
    assert [other.key(i) for i in range(10)] == [index.key(i) for i in range(10)]
    assert np.array_equal(permute_labels(index, seed=3).label_ids, other.label_ids)
    assert not np.array_equal(permute_labels(index, seed=4).label_ids, other.label_ids)
    one_hot = np.stack([other.targets(i) for i in range(10)])
    assert [tuple(np.flatnonzero(row)) for row in one_hot] == after
