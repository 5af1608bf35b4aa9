"""Counting processes by launcher, the strategy, and what sharding leaves alone on one process."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from bat.config.running import Hardware
from bat.errors import UserError
from bat.train import sharding

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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
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
    ],
)
def test_processes_without_a_launcher(launched, given, expected):
    assert sharding.world_size(hardware(**given)) == expected


def test_all_gpus_where_none_are_named(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert sharding.world_size(Hardware(accelerator="auto")) == 4
    assert sharding.world_size(Hardware(accelerator="gpu", devices="-1")) == 4
    assert sharding.world_size(Hardware(accelerator="cpu")) == 1


def test_torchrun_and_slurm_say_how_many(launched):
    launched(TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="2", WORLD_SIZE="6", SLURM_NTASKS="1")
    own = hardware(num_nodes=0)
    assert (sharding.devices(own), sharding.nodes(own)) == (2, 3)
    launched(SLURM_NTASKS="8", SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="2")
    assert (sharding.devices(own), sharding.nodes(own)) == (4, 2)
    assert sharding.world_size(own) == 8
    launched(SLURM_NTASKS="8", SLURM_NTASKS_PER_NODE="4", SLURM_NNODES="2", SLURM_JOB_NAME="bash")
    assert (sharding.devices(own), sharding.nodes(own)) == ("auto", 1)


def test_strategies(launched):
    assert sharding.strategy(hardware()) == "auto"
    assert sharding.strategy(hardware(strategy="fsdp")) == "auto"  # one device: nothing to split
    assert isinstance(sharding.strategy(hardware(strategy="ddp")), DDPStrategy)
    assert isinstance(sharding.strategy(hardware(devices="2")), DDPStrategy)
    two = sharding.strategy(hardware(devices="2", strategy="fsdp"))
    assert isinstance(two, sharding.Sharded)


def test_fsdp_on_an_accelerator_without_it_is_refused():
    with pytest.raises(UserError, match=r"accelerator=mps: say hardware\.strategy=auto"):
        sharding.check_strategy(hardware(accelerator="mps", strategy="fsdp"))
    sharding.check_strategy(hardware(strategy="fsdp"))


def test_total_norm_is_torchs_and_leaves_out_what_has_no_gradient():
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


def test_a_module_of_one_process_is_left_as_it_is():
    module = nn.Linear(2, 2)
    assert not sharding.is_sharded(module)
    assert sharding.full_state(module).keys() == module.state_dict().keys()
    assert sharding.full_state(module)["weight"].data_ptr() == module.weight.data_ptr()
