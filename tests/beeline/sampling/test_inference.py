"""Faster ways to run a network give the same images, within their precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from beeline.denoiser import Denoiser
from beeline.sampling import Sampling, sample
from beeline.sampling.inference import prepare


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
def test_policies_agree_with_the_plain_network(
    make_denoiser: Callable[..., Denoiser], kind: str, precision: str, tolerance: float
) -> None:
    model = make_denoiser(kind=kind, label_dim=4, model_channels=64 if kind == "adm" else 16)
    fast = prepare(model, precision=precision)  # pyright: ignore[reportArgumentType]
    x, sigma, labels = torch.randn(5, 2, 8, 8), torch.rand(5) + 0.1, torch.arange(5) % 4
    expected, found = model(x, sigma, labels), fast(x, sigma, labels)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert precision == "fp32" or not torch.equal(found, expected)
    assert next(model.parameters()).dtype == torch.float32  # the model itself is left as it was


def test_a_short_batch_is_filled_up(make_denoiser: Callable[..., Denoiser]) -> None:
    model = make_denoiser(label_dim=4)
    seen = []
    fast = prepare(model, batch_size=4)
    inner = fast.model.network
    assert isinstance(inner, torch.nn.Module)
    inner.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    labels = torch.tensor([1, 2, 3])
    images = sample(fast, range(3), labels, Sampling(num_steps=3), seed=0)
    torch.testing.assert_close(images, sample(model, range(3), labels, Sampling(num_steps=3), seed=0), atol=1e-4, rtol=1e-4)
    assert set(seen) == {4}


@pytest.mark.slow
def test_compiled(make_denoiser: Callable[..., Denoiser]) -> None:
    model = make_denoiser()
    fast = prepare(model, compiled=True, batch_size=4)
    images = sample(fast, range(3), None, Sampling(num_steps=3), seed=0)
    torch.testing.assert_close(images, sample(model, range(3), None, Sampling(num_steps=3), seed=0), atol=1e-4, rtol=1e-4)
