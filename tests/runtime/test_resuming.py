"""How two descriptions of a run differ, line by line."""

from __future__ import annotations

import json
from typing import Any

from distributed_eg.runtime.resuming import differences


def test_differences_are_sorted_and_complete() -> None:
    then = {"method": {"seed": 0, "betas": (0.9, 0.99)}, "z": 1, "list": [], "data": "a" * 64, "gone": {"x": None}}
    now = {"method": {"seed": 1, "betas": [0.9, 0.95]}, "z": 1.0, "list": [{"c": "d"}], "data": "b" * 64}
    assert differences(then, now) == [
        "data: the run has aaaaaaaaaaaa…, now bbbbbbbbbbbb…",
        "gone.x: the run has None, now nothing",
        "list.0.c: the run has nothing, now 'd'",
        "method.betas.1: the run has 0.99, now 0.95",
        "method.seed: the run has 0, now 1",
    ]


def test_equal_values_do_not_differ() -> None:
    value = {"a": float("nan"), "b": (1, [2, ()]), 3: {}, "inf": float("inf")}
    assert differences(value, json.loads(json.dumps(value))) == []
    assert differences({}, {}) == []
    assert differences({}, {"a": []}) == ["a: the run has nothing, now {}"]
    assert differences({"a": 3}, {"a": {"b": 1}}) == [
        "a: the run has 3, now nothing",
        "a.b: the run has nothing, now 1",
    ]


def data(told_by: str, **others: Any) -> dict[str, Any]:
    """A description of data: ``told_by`` "content", as earlier versions wrote it, or "samples"."""
    return {"class": "Images", "length": 60, "indices": "a" * 64, "targets": "b" * 64, told_by: "c" * 64, **others}


def test_data_described_by_an_earlier_version_are_compared_by_what_both_know() -> None:
    """Wherever such a description stands."""

    def run(told_by: str, **others: Any) -> dict[str, Any]:
        own = data(told_by, **others)
        return {"data": own, "validation": own, "evaluations": [own, own], "reference": own}

    assert differences(run("content"), run("samples")) == []
    assert differences(data("content"), data("samples")) == []
    assert differences(run("content"), run("samples", length=61, targets=None)) == [
        f"{place}.{line}"
        for place in ("data", "evaluations.0", "evaluations.1", "reference", "validation")
        for line in ("length: the run has 60, now 61", "targets: the run has bbbbbbbbbbbb…, now None")
    ]


def test_descriptions_of_one_version_are_compared_whole() -> None:
    content, samples = "content: the run has cccccccccccc…, now ", "samples: the run has cccccccccccc…, now "
    assert differences(data("content"), data("content", content="d" * 64)) == [f"{content}dddddddddddd…"]
    assert differences(data("samples"), data("samples", samples="d" * 64)) == [f"{samples}dddddddddddd…"]
    assert [line.partition(":")[0] for line in differences(data("samples"), data("content"))] == ["content", "samples"]
    # A user's own values of these names are no data.
    assert len(differences({"content": 1}, {"samples": 2})) == 2
    assert len(differences({"reference": data("content")}, {"reference": "d" * 64})) == 6
