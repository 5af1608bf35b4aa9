"""Compilation and activation checkpointing change how, never what."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bat.config import locate
from bat.config.compose import compose, to_yaml
from bat.config.schema import Finetune, Hardware, Pretrain, Probe
from bat.errors import UserError
from bat.eval import hardware as speed
from bat.eval.hardware import attention_in_words, with_precision
from bat.nn.block import Block, blocks_of
from bat.train import run_pretrain
from bat.train.pretrain import Pretraining
from bat.types import WaveBatch

WORDS = ["recipe=toy", "model.width=48", "model.depth=2", "model.heads=4", "objective.mask.views=2"]


def module(*words: str) -> Pretraining:
    torch.manual_seed(0)
    return Pretraining(compose(Pretrain, "pretrain", [*WORDS, "objective.decoder_depth=3", *words]))


def two_clips(model: Pretraining) -> WaveBatch:
    samples = int(model.config.data.clip_seconds * model.config.frontend.sample_rate)
    return WaveBatch(
        waves=0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(1)),
        lengths=torch.tensor([samples, samples // 2]),
        targets=torch.zeros(2, 0),
        keys=["a", "b"],
        positions=torch.arange(2),
        skipped=[],
    )


def step(model: Pretraining) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model.objective(two_clips(model))["loss"]
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.objective.student.named_parameters()}


@pytest.fixture
def eager_graphs(monkeypatch) -> list[dict]:
    """``torch.compile`` without its backend, but without mercy for graph breaks."""
    real, calls = torch.compile, []

    def compile_(function, **keywords):
        calls.append(keywords)
        return real(function, backend="eager", fullgraph=True, dynamic=keywords.get("dynamic"))

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


@pytest.mark.parametrize(
    ("mode", "graphs"), [("off", 0), ("blocks", 2 + 2 + 3), ("whole", 3), ("cudagraphs", 3)]
)
def test_compile__same_loss_and_gradients(mode, graphs, eager_graphs) -> None:
    plain, other = module(), module(f"hardware.compile={mode}")
    assert len(eager_graphs) == graphs
    assert set(other.state_dict()) == set(plain.state_dict())
    assert sum(k.get("mode") == "reduce-overhead" for k in eager_graphs) == 2 * (
        mode == "cudagraphs"
    )
    loss, gradients = step(plain)
    loss_other, gradients_other = step(other)
    assert loss_other == pytest.approx(loss, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_other[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_compile__no_symbolic_sizes(recompute: str, monkeypatch) -> None:
    real, sizes = torch.compile, []

    def backend(graph, inputs):
        found = [n.meta.get("example_value") for n in graph.graph.nodes]
        shapes = [s for v in found if isinstance(v, torch.Tensor) for s in v.shape]
        sizes.append({type(s) for s in shapes})
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, **k | {"backend": backend}))
    torch.compiler.reset()
    model = module("hardware.compile=blocks", f"hardware.activation_checkpointing={recompute}")
    step(model)
    step(model)
    assert sizes == [{int}] * len(sizes)
    # teacher, student, and the decoder's first, middle and last block
    assert len(sizes) == 5


def test_compile__cudagraphs_with_accumulation_is_refused() -> None:
    with pytest.raises(UserError, match=r"accumulate=2 with hardware.compile=cudagraphs.*whole"):
        module("hardware.compile=cudagraphs", "train.accumulate=2")


def test_activation_checkpointing__keeps_less_and_changes_nothing() -> None:
    kept = {}
    results = {}
    for word in ("false", "true"):
        model = module(f"hardware.activation_checkpointing={word}", "model.drop_path=0.3")
        model.train()
        sizes: list[int] = []

        def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        torch.manual_seed(5)  # drop path
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            results[word] = step(model)
        kept[word] = sum(sizes)
    assert kept["true"] < 0.5 * kept["false"]
    assert results["true"][0] == results["false"][0]
    for name, gradient in results["false"][1].items():
        assert torch.equal(results["true"][1][name], gradient), name


def test_activation_checkpointing__not_in_the_teacher() -> None:
    model = module("hardware.activation_checkpointing=true")
    assert [b.recompute for b in blocks_of(model.objective.student)] == [True] * 5
    assert [b.recompute for b in blocks_of(model.objective.teacher)] == [False] * 2


class NothingReadBack(TorchDispatchMode):
    """Raises where a step would wait for the device: values read, sizes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        waits = name.startswith(tuple(f"{w}." for w in (*self.WAITING, "_unique2")))
        by_values = name == "repeat_interleave.Tensor"
        if name.startswith(("index.", "index_put", "_index_put")):  # x[mask]: a hidden nonzero
            by_values = any(i is not None and i.dtype == torch.bool for i in args[1])
        waits = waits or by_values
        assert not waits, f"waits for the device: {name}"
        return function(*args, **(kwargs or {}))


