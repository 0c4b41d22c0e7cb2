"""``distributed-eg benchmarks`` and ``distributed-eg backbones``: what a run can be given by name."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from distributed_eg import given
from distributed_eg.benchmarks.catalog import listed
from distributed_eg.benchmarks.names import CHANGES
from distributed_eg.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BenchmarksOptions:
    """List the task sequences that have names, and whether their data are there."""

    data: str | None = None
    """Folder of torchvision's, MedMNIST's and the paper's datasets, to look for them in."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


@dataclass(frozen=True, kw_only=True)
class BackbonesOptions:
    """List the backbones that have names, and whether their default weights are at hand."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAMES")] = ()
    """Only these; each is built, to tell the size of its features, too."""
    image_size: int = 96
    """With NAMES: side of the images in pixels."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def benchmarks(options: Annotated[BenchmarksOptions, tyro.conf.OmitArgPrefixes]) -> None:
    """List the task sequences that have names: tasks, classes, images, licence, what must be where."""
    from distributed_eg.cli.display import Display

    data = None if options.data is None else given.path(options.data, "--data")
    if data is not None and not os.path.isdir(data):
        raise InputError(f"--data is {data!r}, and there is no such folder.")
    lines = listed(data)
    display = Display(to_stderr=options.json)
    display.benchmarks(lines)
    for kind, (_, makes) in CHANGES.items():
        display.say(f"{kind}:NAME makes {makes}; {kind}-N:NAME does it N times.")
    display.say("a+b+c makes one sequence of several.")
    if options.json:
        print(json.dumps({"benchmarks": [asdict(line) for line in lines]}))


def backbones(options: Annotated[BackbonesOptions, tyro.conf.OmitArgPrefixes]) -> None:
    """List the backbones that have names: parameters, default weights, and the size of the features of those named."""
    from distributed_eg.cli.display import Display
    from distributed_eg.method.backbone_list import listed_backbones, with_features

    size = given.whole(options.image_size, "--image-size", least=8)
    lines = listed_backbones(options.names)
    if options.names:
        lines = [with_features(line, size) for line in lines]
    Display(to_stderr=options.json).backbones(lines)
    if options.json:
        print(json.dumps({"backbones": [asdict(line) for line in lines]}))
