"""The run's metrics, Prometheus' configuration, and Grafana's dashboard, which shows only what there is."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import REPOSITORY, LocalCluster

PROMETHEUS = REPOSITORY / "cluster/prometheus.yml"
DASHBOARD = json.loads((REPOSITORY / "cluster/grafana-dashboard.json").read_text())
FUNCTIONS = {"sum", "by", "rate", "increase", "histogram_quantile", "label_values", "le", "stage", "state", "run", "m"}


def expressions() -> list[str]:
    """All that the dashboard asks Prometheus for."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]


def metrics() -> set[str]:
    """Names of metrics in those expressions, and in Prometheus' configuration."""
    words = set(re.findall(r"[a-z_]+", " ".join(expressions()))) - FUNCTIONS
    return words | set(re.findall(r"\bray_\w+", PROMETHEUS.read_text()))


@pytest.mark.ray
def test_every_metric_that_is_shown_is_there(local_cluster: LocalCluster, tmp_path: Path) -> None:
    """After a run of two tasks that lost a worker, and its evaluation."""
    script = REPOSITORY / "tests/cluster/measured_run.py"
    done = local_cluster.submit("python", str(script), str(tmp_path), *sorted(metrics()))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"ray_')]
    found: dict[str, list[tuple[dict[str, str], float]]] = json.loads(line)
    assert {name for name, samples in found.items() if not samples} == set()

    def told(name: str, label: str) -> dict[str, float]:
        return {labels[label]: value for labels, value in found[f"ray_distributed_eg_{name}"]}

    assert told("tasks", "state") == {"running": 0, "waiting": 0, "failed": 0, "committed": 2}
    stages = {"features", "autoencoder", "relate", "expert"}
    assert told("stage_seconds_count", "stage") == dict.fromkeys(stages, 2)
    assert all(seconds > 0 for seconds in told("stage_seconds_sum", "stage").values())
    assert told("stage_retries_total", "stage") == {"expert": 1}
    (samples,), (rate,) = told("gate_samples_total", "run").values(), told("gate_samples_per_second", "run").values()
    assert samples == 48
    assert 0 < rate < 48_000
    # Two epochs of three for each expert; the attempt that died does not count, and the next one goes on from its last.
    (checkpoints,) = told("checkpoints_total", "run").values()
    assert checkpoints == 2


def test_prometheus_takes_its_configuration() -> None:
    (job,) = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run([promtool, "check", "config", PROMETHEUS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_dashboard_hangs_together() -> None:
    """Panels have numbers of their own and do not lie over each other; all ask the source that is chosen."""
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(asks["datasource"] == chosen for panel in panels for asks in [panel, *panel["targets"]])
    assert {v["name"] for v in DASHBOARD["templating"]["list"]} == {"datasource", "run"}
    own = [expression for expression in expressions() if "distributed_eg" in expression]
    assert all('{run=~"$run"}' in expression or "label_values" in expression for expression in own)
