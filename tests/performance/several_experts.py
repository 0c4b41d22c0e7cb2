"""Prints what several experts that answer together gain: `confidence_threshold=0.1` against the best alone.

    python tests/performance/several_experts.py --data ../shared/data --seeds 0 1 2

Trains ten tasks of MNIST and Fashion-MNIST at 96×96 as the command line does (EfficientNet-Lite0, linear autoencoders,
the shared score, the fitted temperature), of 400 training images and of 40 and 400 in turns, and asks 100 test images a
task. One JSON line a run: the temperature, the share of images that several experts answer, accuracy end to end of the
best alone and of all above the threshold, over all images and over those, and how often only one of both was right.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace

import torch
from avalanche.training.plugins import EvaluationPlugin
from gate_figures import SIZES
from parent_study import images_of

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy, make_benchmark


def measure(data: str, kind: str, seed: int, threshold: float, threads: int) -> None:
    """Train, ask twice, print."""
    benchmark = make_benchmark(
        "split-mnist+fashion", data=data, image_size=96, train_per_task=SIZES[kind], test_per_task=100, seed=seed
    )
    model = ExpertGate(benchmark.shape, arch="efficientnet_lite0", autoencoder="linear", gate_score="shared")
    with ExpertGateStrategy(
        model=model,
        optimizer=torch.optim.SGD(model.expert.parameters(), lr=1e-3, momentum=0.9),
        train_mb_size=16,
        train_epochs=3,
        ae_latent_dim=50,
        rel_thresh=0.7,
        seed=seed,
        evaluator=EvaluationPlugin(loggers=[]),
        cluster=ClusterConfig(engine="inline", threads=threads),
    ) as strategy:
        strategy.train(benchmark.scenario.train_stream)
        alone = strategy.model._predictor
        assert alone is not None
        together = replace(alone, gate=replace(alone.gate, confidence_threshold=threshold))
        several, right = [], []
        for experience in benchmark.scenario.test_stream:
            images, places = images_of(experience.dataset)
            classes = torch.tensor(sorted(set(experience.dataset.targets)))[places]
            for x, y in zip(images.split(50), classes.split(50), strict=True):
                (routing, best), (_, mixed) = (p.answer(x, strategy.model._features) for p in (alone, together))
                several.append((routing.confidences >= threshold).sum(1) > 1)
                right.append(torch.stack([best.argmax(1) == y, mixed.argmax(1) == y]))
        is_several, (best_right, mixed_right) = torch.cat(several), torch.cat(right, dim=1)
        differ = best_right != mixed_right
        told = {
            "sizes": kind,
            "seed": seed,
            "temperature": round(alone.gate.temp, 1),
            "several_experts": float(is_several.double().mean()),
            "accuracy_alone": float(best_right.double().mean()),
            "accuracy_together": float(mixed_right.double().mean()),
            "of_those_alone": float(best_right[is_several].double().mean()),
            "of_those_together": float(mixed_right[is_several].double().mean()),
            "only_alone_right": int((differ & best_right).sum()),
            "only_together_right": int((differ & mixed_right).sum()),
        }
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in told.items()}), flush=True)


def main() -> None:
    """Every seed and sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    for kind in options.sizes:
        for seed in options.seeds:
            measure(options.data, kind, seed, options.threshold, options.threads)


if __name__ == "__main__":
    main()
