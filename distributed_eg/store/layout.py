"""Names of everything in a run directory, and the schema version of its records.

    run.json                              what the run is: configuration, versions, backbone
    config.yaml                           for people: the options of the command that began the run, if it was one
    root-<hash>.safetensors               the pretrained root network
    sessions/00001.json                   who drives the run, or drove it: the lease
    stream.json                           how far its stream was heard to the end
    statistics.json                       names statistics-<hash>.safetensors
    tasks/00003/task.json                 what arrived as task 3: label, classes, versions, identity of the data
    tasks/00003/autoencoder.json          names autoencoder-<hash>.safetensors, and perhaps summary-<hash>.safetensors
    tasks/00003/relatedness.json          the task's row of the relatedness table, and its parent; names
                                          held-out-<hash>.safetensors
    tasks/00003/manifest.json             the seal: names the expert and the hashes of all of the above
    tasks/00003/timings.json              who did what for how long; never hashed
    tasks/00003/retirement.json           when the gate did without the task; not there for one that was never retired
    tasks/00003/checkpoint.json           names checkpoint-<hash>.safetensors while the expert trains; gone afterwards
    tasks/00003/rival.json                the same of the second expert of a contest, with rival-<hash>.safetensors
    evaluations/00000.json                what an evaluation measured: one for each, in order; none replaces another
    tables/registry.parquet, tables/relatedness.parquet   exports for people, rebuilt from the records

Weights are named by their own hash: a second attempt at the same stage writes the same file.
"""

from __future__ import annotations

from distributed_eg.types import TaskId

SCHEMA_VERSION = 1

RUN = "run.json"
CONFIG = "config.yaml"
STREAM = "stream.json"
STATISTICS = "statistics.json"
SESSIONS = "sessions"
TASKS = "tasks"
EVALUATIONS = "evaluations"
REGISTRY_TABLE = "tables/registry.parquet"
RELATEDNESS_TABLE = "tables/relatedness.parquet"


def task_folder(task: TaskId) -> str:
    """Where all of a task's files are."""
    return f"{TASKS}/{task:05d}"


def task_file(task: TaskId, name: str) -> str:
    """Path of a task's record: ``name`` is one of those above."""
    return f"{task_folder(task)}/{name}.json"


def task_weights(task: TaskId, name: str) -> str:
    """Path of a task's weights without hash and ending: ``name`` is "autoencoder", "summary", "held-out", "expert",
    "checkpoint" or "rival"."""
    return f"{task_folder(task)}/{name}"


def session_file(generation: int) -> str:
    """Path of the record of the run's driver number ``generation``."""
    return f"{SESSIONS}/{generation:05d}.json"


def evaluation_file(number: int) -> str:
    """Path of the record of the run's evaluation ``number``, counted from 0."""
    return f"{EVALUATIONS}/{number:05d}.json"
