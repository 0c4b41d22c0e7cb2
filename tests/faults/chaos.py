"""The chaos kit: faults at named points of a run, in whichever process of it comes to the point first.

A plan lies in a folder that all processes of the run see. ``install`` wraps the package's own functions in a process,
so that they look into the plan wherever they come to a point; Ray's workers are given it by
``ray.init(runtime_env=chaos.runtime_env(folder))``. Nothing in the package knows of it.

    chaos = Chaos(folder)
    chaos.plan(Fault("after seal tasks/00001/expert-*", "kill"), Fault("iteration 2 of epoch 1 of task 3", "kill"))
    ...                      # train
    chaos.require_fired()

The points, as they are written in a plan (``fnmatch`` patterns; ``*`` goes over slashes too):

    before seal PATH, after seal PATH      PATH in the run directory: weights, records, checkpoints, tables, lease
    inside seal PATH                       it is written under a temporary name (on local file systems)
    read PATH                              about to be read
    begin STAGE of task T                  a worker was given a stage: features, autoencoder, relate, expert
    report STAGE of task T                 it is done, and about to be reported
    iteration I of epoch E of task T       an expert trains; counted from 0
    relate task T                          between two blocks of a task's validation features
    evaluate                               between two batches of an evaluation
    start                                  a worker is made

What can happen there:

    kill                                   the process ends by SIGKILL
    hang                                   the process stays there until ``release``; others learn its id from ``at``
    delay                                  the process stays there for ``seconds``
    full, denied, broken                   the storage answers with ENOSPC, EACCES or EIO (at seal and read only)
    memory                                 MemoryError is raised
    accelerator                            what torch raises where a card breaks, after which nothing works there
    flip, truncate, remove                 the file that was sealed is harmed (after seal only)
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any, Literal

Action = Literal[
    "kill", "hang", "delay", "full", "denied", "broken", "memory", "accelerator", "flip", "truncate", "remove"
]  # fmt: skip

FOLDER = "DISTRIBUTED_EG_CHAOS"
"""Environment variable that tells a worker process where the plan lies."""
ERRNOS = {"full": errno.ENOSPC, "denied": errno.EACCES, "broken": errno.EIO}
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a point: from the ``nth`` time on that any process comes to it, ``times`` times."""

    point: str
    action: Action
    nth: int = 1
    times: int = 1
    seconds: float = 0.0


class Chaos:
    """A plan in a folder, seen from the process that made it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def plan(self, *faults: Fault) -> None:
        """Replace the plan; nothing of it has happened yet."""
        self.clear()
        text = json.dumps([asdict(fault) for fault in faults])
        (self.folder / "plan.new").write_text(text)
        (self.folder / "plan.new").rename(self.folder / "plan.json")

    def clear(self) -> None:
        """No faults any more; what hangs goes on."""
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)

    def fired(self) -> list[int]:
        """How often each fault of the plan happened."""
        faults = json.loads((self.folder / "plan.json").read_text())
        return [len(list(self.folder.glob(f"fired-{i}-*"))) for i in range(len(faults))]

    def require_fired(self) -> None:
        """Every fault happened as often as it was planned."""
        faults = json.loads((self.folder / "plan.json").read_text())
        left = [fault["point"] for fault, count in zip(faults, self.fired(), strict=True) if count < fault["times"]]
        assert not left, f"never happened: {left}"

    def at(self, index: int, deadline_s: float = 60.0) -> int:
        """Wait until fault ``index`` happens; return the id of the process that came there."""
        wait_for(lambda: any(self.folder.glob(f"fired-{index}-*")), deadline_s, f"fault {index} of {self.folder}")
        (file, *_) = self.folder.glob(f"fired-{index}-*")
        wait_for(lambda: file.read_text() != "", deadline_s, f"the process id in {file}")
        return int(file.read_text())

    def release(self, index: int) -> None:
        """Let what hangs by fault ``index`` go on."""
        (self.folder / f"released-{index}").touch()


def wait_for(predicate: Callable[[], object], deadline_s: float, what: str) -> None:
    """Poll ``predicate`` until it holds.

    Raises:
        TimeoutError: it does not within ``deadline_s``.
    """
    until = time.monotonic() + deadline_s
    pause = threading.Event()
    while not predicate():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        pause.wait(_POLL_S)


def runtime_env(folder: Path) -> dict[str, Any]:
    """For ``ray.init``: every worker process of the job takes part in the plan in ``folder``."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    return {"worker_process_setup_hook": install, "env_vars": {FOLDER: str(folder)}}


def install() -> None:
    """Have this process look into the plan in ``$DISTRIBUTED_EG_CHAOS`` at every point; for its whole life."""
    from distributed_eg.store.storage import Storage

    if not hasattr(Storage, "chaos"):
        Storage.chaos = _Points(Path(os.environ[FOLDER]))  # type: ignore[attr-defined]
        Storage.chaos.wrap()  # type: ignore[attr-defined]


@contextmanager
def installed(folder: Path) -> Iterator[Chaos]:
    """This process takes part in the plan in ``folder`` within the block."""
    points = _Points(folder)
    points.wrap()
    try:
        yield Chaos(folder)
    finally:
        points.unwrap()


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(file, file.stat().st_size // 2)


HARMS: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "remove": Path.unlink}


@contextmanager
def reports(engine: type, change: Callable[[list[Any]], list[Any]]) -> Iterator[None]:
    """Change what an engine's ``wait`` reports, within the block: duplicate, reorder, hold back."""
    wait = engine.wait  # type: ignore[attr-defined]

    @wraps(wait)
    def changed(self: Any) -> list[Any]:
        return change(wait(self))

    engine.wait = changed  # type: ignore[attr-defined]
    try:
        yield
    finally:
        engine.wait = wait  # type: ignore[attr-defined]