def test_step__never_waits_for_the_device() -> None:
    model = module("model.drop_path=0.1")
    optimizer = model.configure_optimizers()
    batch = two_clips(model)
    with NothingReadBack():
        model.training_step(batch, 0).backward()
        optimizer.step()
        model.objective.after_step(0, skip=torch.zeros(()))
    assert model.scalars["loss"].isfinite()


def test_pictures__compile_nothing(monkeypatch, tmp_path) -> None:
    """After a run on a GPU the module is on the CPU, where there may be no compiler."""

    def backend(graph, inputs):
        raise AssertionError("compiled for a picture")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend=backend))
    model = module("hardware.compile=whole")
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(run_pretrain, "plot_curves", lambda *a, **k: None)
    monkeypatch.setattr(run_pretrain, "plot_masks", lambda *a, **k: drawn.extend(a))
    data = SimpleNamespace(first_batch=lambda: two_clips(model))
    run_pretrain.draw(model, data, tmp_path)
    assert drawn[0].shape[:2] == (2, 1)


def test_attention_in_words__kernels() -> None:
    block, cpu = Block(64, 4), torch.device("cpu")
    assert "few heads" in attention_in_words(block, Hardware(precision="bf16-mixed"), cpu)
    assert "scaled_dot" in attention_in_words(block, Hardware(precision="32-true"), cpu)
    assert attention_in_words(torch.nn.Linear(2, 2), Hardware(), cpu) == ""


SCHEMAS = {"pretrain": Pretrain, "finetune": Finetune, "probe": Probe}
SHIPPED = [(c, name) for c in SCHEMAS for name in locate.known_recipes(c)]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """``cpu(fast)``: this machine has no GPU, and its CPU has bfloat16 instructions, or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda fast: monkeypatch.setattr(speed, "has_fast_bfloat16", lambda device: fast)


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_with_precision__no_slow_bfloat16_on_a_cpu(cpu, command, name, tmp_path) -> None:
    config = compose(SCHEMAS[command], command, [f"recipe={name}"])
    if config.hardware.accelerator == "gpu":
        pytest.skip("wants a GPU")
    cpu(False)
    assert with_precision(config, tmp_path).hardware.precision == "32-true"
    cpu(True)
    other = "32-true" if name.startswith("toy") else "bf16-mixed"
    assert with_precision(config, tmp_path).hardware.precision == other


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("bat"), "propagate", True)
    caplog.set_level(logging.INFO, "bat")
    return caplog


@pytest.mark.parametrize("wanted", ["auto", "gpu", "mps"])
def test_with_precision__cpu_in_place_of_mps_with_a_word(
    cpu, said, tmp_path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    cpu(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    words = ["recipe=toy", f"hardware.accelerator={wanted}"]
    for config in (compose(Pretrain, "pretrain", words), compose(Probe, "probe", words)):
        said.clear()
        assert with_precision(config, tmp_path).hardware.accelerator == "cpu"
        assert f"hardware.accelerator={wanted}: MPS" in said.text


def test_with_precision__slow_bfloat16_is_warned_of(cpu, said, tmp_path) -> None:
    words = ["recipe=esc10", "hardware.precision=bf16-mixed"]
    config = compose(Pretrain, "pretrain", words)
    cpu(True)
    assert with_precision(config, tmp_path) == config
    assert not said.records
    cpu(False)
    assert with_precision(config, tmp_path) == config
    assert "as long as in float32" in said.text


@pytest.mark.parametrize("first", [True, False])
def test_with_precision__resumed_run_keeps_it(cpu, said, tmp_path: Path, first: bool) -> None:
    config = compose(Probe, "probe", ["recipe=esc10"])
    cpu(first)
    began = with_precision(config, tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(began))
    said.clear()
    cpu(not first)
    assert with_precision(config, tmp_path) == began
    assert f"precision {began.hardware.precision}, as the run in" in said.text
