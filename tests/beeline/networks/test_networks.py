"""The networks: agreement with EDM's reference implementation, parameter counts and the resampling convolution."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from beeline.checkpoint import build
from beeline.config import NetworkConfig, from_dict
from beeline.denoiser import Denoiser
from beeline.networks.layers import Conv2d, xavier
from beeline.networks.songunet import SongUNet
from beeline.sampling.solvers import solve

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = ["ddpmpp_small_cond", "ddpmpp_small_uncond_augment", "adm_small_cond"]


def golden_weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).standard_normal(shape)
    if len(shape) > 1:
        values = values / math.sqrt(math.prod(shape[1:]))
    else:
        values = values * 0.1 + ("norm" in name and name.endswith("weight"))
    return torch.from_numpy(values).to(torch.float32)


Golden = tuple[dict[str, torch.Tensor], Denoiser, dict[str, list[int]]]


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Load the file's arrays, the denoiser with its weights, and its expected number of parameters."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        kwargs, names = json.loads(str(file["kwargs"])), json.loads(str(file["param_names"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if file[key].ndim}
    kind = {"SongUNet": "ddpmpp", "DhariwalUNet": "adm"}[kwargs.pop("model_type")]
    model = build(from_dict(NetworkConfig, {"kind": kind, **kwargs}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(golden_weights(name, tuple(parameter.shape)))
    return arrays, model.eval().requires_grad_(False), names


def test_parameter_names_and_shapes_are_those_of_edm(golden: Golden) -> None:
    _, model, names = golden
    assert {name: list(parameter.shape) for name, parameter in model.named_parameters()} == names


def test_denoised_images_are_those_of_edm(golden: Golden) -> None:
    arrays, model, _ = golden
    denoised = model(arrays["x"], arrays["sigma"], arrays.get("labels"))
    assert denoised.dtype == torch.float32
    assert (denoised - arrays["denoised"]).abs().max() <= 1e-5


def test_heun_samples_are_those_of_edm(golden: Golden) -> None:
    arrays, model, _ = golden
    images = solve(model, arrays["latents"], arrays.get("labels"), solver="heun", num_steps=18)
    assert (images - arrays["heun18"]).abs().max() <= 1e-4


CIFAR = {"kind": "ddpmpp", "img_resolution": 32, "img_channels": 3, "augment_dim": 9}
AFHQ = {**CIFAR, "img_resolution": 64, "channel_mult": [1, 2, 2, 2]}
IMAGENET = {
    "kind": "adm", "img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": 192,
    "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8],
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "count"),
    [(CIFAR, 55_733_891), ({**CIFAR, "label_dim": 10}, 55_735_299), (AFHQ, 61_805_571), (IMAGENET, 295_899_267)],
    ids=["cifar10-uncond", "cifar10-cond", "afhqv2-64", "imagenet-64"],
)
def test_parameter_counts_of_the_released_networks(config: dict, count: int) -> None:
    with torch.device("meta"):
        model = build(from_dict(NetworkConfig, config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    "channel_mult",
    [
        (2, 2, 2),
        (1, 2, 2),
    ],
)
def test_ncsnpp_builds_and_runs(make_denoiser: Callable[..., Denoiser], channel_mult: tuple[int, ...]) -> None:
    model = make_denoiser(kind="ncsnpp", channel_mult=channel_mult)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    low, high = model(x, torch.tensor(0.3)), model(x, torch.tensor(30.0))
    assert low.shape == x.shape
    assert low.isfinite().all()
    assert high.isfinite().all()
    assert not torch.allclose(low, high)
    assert "model.map_noise.freqs" in model.state_dict()


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
def test_augment_labels_change_nothing_when_none(make_denoiser: Callable[..., Denoiser], kind: str) -> None:
    model = make_denoiser(kind=kind, augment_dim=9)
    x, sigma = torch.randn(2, 2, 8, 8), torch.tensor([0.5, 5.0])
    without = model(x, sigma)
    assert (model(x, sigma, augment_labels=torch.zeros(2, 9)) == without).all()
    assert not torch.allclose(model(x, sigma, augment_labels=torch.ones(2, 9)), without)


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
def test_last_layer_makes_the_output(make_denoiser: Callable[..., Denoiser], kind: str) -> None:
    network = make_denoiser(kind=kind).model
    last_layer = network.last_layer
    assert isinstance(last_layer, torch.nn.Parameter)
    x = torch.randn(1, 2, 8, 8)
    assert (network(x, torch.zeros(1), None).std(dim=(2, 3)) > 1e-3).all()
    last_layer.zero_()
    assert torch.equal(network(x, torch.zeros(1), None).amax(dim=(2, 3)), network(x, torch.zeros(1), None).amin(dim=(2, 3)))


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
def test_the_bottleneck_is_the_end_of_the_encoder(make_denoiser: Callable[..., Denoiser], kind: str) -> None:
    model = make_denoiser(kind=kind)
    x, sigma = torch.randn(2, 2, 8, 8), torch.tensor([0.5, 5.0])
    seen: list[torch.Tensor] = []
    blocks = model.model.get_submodule("dec")
    blocks.get_submodule("4x4_in0").register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model(x, sigma)
    features = model.bottleneck(x, sigma)
    assert features.shape == (2, 32, 4, 4)
    assert torch.equal(features, seen[0])
    for parameter in blocks.parameters():
        parameter.zero_()
    assert torch.equal(model.bottleneck(x, sigma), features)


@pytest.mark.parametrize("kwargs", [{"embedding_type": "other"}, {"encoder_type": "skip"}, {"decoder_type": "skip"}])
def test_unknown_variants_are_refused(kwargs: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SongUNet(img_resolution=8, in_channels=1, out_channels=1, **kwargs)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_resampling_is_the_fir_filter(taps: tuple[int, ...], direction: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    layer = Conv2d(3, 3, 0, init=xavier(), resample_filter=taps, up=direction == "up", down=direction == "down")
    one = torch.tensor(taps) / sum(taps)
    kernel, pad = (one[:, None] * one).expand(3, 1, -1, -1), (len(taps) - 1) // 2
    if direction == "up":
        wanted = F.conv_transpose2d(x, kernel * 4, stride=2, padding=pad, groups=3)
    else:
        wanted = F.conv2d(x, kernel, stride=2, padding=pad, groups=3)
    assert torch.allclose(layer(x), wanted, atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_fused_downsampling_convolves_first(taps: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 8, 8)
    fused = Conv2d(3, 4, 3, init=xavier(), init_bias=xavier(), down=True, resample_filter=taps, fused=True)
    assert fused.weight is not None
    assert fused.bias is not None
    one = torch.tensor(taps) / sum(taps)
    pad = (len(taps) - 1) // 2
    wide = F.conv2d(x, fused.weight, padding=1 + pad)
    wanted = F.conv2d(wide, (one[:, None] * one).expand(4, 1, -1, -1), stride=2, groups=4) + fused.bias[:, None, None]
    assert fused(x).shape == (2, 4, 4, 4)
    assert torch.allclose(fused(x), wanted, atol=1e-5)


def test_up_and_down_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        Conv2d(1, 1, 3, init=xavier(), up=True, down=True)