class _Points:
    """The points of one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._undo: list[tuple[Any, str, Any]] = []

    def wrap(self) -> None:
        """Wrap what writes and reads; stages and training once they are imported, for they import torch."""
        from distributed_eg.store import local_files
        from distributed_eg.store.storage import Storage

        self._around(Storage, "write", self._write)
        self._around(Storage, "create", self._write)
        self._around(Storage, "write_file", self._write_file)
        self._around(local_files, "temporary", self._temporary)
        self._around(Storage, "read", self._read)
        self._around(Storage, "verified_file", self._verify)
        self._around(Storage, "__init__", self._open)

    def unwrap(self) -> None:
        """Everything as it was."""
        while self._undo:
            owner, name, original = self._undo.pop()
            setattr(owner, name, original)

    def reach(self, point: str, storage: Any = None, path: str = "") -> None:
        """This process is at ``point``: do what the plan says."""
        try:
            faults = json.loads((self._folder / "plan.json").read_text())
        except FileNotFoundError:
            return
        for index, raw in enumerate(faults):
            fault = Fault(**raw)
            if fnmatchcase(point, fault.point) and self._is_due(index, fault):
                self._do(index, fault, storage, path)

    def _is_due(self, index: int, fault: Fault) -> bool:
        """Count this visit, over all processes; whether it is one of those that the fault is for."""
        visit = 1
        while not self._claim(f"visit-{index}-{visit}"):
            visit += 1
        return fault.nth <= visit < fault.nth + fault.times and self._claim(f"fired-{index}-{visit}")

    def _claim(self, name: str) -> bool:
        try:
            with (self._folder / name).open("x") as stream:
                stream.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def _do(self, index: int, fault: Fault, storage: Any, path: str) -> None:
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "hang":
            released, plan = self._folder / f"released-{index}", self._folder / "plan.json"
            wait_for(lambda: released.exists() or not plan.exists(), 600, "release")
        elif fault.action == "delay":
            threading.Event().wait(fault.seconds)
        elif fault.action == "memory":
            raise MemoryError("the chaos kit took it")
        elif fault.action == "accelerator":
            import torch

            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        elif fault.action in HARMS:
            HARMS[fault.action](Path(storage.uri) / path)
        else:
            code = ERRNOS[fault.action]
            # As the package tells what its file system raised.
            with storage._asking(path) if fault.point.startswith("read ") else storage._writing(path):
                raise OSError(code, os.strerror(code))

    def _around(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        if any(known[:2] == (owner, name) for known in self._undo):
            return
        self._undo.append((owner, name, original))

        @wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(owner, name, wrapped)

    def _write(self, write: Callable[..., Any], storage: Any, path: str, data: bytes) -> Any:
        self._sealing = storage, path
        self.reach(f"before seal {path}", storage, path)
        answer = write(storage, path, data)
        self.reach(f"after seal {path}", storage, path)
        return answer

    def _write_file(self, write: Callable[..., Any], storage: Any, prefix: str, suffix: str, fill: Any) -> Any:
        path = f"{prefix}-{suffix}"  # its hash is not known yet
        self._sealing = storage, path
        self.reach(f"before seal {path}", storage, path)
        artifact = write(storage, prefix, suffix, fill)
        self.reach(f"after seal {artifact.path}", storage, artifact.path)
        return artifact

    @contextmanager
    def _temporary(self, temporary: Callable[..., Any], target: Path, fill: Any) -> Iterator[Path]:
        storage, path = self._sealing
        with temporary(target, fill) as file:
            self.reach(f"inside seal {path}", storage, path)
            yield file

    def _read(self, read: Callable[..., Any], storage: Any, path: str) -> Any:
        self.reach(f"read {path}", storage, path)
        return read(storage, path)

    def _verify(self, verify: Callable[..., Any], storage: Any, artifact: Any) -> Any:
        self.reach(f"read {artifact.path}", storage, artifact.path)
        return verify(storage, artifact)

    def _open(self, init: Callable[..., Any], storage: Any, uri: str) -> None:
        init(storage, uri)
        # A worker opens its storage before it runs anything; by then its stages are imported.
        if "distributed_eg.runtime.worker.worker" in sys.modules:
            from distributed_eg.runtime.worker import evaluation, stages
            from distributed_eg.runtime.worker.worker import TaskWorker

            self.reach("start")
            self._around(TaskWorker, "run", self._run)
            self._around(stages, "_validation_errors", self._relate)
            self._around(evaluation, "_route", self._evaluate)

    def _run(self, run: Callable[..., Any], worker: Any, request: Any) -> Any:
        from distributed_eg.strategy.training.trainer import _ExpertRules

        self._around(_ExpertRules, "before_update", self._iterate)
        stage = type(request).__name__.removesuffix("Request").lower()
        task = request.input.record.task if hasattr(request, "input") else None
        where = stage if task is None else f"{stage} of task {task}"
        self._task = task
        self.reach(f"begin {where}")
        answer = run(worker, request)
        self.reach(f"report {where}")
        return answer

    def _relate(self, errors: Callable[..., Any], *args: Any) -> Any:
        self.reach(f"relate task {self._task}")
        return errors(*args)

    def _evaluate(self, combine: Callable[..., Any], *args: Any) -> Any:
        self.reach("evaluate")
        return combine(*args)

    def _iterate(self, before_update: Callable[..., Any], rules: Any, strategy: Any, **kwargs: Any) -> None:
        clock = strategy.clock
        at = f"iteration {clock.train_epoch_iterations} of epoch {clock.train_exp_epochs}"
        self.reach(f"{at} of task {self._task}")
        before_update(rules, strategy, **kwargs)
