"""Global batch, devices, accumulation: they multiply out, or the run says why not."""

import pytest

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.errors import UserError
from bat.train.batching import resolve, with_batch


@pytest.mark.parametrize(
    ("global_batch", "batch", "world", "expected"),
    [
        (96, 24, 1, (24, 4)),
        (96, 24, 4, (24, 1)),
        (96, 24, 8, (12, 1)),
        (96, 24, 3, (16, 2)),  # 32 a device: 24 does not divide it
        (96, 20, 2, (16, 3)),
        (96, 1, 2, (1, 48)),
        (7, 100, 7, (1, 1)),
    ],
)
def test_the_global_batch_is_kept_by_the_fewest_micro_batches(global_batch, batch, world, expected):
    found = resolve(global_batch=global_batch, batch=batch, accumulate=1, world=world)
    assert found == expected
    assert found[0] * found[1] * world == global_batch


def test_without_a_global_batch_nothing_changes():
    assert resolve(global_batch=None, batch=5, accumulate=3, world=7) == (5, 3)


def test_a_given_accumulation_is_taken_at_its_word():
    assert resolve(global_batch=96, batch=24, accumulate=8, world=2) == (6, 8)
    assert resolve(global_batch=96, batch=24, accumulate=2, world=2) == (24, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"global_batch": 96, "batch": 24, "accumulate": 1, "world": 5},
            r"global_batch=96 on 5 devices is 19\.2 clips .* data\.global_batch=95 or 100, or take "
            r"1, 2, 3, 4 devices",
        ),
        (
            {"global_batch": 3, "batch": 24, "accumulate": 1, "world": 4},
            r"global_batch=3 on 4 devices is 0\.75 clips .* data\.global_batch=4, or take "
            r"1, 3 devices",
        ),
        (
            {"global_batch": 96, "batch": 24, "accumulate": 2, "world": 1},
            r"1 device\(s\) x train\.accumulate=2 x 48 clips.*at most data\.batch=24",
        ),
        (
            {"global_batch": 96, "batch": 24, "accumulate": 5, "world": 2},
            r"2 device\(s\) x train\.accumulate=5 x 9\.6 clips, which must be whole",
        ),
    ],
)
def test_what_does_not_come_out_even_is_refused_with_the_arithmetic(wrong, message):
    with pytest.raises(UserError, match=message):
        resolve(**wrong)


def test_a_configuration_gets_what_its_devices_need():
    words = ["recipe=toy", "data.global_batch=40", "data.batch=8", "hardware.devices=2"]
    config = compose(Pretrain, "pretrain", words)
    changed = with_batch(config)
    assert (changed.data.batch, changed.train.accumulate) == (5, 4)
    assert (config.data.batch, config.train.accumulate) == (8, 1)  # the user's stays as it is
    nodes = with_batch(compose(Pretrain, "pretrain", [*words, "hardware.num_nodes=4"]))
    assert (nodes.data.batch, nodes.train.accumulate) == (5, 1)
    plain = compose(Pretrain, "pretrain", ["recipe=toy"])
    assert with_batch(plain) is plain
