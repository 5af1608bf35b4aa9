"""Targets, losses, gradients and three optimiser steps against the golden vectors and the loops."""

import pytest
import torch
import torch.nn.functional as F

from bat.encoders.bat import BAT
from bat.encoders.strict import load_strictly
from bat.nn.decoder import CNNDecoder, ViTDecoder
from bat.nn.ema import ema_decay
from bat.nn.masking import inverse_block_mask, row_seeds
from bat.objectives.masked_latent import MaskedLatent, gather_patches, global_loss, standardise
from bat.seeding import derive_seed
from bat.types import Grid, Views
from tests.golden_files import Golden, checksum
from tests.reference import targets as slow

GRID = Grid(6, 4)
CLOSE = {"atol": 1e-4, "rtol": 0}


def tiny(**keywords) -> MaskedLatent:
    torch.manual_seed(0)
    encoder = BAT(width=32, depth=3, heads=4, grid=GRID)
    decoder = ViTDecoder(32, GRID, depth=2, heads=4)
    return MaskedLatent(encoder, decoder, **keywords)


def golden_model(data: Golden, **keywords) -> MaskedLatent:
    model = tiny(**keywords)
    weights = data.under("student_init/")
    load_strictly(model.student, weights, "student")
    encoder = {n.removeprefix("encoder."): t for n, t in weights.items() if n[0] == "e"}
    load_strictly(model.teacher.encoder, encoder, "teacher")
    return model


def golden_batch(data: Golden, step: int) -> tuple[torch.Tensor, Views]:
    return data["x"][step], Views(data["ids_keep_sorted"][step], data["mask"][step].bool())


def random_batch(clips: int = 2, views: int = 4) -> tuple[torch.Tensor, Views]:
    g = torch.Generator().manual_seed(5)
    x = torch.rand(clips, 1, 96, 64, generator=g)
    return x, inverse_block_mask(clips * views, GRID, generator=g)


def test_golden_forward(golden) -> None:
    data = Golden(golden / "ssl_tiny.npz")
    model = golden_model(data)
    x, views = golden_batch(data, 0)
    with torch.no_grad():
        cls, patches = model.student.encoder.encode_views(x, views)
        torch.testing.assert_close(cls, data["fwd_student_cls"], **CLOSE)
        torch.testing.assert_close(patches, data["fwd_encoder_patches"], **CLOSE)
        predictions = model.student.decoder(patches, views)
        golden_predictions = data["fwd_decoder_patches"][views.mask].view_as(predictions)
        torch.testing.assert_close(predictions, golden_predictions, **CLOSE)
        targets, teacher_cls = model.targets(x)
        torch.testing.assert_close(targets, data["fwd_teacher_targets"], **CLOSE)
        torch.testing.assert_close(teacher_cls, data["fwd_teacher_cls"], **CLOSE)
        losses = model.losses(x, views)
    assert float(losses.local) == pytest.approx(float(data["fwd_local_loss"]), abs=1e-5)
    assert float(losses.global_) == pytest.approx(float(data["fwd_global_loss"]), abs=1e-5)
    assert float(losses.total) == pytest.approx(float(losses.local + losses.global_), abs=1e-6)


def test_masks__on_a_small_grid_have_smaller_blocks_and_describe_says_so() -> None:
    grid, positions = Grid(7, 8), torch.arange(3)
    encoder = BAT(width=24, depth=1, heads=2, grid=grid)
    objective = MaskedLatent(encoder, ViTDecoder(24, grid, depth=1, heads=2))
    seeds = row_seeds(derive_seed(0, "masks"), positions, 16)
    wanted = inverse_block_mask(len(seeds), grid, keep_ratio=1 - 0.8, block=3, seeds=seeds)
    assert torch.equal(objective.draw_views(positions).keep_ids, wanted.keep_ids)
    assert "side 3" in objective.describe()


def test_golden_gradients(golden) -> None:
    data = Golden(golden / "ssl_tiny.npz")
    model = golden_model(data)
    model.losses(*golden_batch(data, 0)).total.backward()
    expected = data.under("grad0/")
    got = {n: p.grad for n, p in model.student.named_parameters()}
    assert set(got) == set(expected)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5, rtol=1e-3, msg=name)
    assert all(p.grad is None for p in model.teacher.parameters())


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The key rows of a qkv bias have no gradient and drift by rounding under Adam."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    third = tensor.shape[0] // 3
    return torch.cat([tensor[:third], tensor[2 * third :]])


