"""The probe: its taps, its features, and a short training that makes it a classifier."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from beeline.config import ProbeNetworkConfig
from beeline.features import bilinear
from beeline.features.probe import Probe, train_probe


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    scaled = np.asarray(images, np.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return torch.from_numpy(scaled), torch.from_numpy(np.asarray(labels, np.int64))


def fresh_probe(seed: int, widths: tuple[int, ...] = (16, 32, 32), strides: tuple[int, ...] = (1, 2, 1)) -> Probe:
    torch.manual_seed(seed)
    return Probe(ProbeNetworkConfig(widths=widths, strides=strides), channels=1, num_classes=10)


def test_taps_and_features(probe: Probe) -> None:
    images = torch.rand(5, 1, 8, 8)
    taps = probe.taps(images)
    assert [tuple(tap.shape) for tap in taps] == [(5, 8, 8, 8), (5, 12, 4, 4), (5, 16, 4, 4)]
    assert tuple(tap.shape[1] for tap in taps) == probe.tap_channels
    torch.testing.assert_close(probe.features(images), taps[-1].mean(dim=(2, 3)))
    assert probe(images).shape == (5, 10)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations(activation: str) -> None:
    config = ProbeNetworkConfig(widths=(8,), strides=(1,), activation=activation)  # pyright: ignore[reportArgumentType]
    (tap,) = Probe(config, channels=1, num_classes=2).requires_grad_(False).taps(torch.randn(4, 1, 8, 8))
    lowest = {"relu": (-0.0, 0.0), "silu": (-0.2785, -0.2), "gelu": (-0.171, -0.12)}[activation]
    assert lowest[0] <= float(tap.min()) <= lowest[1]


def test_a_short_training_learns_digits(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    probe = fresh_probe(0, widths=(32, 64, 64, 64), strides=(1, 1, 2, 1))
    accuracy = train_probe(probe, *digits, iterations=150, batch_size=96, lr=6e-3, seed=0)
    assert 0.9 < accuracy <= 1
    assert not probe.training
    assert not any(parameter.requires_grad for parameter in probe.parameters())


def test_weights_that_are_not_finite_have_no_accuracy(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert math.isnan(train_probe(fresh_probe(0), *digits, iterations=5, batch_size=32, lr=1e30, seed=0))


def test_random_labels_cannot_be_held_out_accurately(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Held-out accuracy is measured on images that were not used in training."""
    images, labels = digits
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert train_probe(fresh_probe(0), images, shuffled, iterations=60, batch_size=64, lr=4e-3, seed=0) < 0.3


def test_training_is_a_function_of_weights_and_seed(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    def weights(seed: int) -> torch.Tensor:
        probe = fresh_probe(0)
        train_probe(probe, *digits, iterations=5, batch_size=32, lr=4e-3, seed=seed)
        return probe.head.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(24, 24), (5, 14), (8, 16)])
def test_bilinear_is_pytorchs_interpolation(size: tuple[int, int], align_corners: bool) -> None:
    maps = torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)
    made = bilinear(maps, size, align_corners=align_corners)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)
    towards = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(of, maps, towards)[0] for of in (made, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
