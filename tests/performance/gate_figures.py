"""Prints how often gates are right on ten tasks of MNIST and Fashion-MNIST: ours, and others on the same features.

    python tests/performance/gate_figures.py --data ../shared/data --seeds 0 1 2 3 4 --sizes equal mixed
    python tests/performance/gate_figures.py --data ../shared/data --arch resnet18 --random-weights

Two classes a task, 400 training and 200 test images a task at 96×96; mixed: every other pair of tasks has 40 training
images. As a run does it, a tenth of the training images is held out, and the first task's features standardize all.
Experts do not take part. One JSON line for each method and sizes, over the seeds of the split.

Methods: residual (the paper's score; linear autoencoders of 50 units), shared, the same with as few directions of
scatter a task as 128 MiB leave to each of 100 and of 1,000 tasks of 11,520 features, nearest class mean, streaming LDA
(one covariance over all images; Hayes & Kanan 2020), mahalanobis (a covariance a task), and two that keep all images: a
linear classifier and one with a hidden layer of 256 units. Nothing was chosen by looking at test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distributed_eg import ExpertGate, make_benchmark
from distributed_eg.method.backbone import features_at
from distributed_eg.method.calibration import calibrate, hold_out
from distributed_eg.method.linear_autoencoder import LinearAutoencoder, LinearStack, fit_linear
from distributed_eg.method.shared_score import SharedStack
from distributed_eg.method.standardize import compute_statistics, standardize
from distributed_eg.method.summary import TaskSummary, fit_summary

# The tasks of the two datasets alternate: each dataset has small and large ones.
SIZES = {"equal": [400] * 10, "mixed": [40, 40, 400, 400, 40, 40, 400, 400, 40, 40]}
Score = Callable[[Tensor], Tensor]
"""Standardized features (n, num_features) to errors (n, tasks)."""


@dataclass(frozen=True)
class Task:
    """Standardized features, each with its class ids."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@torch.inference_mode()
def extracted(model: ExpertGate, dataset: object) -> tuple[Tensor, Tensor]:
    """Raw features of a dataset, and its class ids."""
    batches = DataLoader(dataset, batch_size=32)  # type: ignore[arg-type]
    parts = [(features_at(model.expert, model.output_layer_name, x).flatten(1), y) for x, y, *_ in batches]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def tasks_of(model: ExpertGate, data: str, sizes: list[int], seed: int) -> list[Task]:
    """All tasks of one split."""
    benchmark = make_benchmark(
        "split-mnist+fashion", data=data, image_size=96, train_per_task=sizes, test_per_task=200, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    raw = []
    for of_train, of_test in zip(benchmark.scenario.train_stream, benchmark.scenario.test_stream, strict=True):
        x, y = extracted(model, of_train.dataset)
        order = torch.randperm(len(x), generator=generator)
        held, used = order[: len(x) // 10], order[len(x) // 10 :]
        raw.append(((x[used], y[used]), (x[held], y[held]), extracted(model, of_test.dataset)))
    statistics = compute_statistics([raw[0][0][0]])
    return [Task(*((standardize(x, statistics), y) for x, y in parts)) for parts in raw]


def autoencoders_of(tasks: list[Task]) -> list[LinearAutoencoder]:
    """Each task's."""
    return [fit_linear(task.train[0].split, 50) for task in tasks]


def summaries_of(tasks: list[Task]) -> list[TaskSummary]:
    """Each task's."""
    return [fit_summary(task.train[0].split, task.train[1]) for task in tasks]


def by_class(tasks: list[Task], distances: Callable[[Tensor], Tensor]) -> Score:
    """Errors by task of distances to all classes, in their order."""
    sizes = [len(task.train[1].unique()) for task in tasks]
    return lambda x: torch.stack([part.amin(1) for part in distances(x).split(sizes, dim=1)], dim=1)


def class_means(tasks: list[Task]) -> Tensor:
    """Of all classes, in order."""
    return torch.cat([s.means for s in summaries_of(tasks)])


def centred(task: Task) -> Tensor:
    """Training features around their class means."""
    x, y = task.train
    return torch.cat([x[y == c] - x[y == c].mean(0) for c in y.unique()])


def nearest_mean(tasks: list[Task]) -> Score:
    """Nearest class mean."""
    means = class_means(tasks)
    return by_class(tasks, lambda x: torch.cdist(x, means).square())


def inverse_times(rows: Tensor, ridge: float, right: Tensor) -> Tensor:
    """The inverse of the covariance of centred ``rows``, with ``ridge`` of its mean variance added, times ``right``."""
    load = (ridge * rows.square().sum() / rows.shape[1]).double()
    inner = (rows @ rows.T).double() + load * torch.eye(len(rows), dtype=torch.float64)
    seen = torch.linalg.solve(inner, (rows @ right).double())
    return (len(rows) * (right.double() - rows.T.double() @ seen) / load).float()


def streaming_lda(tasks: list[Task]) -> Score:
    """Its covariance is that of all images so far, whatever their order; shrinkage 1e-4, as in its authors' code."""
    rows, means = torch.cat([centred(task) for task in tasks]), class_means(tasks)
    weights = inverse_times(rows, 1e-4, means.T)
    biases = (means.T * weights).sum(0)
    return by_class(tasks, lambda x: biases - 2 * x @ weights)


def mahalanobis(tasks: list[Task]) -> Score:
    """Each task's own covariance around its mean, with half of its mean variance added."""
    parts = [(task.train[0] - task.train[0].mean(0), task.train[0].mean(0)) for task in tasks]

    def errors(x: Tensor) -> Tensor:
        away = [(rows, x - mean) for rows, mean in parts]
        return torch.stack([(inverse_times(rows, 0.5, d.T).T * d).sum(1) for rows, d in away], dim=1)

    return errors


def classifier(hidden: int | None) -> Callable[[list[Task]], Score]:
    """One that is trained on the images of all tasks: 12 epochs of Adam, weight decay 1e-4, batch 64."""

    def fit(tasks: list[Task]) -> Score:
        torch.manual_seed(0)
        x = torch.cat([task.train[0] for task in tasks]) - 0.5
        of_task = torch.cat([torch.full((len(task.train[0]),), i) for i, task in enumerate(tasks)])
        layers = [nn.Linear(x.shape[1], len(tasks))]
        if hidden is not None:
            layers = [nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, len(tasks))]  # type: ignore[list-item]
        network = nn.Sequential(*layers)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
        for _ in range(12):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x[rows]), of_task[rows]).backward()
                optimizer.step()
        network.eval()
        return lambda features: -network(features - 0.5)

    return fit


