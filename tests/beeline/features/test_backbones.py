"""Backbones compute the same as the original packages, stay frozen, and pass gradients to the images."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beeline.errors import BeelineError
from beeline.features.backbones import BACKBONES, VGG16, VGG16_AVG, TimmBackbone, build_backbone, with_pooling_of
from beeline.features.torchvision_shim import import_torchvision
from beeline.objectives.perceptual import perceptual

LITE0, DEIT = "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"
STRIDES = {"vgg16": (1, 2, 4, 8, 16), LITE0: (4, 8, 16, 32), DEIT: (16,) * 4}
CHANNELS = {"vgg16": (64, 128, 256, 512, 512), LITE0: (24, 40, 112, 320), DEIT: (768,) * 4}
Backbone = VGG16 | TimmBackbone


@pytest.fixture(scope="module")
def backbone() -> Callable[[str], Backbone]:
    """Build each backbone once, with random weights and with running statistics that affect EfficientNet's output."""
    made: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in made:
            torch.manual_seed(1)
            made[name] = build_backbone(name)
            for key, buffer in made[name].named_buffers():
                if key.endswith(("running_mean", "running_var")):
                    buffer.copy_(torch.rand(buffer.shape) + 0.1)
        return made[name]

    return get


def images(side: int, channels: int = 3, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, side, side, generator=generator) * 2 - 1


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


@pytest.fixture(scope="module")
def lpips_vgg() -> Any:
    """The lpips package's own metric: random VGG16, learned linear layers."""
    import_torchvision()
    import lpips

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # lpips calls it in an old way
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False)


@pytest.fixture(scope="module")
def vgg_of_lpips(lpips_vgg: Any) -> VGG16:
    """Our network with the package's weights."""
    ours = VGG16()
    trunk = {f"features.{key.split('.', 1)[1]}": tensor for key, tensor in lpips_vgg.net.state_dict().items()}
    lins = {f"lins.{k}": layer.model[-1].weight.reshape(-1) for k, layer in enumerate(lpips_vgg.lins)}
    ours.load_state_dict(trunk | lins)
    return ours


@pytest.mark.parametrize("channels", [3, 1])
def test_vgg16_with_its_weights_is_lpips(channels: int, lpips_vgg: Any, vgg_of_lpips: VGG16) -> None:
    a, b = images(64, channels), images(64, channels, seed=1)
    total = torch.zeros(2)
    for ours, theirs, weights in zip(vgg_of_lpips.taps(a), vgg_of_lpips.taps(b), vgg_of_lpips.tap_weights, strict=True):
        assert (weights >= 0).all()
        difference = (unit(ours) - unit(theirs)).square()
        total += (weights[:, None, None] * difference).sum(dim=1).mean(dim=(1, 2))
    wanted = lpips_vgg(a, b).reshape(2)
    assert (wanted > 0.01).all()
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(perceptual(vgg_of_lpips, a, b), wanted, rtol=1e-4, atol=0)


def test_vgg16_with_average_pooling(lpips_vgg: Any, vgg_of_lpips: VGG16) -> None:
    """LPIPS as CTM uses it: the package's network with its pooling replaced."""
    theirs, ours = copy.deepcopy(lpips_vgg), with_pooling_of(copy.deepcopy(vgg_of_lpips), VGG16_AVG)
    for k in range(1, 6):
        part = getattr(theirs.net, f"slice{k}")
        for name, layer in part.named_children():
            if isinstance(layer, torch.nn.MaxPool2d):
                setattr(part, name, torch.nn.AvgPool2d(2))
    a, b = images(64), images(64, seed=1)
    wanted = theirs(a, b).reshape(2)
    torch.testing.assert_close(perceptual(ours, a, b), wanted, rtol=1e-4, atol=0)
    assert not torch.allclose(perceptual(vgg_of_lpips, a, b), wanted, rtol=1e-2)
    made = build_backbone(VGG16_AVG)
    assert isinstance(made, VGG16)
    assert made.pooling == "average"


