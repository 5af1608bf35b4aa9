"""Effective rank and deviation between clips: known values, collapsed encoders, no side effects."""

import math

import pytest
import torch
from torch import Tensor

from bat.encoders.bat import BAT
from bat.eval.collapse import effective_rank, representation
from bat.nn.block import Block
from bat.types import Grid

NAN = pytest.approx(math.nan, nan_ok=True)


def encoder(**keywords) -> BAT:
    torch.manual_seed(0)
    return BAT(width=48, depth=2, heads=2, grid=Grid(13, 8), **keywords)


def clips(count: int) -> Tensor:
    """Smooth noise, another for each clip: (count, 1, 208, 128)."""
    noise = torch.randn(count, 1, 26, 16, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, scale_factor=8, mode="bilinear") - 4


def matrix(values: list[float], *, rows: int, width: int) -> Tensor:
    """One with these singular values, float32."""
    torch.manual_seed(2)
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, len(values), dtype=torch.float64))[0]
    return ((left * torch.tensor(values)) @ right.T).float()


@pytest.mark.parametrize(("rows", "width"), [(512, 96), (60, 300), (40, 40)])
def test_effective_rank__known_singular_values(rows: int, width: int) -> None:
    def rank(*values: float) -> float:
        return effective_rank(matrix(list(values), rows=rows, width=width))

    assert rank(2.0) == pytest.approx(1, abs=1e-3)
    assert rank(3.0, 3.0) == pytest.approx(2, abs=1e-3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank(3.0, 1.0) == pytest.approx(math.exp(entropy), abs=1e-3)
    assert rank(*[5.0] * 30) == pytest.approx(30, abs=1e-2)


def test_effective_rank__zeros_and_nan() -> None:
    assert effective_rank(torch.zeros(20, 5)) == 0
    assert effective_rank(torch.full((20, 5), math.nan)) == NAN
    assert effective_rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])) == NAN


@pytest.mark.parametrize("count", [5, 8])
def test_representation__random_weights_have_not_collapsed(count: int) -> None:
    found = representation(encoder(), clips(count))
    assert 5 < found["rank"] <= 48
    assert 0.1 < found["std"] < 1.5


def test_representation__positions_alone_have_collapsed() -> None:
    deaf = encoder()
    torch.nn.init.zeros_(deaf.patch_embed.proj.weight)
    assert representation(deaf, clips(8))["std"] < 1e-6


def test_representation__constant_tokens_have_collapsed() -> None:
    constant = encoder()
    last = constant.blocks[-1].norm2
    torch.nn.init.constant_(last.weight, 1e-5)  # post-norm: what a block ends with
    torch.nn.init.ones_(last.bias)
    assert representation(constant, clips(8))["std"] < 0.01
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    assert representation(constant, clips(8)) == {"rank": 0, "std": 0}


class Positional(torch.nn.Module):
    """Rich in what it says of the position; of the clip it says one number, its mean level."""

    def embed_patches(self, spectrogram: Tensor) -> Tensor:
        position = torch.randn(104, 48, generator=torch.Generator().manual_seed(4))
        return position + spectrogram.mean((1, 2, 3))[:, None, None]

    def layers(self, tokens: Tensor):
        yield torch.cat([tokens[:, :1], tokens], dim=1), tokens


def test_representation__position_is_no_content() -> None:
    assert representation(Positional(), clips(8))["rank"] == pytest.approx(1, abs=1e-2)


def test_representation__is_nan_without_different_clips() -> None:
    assert representation(encoder(), clips(1)) == {"rank": NAN, "std": NAN}
    silence = torch.full((8, 1, 208, 128), -4.0)
    assert representation(encoder(), silence) == {"rank": NAN, "std": NAN}
    broken = encoder()
    torch.nn.init.constant_(broken.blocks[0].mlp.fc1.bias, math.nan)
    assert representation(broken, clips(8)) == {"rank": NAN, "std": NAN}
    few = representation(encoder(), clips(4))  # four clips: at most three directions of their own
    assert few["rank"] == NAN
    assert few["std"] > 0.1


def test_representation__changes_no_state() -> None:
    student = encoder(drop_path=0.5, attention="cudnn").train()  # cuDNN: not in float32, not here
    student.blocks[0].eval()
    before = {n: t.clone() for n, t in student.state_dict().items()}
    modes = [part.training for part in student.modules()]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = representation(student, clips(8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [part.training for part in student.modules()] == modes
    assert student.blocks[1].attn.backend == "cudnn"
    assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    assert representation(student, clips(8)) == first  # the same rows, no drop path


def test_representation__is_float32_under_autocast() -> None:
    plain = representation(encoder(), clips(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert representation(encoder(), clips(8)) == plain


def test_representation__compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()  # other tests may have compiled blocks as often as PyTorch allows
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    plain, blocks = encoder(), encoder()
    for block in (part for part in blocks.modules() if isinstance(part, Block)):
        block.compile(backend=backend, dynamic=False)
    assert representation(blocks, clips(8)) == representation(plain, clips(8))
    assert not compiled
    blocks.features(clips(2))
    assert compiled  # elsewhere they are
