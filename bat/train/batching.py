"""Clips of an optimiser step = devices x accumulated micro-batches x clips of a micro-batch.

``data.global_batch`` fixes the product whatever the number of devices: ``data.batch`` is then the
most that a device takes at once, and the number of micro-batches follows. A batch that does
not divide evenly raises an error that shows the arithmetic; it is never rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from bat.config.schema import Finetune, Pretrain
from bat.errors import UserError
from bat.train.sharding import world_size

C = TypeVar("C", Pretrain, Finetune)


def with_batch(config: C) -> C:
    """Returns ``config`` with the ``data.batch`` and ``train.accumulate`` that this run uses."""
    if config.data.global_batch is None:
        return config
    batch, accumulate = resolve(
        global_batch=config.data.global_batch,
        batch=config.data.batch,
        accumulate=config.train.accumulate,
        world=world_size(config.hardware),
    )
    changed: dict[str, Any] = {
        "data": replace(config.data, batch=batch),
        "train": replace(config.train, accumulate=accumulate),
    }
    return replace(config, **changed)


def resolve(
    *, global_batch: int | None, batch: int, accumulate: int, world: int
) -> tuple[int, int]:
    """Returns ``(clips per device and micro-batch, micro-batches per step)`` on ``world`` devices.

    Without ``global_batch``, returns the values given. With it, chooses the fewest micro-batches of
    at most ``batch`` clips; an ``accumulate`` other than 1 is used as given. Raises ``UserError``
    if ``global_batch`` does not divide evenly.
    """
    if global_batch is None:
        return batch, accumulate
    each, rest = divmod(global_batch, world)
    if rest or not each:
        near = sorted({max(1, each) * world, (each + 1) * world})
        fewer = [n for n in range(1, min(world, global_batch) + 1) if global_batch % n == 0]
        raise UserError(
            f"data.global_batch={global_batch} on {world} devices is {global_batch / world:.4g} "
            f"clips a device and step: say data.global_batch={' or '.join(map(str, near))}, or "
            f"take {', '.join(map(str, fewer[-4:]))} device{'s' if fewer[-1] > 1 else ''}"
        )
    if accumulate == 1:
        accumulate = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= batch)
        return each // accumulate, accumulate
    if each % accumulate or each // accumulate > batch:
        raise UserError(
            f"data.global_batch={global_batch} is {world} device(s) x train.accumulate="
            f"{accumulate} x {each / accumulate:.4g} clips, which must be whole and at most "
            f"data.batch={batch}: leave train.accumulate away (it follows), or change data.batch"
        )
    return each // accumulate, accumulate
