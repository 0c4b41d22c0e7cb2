"""What can be given by name, as a person or a script asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.benchmarks import BENCHMARKS
from distributed_eg.cli import main


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The lines by their names, and what people read."""
    main([*arguments, "--json"])
    printed = capsys.readouterr()
    (lines,) = json.loads(printed.out.splitlines()[-1]).values()
    return {line["name"]: line for line in lines}, printed.err


def test_benchmarks_are_listed_with_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "usps.bz2").touch()
    found, read = answer(capsys, "benchmarks", "--data", str(tmp_path))
    assert {*BENCHMARKS, "folder:PATH", "hf:PATH", "medmnist:pathmnist"} <= found.keys()
    assert (found["split-usps"]["is_there"], found["split-svhn"]["is_there"]) == (True, False)
    assert [found[name]["num_tasks"] for name in ("embedded", "split-mnist+fashion", "split-food101")] == [8, 10, 10]
    assert all(name in read for name in ("split-gtsrb", "usps.bz2", "pairs:NAME", "a+b+c"))
    assert list(tmp_path.iterdir()) == [tmp_path / "usps.bz2"]
    assert answer(capsys, "benchmarks")[0]["split-usps"]["is_there"] is None


def test_backbones_are_listed_and_those_named_tell_their_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "squeezenet1_1-b8a52dc0.pth").touch()
    found, read = answer(capsys, "backbones")
    assert len(found) > 50
    assert [found[name]["has_weights"] for name in ("squeezenet1_1", "resnet18")] == [True, False]
    assert (found["resnet18"]["num_parameters"], found["resnet18"]["feature_shape"]) == (11_689_512, None)
    assert "efficientnet_lite0" in read
    named, read = answer(capsys, "backbones", "squeezenet1_1", "resnet18", "--image-size", "64")
    assert list(named) == ["squeezenet1_1", "resnet18"]
    assert (named["squeezenet1_1"]["layer"], named["resnet18"]["layer"]) == ("features", "layer4")
    assert named["resnet18"]["feature_shape"] == [512, 2, 2]
    assert "512×2×2 = 2,048" in read


def test_the_parameters_of_the_packaged_backbone_are_counted_right() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra demo is not installed")
    from distributed_eg.method.backbone import build_network
    from distributed_eg.method.backbone_list import listed_backbones

    network = build_network("efficientnet_lite0", pretrained=False, weights=None, seed=0)
    (line,) = listed_backbones(["efficientnet_lite0"])
    assert line.num_parameters == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["benchmarks", "--data", "nowhere"], "there is no such folder"),
        (["backbones", "resnt18"], "the nearest are resnet18"),
        (["backbones", "alexnet", "--image-size", "8"], "cannot take images of shape (3, 8, 8)"),
        (["run", "--benchmark", "split-cifar"], "the nearest are split-cifar10"),
        (["run", "--benchmark", "split-mnist", "--classes-per-task", "1"], "classes_per_task is 1"),
        (["eval", "nowhere", "--benchmark", "folder:nothing"], "needs the folder nothing"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert list(tmp_path.iterdir()) == []
