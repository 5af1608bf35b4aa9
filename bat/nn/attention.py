"""Gated self-attention on fused attention kernels (docs/method.md 2).

    out = proj( concat_heads(softmax(q k^T / sqrt(d)) v)  *  sigmoid(x W_G + b_G) )

The gate is computed from the block's input x, one value a channel. Without it this is the block of
EAT, SSLAM and data2vec 2.0. Parameter names are the paper's and timm's: ``qkv``, ``gate``,
``proj``; a test compares the module with ``timm.layers.Attention(gated=True)``. Queries, keys,
values and the gate are computed by one product over the joined weights, which stay two parameters.

``project`` and ``combine`` are the two halves of ``forward``: a decoder whose tokens are mostly
copies of each other projects each distinct one once (``nn/decoder.py``). ``at`` selects the tokens
whose outputs are computed; all tokens stay keys and values.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    sdpa_kernel,
)
from torch.torch_version import TorchVersion

from bat.errors import UserError
from bat.nn.blocked import blocked_attention

Backend = Literal["auto", "flash", "flash4", "cudnn", "sdpa", "eager"]
Kernel = Literal["package", "blocked", "sdpa", "not_cudnn", "flash", "flash4", "cudnn", "eager"]

_ALLOWED = {
    "not_cudnn": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "flash4": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
}
"""Kernels among which ``scaled_dot_product_attention`` chooses; ``sdpa``: among all."""
PACKAGES = ("flash_attn_interface", "flash_attn")
"""FlashAttention packages, newest first: version 3 (built from source), version 2 (``[flash]``)."""
CUDNN = 91501
"""Oldest cuDNN, as PyTorch numbers it, whose attention is right for any length on compute
capabilities 9 and 10: earlier ones are wrong for lengths not divisible by 128."""
FLASH4 = "4.0.0b19"
"""Newest flash-attn-4 whose forward returns two results, as many as PyTorch's hook unpacks
(``torch.nn.attention._fa4``); from 4.0.0b20 on it returns four."""


def find_flash() -> tuple[Callable[..., Tensor] | None, str]:
    """Returns ``flash_attn_func`` of the first package that has it, and the package's name and
    version."""
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):  # absent, or built for another torch
            continue
        if hasattr(module, "flash_attn_func"):  # a placeholder package of that name is empty
            return module.flash_attn_func, f"{name} {getattr(module, '__version__', '')}".strip()
    return None, ""


FLASH, FLASH_NAME = find_flash()


class Facts(NamedTuple):
    """The properties of a device and its software on which the choice of a kernel depends."""

    device: str
    """``cpu``, ``cuda`` (also AMD's) or another type."""
    capability: int = 0
    """Major compute capability of an NVIDIA GPU: 9 Hopper, 10 Blackwell; else 0."""
    cudnn: int = 0
    """The *loaded* cuDNN as PyTorch numbers it (91501 is 9.15.1), which is not the installed one if
    ``LD_LIBRARY_PATH`` names another; 0: none."""
    package: str = ""
    """FlashAttention package with its version; empty: none is installed."""
    flash4: str = ""
    """Version of flash-attn-4; empty: not installed."""

    @property
    def wrong_cudnn(self) -> bool:
        """True if cuDNN's attention is wrong for lengths that are not divisible by 128."""
        return self.capability in (9, 10) and self.cudnn < CUDNN


@functools.cache
def facts_of(device: torch.device) -> Facts:
    """Returns the facts of ``device``."""
    if device.type != "cuda" or torch.version.hip:
        return Facts(device.type, package=FLASH_NAME)
    try:
        flash4 = version("flash-attn-4")
    except PackageNotFoundError:
        flash4 = ""
    cudnn = torch.backends.cudnn.version() or 0
    return Facts("cuda", torch.cuda.get_device_capability(device)[0], cudnn, FLASH_NAME, flash4)


def choose(backend: Backend, facts: Facts, dtype: torch.dtype, head_width: int) -> Kernel:
    """Returns the kernel that ``backend`` selects for tensors of this kind.

    On compute capabilities 9 and 10 ``auto`` is PyTorch's choice, which prefers cuDNN there, or
    with a cuDNN older than ``CUDNN`` the FlashAttention package, else PyTorch's choice without
    cuDNN. On other GPUs it is the package if installed and applicable (16 bits), on a CPU in
    bfloat16 the blocked kernel, else PyTorch's choice. ``flash``: the package, else PyTorch's
    FlashAttention, which raises an error if it does not apply, as ``cudnn`` does. ``flash4``: the
    package flash-attn-4 in place of PyTorch's FlashAttention, for the whole process.

    Raises ``UserError`` for ``cudnn`` where it would be wrong (``Facts.wrong_cudnn``: lengths are
    not known here) and for ``flash4`` where it does not apply.
    """
    fits = dtype in (torch.float16, torch.bfloat16) and head_width % 8 == 0 and head_width <= 256
    package = fits and facts.device == "cuda" and facts.package != ""
    if backend == "flash4":
        _check_flash4(facts, dtype, head_width)
    if backend == "cudnn" and facts.wrong_cudnn:
        raise UserError(
            f"attention=cudnn: cuDNN {cudnn_version(facts.cudnn)} is loaded, which is wrong for "
            f"lengths not divisible by 128 (right from {cudnn_version(CUDNN)} on): say "
            "attention=auto, or let PyTorch find its own cuDNN (LD_LIBRARY_PATH may name another)"
        )
    cudnn = facts.capability in (9, 10) and not facts.wrong_cudnn  # PyTorch prefers it, and it fits
    if package and (backend == "flash" or (backend == "auto" and not cudnn)):
        return "package"
    if backend != "auto" and backend != "sdpa":
        return backend
    if backend == "auto" and facts.device == "cpu" and dtype == torch.bfloat16:
        return "blocked"
    return "not_cudnn" if facts.wrong_cudnn else "sdpa"


def _check_flash4(facts: Facts, dtype: torch.dtype, head_width: int) -> None:
    """Raises ``UserError`` naming all reasons for which flash-attn-4 does not apply."""
    problems = []
    if facts.capability not in (9, 10):
        problems.append(
            f"it needs a GPU of compute capability 9 or 10, not {facts.device}"
            + f" {facts.capability}" * bool(facts.capability)
        )
    if not facts.flash4:
        problems.append(f"flash-attn-4 is not installed: pip install flash-attn-4=={FLASH4}")
    elif TorchVersion(facts.flash4) > FLASH4:
        problems.append(
            f"flash-attn-4 {facts.flash4} returns more than the two results that PyTorch's hook "
            f"unpacks: pip install flash-attn-4=={FLASH4}"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        problems.append(f"it computes in 16 bits, not {dtype}: say hardware.precision=bf16-mixed")
    if head_width % 8 or head_width > 128:
        problems.append(
            f"{head_width} channels a head are no multiple of 8 up to 128: choose model.heads"
        )
    if problems:
        raise UserError(f"attention=flash4: {'; '.join(problems)}; or say attention=auto")


def cudnn_version(number: int) -> str:
    """Formats PyTorch's number of a cuDNN: 91501 is 9.15.1, 8902 is 8.9.2."""
    size = 10_000 if number >= 90_000 else 1000
    return f"{number // size}.{number % size // 100}.{number % 100}" if number else "none"


def describe(backend: Backend, facts: Facts, dtype: torch.dtype, head_width: int) -> str:
    """Returns the result of ``choose`` in words, with versions, for a run's log."""
    said = {
        "package": f"FlashAttention ({facts.package})",
        "blocked": "a few heads at a time (bat.nn.blocked)",
        "sdpa": "PyTorch's scaled_dot_product_attention",
        "not_cudnn": "PyTorch's scaled_dot_product_attention without cuDNN, which is too old",
        "flash": "PyTorch's FlashAttention, nothing else",
        "flash4": f"FlashAttention 4 (flash-attn-4 {facts.flash4})",
        "cudnn": "cuDNN's, nothing else",
        "eager": "matmul, softmax, matmul",
    }[choose(backend, facts, dtype, head_width)]
    if facts.device != "cuda":
        return said
    more = "" if facts.package else ", no flash_attn package here"
    return f"{said}; torch {torch.__version__}, cuDNN {cudnn_version(facts.cudnn)}{more}"


@torch.compiler.assume_constant_result
def _kernel(backend: Backend, device: torch.device, dtype: torch.dtype, head_width: int) -> Kernel:
    """Returns the kernel for tensors on ``device``; makes flash-attn-4 PyTorch's FlashAttention."""
    kernel = choose(backend, facts_of(device), dtype, head_width)
    if kernel == "flash4" and current_flash_attention_impl() != "FA4":
        activate_flash_attention_impl("FA4")
    return kernel


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Computes ``softmax(q k^T / sqrt(d)) v``: (B, H, m, d) queries, (B, H, n, d) keys and values.

    ``backend``: see ``choose``; ``eager`` is matmul-softmax-matmul.
    """
    kernel = _kernel(backend, q.device, q.dtype, q.shape[-1])
    if kernel == "package":
        assert FLASH is not None
        out = FLASH(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, m, H, d)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
    if kernel == "blocked":
        blocked: Tensor = blocked_attention(q, k, v)
        return blocked
    if kernel == "eager":
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return weights @ v
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    try:
        with sdpa_kernel(_ALLOWED[kernel]):
            return F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise UserError(
            f"attention={backend} cannot run here: {q.dtype} of {q.shape[-1]} channels a head on "
            f"{q.device.type}; say attention=auto"
        ) from error


class Attention(nn.Module):
    """Multi-head self-attention with an elementwise gate before the output projection."""

    def __init__(
        self, width: int, heads: int, *, gate: bool = True, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        if backend not in get_args(Backend):
            known = ", ".join(get_args(Backend))
            raise ValueError(f"unknown attention backend '{backend}'. Known: {known}")
        self.heads = heads
        self.backend: Backend = backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gate = nn.Linear(width, width) if gate else None

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """Maps (B, n, D) to (B, n, D), or to (B, m, D) for the token ids ``at`` (B, m)."""
        if at is None:
            return self.combine(self.project(x))
        D = x.shape[-1]
        # keys and values of all tokens; queries and gates of the selected ones
        kv = self._linear(x, [(self.qkv, slice(D, None))])  # (B, n, 2 D)
        own = [(self.qkv, slice(0, D))] + ([(self.gate, slice(None))] if self.gate else [])
        q, *gate = self._linear(take(x, at), own).split(D, dim=-1)  # (B, m, D) each
        return self._mix(q, *kv.split(D, dim=-1), *gate)

    def project(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., 4 D): queries, keys, values and gates before the sigmoid
        (3 D without a gate), for each token."""
        parts = [self.qkv, *([self.gate] if self.gate is not None else [])]
        return self._linear(x, [(part, slice(None)) for part in parts])

    def combine(self, projected: Tensor) -> Tensor:
        """Maps the result of ``project`` for all tokens, (B, n, 4 D), to (B, n, D)."""
        D = self.proj.in_features
        return self._mix(*projected.split(D, dim=-1))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v, self.backend).transpose(1, 2).flatten(2)  # (B, m, D)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.proj(out)

    @staticmethod
    def _linear(x: Tensor, parts: list[tuple[nn.Linear, slice]]) -> Tensor:
        """Applies rows of several layers as one product, as if they were one layer."""
        if len(parts) == 1 and parts[0][1] == slice(None):
            return parts[0][0](x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = torch.cat([layer.weight[rows].to(dtype) for layer, rows in parts])
        bias = torch.cat([layer.bias[rows].to(dtype) for layer, rows in parts])
        return F.linear(x, weight, bias)


def take(x: Tensor, at: Tensor) -> Tensor:
    """Gathers rows of each item: (B, n, D), ids (B, m) -> (B, m, D)."""
    return x.flatten(0, 1).index_select(0, flat_ids(at, x.shape[1])).view(*at.shape, -1)


def flat_ids(at: Tensor, n: int) -> Tensor:
    """Maps ids (B, m) within items of ``n`` rows to ids (B m) of the rows of all items."""
    return (at + n * torch.arange(at.shape[0], device=at.device)[:, None]).flatten()
