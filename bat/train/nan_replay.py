"""Computes a kept step again and names the first tensor that is not finite (``bat debug``).

The weights and the batch are looked at first, then the result of every operation of the forward
pass, the gradient that every operation of the backward pass returns, the accumulated gradients of
the parameters and their norm. In the forward pass an operation is named that makes NaN of inputs
without NaN, or infinity of finite inputs; constants such as the -inf of a mask are no finding.

The step is computed without compilation and without activation checkpointing, in the run's
precision, on the device of its kind if there is one. On the same machine and without compilation
a finite loss is the recorded one bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bat.config.compose import from_yaml
from bat.config.schema import Finetune, Pretrain
from bat.errors import UserError
from bat.eval.loading import autocast_for
from bat.eval.prepare import prepare
from bat.train.finetune import Folds
from bat.train.nan_record import FOLDER, RECORD, SETTINGS, TENSORS, finite, records
from bat.train.pretrain import Pretraining
from bat.train.sharding import total_norm
from bat.types import WaveBatch
from bat.weights import read_json, read_tensors

MADE = ("empty", "empty_like", "new_empty", "empty_strided", "tensor", "as_tensor", "from_numpy")
"""Functions whose result is no computation."""
TRY = {
    "weight": "the weights were broken before this step: begin anew from an earlier checkpoint, "
    "with a lower optim.lr and optim.clip_norm=1",
    "batch": "the batch itself is broken: remove the clip, or check the data (bat-shard verify)",
    "forward": "lower optim.lr, more optim.warmup_steps, optim.clip_norm=1; begin anew from an "
    "earlier checkpoint if the input above is already large",
    "backward": "lower optim.lr, or begin anew from an earlier checkpoint: optim.clip_norm cannot "
    "clip an infinite gradient",
    "norm": "each gradient is finite, and their norm is too large for float32: lower optim.lr, or "
    "begin anew from an earlier checkpoint",
    "": "all is finite here: the run's device, precision or compilation makes the difference, or "
    "its memory was at fault; more than one such step: hardware.precision=32-true, "
    "hardware.compile=off",
}
"""Advice by kind of finding."""
IN_16_BITS = "hardware.precision=32-true first; "


@dataclass
class Finding:
    """The first tensor that is not finite."""

    kind: str
    """``weight``, ``batch``, ``forward``, ``backward`` or ``norm``."""
    where: str
    """Path of the module, the weight or the part of the batch."""
    operation: str
    """Function that made it; empty for weights and batches."""
    tensor: str
    """Shape, type and counts, see ``described``."""
    inputs: list[str] = field(default_factory=list)
    """Tensors that it was made from."""

    def lines(self) -> list[str]:
        """Returns the finding for printing."""
        how = f", {self.operation}" if self.operation else ""
        made_from = [f"  made from {text}" for text in self.inputs]
        return [f"first     {self.kind} of {self.where}{how}", f"  {self.tensor}", *made_from]


@dataclass
class Replay:
    """Result of computing a step again."""

    folder: Path
    record: dict[str, Any]
    config: Pretrain | Finetune
    losses: list[tuple[int, int, float | None, float | None]] = field(default_factory=list)
    """(rank, micro-batch, loss, recorded loss) of each; None: not finite."""
    keys: list[str] = field(default_factory=list)
    """Clips of the micro-batch of the finding; of a broken batch only those that are broken."""
    finding: Finding | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns all of it for printing."""
        fold = f", fold {self.record['fold']}" if self.record["fold"] else ""
        lines = [f"step      {self.record['step']}{fold}, {self.record['kind']} ({self.folder})"]
        for rank, index, loss, then in self.losses:
            same = "as recorded" if loss == then else f"recorded: {_number(then)}"
            lines.append(f"loss      {_number(loss)} ({same}), micro-batch {index} of rank {rank}")
        lines += [f"note      {note}" for note in self.notes]
        lines += self.finding.lines() if self.finding else ["first     no tensor"]
        if self.keys:
            lines.append(f"clips     {' '.join(self.keys[:8])}{' ...' * (len(self.keys) > 8)}")
        kind = self.finding.kind if self.finding else ""
        narrow = self.config.hardware.precision != "32-true" and kind in ("forward", "backward")
        return [*lines, f"try       {IN_16_BITS * narrow}{TRY[kind]}"]