@pytest.mark.parametrize(
    ("name", "side"), [("vgg16", 64), ("vgg16", 128), (LITE0, 64), (LITE0, 128), (LITE0, 224), (DEIT, 64), (DEIT, 128)]
)
def test_shapes(name: str, side: int, backbone: Callable[[str], Backbone]) -> None:
    network = backbone(name)
    with torch.inference_mode():
        taps = network.taps(images(side))
    wanted = [(2, width, side // stride, side // stride) for width, stride in zip(CHANNELS[name], STRIDES[name], strict=True)]
    assert [tuple(tap.shape) for tap in taps] == wanted
    assert network.tap_channels == CHANNELS[name]
    assert network.tap_strides == STRIDES[name]
    assert all(tap.isfinite().all() for tap in taps)
    assert network.name == name


def test_sides_may_differ(backbone: Callable[[str], Backbone]) -> None:
    with torch.inference_mode():
        taps = backbone(DEIT).taps(torch.zeros(1, 3, 32, 96))
    assert [tuple(tap.shape[2:]) for tap in taps] == [(2, 6)] * 4


def plain(name: str, network: TimmBackbone, **arguments: Any) -> Any:
    """timm's own network with the same weights, after its own scaling of images in [0, 1]."""
    import timm

    made: Any = timm.create_model(name, **arguments)
    weights = {key.removeprefix("network."): tensor for key, tensor in network.state_dict().items()}
    if not arguments.get("features_only"):
        weights = {key.removeprefix("model."): tensor for key, tensor in weights.items()}
    missing = made.load_state_dict(weights, strict=False, assign=True).missing_keys
    assert all(key.startswith(("norm.", "head", "conv_head", "bn2", "classifier")) for key in missing)
    mean, std = (torch.tensor(made.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return lambda x: made.eval()(((x + 1) / 2 - mean) / std), made


def test_lite0_taps_are_those_of_timm(backbone: Callable[[str], Backbone]) -> None:
    network = backbone(LITE0)
    assert isinstance(network, TimmBackbone)
    theirs, made = plain(LITE0, network, features_only=True, out_indices=(1, 2, 3, 4))
    assert made.feature_info.reduction() == [4, 8, 16, 32]
    x = images(96)
    with torch.inference_mode():
        for ours, wanted in zip(network.taps(x), theirs(x), strict=True):
            torch.testing.assert_close(ours, wanted)
        scaled_otherwise = made(x / 2)
    assert not torch.allclose(network.taps(x)[0], scaled_otherwise[0], rtol=1e-2)


def test_deit_taps_at_224_are_the_blocks_of_the_fixed_size_network(backbone: Callable[[str], Backbone]) -> None:
    network = backbone(DEIT)
    assert isinstance(network, TimmBackbone)
    theirs, made = plain(DEIT, network, weight_init="skip")
    assert not made.dynamic_img_size
    outputs: list[torch.Tensor] = []
    for k in (2, 5, 8, 11):
        made.blocks[k].register_forward_hook(lambda *found: outputs.append(found[2]))
    x = images(224, batch=1)
    with torch.inference_mode():
        theirs(x)
        taps = network.taps(x)
    for tap, tokens in zip(taps, outputs, strict=True):
        wanted = tokens[:, 2:].transpose(1, 2).reshape(1, 768, 14, 14)  # without the class and distillation tokens
        torch.testing.assert_close(tap, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_but_for_the_images(name: str, backbone: Callable[[str], Backbone]) -> None:
    network = backbone(name)
    torch.nn.ModuleList([network]).train()
    assert not any(module.training for module in network.modules())
    before = {key: tensor.clone() for key, tensor in network.named_buffers()}
    x = images(32, 1).requires_grad_()
    taps = network.taps(x)
    torch.stack([(tap * torch.randn_like(tap)).mean() for tap in taps]).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in network.named_buffers())


@pytest.mark.parametrize("name", BACKBONES)
def test_grey_images_are_repeated(name: str, backbone: Callable[[str], Backbone]) -> None:
    grey = images(32, 1)
    with torch.inference_mode():
        for ours, wanted in zip(backbone(name).taps(grey), backbone(name).taps(grey.repeat(1, 3, 1, 1)), strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg16", (1, 3, 8, 64), "sides of 16 or more"),
        ("vgg16", (1, 2, 64, 64), "1 or 3"),
        (LITE0, (1, 3, 64, 48), "multiples of 32"),
        (DEIT, (3, 64, 64), "1 or 3"),
    ],
)
def test_other_shapes_are_refused(name: str, shape: tuple[int, ...], message: str, backbone: Callable[[str], Backbone]) -> None:
    with pytest.raises(ValueError, match=message):
        backbone(name).taps(torch.zeros(shape))


def test_only_lpips_has_tap_weights(backbone: Callable[[str], Backbone]) -> None:
    weights = backbone("vgg16").tap_weights
    assert weights is not None
    assert tuple(len(weight) for weight in weights) == CHANNELS["vgg16"]
    assert backbone(LITE0).tap_weights is None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BeelineError, match="'vgg19' is unknown; expected one of: vgg16, tf_efficientnet_lite0, deit_base"):
        build_backbone("vgg19")


SHIM = """
import sys
import torch
import beeline.features.torchvision_shim as shim, beeline.features.backbones, beeline.weights
assert not {"torchvision", "timm", "lpips"} & sys.modules.keys(), "importing the modules did something"

sys.path.insert(0, sys.argv[1])  # a torchvision that works
shim.import_torchvision()
assert sys.modules.pop("torchvision").__file__.startswith(sys.argv[1])
assert not hasattr(torch.ops.torchvision, "nms"), "declared without need"

sys.path.pop(0)
shim.import_torchvision()
shim.import_torchvision()
import timm
"""


def test_the_shim_declares_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").touch()
    command = [sys.executable, "-W", "error", "-c", SHIM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