def test_golden_three_optimiser_steps(golden) -> None:
    data = Golden(golden / "ssl_tiny.npz")
    model = golden_model(data)
    hyper = data.meta["hyper"]
    optimiser = torch.optim.AdamW(
        model.student.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05
    )
    decays = [ema_decay(i, start=0.9, end=0.99, steps=4) for i in range(3)]
    assert decays == pytest.approx([0.9, 0.93, 0.96], abs=1e-6), hyper
    for step in range(3):
        record = data.meta["steps"][step]
        for group in optimiser.param_groups:
            group["lr"] = record["lr"]
        optimiser.zero_grad()
        losses = model.losses(*golden_batch(data, step))
        assert losses.local.item() == pytest.approx(record["local_loss"], abs=1e-5)
        assert losses.global_.item() == pytest.approx(record["global_loss"], abs=1e-5)
        losses.total.backward()
        optimiser.step()
        model.update_teacher(decays[step])
        for who, module in (("student", model.student), ("teacher", model.teacher)):
            for name, tensor in module.state_dict().items():
                sums = record.get(f"{who}_checksum", {})
                plain = name if name in sums else name.removeprefix("encoder.")
                if plain in sums and not name.endswith("qkv.bias"):
                    assert checksum(tensor) == pytest.approx(sums[plain], abs=2e-3), name
    for who, module in (("student", model.student), ("teacher", model.teacher)):
        final = data.under(f"{who}_final/")
        assert final
        for name, expected in final.items():
            own = module.state_dict()
            got = own[name] if name in own else own[f"encoder.{name}"]
            torch.testing.assert_close(
                without_key_bias(name, got),
                without_key_bias(name, expected),
                atol=1e-5,
                rtol=0,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_golden_accumulation_and_clipping(golden) -> None:
    data = Golden(golden / "ssl_tiny.npz")
    model = golden_model(data)
    record = data.meta["accum_clip"]
    optimiser = torch.optim.AdamW(
        model.student.parameters(), lr=record["lr"][0], betas=(0.9, 0.95), weight_decay=0.05
    )
    for step in range(2):
        (model.losses(*golden_batch(data, step)).total / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.student.parameters(), record["clip_norm"])
    assert float(norm) == pytest.approx(record["grad_norm_before_clip"][0], rel=1e-4)
    optimiser.step()
    own = model.student.state_dict()
    for name, expected in data.under("accum_clip_student_final/").items():
        torch.testing.assert_close(own[name], expected, atol=1e-5, rtol=0)


def test_golden_narrow_decoder(golden) -> None:
    data = Golden(golden / "ssl_tiny.npz")
    decoder = ViTDecoder(32, GRID, width=24, depth=2, heads=4)
    load_strictly(decoder, data.under("dec24/w/"), "dec24")
    _, views = golden_batch(data, 0)
    with torch.no_grad():
        out = decoder(data["fwd_encoder_patches"], views)
    torch.testing.assert_close(out, data["dec24/out"][views.mask].view_as(out), **CLOSE)


def test_targets_and_losses_equal_the_loops() -> None:
    model = tiny().double()
    x, views = random_batch()
    x = x.double()
    with torch.no_grad():
        layers = model.teacher.encoder.features(x).patches.flatten(2, 3)
        targets, _ = model.targets(x)
        expected = slow.targets(layers)
        # targets are float32 by definition
        torch.testing.assert_close(targets, expected.float(), atol=1e-5, rtol=0)
        cls = torch.randn(8, 32)
        predictions = torch.randn(8, 24, 32)
        local, global_ = slow.losses(predictions, cls, targets, views.mask, views=4)
    masked = predictions[views.mask].view(8, -1, 32)
    wanted = gather_patches(targets, views.masked_ids)
    assert float(F.mse_loss(masked.flatten(0, 1), wanted)) == pytest.approx(local, rel=1e-5)
    assert float(global_loss(cls, targets.mean(1))) == pytest.approx(global_, rel=1e-5)


def test_loss_of_the_target_itself_is_zero() -> None:
    targets = torch.randn(2, 24, 32)
    views = random_batch()[1]
    same = targets.repeat_interleave(4, 0)[views.mask].view(8, -1, 32)
    assert torch.equal(same.flatten(0, 1), gather_patches(targets, views.masked_ids))
    assert float(global_loss(targets.mean(1).repeat_interleave(4, 0), targets.mean(1))) == 0


def test_centred_targets_hold_nothing_that_depends_on_the_position_alone() -> None:
    model = tiny(target_centering="batch")
    x, _ = random_batch(clips=1)
    targets, _ = model.targets(x.repeat(3, 1, 1, 1))  # three equal clips: all is position
    assert float(targets.abs().max()) < 0.1
    plain, _ = tiny().targets(x.repeat(3, 1, 1, 1))
    assert float(plain.abs().mean()) > 0.5


def test_position_only_is_the_loss_of_the_mean_over_other_clips() -> None:
    """The expected error of a position's mean, estimated without bias from the batch itself."""
    model = tiny()
    x, views = random_batch(clips=3)
    targets, _ = model.targets(x)
    losses = model.losses(
        x, inverse_block_mask(12, GRID, generator=torch.Generator().manual_seed(0))
    )
    squared = [((targets[b] - targets.mean(0)) ** 2).mean() for b in range(3)]
    expected = float(sum(squared) / 2)  # B - 1
    assert losses.position_only.item() == pytest.approx(expected, rel=1e-5)
    same = model.losses(x[:1].repeat(2, 1, 1, 1), views)
    assert same.position_only.item() == pytest.approx(0, abs=1e-6)


def test_standardise_is_biased_and_safe_on_constants() -> None:
    x = torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(standardise(x, 1), torch.tensor([[-1.0, 1.0]]), atol=1e-5, rtol=0)
    assert float(standardise(torch.full((1, 4), 7.0), 1).abs().max()) == 0


def test_teacher_stays_in_eval_mode_and_moves_only_by_ema() -> None:
    model = tiny().train()
    assert not model.teacher.training
    assert not model.teacher.encoder.blocks[0].training
    before = model.teacher.encoder.cls_token.clone()
    with torch.no_grad():
        model.student.encoder.cls_token.add_(1.0)
    assert torch.equal(model.teacher.encoder.cls_token, before)
    model.update_teacher(0.5)
    torch.testing.assert_close(model.teacher.encoder.cls_token, before + 0.5)


def test_cnn_decoder_trains_too() -> None:
    torch.manual_seed(0)
    model = MaskedLatent(BAT(width=32, depth=1, heads=4, grid=GRID), CNNDecoder(32, GRID, depth=2))
    model.losses(*random_batch()).total.backward()
    assert all(p.grad is not None for p in model.student.parameters())


def test_step_has_no_graph_breaks() -> None:
    model = tiny()
    x, views = random_batch()
    compiled = torch.compile(model.losses, backend="eager", fullgraph=True)
    assert compiled(x, views).total.item() == pytest.approx(
        model.losses(x, views).total.item(), abs=1e-6
    )
