"""A run's life beside its training: which calls ended, which tasks the gate does without."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distributed_eg.errors import InputError, RunInUseError
from distributed_eg.store import records
from distributed_eg.store.evaluations import EvaluationRecord, seal_next
from distributed_eg.store.lease import superseded
from distributed_eg.store.records import RetirementRecord, Span, StreamRecord, TaskRecord
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage
from distributed_eg.types import TaskId


@dataclass(frozen=True)
class Life:
    """Records that the driver writes itself, for no stage needs to know of them; and never once it is superseded.

    Those that write raise ``StorageError`` where the run directory cannot be written.
    """

    storage: Storage
    generation: int
    """The driver's number in the run's lease."""
    recorded: Registry
    """What earlier drivers left."""
    registry: Registry
    """What this driver has seen."""
    follows: bool
    """Whether what is brought now follows what the run holds, rather than being all of it."""

    def interrupted(self) -> list[TaskRecord]:
        """What was brought by a call that was cut off, in order, where it can be brought again."""
        registry = self.registry
        if not self.follows:
            return []
        return [record for task, record in sorted(registry.arrivals.items()) if task >= registry.num_ended]

    def end_calls(self, num_tasks: int) -> None:
        """Note that calls that ended brought the tasks below ``num_tasks``: what comes next comes after them."""
        known = self.registry.stream or self.recorded.stream
        if known is None or known.num_tasks < num_tasks:
            self._seal(StreamRecord(num_tasks))

    def retire(self, task: TaskId) -> None:
        """Have the gate do without a task, by the number that users see, from here on; twice is once."""
        known = self.registry.retirements.get(task, RetirementRecord(task, (), is_swept=False))
        if not known.is_retired:
            self._seal(replace(known, spans=(*known.spans, Span(self._next_task, None))))

    def restore(self, task: TaskId) -> None:
        """Have the gate know a task again that was retired; twice is once.

        Raises:
            InputError: its weights are gone.
        """
        known = self.registry.retirements.get(task)
        if known is None or not known.is_retired:
            return
        if known.is_swept:
            raise InputError(f"Task {task} cannot be restored: `distributed-eg gc` has removed its weights.")
        self._seal(replace(known, spans=(*known.spans[:-1], replace(known.spans[-1], until=self._next_task))))

    def keep(self, evaluation: EvaluationRecord) -> None:
        """Write down what an evaluation measured, as the run's next one; ``RunInUseError`` once a later driver has
        taken the run over."""
        if superseded(self.storage, self.generation):
            raise RunInUseError(f"Another driver has taken over the run in {self.storage.shown!r}.")
        seal_next(self.storage, evaluation)

    @property
    def _next_task(self) -> TaskId:
        return max((*self.recorded.arrivals, *self.registry.arrivals), default=-1) + 1

    def _seal(self, record: StreamRecord | RetirementRecord) -> None:
        if not superseded(self.storage, self.generation):
            records.seal(self.storage, record)
            self.registry.add(record)
