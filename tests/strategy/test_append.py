"""A run is appended to: tasks follow without the data of earlier ones, to the bytes of one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import TensorDataset

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import DamagedFileError, HookError, InputError, ResumeError, RunInUseError, StorageError
from distributed_eg.store.storage import Storage
from distributed_eg.store.verification import verify
from tests.helpers import (
    DOMAINS,
    SETTINGS,
    SHAPE,
    content,
    hashes,
    task_images,
    tiny_benchmark,
    tiny_net,
    tiny_strategy,
)
from tests.inside import registry_of
from tests.strategy.test_repeats import STEPS, stream


def appended(storage: Path, **settings: Any) -> ExpertGateStrategy:
    """A strategy of a process of its own, which knows of the run what the storage holds."""
    cluster = ClusterConfig(engine="inline", storage=str(storage), resume="append")
    return tiny_strategy(**{"cluster": cluster, **SETTINGS, **settings})


def of_one_process(storage: Path, experiences: Iterable[Any], **settings: Any) -> dict[str, bytes]:
    """What one process leaves that trains the whole stream."""
    cluster = ClusterConfig(engine="inline", storage=str(storage))
    with tiny_strategy(cluster=cluster, **{**SETTINGS, **settings}) as strategy:
        strategy.train(experiences)
    return content(storage)


@pytest.mark.parametrize("autoencoder", ["linear", "sgd"])
def test_each_task_in_a_process_of_its_own_gives_the_bytes_of_one_process(tmp_path: Path, autoencoder: Any) -> None:
    def model() -> ExpertGate:
        return ExpertGate(SHAPE, arch=tiny_net(), autoencoder=autoencoder)

    experiences = list(tiny_benchmark(DOMAINS).train_stream)
    whole = of_one_process(tmp_path / "one", experiences, model=model())
    for experience in experiences:
        with appended(tmp_path / "many", model=model()) as strategy:
            strategy.train(experience)
    assert content(tmp_path / "many") == whole
    assert verify(Storage(str(tmp_path / "many"))).damages == ()


@pytest.mark.parametrize("on_repeat", ["continue", "new_expert"])
def test_a_label_that_the_run_knows_goes_on_as_in_one_process(tmp_path: Path, on_repeat: Any) -> None:
    experiences = list(stream(*STEPS).train_stream)
    whole = of_one_process(tmp_path / "one", experiences, on_repeat=on_repeat)
    for part in (experiences[:2], experiences[2:3], experiences[3:]):
        with appended(tmp_path / "many", on_repeat=on_repeat) as strategy:
            strategy.train(part)
    assert content(tmp_path / "many") == whole


def test_the_same_data_again_are_the_next_version_once_the_user_has_closed_the_run(tmp_path: Path) -> None:
    experiences = list(tiny_benchmark((0, 1)).train_stream)
    for part in (experiences, experiences[:1]):
        with appended(tmp_path / "run") as strategy:
            strategy.train(part)
    assert registry_of(strategy).newest[0].versions == (0, 2)


def test_a_process_that_ends_without_closing_may_be_sent_again(tmp_path: Path) -> None:
    """It may have died after its training, as in the evaluation: what it had brought is not trained twice."""
    experiences = list(tiny_benchmark((0, 1, 2)).train_stream)
    with appended(tmp_path / "run", on_repeat="error") as strategy:
        strategy.train(experiences[:1])
    for _ in range(2):
        strategy = appended(tmp_path / "run", on_repeat="error")
        strategy.train(experiences[1:])
        strategy.__exit__(ZeroDivisionError)
        assert registry_of(strategy).manifests.keys() == {0, 1, 2}
    with appended(tmp_path / "run", on_repeat="error") as strategy:
        strategy.train(experiences[1:])
    with appended(tmp_path / "run", on_repeat="error") as strategy, pytest.raises(InputError, match="as task 1"):
        strategy.train(experiences[1:])


def test_a_failed_call_is_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sealed is kept, what failed is trained under the number that it had."""

    class Failing(ExpertGateStrategy):
        def training_epoch(self, **kwargs: Any) -> None:
            if self.experience.current_experience == int(os.environ["FAILING_TASK"]):
                raise OSError("no such luck")
            super().training_epoch(**kwargs)

    experiences = list(tiny_benchmark((0, 1, 2, 1)).train_stream)
    monkeypatch.setenv("FAILING_TASK", "-1")
    whole = of_one_process(tmp_path / "one", experiences, cls=Failing)
    with appended(tmp_path / "run", cls=Failing) as strategy:
        strategy.train(experiences[:1])
    for failing in (2, 2, -1):
        monkeypatch.setenv("FAILING_TASK", str(failing))
        with appended(tmp_path / "run", cls=Failing) as strategy:
            with pytest.raises(HookError, match="no such luck") if failing > 0 else contextlib.nullcontext():
                strategy.train(experiences[1:])
            assert len(strategy.registry) == (3 if failing > 0 else 4)
    assert content(tmp_path / "run") == whole


