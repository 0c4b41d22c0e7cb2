"""What makes a stage give the same bytes anywhere: seeds, threads, deterministic kernels; all put back after."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Run the block under ``seed`` and ``threads``; the caller's generators, threads and flags are restored."""
    saved_threads = torch.get_num_threads()
    saved_python, saved_numpy = random.getstate(), np.random.get_state()
    saved_cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    saved_kernels = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.set_num_threads(threads)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            if torch.cuda.is_available():
                torch.use_deterministic_algorithms(True, warn_only=True)
            # Without an accelerator torch.manual_seed notes for CUDA, each time, the whole stack that it came from.
            (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            torch.set_num_threads(saved_threads)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = saved_cudnn
            torch.use_deterministic_algorithms(saved_kernels[0], warn_only=saved_kernels[1])
            random.setstate(saved_python)
            np.random.set_state(saved_numpy)
