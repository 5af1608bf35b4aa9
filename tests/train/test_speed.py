"""Compilation and activation checkpointing change how, never what."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bat.config.compose import compose
from bat.config.schema import Hardware, Pretrain
from bat.nn.block import Block
from bat.shapes import WaveBatch
from bat.train.pretrain import Pretraining
from bat.train.speed import attention_in_words, blocks_of

WORDS = ["recipe=toy", "model.width=48", "model.depth=2", "model.heads=4", "mask.views=2"]


def module(*words: str) -> Pretraining:
    torch.manual_seed(0)
    return Pretraining(compose(Pretrain, "pretrain", [*WORDS, "objective.decoder_depth=3", *words]))


def step(model: Pretraining, *, clips: int = 2) -> tuple[float, dict[str, torch.Tensor]]:
    samples = int(model.config.data.clip_seconds * model.config.frontend.sample_rate)
    waves = 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(1))
    batch = WaveBatch(
        waves=waves,
        lengths=torch.full((clips,), samples),
        targets=torch.zeros(clips, 0),
        keys=[str(i) for i in range(clips)],
        positions=torch.arange(clips),
        skipped=[],
    )
    loss = model.objective(model.spectrogram(batch), model.draw_views(clips, 3)).total
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
def test_compiled_step_has_the_same_loss_and_gradients(mode, graphs, eager_graphs) -> None:
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


def test_activation_checkpointing_keeps_less_and_changes_nothing() -> None:
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


def test_the_teacher_is_never_recomputed() -> None:
    model = module("hardware.activation_checkpointing=true")
    assert [b.recompute for b in blocks_of(model.objective.student)] == [True] * 5
    assert [b.recompute for b in blocks_of(model.objective.teacher)] == [False] * 2


class NothingReadBack(TorchDispatchMode):
    """Raises where a step would wait for the device: values read, sizes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.__name__.split(".")[0] not in self.WAITING, function
        return function(*args, **(kwargs or {}))


def test_step_never_waits_for_the_device() -> None:
    model = module("model.drop_path=0.1")
    optimizer = model.configure_optimizers()
    with NothingReadBack():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()
        samples = int(model.config.data.clip_seconds * model.config.frontend.sample_rate)
        batch = WaveBatch(
            torch.ones(2, samples).cumsum(1).sin(),
            torch.tensor([samples, samples // 2]),
            torch.zeros(2, 0),
            ["a", "b"],
            torch.arange(2),
            [],
        )
        model.training_step(batch, 0).backward()
        optimizer.step()
        model.objective.update_teacher(0.9)
    assert model.figures["loss"].isfinite()


def test_words_for_the_attention_kernel() -> None:
    block, cpu = Block(64, 4), torch.device("cpu")
    assert "few heads" in attention_in_words(block, Hardware(precision="bf16-mixed"), cpu)
    assert "scaled_dot" in attention_in_words(block, Hardware(precision="32-true"), cpu)
    assert attention_in_words(torch.nn.Linear(2, 2), Hardware(), cpu) == ""
