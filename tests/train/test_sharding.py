"""Counting processes by launcher, dividing the global batch, the strategy, norms."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from bat.config.compose import compose
from bat.config.running import Hardware
from bat.config.schema import Pretrain
from bat.errors import UserError
from bat.train import sharding
from bat.train.processes import devices, nodes, resolve, with_batch, world_size

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_NTASKS")
LAUNCHERS += ("SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_NAME")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """``launched(NAME=value)``: the variables of a launcher, and no others."""

    def set_them(**variables: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_them()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    return set_them


def hardware(**given) -> Hardware:
    return Hardware(**{"accelerator": "cpu", "precision": "32-true", **given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 1),
        ({"devices": "3"}, 3),
        ({"devices": "3", "num_nodes": 2}, 6),
        ({"devices": "0,1"}, 2),
        ({"devices": "1,"}, 1),
        ({"num_nodes": 0}, 1),
        ({"accelerator": "auto"}, 4),
        ({"accelerator": "gpu", "devices": "-1"}, 4),
    ],
)
def test_world_size__without_a_launcher(launched, given, expected):
    assert world_size(hardware(**given)) == expected


def test_world_size__torchrun_and_slurm_say_how_many(launched):
    launched(TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="2", WORLD_SIZE="6", SLURM_NTASKS="1")
    own = hardware(num_nodes=0)
    assert (devices(own), nodes(own)) == (2, 3)
    slurm = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
    launched(**slurm)
    assert (devices(own), nodes(own)) == (4, 2)
    assert world_size(own) == 8
    launched(**slurm, SLURM_JOB_NAME="bash")
    assert (devices(own), nodes(own)) == ("auto", 1)


def test_strategy__by_devices_and_refused_where_fsdp_is_not(launched):
    assert sharding.strategy(hardware()) == "auto"
    assert sharding.strategy(hardware(strategy="fsdp")) == "auto"  # one device: nothing to split
    assert isinstance(sharding.strategy(hardware(strategy="ddp")), DDPStrategy)
    assert isinstance(sharding.strategy(hardware(devices="2")), DDPStrategy)
    two = sharding.strategy(hardware(devices="2", strategy="fsdp"))
    assert isinstance(two, sharding.Sharded)
    words = ["recipe=toy", "hardware.strategy=fsdp", "hardware.accelerator=mps"]
    with pytest.raises(UserError, match=r"accelerator=mps: say hardware\.strategy=auto"):
        compose(Pretrain, "pretrain", words)


def test_total_norm__is_torchs_and_omits_what_has_no_gradient():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module(torch.randn(5, 3)).sum().backward()
    module[0].bias.grad = None
    norm = sharding.total_norm(module.parameters())
    expected = torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    module[1].bias.grad[0] = torch.inf
    assert not torch.isfinite(sharding.total_norm(module.parameters()))
    assert sharding.total_norm([nn.Parameter(torch.ones(1))]) == 0


@pytest.mark.parametrize(
    ("global_batch", "batch", "accumulate", "world", "expected"),
    [
        (96, 24, 1, 1, (24, 4)),
        (96, 24, 1, 8, (12, 1)),
        (96, 24, 1, 3, (16, 2)),  # 32 a device: 24 does not divide it
        (96, 20, 1, 2, (16, 3)),
        (96, 1, 1, 2, (1, 48)),
        (7, 100, 1, 7, (1, 1)),
        (96, 24, 8, 2, (6, 8)),  # a given accumulation is used as given
        (None, 5, 3, 7, (5, 3)),
    ],
)
def test_global_batch__is_kept_by_the_fewest_micro_batches(
    global_batch, batch, accumulate, world, expected
):
    found = resolve(global_batch=global_batch, batch=batch, accumulate=accumulate, world=world)
    assert found == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((96, 24, 1, 5), r"on 5 devices is 19\.2 clips .*=95 or 100, or take 1, 2, 3, 4 devices"),
        ((3, 24, 1, 4), r"on 4 devices is 0\.75 clips .*global_batch=4, or take 1, 3 devices"),
        ((96, 24, 2, 1), r"1 device\(s\) x train\.accumulate=2 x 48 clips.*at most data\.batch=24"),
        ((96, 24, 5, 2), r"2 device\(s\) x train\.accumulate=5 x 9\.6 clips, which must be whole"),
    ],
)
def test_global_batch__what_does_not_divide_is_refused_with_the_arithmetic(given, message):
    global_batch, batch, accumulate, world = given
    with pytest.raises(UserError, match=message):
        resolve(global_batch=global_batch, batch=batch, accumulate=accumulate, world=world)


def test_with_batch__settings_get_what_their_devices_need():
    words = ["recipe=toy", "data.global_batch=40", "data.batch=8", "hardware.devices=2"]
    config = compose(Pretrain, "pretrain", words)
    changed = with_batch(config)
    assert (changed.data.batch, changed.train.accumulate) == (5, 4)
    assert (config.data.batch, config.train.accumulate) == (8, 1)  # the user's stays as it is
    nodes = with_batch(compose(Pretrain, "pretrain", [*words, "hardware.num_nodes=4"]))
    assert (nodes.data.batch, nodes.train.accumulate) == (5, 1)
    plain = compose(Pretrain, "pretrain", ["recipe=toy"])
    assert with_batch(plain) is plain
