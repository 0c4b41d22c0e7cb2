"""``distributed-eg eval``: what a run answers on a task sequence's test images, without training anything."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from distributed_eg import given
from distributed_eg.cli.options import BenchmarkOptions, WorkerOptions, folder_name, open_run, optional
from distributed_eg.cli.outcome import outcome_of
from distributed_eg.errors import InputError

if TYPE_CHECKING:
    from distributed_eg.benchmarks.benchmark import Benchmark
    from distributed_eg.store.registry import Registry


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is asked of which run."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory: a path, or any pyarrow.fs URI."""
    data: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    cluster: WorkerOptions = field(default_factory=WorkerOptions)
    seed: Annotated[int | None, optional("SEED")] = None
    """Seed of which images are drawn; the run's own where not given."""
    save_images: Annotated[str | None, optional("DIR")] = None
    """Also write the test images into this folder, as PNG files in a folder a class: what predict can be tried on."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def evaluate(options: Annotated[EvalOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> None:
    """Route a task sequence's test images with a run that is there, on worker actors."""
    from distributed_eg.cli.display import Display
    from distributed_eg.store.registry import Registry
    from distributed_eg.store.storage import Storage

    options.data.check()
    folder = None if options.save_images is None else Path(given.path(options.save_images, "--save-images"))
    display = Display(to_stderr=options.json)
    with open_run(options.run, options.cluster) as strategy:
        seed = strategy.method.seed if options.seed is None else options.seed
        benchmark = options.data.make(strategy.model.shape[1], seed)
        if folder is not None and benchmark.transform is None:
            raise InputError(f"--save-images cannot be had: {benchmark.name} does not say what its images go through.")
        if benchmark.shape != strategy.model.shape:
            raise InputError(
                f"The run takes images of shape {strategy.model.shape}, {benchmark.name} has {benchmark.shape}."
            )
        _require_known(benchmark, Registry.read(Storage(options.run)))
        if folder is not None:
            _make(folder)
        started = time.perf_counter()
        with display.evaluating():
            metrics = strategy.eval(benchmark.scenario.streams["test"])
        outcome = outcome_of(strategy, metrics, benchmark, 0.0, time.perf_counter() - started)
    display.table(outcome)
    if folder is not None:
        display.say(f"{_save_images(benchmark, folder)} test images are in {folder}.")
    if options.json:
        print(json.dumps(asdict(outcome)))


def _require_known(benchmark: Benchmark, registry: Registry) -> None:
    """Every task of the sequence is one of the run's, with the same classes under the same ids.

    Raises:
        InputError: it is not.
    """
    known = {m.label: registry.arrivals[m.task].names for m in registry.newest.values()}
    if missing := sorted(set(benchmark.labels) - known.keys()):
        raise InputError(
            f"The run has no tasks with the labels {missing}: give those that it has (--tasks, --first-label, "
            "--first-class); `distributed-eg tasks` lists them."
        )
    for label, experience in zip(benchmark.labels, benchmark.scenario.streams["test"], strict=True):
        names = known[label]
        here = {int(c): benchmark.class_names[int(c)] for c in experience.dataset.targets.uniques}
        if any(c not in names or (None not in (name, names[c]) and name != names[c]) for c, name in here.items()):
            raise InputError(
                f"The task with the label {label} has the classes {_told(names)} in the run, and {_told(here)} in "
                f"{benchmark.name}: give what the run was trained on (--benchmark, --classes-per-task, --order-seed, "
                "--first-class)."
            )


def _told(names: Mapping[int, str | None]) -> str:
    return ", ".join(f"{c} {name or ''}".rstrip() for c, name in sorted(names.items()))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--save-images: the folder {folder} cannot be made: {error.strerror}.") from error


def _save_images(benchmark: Benchmark, folder: Path) -> int:
    """Write the test images, and return how many.

    Raises:
        InputError: they do not come back as they were: the benchmark's transform is not the one they went through.
    """
    import torch
    from torchvision.transforms.functional import to_pil_image

    from distributed_eg.benchmarks.benchmark import IMAGENET_MEAN, IMAGENET_STD
    from distributed_eg.method.image_transform import ImageReader, transform_as_data

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    reader = ImageReader(transform_as_data(benchmark.transform, "RGB"), benchmark.shape)
    count = 0
    for experience in benchmark.scenario.streams["test"]:
        for image, target, *_ in experience.dataset:
            pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            file = folder / folder_name(benchmark.class_names[int(target)] or str(int(target))) / f"{count:06d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(pixels).save(file)
            if not torch.equal(reader.open(file), image):
                raise InputError(f"{file} does not hold the image that was evaluated.")
            count += 1
    return count