def test_how_experts_train_may_differ_and_is_recorded(tmp_path: Path) -> None:
    experiences = list(tiny_benchmark((0, 1, 0)).train_stream)
    with appended(tmp_path / "run") as strategy:
        strategy.train(experiences[:2])
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = torch.optim.Adam(model.expert.parameters(), lr=0.01)
    with appended(tmp_path / "run", model=model, optimizer=optimizer, train_epochs=3, train_mb_size=64) as strategy:
        strategy.train(experiences[2])
    arrivals = registry_of(strategy).arrivals
    assert [arrivals[task].identity["train_epochs"] for task in range(3)] == [2, 2, 3]
    assert [arrivals[task].identity["optimizer"]["class"].rpartition(".")[2] for task in (1, 2)] == ["SGD", "Adam"]


def test_the_bytes_do_not_depend_on_what_another_process_evaluated_with(tmp_path: Path) -> None:
    """Features are read as the run reads them, whatever the batch size of who appends."""
    experiences = list(tiny_benchmark((0, 1), train=150).train_stream)
    whole = of_one_process(tmp_path / "one", experiences, eval_mb_size=64)
    for part, size in zip(experiences, (64, 16), strict=True):
        with appended(tmp_path / "many", eval_mb_size=size) as strategy:
            strategy.train(part)
    autoencoders = {path for path in whole if "autoencoder" in path}
    many = content(tmp_path / "many")
    assert {path: many[path] for path in autoencoders} == {path: whole[path] for path in autoencoders}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model": lambda: ExpertGate(SHAPE, arch=tiny_net(1), autoencoder="linear")}, r"backbone\.root"),
        ({"model": lambda: ExpertGate(SHAPE, arch=tiny_net(), autoencoder="sgd")}, r"method\.autoencoder\.kind"),
        ({"model": lambda: ExpertGate((3, 24, 24), arch=tiny_net(), autoencoder="linear")}, r"backbone\.shape"),
        ({"seed": 5}, r"method\.seed: the run has 0, now 5"),
        ({"ae_latent_dim": 9}, r"latent_dim: the run has 8, now 9"),
        ({"threads": 2}, r"threads: the run has 1, now 2"),
        ({"reference": lambda: tiny_benchmark((3,)).train_stream[0].dataset}, r"settings\.reference"),
    ],
)
def test_what_every_task_shares_must_be_the_same(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    experiences = list(tiny_benchmark((0, 1)).train_stream)
    with appended(tmp_path / "run") as strategy:
        strategy.train(experiences[:1])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    made = {name: value() if callable(value) else value for name, value in settings.items()}
    if threads := made.pop("threads", None):
        made["cluster"] = ClusterConfig(
            engine="inline", storage=str(tmp_path / "run"), resume="append", threads=threads
        )
    with appended(tmp_path / "run", **made) as strategy, pytest.raises(ResumeError, match=named):
        strategy.train(experiences[1])
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_reference_is_taken_from_the_run(tmp_path: Path) -> None:
    experiences = list(tiny_benchmark((0, 1)).train_stream)
    reference = tiny_benchmark((3,)).train_stream[0].dataset
    whole = of_one_process(tmp_path / "one", experiences, reference=reference)
    for experience, given in zip(experiences, (reference, None), strict=True):
        with appended(tmp_path / "many", reference=given) as strategy:
            strategy.train(experience)
    many = content(tmp_path / "many")
    assert {path: data for path, data in many.items() if not path.endswith("task.json")} == {
        path: data for path, data in whole.items() if not path.endswith("task.json")
    }


def test_images_of_another_shape_change_nothing(tmp_path: Path) -> None:
    with appended(tmp_path / "run") as strategy:
        strategy.train(tiny_benchmark((0,)).train_stream)
    before = content(tmp_path / "run")
    leaf = TensorDataset(torch.zeros(8, 3, 32, 32), torch.arange(8) % 2)
    leaf.targets = (torch.arange(8) % 2).tolist()  # type: ignore[attr-defined]
    larger = benchmark_from_datasets(train=[as_classification_dataset(leaf)]).train_stream[0]
    with appended(tmp_path / "run") as strategy, pytest.raises(InputError, match=r"\(3, 32, 32\).*shape=\(3, 16, 16\)"):
        strategy.train(larger)
    assert content(tmp_path / "run") == before


def test_a_damaged_run_is_not_appended_to(tmp_path: Path) -> None:
    """Its data are gone: nothing could make again what is missing."""
    experiences = list(tiny_benchmark((0, 1)).train_stream)
    with appended(tmp_path / "run") as strategy:
        strategy.train(experiences[:1])
    for name in ("tasks/00000/manifest.json", "statistics.json"):
        whole = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_text("{")
        with appended(tmp_path / "run") as strategy, pytest.raises(DamagedFileError, match=name):
            strategy.train(experiences[1])
        (tmp_path / "run" / name).write_bytes(whole)


def test_two_processes_do_not_append_at_once(tmp_path: Path) -> None:
    experiences = list(tiny_benchmark((0, 1)).train_stream)
    with appended(tmp_path / "run") as first, appended(tmp_path / "run") as second:
        first.train(experiences[0])
        with pytest.raises(RunInUseError, match="in use"):
            second.train(experiences[1])


def test_the_stream_of_an_appended_run_is_resumed_as_any(tmp_path: Path) -> None:
    experiences = list(tiny_benchmark((0, 1)).train_stream)
    for experience in experiences:
        with appended(tmp_path / "run") as strategy:
            strategy.train(experience)
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"), resume=True)
    with tiny_strategy(cluster, **SETTINGS) as resumed:
        resumed.train(experiences)
        assert hashes(resumed) == hashes(strategy)


def test_resuming_as_before_says_how_to_append(tmp_path: Path) -> None:
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    for message in (None, "resume='append' adds what follows"):
        with tiny_strategy(cluster) as strategy:
            if message is None:
                strategy.train(tiny_benchmark((0,)).train_stream)
            else:
                with pytest.raises(StorageError, match=message):
                    strategy.train(tiny_benchmark((0,)).train_stream)


def test_earlier_data_and_the_run_may_have_moved(tmp_path: Path) -> None:
    experiences = list(tiny_benchmark((0, 1)).train_stream)
    with appended(tmp_path / "here") as strategy:
        strategy.train(experiences[0])
    shutil.move(tmp_path / "here", tmp_path / "there")
    with appended(tmp_path / "there") as strategy:
        strategy.train(experiences[1])
    assert of_one_process(tmp_path / "one", experiences) == content(tmp_path / "there")


TEN = """
import sys
from pathlib import Path
import numpy as np, torch
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from torch.utils.data import TensorDataset
from distributed_eg import ClusterConfig
from tests.helpers import SETTINGS, tiny_strategy

storage, *files = sys.argv[1:]
experiences = []
for file in files:
    with np.load(file) as held:
        leaf = TensorDataset(torch.from_numpy(held["images"]), torch.from_numpy(held["targets"]))
    leaf.targets = leaf.tensors[1].tolist()
    labels = TaskLabels([int(Path(file).stem)] * len(leaf))
    data = ClassificationDataset([leaf], data_attributes=[DataAttribute(leaf.targets, "targets"), labels])
    experiences += with_task_labels(benchmark_from_datasets(train=[data])).train_stream
cluster = ClusterConfig(engine="inline", storage=storage, resume="append")
with tiny_strategy(cluster, **SETTINGS) as strategy:
    strategy.train(experiences)
"""


@pytest.mark.long
def test_ten_processes_that_see_only_their_own_data_are_one(tmp_path: Path) -> None:
    """Each opens its own folder of images; those of earlier tasks are gone by then."""
    images = [task_images(task % 4, 40, 50 + task) for task in range(10)]
    script = tmp_path / "process.py"
    script.write_text(TEN)

    def run(storage: Path, *tasks: int) -> None:
        for task in tasks:
            np.savez(tmp_path / f"{task}.npz", images=images[task][0].numpy(), targets=images[task][1].numpy())
        arguments = [str(storage), *(f"{tmp_path}/{task}.npz" for task in tasks)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), *arguments],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for task in tasks:
            (tmp_path / f"{task}.npz").unlink()

    run(tmp_path / "one", *range(10))
    for task in range(10):
        run(tmp_path / "ten", task)
    assert content(tmp_path / "ten") == content(tmp_path / "one")
