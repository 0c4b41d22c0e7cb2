"""Runs that an earlier version left are read as before, and gone on with: see ``tests/store/old_runs/make.py``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from distributed_eg.errors import InputError, ResumeError
from distributed_eg.store.storage import Storage
from distributed_eg.store.verification import verify
from tests.store.old_runs import make

FOLDER = Path(make.__file__).parent
MADE_WITH = json.loads((FOLDER / "finished" / "run.json").read_text())["libraries"]["torch"]

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")
resumes = pytest.mark.skipif(
    torch.__version__.split(".")[:2] != MADE_WITH.split(".")[:2],
    reason=f"made with torch {MADE_WITH}: another one may have other settings in its optimizers, which are refused",
)


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one of the runs."""
    return Path(shutil.copytree(FOLDER / request.param, tmp_path / request.param))


@pytest.fixture
def steps() -> Iterator[list[int]]:
    """One entry for each step of an optimizer in this process."""
    taken: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    yield taken
    handle.remove()


def train(run: Path) -> list[dict[str, Any]]:
    """Train the stream of the run that a folder is named after: the registry, without what differs each time."""
    with make.strategy_in(run) as strategy:
        strategy.train(make.benchmark(run.name).train_stream)
        return strategy.registry.drop_columns(["train_s", "worker"]).to_pylist()


@resumes
@pytest.mark.parametrize("run", ["finished"], indirect=True)
@pytest.mark.parametrize(("temp", "is_refused"), [(2.0, False), (5.0, True)])
def test_a_temperature_that_was_given_is_not_forgotten(run: Path, temp: float, is_refused: bool) -> None:
    """Such runs hold the default, 2, or what somebody asked for, which nothing fitted may replace unasked."""
    record = json.loads((run / "run.json").read_text())
    record["method"]["temp"] = temp
    record["sha256"] = hashlib.sha256(
        json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True).encode()
    ).hexdigest()
    (run / "run.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    if not is_refused:
        train(run)
        return
    with pytest.raises(ResumeError, match="temp"):
        train(run)


def weights(run: Path) -> dict[str, bytes]:
    """All autoencoders and experts of a run."""
    files = [path for kind in ("autoencoder", "expert") for path in run.glob(f"tasks/*/{kind}-*")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def assert_close(answers: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """The same tasks by the gate, and log-probabilities that differ by less; other machines may differ in bits."""
    assert answers["tasks"] == expected["tasks"]
    torch.testing.assert_close(
        torch.tensor(answers["outputs"]), torch.tensor(expected["outputs"]), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("run", make.STREAMS, indirect=True)
def test_it_is_intact_and_predicts_as_it_did(run: Path) -> None:
    assert verify(Storage(str(run))).damages == ()
    assert_close(make.answers_of(run), json.loads((FOLDER / "answers.json").read_text())[run.name], 1e-5)


@resumes
@pytest.mark.parametrize("run", ["finished"], indirect=True)
def test_a_finished_run_has_nothing_left_to_train(run: Path, steps: list[int]) -> None:
    """Its third task continued its first."""
    before = weights(run)
    registry = train(run)
    assert [(row["label"], row["transfer"]) for row in registry] == [(7, "continue"), (3, "finetune")]
    assert steps == []
    assert weights(run) == before
    assert verify(Storage(str(run))).damages == ()


@resumes
@pytest.mark.parametrize("run", ["interrupted"], indirect=True)
def test_an_interrupted_run_comes_to_the_end_of_an_undisturbed_one(run: Path, tmp_path: Path, steps: list[int]) -> None:
    """What was sealed is kept; to the byte where this machine computes as the one that it was begun on."""
    before = weights(run)
    assert sum("/expert-" in path for path in before) == 2
    assert list(run.glob("tasks/00002/checkpoint-*"))
    registry = train(run)
    assert 0 < len(steps) <= 2 * make.STEPS_PER_TASK
    after = weights(run)
    assert after.items() >= before.items()
    assert verify(Storage(str(run))).damages == ()

    undisturbed = tmp_path / "undisturbed" / "interrupted"
    expected = train(undisturbed)
    assert [row["transfer"] for row in registry] == ["fresh", "finetune", "lwf", "finetune"]
    assert [row["parent"] for row in registry] == [row["parent"] for row in expected]
    assert_close(make.answers_of(run), make.answers_of(undisturbed), 1e-3)
    if weights(undisturbed).items() >= before.items():
        assert after == weights(undisturbed)
        assert registry == expected


@resumes
@pytest.mark.parametrize("run", ["finished"], indirect=True)
def test_it_is_evaluated_predicts_and_takes_a_new_task(run: Path) -> None:
    """Without the data of its tasks."""
    before, stream = weights(run), make.benchmark("interrupted").train_stream
    with make.strategy_in(run) as strategy:
        strategy._driver.cluster = replace(strategy._driver.cluster, resume="append")
        metrics = strategy.eval(make.benchmark("finished").train_stream[1])
        assert metrics["EndToEnd_Acc_Exp/eval_phase/train_stream/Task003/Exp001"] > 0.5
        images = make.images_of(0, 4, 9)[0]
        said = strategy.model.predict(images)
        assert [prediction.class_name for prediction in said] == [None] * 4
        with pytest.raises(InputError, match="give transform="):
            strategy.predict(["a.png"])
        strategy.train(stream[2])
        assert [row["label"] for row in strategy.registry.to_pylist()] == [7, 3, 2]
    assert weights(run).items() >= before.items()
    assert verify(Storage(str(run))).damages == ()


@resumes
@pytest.mark.parametrize("run", ["finished"], indirect=True)
def test_what_was_related_before_and_is_sealed_now_is_whole(run: Path) -> None:
    """The manifest names the relatedness record as it is now, which an earlier version wrote otherwise."""
    for file in sorted(run.glob("tasks/*/manifest.json"))[1:]:
        file.unlink()
    train(run)
    assert verify(Storage(str(run))).damages == ()
