"""`reproducible`: what runs inside depends on the seed only, and the caller notices nothing."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_eg import ExpertGate
from distributed_eg.errors import InputError
from distributed_eg.runtime.determinism import (
    CUBLAS,
    _pooling_instead_of,
    _require_one_order,
    pool_by_products,
    reproducible,
)
from tests.helpers import SHAPE, tiny_net


def state() -> tuple[Any, ...]:
    """Everything that must be as before."""
    name, keys, *rest = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        (name, np.asarray(keys).tolist(), *rest),
        random.getstate(),
        torch.get_num_threads(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def draw() -> tuple[list[float], list[float], list[float]]:
    """Some numbers from each generator."""
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


@pytest.fixture(autouse=True)
def _unusual_caller() -> Iterator[None]:
    """A caller whose settings are none of the defaults; all put back for the other tests."""
    threads = torch.get_num_threads()
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(2)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    draw()
    np.random.standard_normal()  # leaves a cached second value in the state
    random.gauss(0, 1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_every_generator_starts_from_the_seed(seed: int) -> None:
    with reproducible(seed, 1):
        first = draw()
    draw()
    with reproducible(seed, 1):
        assert draw() == first
    with reproducible(seed ^ 1, 1):
        other = draw()
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_kernels_are_the_runs_inside(threads: int) -> None:
    with reproducible(0, threads):
        assert torch.get_num_threads() == threads
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == 2


def test_the_caller_notices_nothing() -> None:
    before = state()
    with reproducible(5, 1):
        draw()
        torch.manual_seed(1)
        torch.set_num_threads(4)
        torch.backends.cudnn.benchmark = True
    assert state() == before


@pytest.mark.parametrize("error", [ValueError("diverged"), KeyboardInterrupt()], ids=repr)
def test_the_caller_notices_nothing_after_an_error_either(error: BaseException) -> None:

    def stage() -> None:
        with reproducible(5, 1):
            draw()
            raise error

    before = state()
    with pytest.raises(type(error)) as caught:
        stage()
    assert caught.value is error
    assert state() == before


def test_a_refused_number_of_threads_changes_nothing() -> None:
    before = state()
    with pytest.raises(RuntimeError), reproducible(5, 0):
        raise AssertionError("torch takes no 0 threads")
    assert state() == before


def test_what_the_caller_draws_is_the_same_with_and_without_a_stage_between() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = draw(), draw()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    first = draw()
    with reproducible(9, 1):
        draw()
    assert (first, draw()) == expected


def test_blocks_nest() -> None:
    with reproducible(1, 1):
        draw()
        expected = draw()
    with reproducible(1, 1):
        draw()
        with reproducible(2, 3):
            draw()
        assert torch.get_num_threads() == 1
        assert draw() == expected


def settings() -> tuple[Any, ...]:
    """What a caller may have set, and what decides about bits."""
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )


@pytest.fixture
def _other_settings() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("said", ["by the older names", "by the newer names"])
@pytest.mark.usefixtures("_other_settings")
def test_precision_that_was_said_in_either_way_comes_back(said: str) -> None:
    """torch refuses to read by one what was set by the other."""
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    if said == "by the newer names":
        if not newer:
            pytest.skip(f"torch {torch.__version__} has the older names only")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = torch.backends.cuda.matmul.fp32_precision if newer else torch.get_float32_matmul_precision()
    with reproducible(0, 1):
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.allow_tf32
    assert before == (torch.backends.cuda.matmul.fp32_precision if newer else torch.get_float32_matmul_precision())


@pytest.mark.usefixtures("_other_settings")
def test_inside_torch_is_as_it_is_by_default() -> None:
    before = settings()
    with reproducible(0, 1):
        made = torch.ones(2)
        assert made.dtype is torch.float32
        assert made.device.type == "cpu"
        assert not torch.are_deterministic_algorithms_enabled(), "which changes kernels on CPUs, too"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not _uses_bfloat16()
    assert settings() == before


def _uses_bfloat16() -> bool:
    """Whether products of float32 are rounded to bfloat16 on the way, where this CPU can."""
    x = torch.full((64, 64), 1 + 2**-12)
    return bool((x @ x - 64 * (1 + 2**-12) ** 2).abs().max() > 1e-3)


def test_no_card_is_seeded_where_the_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would put its generator back: what the caller draws there later would be another number."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with reproducible(1, 1):
        pass
    assert seeded == []


def test_a_process_that_multiplied_on_a_card_before_its_order_was_settled_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch looks at the variable once: set later, it does nothing, and every product in a stage would raise."""

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("Deterministic behavior was enabled ... you must set CUBLAS_WORKSPACE_CONFIG=:4096:8")

    name, value = CUBLAS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(name, raising=False)
    require, device = _require_one_order.__wrapped__, torch.device("cpu")
    require(device)
    assert os.environ[name] == value
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", refuse)
        with pytest.raises(InputError, match=f"multiplied .* before {name} was set"):
            require(device)
    monkeypatch.setenv(name, ":16:8")
    with pytest.raises(InputError, match="':16:8' in this process"):
        require(device)


def test_a_model_settles_the_order_of_sums_before_its_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = CUBLAS
    monkeypatch.delenv(name, raising=False)
    ExpertGate(SHAPE, arch=tiny_net())
    assert name not in os.environ  # nothing computes on a card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ExpertGate(SHAPE, arch=tiny_net())
    assert os.environ[name] == value
    monkeypatch.delenv(name)


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (13, 9), (1, 4), (3, None)])
@pytest.mark.parametrize("shape", [(2, 3, 13, 9), (3, 6, 6), (1, 2, 4, 17)])
def test_pooling_by_products_is_torchs(shape: tuple[int, ...], size: tuple[int, int | None]) -> None:
    """Values and gradients; float64, so that the order of a sum of at most 221 values is below 1e-12."""
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours, theirs = pool_by_products(images, size), F.adaptive_avg_pool2d(images, size)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((pooled * weights).sum(), images)[0] for pooled in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


class _Seen(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Of torch's list of operations that have no deterministic kernel on a card, those that networks for images use.
_WITHOUT_KERNEL = re.compile(
    r"_?adaptive_avg_pool[23]d_backward|adaptive_max_pool2d_backward|fractional_max_pool\dd_backward|"
    r"max_pool3d_with_indices_backward|avg_pool3d_backward|max_unpool\dd|reflection_pad\dd_backward|"
    r"replication_pad\dd_backward|upsample_.*_backward|grid_sampler_\dd_backward|cumsum|kthvalue|median|put|histc"
)


@pytest.mark.parametrize(
    "arch",
    [
        *("alexnet", "vgg11_bn", "resnet18", "squeezenet1_1", "densenet121", "googlenet", "inception_v3"),
        *("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0"),
        *("convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"),
    ],
)
def test_networks_of_torchvision_learn_by_deterministic_kernels(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each family, without values: what runs in a training step has a deterministic kernel on a card."""
    monkeypatch.setattr(F, "adaptive_avg_pool2d", _pooling_instead_of(F.adaptive_avg_pool2d, lambda _images: True))
    side = 299 if arch == "inception_v3" else 224
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
        network = torchvision.models.get_model(arch, weights=None, **options).train()
        images = torch.empty(2, 3, side, side)
        with _Seen() as seen:
            answer = network(images)
            answer = getattr(answer, "logits", answer)
            answer.sum().backward()
    assert any("backward" in name for name in seen.names)
    assert [name for name in seen.names if _WITHOUT_KERNEL.fullmatch(name)] == []
