"""Discriminators: shapes, trained parameters, fixed projections, and spectral norms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from beeline.config import ProbeNetworkConfig
from beeline.features import FeatureNetwork
from beeline.features.probe import Probe
from beeline.objectives.discriminator import Discriminator, DownHead, Projection

PLACES = 8 * 8 + 4 * 4 + 4 * 4  # the probe's taps have strides 1, 2, 2


class Pyramid(torch.nn.Module):
    """A frozen substitute for a pretrained backbone: four taps at strides 4, 8, 16 and 32."""

    tap_channels, tap_strides, tap_weights = (6, 8, 10, 12), (4, 8, 16, 32), None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(3, width, stride, stride) for width, stride in zip(self.tap_channels, (4, 8, 16, 32), strict=True)
        )
        self.eval().requires_grad_(False)

    def taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [conv(images) for conv in self.convs]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images(channels: int = 1, side: int = 8, count: int = 4) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=seeded()) * 2 - 1


def make(networks: dict[str, FeatureNetwork | None], shape: tuple[int, int, int], num_classes: int = 0) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(networks, image_shape=shape, num_classes=num_classes, policy=(), side=128, width=8)


def classes(count: int = 4) -> torch.Tensor:
    return torch.eye(3)[torch.arange(count) % 3]


def test_a_probe_gives_logits_of_every_place_of_every_tap(probe: Probe) -> None:
    critic = make({"probe": probe}, (1, 8, 8))
    (logits,) = critic(critic.look(images(), seeded()), None)
    assert logits.shape == (4, PLACES)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_backbone_gives_a_logit_of_each_scale(side: int, num_classes: int) -> None:
    """At 128 pixels: features of 64, 32, 16 and 8 pixels, halved 4, 3, 2 and 1 times, then a 4x4 convolution."""
    critic = make({"a": Pyramid(), "b": Pyramid()}, (3, side, side), num_classes)
    look = critic.look(images(3, side), seeded())
    assert [tuple(part.shape[1:]) for part in look[0]] == [(64, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
    logits = critic(look, classes() if num_classes else None)
    assert [tuple(part.shape) for part in logits] == [(4, 4), (4, 4)]


@pytest.mark.parametrize(("side", "places"), [(8, 1), (16, 25), (32, 25), (64, 25)])
def test_a_discriminator_from_scratch(side: int, places: int) -> None:
    critic = make({"scratch": None}, (3, side, side), 3)
    (logits,) = critic(critic.look(images(3, side), seeded()), classes())
    assert logits.shape == (4, places)
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_a_projection_mixes_channels_and_then_scales_from_the_top_down() -> None:
    torch.manual_seed(0)
    projection = Projection((6, 8, 10, 12))
    taps = Pyramid().taps(images(3, 64))
    above: torch.Tensor | None = None
    for level in (3, 2, 1, 0):
        across, out = projection.across_channels[level], projection.across_scales[level]
        assert isinstance(across, torch.nn.Conv2d)
        assert isinstance(out, torch.nn.Conv2d)
        assert across.bias is not None
        assert out.bias is not None
        mixed = torch.einsum("oi,bihw->bohw", across.weight[:, :, 0, 0], taps[level]) + across.bias[:, None, None]
        mixed = mixed if above is None else mixed + above
        large = F.interpolate(mixed, scale_factor=2, mode="bilinear", align_corners=True)
        above = torch.einsum("oi,bihw->bohw", out.weight[:, :, 0, 0], large) + out.bias[:, None, None]
        torch.testing.assert_close(projection(taps)[level], above, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="found 3"):
        Projection((1, 2, 3))


def test_a_head_sees_mostly_its_own_tap() -> None:
    """Measure the share of each tap in the variance of the first head's input, with unit-variance taps. With PyTorch's
    initialisation of convolutions, about 71 % come from its own tap and 2 % from the deepest. Kaiming's would give 8 % and 52
    %."""
    torch.manual_seed(0)
    projection = Projection((24, 40, 112, 320))
    taps = [torch.randn(2, width, 64 // 2**level, 64 // 2**level) for level, width in enumerate((24, 40, 112, 320))]
    without = projection([torch.zeros_like(tap) for tap in taps])[0]
    shares = []
    for level in range(4):
        alone = [tap if k == level else torch.zeros_like(tap) for k, tap in enumerate(taps)]
        shares.append(float((projection(alone)[0] - without).square().mean()))
    own, deepest = shares[0] / sum(shares), shares[3] / sum(shares)
    assert own > 0.6
    assert deepest < 0.05


class Tokens(Pyramid):
    """A frozen substitute for a vision transformer: four taps at stride 16."""

    tap_channels, tap_strides = (10,) * 4, (16,) * 4

    def __init__(self) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, 10, 16, 16) for _ in range(4)).requires_grad_(False)


def test_taps_of_a_transformer_become_a_pyramid_by_random_frozen_layers() -> None:
    critic = make({"vit": Tokens()}, (3, 32, 32), 3)
    (look,) = critic.look(images(3, 32), seeded())
    assert [tuple(part.shape[1:]) for part in look] == [(64, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
    frozen = {name: p for name, p in critic.named_parameters() if not p.requires_grad}
    shapes = {name.split("pyramid.levels.")[1]: tuple(p.shape) for name, p in frozen.items() if "pyramid" in name}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == {
        "0.0.weight": (96, 10, 1, 1), "0.1.weight": (96, 96, 4, 4),
        "1.0.weight": (192, 10, 1, 1), "1.1.weight": (192, 192, 2, 2),
        "2.0.weight": (384, 10, 1, 1),
        "3.0.weight": (768, 10, 1, 1), "3.1.weight": (768, 768, 3, 3),
    }  # fmt: skip
    assert frozen.keys() <= critic.state_dict().keys()
    bound = 10**-0.5  # of PyTorch's default for a 1x1 convolution of 10 channels
    first = frozen["critics.vit.pyramid.levels.3.0.weight"]
    assert float(first.abs().max()) <= bound
    assert float(first.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_class_embeddings_start_at_unit_scale(probe: Probe) -> None:
    critic = make({"probe": probe, "a": Pyramid(), "scratch": None}, (3, 32, 32), 1000)
    embeddings = [p for name, p in critic.named_parameters() if "embed" in name]
    assert len(embeddings) == 3 + 4 + 1
    for weight in embeddings:
        assert float(weight.detach().std()) == pytest.approx(1, rel=0.05)
    assert not any(name.endswith("out.bias") for name, _ in critic.named_parameters())


def test_projections_are_frozen_random_and_saved() -> None:
    critic = make({"a": Pyramid(), "b": Pyramid()}, (3, 32, 32))
    frozen = {name for name, parameter in critic.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in dict(critic.named_parameters()) if ".projection." in name}
    state = critic.state_dict()
    assert frozen <= state.keys()
    name = "projection.across_scales.0.weight"
    assert not torch.equal(state[f"critics.a.{name}"], state[f"critics.b.{name}"])
    assert not any("_network" in name or "convs" in name for name in state)


def test_conditional_logits_are_products_with_the_classes_embedding() -> None:
    torch.manual_seed(0)
    head = DownHead((8, 16), 3).eval()
    features = torch.randn(2, 8, 8, 8)
    maps = head.out(head.down(features))
    assert maps.shape == (2, 64, 1, 1)
    assert head.embed is not None
    embedded = head.embed.weight[:, [2, 0]].T
    wanted = (maps.flatten(1) * embedded).sum(dim=1) / 8
    torch.testing.assert_close(head(features, torch.eye(3)[[2, 0]]).flatten(), wanted, rtol=1e-3, atol=1e-4)


def test_classes_change_the_logits(probe: Probe) -> None:
    critic = make({"probe": probe, "scratch": None}, (1, 8, 8), 3).eval()
    look = critic.look(images(), seeded())
    for a, b in zip(critic(look, torch.eye(3)[[0] * 4]), critic(look, torch.eye(3)[[1] * 4]), strict=True):
        assert not torch.allclose(a, b)


def test_each_critic_draws_its_own_augmentation(probe: Probe) -> None:
    critic = make({"scratch": None, "probe": probe}, (1, 8, 8))
    critic.policy = ("color", "translation", "cutout")
    a, b = (critic.look(images(), generator) for generator in (seeded(), seeded()))
    assert torch.equal(a[0][0], b[0][0])
    unchanged = critic.critics["probe"]
    assert not torch.equal(a[1][0], unchanged.look(a[0][0])[0])  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_frozen_network_is_no_part_of_it(probe: Probe, num_classes: int) -> None:
    critic = make({"probe": probe}, (1, 8, 8), num_classes)
    frozen = {id(parameter) for parameter in probe.parameters()}
    assert not frozen & {id(parameter) for parameter in critic.parameters()}
    assert all(name.startswith("critics.probe.heads.") for name in critic.state_dict())
    critic.train()
    assert not probe.training


def test_gradients_reach_images_and_heads_but_not_the_network(probe: Probe) -> None:
    pyramid = Pyramid()
    for network, shape in ((probe, (1, 8, 8)), (pyramid, (3, 32, 32))):
        critic = make({"probe" if network is probe else "a": network}, shape, 3)
        seen = images(shape[0], shape[1]).requires_grad_()
        torch.cat(critic(critic.look(seen, seeded()), classes()), dim=1).square().mean().backward()
        assert seen.grad is not None
        assert (seen.grad != 0).any()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in critic.parameters())
        assert isinstance(network, torch.nn.Module)
        assert all(parameter.grad is None for parameter in network.parameters())


def test_spectral_norms_become_one() -> None:
    config = ProbeNetworkConfig(widths=(8, 12, 16), strides=(1, 2, 1))
    colour = Probe(config, channels=3, num_classes=3).eval().requires_grad_(False)
    critic = make({"probe": colour, "a": Pyramid(), "scratch": None}, (3, 32, 32), 3).train()
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.requires_grad:
                parameter.mul_(7)
    look = critic.look(images(3, 32, count=2), seeded())
    for _ in range(40):
        critic(look, classes(2))
    layers = [layer for layer in critic.modules() if hasattr(layer, "parametrizations")]
    assert len(layers) == 9 + (4 + 3 + 2 + 1) + 4 + (1 + 2 + 1)
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        assert float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2)) == pytest.approx(1, rel=0.1)
