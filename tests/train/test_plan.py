"""A run on paper: devices, times, memory by part, and its counts against real steps."""

import pytest
import torch

from bat.config.compose import compose
from bat.config.schema import Pretrain
from bat.errors import UserError
from bat.train import plan as planning
from bat.train.cost import DEVICES, StepCount, count_step, device_called
from bat.train.plan import Assumptions, Sizes, assumptions, memory, network_seconds, place, plan
from bat.train.pretrain import build_objective
from bat.types import WaveBatch

TINY = (
    "recipe=toy model.width=48 model.depth=2 model.heads=2 objective.decoder_depth=1 "
    "objective.mask.views=2"
)


def tiny(*words: str) -> Pretrain:
    merged = dict(w.split("=", 1) for w in [*TINY.split(), *words])
    if merged.get("objective") == "mae":
        del merged["objective.mask.views"]
    return compose(Pretrain, "pretrain", [f"{k}={v}" for k, v in merged.items()])


def kept_bytes(config: Pretrain, clips: int) -> int:
    """Bytes that the backward pass of a real step keeps, by autograd's hooks."""
    config.model.attention = "sdpa"
    objective = build_objective(config)
    own = {t.untyped_storage().data_ptr() for t in [*objective.parameters(), *objective.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(clips)
    batch = WaveBatch(
        torch.randn(clips, 32_000), ids * 0 + 32_000, torch.empty(clips, 0), ["a"] * clips, ids, []
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch)["loss"].backward()
    return sum(storage.nbytes() for storage in kept.values())


OBJECTIVES = [
    ["objective=masked_latent"],
    ["objective=masked_latent", "objective.decoder=cross", "objective.predict=0.5"],
    ["objective=eat"],
    ["objective=sslam"],
    ["objective=mae"],
]


@pytest.mark.parametrize("words", OBJECTIVES, ids=lambda words: "-".join(words)[10:])
def test_count_step__memory_is_what_a_real_step_keeps(words: list[str]) -> None:
    config = compose(Pretrain, "pretrain", ["recipe=toy", *words])  # larger than the front end
    counted = count_step(config, clips=4)
    kept = kept_bytes(config, 4)
    assert kept <= counted.bytes < 1.5 * kept  # besides: temporaries, the first gradients
    assert counted.flop > 0


def test_count_step__recomputed_blocks_cost_flop_and_save_memory() -> None:
    words = ["model.depth=8", "model.width=192", "objective.mask.views=16"]  # blocks outweigh all
    plain, recomputed = (count_step(tiny(*words), recompute=again) for again in (False, True))
    assert 1.15 * plain.flop < recomputed.flop < 1.4 * plain.flop
    assert recomputed.bytes < 0.6 * plain.bytes


def test_memory__by_part_and_strategy() -> None:
    config = tiny("hardware.precision=bf16-mixed", "data.batch=3")
    size, step = Sizes(trained=1000, frozen=500, largest=100), StepCount(0, 7000)
    where = place("a100x4x2")
    parts = {w: memory(config, where, w, size, step, 0.0) for w in ("ddp", "fsdp", "hsdp")}
    names = ("weights", "gradients", "optimiser", "teacher", "units gathered", "activations")
    rows = {way: [part[name] for name in names] for way, part in parts.items()}
    assert rows["ddp"] == [4000, 4000, 8000, 2000, 0, 3 * 5000 + 2000]
    assert rows["fsdp"] == [500, 500, 1000, 250, 1200, 17_000]
    assert rows["hsdp"] == [1000, 1000, 2000, 500, 1200, 17_000]
    config.train.accumulate = 2
    assert memory(config, where, "fsdp", size, step, 0.0)["gradients"] == 4000


def test_device_called__whole_words_only() -> None:
    assert device_called("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert device_called("NVIDIA H100 PCIe") is DEVICES["h100-pcie"]
    assert device_called("NVIDIA GH200 480GB") is None
    assert device_called("NVIDIA L40") is None


def test_network__rings_within_and_between_nodes() -> None:
    config, size, where = tiny(), Sizes(1000, 500, 100), place("h100x4x2")

    def seconds(way: str, link: float, network: float) -> float:
        return network_seconds(config, where, way, size, link, network) * 1e9

    assert seconds("ddp", 1e9, 1.0) == pytest.approx(2 * 4000 * 7 / 8)
    assert seconds("fsdp", 1e9, 1.0) == pytest.approx((4 * 2500 + 4000) * 7 / 8)
    assert seconds("hsdp", 1e9, 1.0) == pytest.approx(2 * 4000 / 2)  # gradients alone
    assert seconds("hsdp", 1.0, 1e9) == pytest.approx((4 * 2500 + 4000) * 3 / 4)
    one = place("h100")
    assert network_seconds(config, one, "ddp", size, 1.0, 1.0) == 0


def test_place__known_devices_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    where = place("h100x8x4")
    assert (where.name, where.devices, where.nodes) == ("h100", 8, 4)
    assert (place("rtx4090x2").devices, place("h100-pcie").device.tflops) == (2, 756)
    assert place("cpu").is_cpu
    assert place("cpu").device.tflops > 0
    for wrong in ("tpux8", "h100x0", "8xh100"):
        with pytest.raises(UserError, match=rf"--on {wrong}.*h200.*cpu"):
            place(wrong)
    with pytest.raises(UserError, match=r"--assume speed=3.*clip_kb.*mfu"):
        assumptions(["speed=3"], where)
    with pytest.raises(UserError, match="--assume mfu=0"):
        assumptions(["mfu=0"], where)
    assumed, given = assumptions(["mfu=0.5,store=2", "link=9"], where)
    assert assumed == Assumptions(mfu=0.5, store=2, link=9)
    assert given == {"mfu", "store", "link"}
    assert device_called("NVIDIA H100 PCIe") == DEVICES["h100-pcie"]
    assert device_called("NVIDIA L40S") == DEVICES["l40s"]
    assert device_called("Quadro") is None


def test_plan__numbers_follow_from_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(config: Pretrain, *, clips: int, recompute: bool) -> StepCount:
        return StepCount(clips * 10**12, clips * 10**9)

    monkeypatch.setattr(planning, "count_step", counted)
    words = ["train.steps=3600", "data.global_batch=64", "data.batch=4", "data.workers=2"]
    lines = plan(tiny(*words), "a100x8x2", ["mfu=0.5", "tflops=100", "overhead=1"])
    said = {line.split()[0]: line for line in lines.splitlines()}
    # 4 TFLOP a device and step / (100 TFLOP/s x 0.5)
    assert said["compute"].split()[1] == "0.0800"
    assert "(given)" in said["compute"]
    assert "bound by  compute: 12.5 steps/s, 800 clips/s" in lines
    assert "3600 steps in 0.08 h, 1.28 GPU-hours" in lines
    assert said["loader"].startswith("loader    0.381 cores")  # 800 clips of 2 s / 4200
    assert "4 x 1 micro-batches x 16 devices" in said["step"]
    assert said["activations"].split()[1:4] == ["4.00"] * 3
    assert said["memory"].split()[-4:] == ["ddp", "*", "fsdp", "hsdp"]
    starved = plan(tiny(*words), "a100x8x2", ["loader=10"])
    assert "bound by  loader" in starved
    with pytest.raises(UserError, match="global_batch=64 on 5 devices"):
        plan(tiny(*words), "a100x5")


def test_command__plans_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    from bat.cli.pretrain import main

    # an objective that mixes the clips of a batch, so that none can be counted alone
    assert main([*TINY.split(), "objective=sslam", "--plan", "--on", "l4x2"]) == 0
    assert "2 x l4 (1 node), bf16-mixed, ddp" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["recipe=toy", "--on", "l4"])
