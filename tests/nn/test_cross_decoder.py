"""The cross-attention decoder and the choice of patches that are predicted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bat.encoders.bat import BAT
from bat.nn.decoder import CNNDecoder, CrossDecoder, ViTDecoder
from bat.nn.masking import choose_predicted, inverse_block_mask
from bat.objectives.base import Student
from bat.objectives.mae import MAE
from bat.objectives.masked_latent import Mask, MaskedLatent
from bat.types import Grid, Views

GRID = Grid(6, 4)


def views(rows: int = 4, share: float = 1.0) -> Views:
    made = inverse_block_mask(rows, GRID, generator=torch.Generator().manual_seed(0))
    return choose_predicted(made, share, torch.arange(rows) + 100)


def slow(decoder: CrossDecoder, layers: Tensor, row: int, patch: int) -> Tensor:
    """The prediction of one patch of one view, written from the equations."""
    x = decoder.mask_token[0, 0] + decoder.pos_embed[0, patch]
    for block, norm, w in zip(decoder.blocks, decoder.norms, decoder.shares, strict=True):
        share = w.exp() / w.exp().sum()
        context = norm(sum(a * f for a, f in zip(share, layers[:, row], strict=True)))  # (1 + n, D)
        q = block.q(block.norm1(x)).view(block.heads, -1)
        k, v = (t.unflatten(-1, (block.heads, -1)) for t in block.kv(context).chunk(2, -1))
        heads = []
        for h in range(block.heads):
            scores = torch.stack([q[h] @ key / q.shape[1] ** 0.5 for key in k[:, h]])
            heads.append(
                sum(p * value for p, value in zip(scores.softmax(0), v[:, h], strict=True))
            )
        x = x + block.proj(torch.cat(heads))
        x = x + block.mlp(block.norm2(x))
    return decoder.out_proj(decoder.norm(x))


def cross(width: int | None = 24) -> CrossDecoder:
    torch.manual_seed(0)
    decoder = CrossDecoder(32, 3, GRID, width=width, depth=2, heads=4, out_width=7).double()
    for parameter in decoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return decoder


def test_cross_decoder__equals_the_loop_over_patches_and_heads() -> None:
    decoder, v = cross(), views(2)
    layers = torch.randn(3, 2, 1 + v.keep_ids.shape[1], 32, dtype=torch.float64)
    out = decoder(layers, v)
    assert out.shape == (2, v.masked_ids.shape[1], 7)
    for row, i in ((0, 0), (1, 5)):
        expected = slow(decoder, layers, row, int(v.masked_ids[row, i]))
        torch.testing.assert_close(out[row, i], expected, atol=1e-12, rtol=0)


def test_cross_decoder__gradients_are_those_of_finite_differences() -> None:
    decoder, v = cross(8), views(1, share=0.2)
    layers = torch.randn(3, 1, 1 + v.keep_ids.shape[1], 32, dtype=torch.float64, requires_grad=True)

    def call(layers: Tensor, shares: Tensor, token: Tensor) -> Tensor:
        given = {"shares": shares, "mask_token": token}
        return torch.func.functional_call(decoder, given, (layers, v))

    own = [p.detach().clone().requires_grad_() for p in (decoder.shares, decoder.mask_token)]
    assert torch.autograd.gradcheck(call, (layers, *own), fast_mode=True)


@pytest.mark.parametrize("kind", ["vit", "cnn", "cross"])
def test_subset__predictions_are_those_of_all_at_its_places(kind: str) -> None:
    torch.manual_seed(0)
    decoder = {
        "vit": ViTDecoder(32, GRID, depth=2, heads=4),
        "cnn": CNNDecoder(32, GRID, depth=2),
        "cross": CrossDecoder(32, 3, GRID, depth=2, heads=4),
    }[kind]
    every, some = views(4), views(4, share=0.3)
    n = every.keep_ids.shape[1]
    given = torch.randn(3, 4, 1 + n, 32) if kind == "cross" else torch.randn(4, n, 32)
    whole, part = decoder(given, every), decoder(given, some)
    assert part.shape[1] == int(0.3 * whole.shape[1])
    for row in range(4):
        at = [every.masked_ids[row].tolist().index(i) for i in some.predict_ids[row].tolist()]
        torch.testing.assert_close(part[row], whole[row, at])


def test_subset__is_uniform_over_masked_patches_and_drawn_from_the_seed() -> None:
    seeds = torch.arange(20_000)
    made = inverse_block_mask(20_000, GRID, seeds=seeds)
    some = choose_predicted(made, 0.5, seeds * 7 + 1)
    assert some.chosen is not None
    assert (some.chosen.diff(dim=1) > 0).all()
    assert some.mask.gather(1, some.chosen).all()
    counts = torch.zeros(20_000, 24).scatter(1, some.chosen, 1.0)
    share = counts.sum(0) / made.mask.sum(0)
    assert float((share - some.chosen.shape[1] / made.masked_ids.shape[1]).abs().max()) < 0.02
    again = choose_predicted(made, 0.5, seeds * 7 + 1).chosen
    assert torch.equal(again, some.chosen)
    assert not torch.equal(choose_predicted(made, 0.5, seeds * 7 + 2).chosen, some.chosen)
    assert choose_predicted(made, 1.0, seeds) is made


def objective(kind: type, **settings) -> MaskedLatent | MAE:
    torch.manual_seed(0)
    own = {"mask": Mask(views=2)} if kind is MaskedLatent else {"decoder_heads": 4}
    config = kind.Config(decoder_depth=1, decoder_width=24, **own, **settings)
    return kind.build(config, BAT(width=32, depth=2, heads=4, grid=GRID), seed=0)


@pytest.mark.parametrize("kind", [MaskedLatent, MAE])
@pytest.mark.parametrize("decoder", ["cross", "usual"])
def test_objective__loss_is_the_mean_over_what_is_predicted(kind: type, decoder: str) -> None:
    usual = {} if decoder == "usual" else {"decoder": decoder}
    model = objective(kind, predict=0.5, **usual)
    drawn = model.draw_views(torch.arange(3))
    assert drawn.predict_ids.shape[1] == drawn.masked_ids.shape[1] // 2
    x = torch.rand(3, 1, 96, 64)

    def loss(which: Views) -> Tensor:
        if isinstance(model, MAE):
            return model.reconstruction_loss(x, which)
        return model.losses(x, which).local

    every = drawn.masked_ids.tolist()
    own = [set(ids) for ids in drawn.predict_ids.tolist()]
    rest = [[i for i in ids if i not in mine] for ids, mine in zip(every, own, strict=True)]
    parts = loss(drawn), loss(drawn._replace(chosen=torch.tensor(rest)))
    sizes = drawn.predict_ids.shape[1], len(rest[0])
    mean = sum(n * part for n, part in zip(sizes, parts, strict=True)) / sum(sizes)
    torch.testing.assert_close(loss(drawn._replace(chosen=None)), mean)
    loss(drawn).backward()
    assert all(p.grad is not None for p in model.student.decoder.parameters())


def test_student__cross_decoder_reads_every_block() -> None:
    encoder = BAT(width=32, depth=3, heads=4, grid=GRID)
    student = Student(encoder, CrossDecoder(32, 3, GRID, depth=2, heads=4))
    x, v = torch.rand(2, 1, 96, 64), views(4)
    cls, predictions = student.predict(x, v)
    torch.testing.assert_close(cls, encoder.encode_views(x, v)[0])
    layers = torch.stack([*encoder.view_layers(x, v)])
    torch.testing.assert_close(predictions, student.decoder(layers, v))
    for dropped in range(3):
        other = layers.clone()
        other[dropped] = 0
        assert not torch.allclose(student.decoder(other, v), predictions)
