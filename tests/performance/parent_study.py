"""Prints which way of choosing a parent gives small tasks the better expert: residual, shared distance, chance, none.

    python tests/performance/parent_study.py --data ../shared/data --seeds 0 1 2

Ten tasks of MNIST and Fashion-MNIST at 64×64, EfficientNet-Lite0. The first seven have 400 training images; their
experts are the parents. Of each of the last three an expert is fine-tuned from every parent, and from the root, with
20, 50 and 100 images, a tenth of which is held out and tells the relatedness, as in a run. One JSON line a size:
accuracy on 200 test images a task, by who chose the parent, the mean over tasks and seeds and each seed's; "chance" is
the mean over the parents, "best" the parent that test images would choose.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections import defaultdict

import torch
from gate_figures import Task, autoencoders_of, extracted, summaries_of
from torch import Tensor, nn

from distributed_eg import ExpertGate, make_benchmark
from distributed_eg.method.expert import derive_expert, freeze_norm, logits_of
from distributed_eg.method.linear_autoencoder import LinearStack
from distributed_eg.method.shared_score import SharedStack
from distributed_eg.method.standardize import compute_statistics, standardize

SIZES = (20, 50, 100)
NUM_PARENTS = 7
_STEPS = 60
"""Of batches of 16 and momentum 0.9, as the command trains 400 images; fewer images are seen as often."""


def images_of(dataset: object) -> tuple[Tensor, Tensor]:
    """All images, and their class ids from 0."""
    rows = [dataset[i][:2] for i in range(len(dataset))]  # type: ignore[index,arg-type]
    classes = torch.tensor([int(label) for _, label in rows])
    return torch.stack([image for image, _ in rows]), classes.unique(return_inverse=True)[1]


def fine_tuned(start: nn.Module, head: str, images: Tensor, classes: Tensor, seed: int) -> nn.Module:
    """An expert from ``start``, trained as the command line's runs are."""
    expert = derive_expert(start, head, 2, seed)
    expert.train()
    freeze_norm(expert)
    optimizer = torch.optim.SGD(expert.parameters(), lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        rows = torch.randint(len(images), (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_of(expert, images[rows]), classes[rows]).backward()
        optimizer.step()
    return expert.eval()


@torch.no_grad()
def accuracy(expert: nn.Module, images: Tensor, classes: Tensor) -> float:
    """On test images."""
    right = [(logits_of(expert, x).argmax(1) == y) for x, y in zip(images.split(50), classes.split(50), strict=True)]
    return float(torch.cat(right).double().mean())


@torch.no_grad()
def choices(tasks: list[Task], mine: Task) -> dict[str, int]:
    """The parent that each score chooses, by the held-out images of a task."""
    x = mine.valid[0]
    shared = SharedStack(summaries_of([mine, *tasks])).errors(x).double().mean(0)[1:]
    return {
        "residual": int(LinearStack(autoencoders_of(tasks)).errors(x).double().mean(0).argmin()),
        "shared": int(shared.argmin()),
    }


def study(model: ExpertGate, data: str, seed: int) -> dict[int, list[dict[str, float]]]:
    """Accuracies by size, of each small task."""
    scenario = make_benchmark(
        "split-mnist+fashion", data=data, image_size=64, train_per_task=400, test_per_task=200, seed=seed
    ).scenario
    root, head = model.expert, model.head
    raw = [extracted(model, experience.dataset) for experience in scenario.train_stream]
    standard = compute_statistics([raw[0][0]])
    parents, known = [], []
    for place, experience in enumerate(scenario.train_stream):
        if place < NUM_PARENTS:
            parents.append(fine_tuned(root, head, *images_of(experience.dataset), seed))
            x, y = standardize(raw[place][0], standard), raw[place][1]
            known.append(Task((x, y), (x, y), (x, y)))
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    for place in range(NUM_PARENTS, len(raw)):
        images, classes = images_of(scenario.train_stream[place].dataset)
        test = images_of(scenario.test_stream[place].dataset)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        x, y = standardize(raw[place][0], standard), raw[place][1]
        for size in SIZES:
            held, used = order[: size // 10], order[size // 10 : size]
            mine = Task((x[used], y[used]), (x[held], y[held]), (x[held], y[held]))
            experts = (fine_tuned(start, head, images[used], classes[used], seed) for start in (root, *parents))
            of_each = [accuracy(expert, *test) for expert in experts]
            row = {name: of_each[1 + parent] for name, parent in choices(known, mine).items()}
            row |= {"chance": statistics.mean(of_each[1:]), "root": of_each[0], "best": max(of_each[1:])}
            found[size].append(row)
    return found


def main() -> None:
    """Every seed, then a line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    model = ExpertGate((3, 64, 64), arch="efficientnet_lite0", pretrained_flag=True)
    by_seed = [study(model, options.data, seed) for seed in options.seeds]
    for size in SIZES:
        told: dict[str, object] = {"images": size}
        for chooser in ("residual", "shared", "chance", "root", "best"):
            means = [statistics.mean(row[chooser] for row in found[size]) for found in by_seed]
            told |= {chooser: round(statistics.mean(means), 4), f"{chooser}_by_seed": [round(m, 3) for m in means]}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
