"""An order of tasks in which those that are related stand together: the leaves of average linkage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from distributed_eg.types import TaskId

_FAR = 2.0
"""Distance of tasks whose relatedness is −1 or less, or is not known."""


def clustered(tasks: Sequence[TaskId], relatedness: Mapping[tuple[TaskId, TaskId], float]) -> list[TaskId]:
    """``tasks``, most related ones next to each other; ``relatedness`` is at most 1, by task and earlier task."""
    place = {task: i for i, task in enumerate(tasks)}
    distances = np.full((len(tasks), len(tasks)), _FAR)
    for (task, candidate), value in relatedness.items():
        if task in place and candidate in place:
            i, j = place[task], place[candidate]
            distances[i, j] = distances[j, i] = min(1 - value, _FAR)
    np.fill_diagonal(distances, np.inf)
    clusters: dict[int, list[TaskId]] = {i: [task] for i, task in enumerate(tasks)}
    for _ in range(len(tasks) - 1):
        i, j = sorted(divmod(int(distances.argmin()), len(tasks)))
        sizes = len(clusters[i]), len(clusters[j])
        joined = (sizes[0] * distances[i] + sizes[1] * distances[j]) / sum(sizes)
        distances[i, :] = distances[:, i] = joined
        distances[j, :] = distances[:, j] = distances[i, i] = np.inf
        clusters[i] += clusters.pop(j)
    return [task for cluster in clusters.values() for task in cluster]