def replay(folder: Path) -> Replay:
    """Computes the step kept in ``folder`` again, until something is not finite.

    Raises ``UserError`` if it holds no record, or the settings or (fine-tuning) the data it was
    made with are no longer there.
    """
    record = _record(folder)
    module = _module(record, folder)
    found = Replay(folder, record, module.config)
    try:
        module.load_state_dict(read_tensors(folder / "weights.safetensors"))
    except RuntimeError as error:
        version = record["versions"]["bat"]
        raise UserError(
            f"{folder} was kept by bat {version} and does not fit this version ({error}): replay "
            f"it with pip install bat-audio=={version}"
        ) from error
    device = torch.device(record["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")
        found.notes.append("computed on the CPU, the run was on a GPU: its numbers differ a little")
    if record["later_steps"]:
        found.notes.append("another step had moved the weights when this one was noticed")
    module.to(device)
    torch.set_num_threads(int(record["threads"]))
    found.finding = _broken("weight", module.state_dict())
    for rank in range(int(record["processes"])):
        part = folder / f"batch-rank{rank}.json"
        if not part.is_file():
            found.notes.append(f"the batch of rank {rank} is not here")
            continue
        module.replayed_rank = rank
        rows = read_json(part)["micro_batches"]
        tensors = read_tensors(part.with_suffix(".safetensors"))
        for p in module.parameters():
            p.grad = None
        for number, row in enumerate(rows):
            parts = {name: tensors[f"{number}.{name}"] for name in TENSORS}
            batch = WaveBatch(**parts, keys=row["keys"], skipped=[]).to(device)
            loss, finding = _step(module, batch, row["micro_batch"], share=1 / len(rows))
            found.losses.append((rank, row["micro_batch"], finite(loss), row["loss"]))
            if found.finding is None and finding is not None:
                bad = ~batch.waves.isfinite().all(1).cpu()
                rows_of = bad if finding.kind == "batch" else torch.ones_like(bad)
                found.finding = finding
                found.keys = [key for key, hit in zip(batch.keys, rows_of, strict=True) if hit]
            if found.finding is not None:
                return found
        trained = [p for p in module.parameters() if p.grad is not None]
        if not math.isfinite(float(total_norm(trained))):
            largest = max(_gradients(module).items(), key=lambda item: float(item[1].abs().max()))
            found.finding = Finding("norm", largest[0], "gradient", described(largest[1]))
            return found
    return found


def _record(folder: Path) -> dict[str, Any]:
    """Returns ``record.json`` of ``folder``, or raises ``UserError`` that names records near it."""
    if (folder / RECORD).is_file():
        return read_json(folder / RECORD)
    out = next((p for p in (folder, *folder.parents) if (p / FOLDER).is_dir()), folder)
    near = records(out) + [p for fold in sorted(out.glob("fold-*")) for p in records(fold)]
    if near:
        raise UserError(f"{folder} is no kept step: say bat debug {near[0]}")
    raise UserError(
        f"{folder} is no kept step: a run keeps the first steps whose loss is not finite in "
        f"OUT/{FOLDER}/STEP (health.keep_nan); bat runs lists the runs"
    )


def _module(record: dict[str, Any], folder: Path) -> Any:
    """Builds the run's module with fresh weights."""
    schema: Any = Pretrain if record["kind"] == "pretrain" else Finetune
    config = from_yaml(schema, folder / SETTINGS)
    hardware = replace(config.hardware, compile="off", activation_checkpointing=False)
    config = replace(config, hardware=hardware)
    if isinstance(config, Pretrain):
        return Pretraining(config)
    ready = prepare(config)
    held = next((split for split in ready.splits if split.name == record["fold"]), None)
    if held is None:
        raise UserError(
            f"{folder} is of fold {record['fold']}, which the data no longer have: put them back"
        )
    return Folds(ready, folder).module(held)


def _step(
    module: Any, batch: WaveBatch, index: int, *, share: float
) -> tuple[float, Finding | None]:
    """Computes loss and gradients of a micro-batch; ``share``: its part in the step's loss."""
    broken = _broken("batch", {"waves": batch.waves})
    watch = Watch(module)
    autocast = autocast_for(module.config.hardware)
    cast = torch.autocast(batch.waves.device.type, autocast, enabled=autocast is not None)
    with watch.forward(), cast:
        loss = module.training_step(batch, index)
    value = float(loss.detach())
    if broken or watch.found:
        return value, broken or watch.found
    watch.watch_backward(loss)
    (loss * share).backward()
    return value, watch.found or _broken("backward", _gradients(module))


class Watch(TorchFunctionMode):
    """Finds the first result or gradient that is not finite in a step of ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.found: Finding | None = None
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.path = ["training_step"]
        """Names of the modules whose forward is running."""
        self.made_by: dict[Any, tuple[str, str]] = {}
        """Module and operation of each node of the backward graph that ends an operation."""

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Context manager around the forward pass."""

        def leave(*_: Any) -> None:
            self.path.pop()

        hooks = []
        for name, module in self.module.named_modules():
            enter = partial(self._enter, name or "training_step")
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        with self:
            yield
        for hook in hooks:
            hook.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self.path.append(name)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        name = str(getattr(func, "__name__", func))
        overwrites = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        before = _state(given) if overwrites else None
        out = func(*args, **(kwargs or {}))
        where = self.path[-1]
        for tensor in _tensors(out):
            if tensor.grad_fn is not None:
                self.made_by[tensor.grad_fn] = (where, name)
            if self.found or name in MADE or not _constants_are_finite(given):
                continue
            nan, inf = _state([tensor])
            if not nan and not inf:
                continue
            nan_before, inf_before = before or _state(given)
            if (nan and not nan_before) or not (nan_before or inf_before):
                inputs = [
                    f"{self.names.get(id(t), 'input')} {described(t)}" for t in _tensors(given)
                ]
                self.found = Finding("forward", where, name, described(tensor), inputs)
        return out

    def watch_backward(self, loss: Tensor) -> None:
        """Watches the gradients of every operation that ``loss`` depends on."""
        seen: set[Any] = set()
        left: list[tuple[Any, tuple[str, str]]] = [(loss.grad_fn, ("training_step", "loss"))]
        while left:
            node, label = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            label = self.made_by.get(node, label)
            node.register_hook(partial(self._gradients, label, node.name()))
            left += [(below, label) for below, _ in node.next_functions]

    def _gradients(self, label: tuple[str, str], node: str, returned: Any, given: Any) -> None:
        bad = [t for t in _tensors(returned) if any(_state([t]))]
        if self.found or not bad:
            return
        inputs = [f"gradient {described(t)}" for t in _tensors(given)]
        self.found = Finding(
            "backward", label[0], f"{label[1]} ({node})", described(bad[0]), inputs
        )


def described(tensor: Tensor) -> str:
    """Returns shape, type, counts of NaN and infinity and the range of the rest."""
    x = tensor.detach()
    counts = f"{int(x.isnan().sum())} NaN, {int(x.isinf().sum())} inf"
    rest = x[x.isfinite()]
    spread = f"{float(rest.min()):.4g} .. {float(rest.max()):.4g}" if rest.numel() else "none"
    kind = str(x.dtype).removeprefix("torch.")
    return f"{tuple(x.shape)} {kind}: {counts} of {x.numel()}, finite ones {spread}"


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the floating-point tensors of nested lists and tuples."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


def _state(tree: Any) -> tuple[bool, bool]:
    """Returns whether the tensors of ``tree`` have NaN, and infinity."""
    some = [t.detach() for t in _tensors(tree)]
    return any(bool(t.isnan().any()) for t in some), any(bool(t.isinf().any()) for t in some)


def _constants_are_finite(tree: Any) -> bool:
    if isinstance(tree, float):
        return math.isfinite(tree)
    return not isinstance(tree, (list, tuple)) or all(map(_constants_are_finite, tree))


def _broken(kind: str, tensors: dict[str, Tensor]) -> Finding | None:
    """Returns the first of ``tensors`` that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return Finding(kind, name, "", described(tensor))
    return None


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Returns the accumulated gradients of the parameters."""
    return {f"{n} (gradient)": p.grad for n, p in module.named_parameters() if p.grad is not None}


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else repr(loss)