def shared(directions: int) -> Callable[[list[Task]], Score]:
    """The shared score of so many directions of scatter a task."""

    def fit(tasks: list[Task]) -> Score:
        summaries = summaries_of(tasks)
        return SharedStack(summaries, 4 * directions * summaries[0].means.shape[1] * len(tasks)).errors

    return fit


METHODS: dict[str, Callable[[list[Task]], Score]] = {
    "residual": lambda tasks: LinearStack(autoencoders_of(tasks)).errors,
    "shared": lambda tasks: SharedStack(summaries_of(tasks)).errors,
    "shared, 29 directions": shared(29),
    "shared, 2 directions": shared(2),
    "nearest class mean": nearest_mean,
    "streaming LDA": streaming_lda,
    "mahalanobis": mahalanobis,
    "all images, linear": classifier(None),
    "all images, 256 hidden": classifier(256),
}


def calibration_error(tasks: list[Task], method: str, score: Score) -> float:
    """Of test images, at the temperature that a run fits to its held-out images."""
    tables = []
    for last, task in enumerate(tasks):
        errors = METHODS[method](tasks[: last + 1])(task.valid[0])
        tables.append(hold_out(errors[:, last], errors[:, :last]))
    temp = calibrate(tables, None).temp
    errors = torch.cat([score(task.test[0]) for task in tasks])
    right = errors.argmin(1) == torch.arange(len(tasks)).repeat_interleave(len(errors) // len(tasks))
    confidences = torch.softmax(-errors / temp, dim=1).amax(1).double()
    bins = (confidences * 15).long().clamp_max(14)
    gaps = [(right[bins == b].double().sum() - confidences[bins == b].sum()).abs() for b in range(15)]
    return float(torch.stack(gaps).sum() / len(right))


def unknown_auroc(tasks: list[Task], known: list[int], strange: list[int]) -> float:
    """How well the nearest task's residual, by the quantile of its held-out images, parts strange tasks from known."""
    of_known = [tasks[i] for i in known]
    autoencoders, shared = autoencoders_of(of_known), SharedStack(summaries_of(of_known))
    residual = LinearStack(autoencoders)
    limits = torch.stack([residual.errors(task.valid[0])[:, i].quantile(0.99) for i, task in enumerate(of_known)])

    def strangeness(which: list[int]) -> Tensor:
        x = torch.cat([tasks[i].test[0] for i in which])
        nearest = shared.errors(x).argmin(1)
        return (residual.errors(x) / limits).gather(1, nearest[:, None])[:, 0]

    inside, outside = strangeness(known).sort().values, strangeness(strange)
    return float(torch.searchsorted(inside, outside).double().mean() / len(inside))


def main() -> None:
    """Every method on every split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--arch", default="efficientnet_lite0")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    model = ExpertGate((3, 96, 96), arch=options.arch, pretrained_flag=not options.random_weights)
    for kind in options.sizes:
        sizes, found = SIZES[kind], {method: [] for method in options.methods}
        strange: dict[str, list[float]] = {"MNIST known": [], "Fashion-MNIST known": [], "unseen classes": []}
        for seed in options.seeds:
            tasks = tasks_of(model, options.data, sizes, seed)
            for method in options.methods:
                score = METHODS[method](tasks)
                with torch.no_grad():
                    chosen = [score(task.test[0]).argmin(1) for task in tasks]
                right = [float((c == i).double().mean()) for i, c in enumerate(chosen)]
                domain = [float((c % 2 == i % 2).double().mean()) for i, c in enumerate(chosen)]
                small = [r for r, size in zip(right, SIZES["mixed"], strict=True) if size == 40]
                row = {"mean": statistics.mean(right), "min": min(right), "dataset": statistics.mean(domain)}
                row["small"] = statistics.mean(small)
                if method in ("residual", "shared"):
                    row["calibration_error"] = calibration_error(tasks, method, score)
                found[method].append(row)
            mnist, fashion = list(range(0, 10, 2)), list(range(1, 10, 2))
            strange["MNIST known"].append(unknown_auroc(tasks, mnist, fashion))
            strange["Fashion-MNIST known"].append(unknown_auroc(tasks, fashion, mnist))
            strange["unseen classes"].append(unknown_auroc(tasks, list(range(6)), [6, 7, 8, 9]))
        for method, rows in found.items():
            means = {name: round(statistics.mean(row[name] for row in rows), 4) for name in rows[0]}
            spread = [round(pick(row["mean"] for row in rows), 4) for pick in (min, max)]
            told = {"arch": options.arch, "sizes": kind, "method": method, **means, "mean_over_seeds": spread}
            print(json.dumps(told), flush=True)
        areas = {name: round(statistics.mean(values), 4) for name, values in strange.items()}
        print(json.dumps({"arch": options.arch, "sizes": kind, "unknown_auroc": areas}), flush=True)


if __name__ == "__main__":
    main()
