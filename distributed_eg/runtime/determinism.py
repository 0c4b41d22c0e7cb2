"""What makes a stage give the same bytes anywhere: seeds, threads, deterministic kernels, torch's own defaults; all put
back after."""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_eg.errors import InputError
from distributed_eg.method.head import own_draws

CUBLAS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""A variable, and its value with which cuBLAS sums in one order; torch looks at it once, before the first product."""


def settle_cublas() -> None:
    """Have cuBLAS sum in one order, where this process may compute on a card and nobody has said anything else."""
    if torch.cuda.is_available():
        os.environ.setdefault(*CUBLAS)


def told_of(device: torch.device) -> str:
    """What kind of processor a device is, as far as it decides about bytes, in one line."""
    if device.type != "cuda":
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    card = torch.cuda.get_device_properties(device)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{card.name} ({card.major}.{card.minor}), {runtime}, cuDNN {torch.backends.cudnn.version()}"


@contextmanager
def reproducible(seed: int, threads: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run the block under ``seed`` and ``threads``; the caller's generators, threads and flags are restored.

    Inside, torch is as it is by default, whatever the caller has set: the default type and device, the precision of
    float32. On a card, operations that have no deterministic kernel raise, but for pooling to a size, which gets one.
    """
    device = torch.device(device)
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.init()  # else what is seeded here would be seeded later, outside
    saved_python, saved_numpy = random.getstate(), np.random.get_state()
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_draws(device))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(random.setstate, saved_python)
        stack.callback(np.random.set_state, saved_numpy)
        for owner, name, value in _flags():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.enter_context(_default_precision())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        stack.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
        torch.use_deterministic_algorithms(on_card)
        torch.set_num_threads(threads)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds cards that nobody puts back
        np.random.seed(seed % 2**32)
        random.seed(seed)
        if on_card:
            stack.enter_context(_on_card(device, seed))
        yield


def _flags() -> list[tuple[Any, str, object]]:
    """Attributes of torch that decide about bits, with the values that they have inside."""
    return [
        (torch.backends.cudnn, "enabled", True),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),  # it only takes time
    ]


@contextmanager
def _default_precision() -> Iterator[None]:
    """Products of float32 in float32, convolutions of cuDNN in TF32: torch's defaults. From torch 2.9 on there are two
    ways to say it, and what was said in one cannot always be read in the other: both are put back, the newer one last.
    """
    backends: Any = torch.backends
    owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    owners += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    newer = [(owner, owner.fp32_precision) for owner in owners if hasattr(owner, "fp32_precision")]
    matmul = cudnn = None
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        cudnn = backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for owner, _ in newer[4:]:  # of CPUs, which the older way does not know
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            backends.cudnn.allow_tf32 = cudnn
        for owner, precision in newer:
            owner.fp32_precision = precision


@contextmanager
def _on_card(device: torch.device, seed: int) -> Iterator[None]:
    """What only a card needs: its own seed, sums of cuBLAS in one order, pooling whose gradient is."""
    pool, settings = F.adaptive_avg_pool2d, torch.backends.cuda
    preferred = settings.preferred_linalg_library(), settings.preferred_blas_library()
    with torch.cuda.device(device):
        _require_one_order(device)
        torch.cuda.manual_seed(seed)
        settings.preferred_linalg_library("default")
        settings.preferred_blas_library("default")
        setattr(F, "adaptive_avg_pool2d", _pooling_instead_of(pool))  # noqa: B010 - no variable to the type checker
        try:
            yield
        finally:
            setattr(F, "adaptive_avg_pool2d", pool)  # noqa: B010
            settings.preferred_linalg_library(preferred[0])
            settings.preferred_blas_library(preferred[1])


@functools.cache  # what torch found at the first product holds as long as the process
def _require_one_order(device: torch.device) -> None:
    """Refuse a process that multiplied on a card before it was settled how.

    Raises:
        InputError: it did, or somebody has settled it otherwise.
    """
    settle_cublas()
    name, value = CUBLAS
    if os.environ[name] != value:
        raise InputError(
            f"{name} is {os.environ[name]!r} in this process. Workers compute under {value!r}, and another workspace "
            "gives other bytes: unset it."
        )
    one = torch.ones(1, 1, device=device)
    try:
        torch.mm(one, one)
    except RuntimeError as error:
        if name not in str(error):
            raise
        raise InputError(
            f"This process has multiplied on {device} before {name} was set, which torch looks at once: its sums come "
            f"in any order now. Set {name}={value} before the process starts, or make the ExpertGate first."
        ) from error


def _pooling_instead_of(
    pool: Callable[..., Tensor], is_on_card: Callable[[Tensor], bool] = attrgetter("is_cuda")
) -> Callable[..., Tensor]:
    """``pool``, but for what it does on a card, where its gradient is summed in any order."""

    def pooled(input: Tensor, output_size: Any) -> Tensor:
        return pool_by_products(input, output_size) if is_on_card(input) else pool(input, output_size)

    return pooled


def pool_by_products(images: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """Adaptive average pooling of (…, height, width) as two matrix products, whose gradients are deterministic."""
    wanted = (output_size, output_size) if isinstance(output_size, int) else output_size
    sizes = [side if size is None else size for size, side in zip(wanted, images.shape[-2:], strict=True)]
    kept = [_averages(n, size, images.device, images.dtype) for n, size in zip(images.shape[-2:], sizes, strict=True)]
    return kept[0] @ images @ kept[1].T


@functools.lru_cache(maxsize=64)  # a copy to the card for each batch would wait for it
def _averages(side: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size, side): each row takes the mean over its part of a side, as torch cuts it."""
    with torch.inference_mode(False):
        matrix = torch.zeros(size, side, dtype=torch.float64)
        for i in range(size):
            first, last = i * side // size, -(-(i + 1) * side // size)
            matrix[i, first:last] = 1 / (last - first)
        return matrix.to(device, dtype)
