"""FD-loss: the distance is that of the metric, its gradient is right, memories cover what they should, resuming is exact."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import pytest
import small
import torch

from beeline import counting
from beeline.checkpoint import build
from beeline.config import OptimizerConfig, ProbeNetworkConfig
from beeline.errors import BeelineError, SettingError
from beeline.features import FeatureNetwork
from beeline.features.probe import Probe
from beeline.metrics.frechet import Statistics, frechet_distance
from beeline.objectives import Batch, Context, Needs, fd_loss
from beeline.objectives.fd_loss import FrechetLoss, FrechetLossConfig, Memory, distance, sums_of
from beeline.objectives.learner import Learner

REAL = np.random.default_rng(0).normal(size=(50, 4)) @ np.diag([1, 0.5, 2, 0.1]) + 0.3


def features(count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) * torch.tensor([1, 1, 0.5, 0.2]) + 0.1


def memory(real: np.ndarray = REAL, *, queue: int = 0, decay: float = 0.0) -> Memory:
    made = Memory(real.shape[1], queue=queue, decay=decay)
    made.learn(Statistics.of(real))
    return made


def closed_form(x: torch.Tensor) -> torch.Tensor:
    """d^2 between features (B, D) and REAL, written out with symmetric square roots."""
    real = torch.from_numpy(REAL)
    values, vectors = torch.linalg.eigh(real.T.cov())
    half = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(half @ x.T.cov() @ half).sqrt().sum()
    return (x.mean(dim=0) - real.mean(dim=0)).square().sum() + x.T.cov().trace() + real.T.cov().trace() - 2 * cross


def of(x: torch.Tensor, known: Memory) -> torch.Tensor:
    return distance(sums_of(x - known.mean, known.factor), known.factor)


def test_the_distance_is_that_of_the_metric() -> None:
    x, known = features(30), memory()
    assert float(of(x, known)) == pytest.approx(frechet_distance(Statistics.of(x.numpy()), Statistics.of(REAL)), rel=1e-6)
    assert float(of(torch.from_numpy(REAL), known)) == pytest.approx(0, abs=1e-6)
    assert float(distance(memory().add(x), known.factor)) == pytest.approx(float(of(x, known)), rel=1e-5)


def test_the_distance_of_few_images_and_of_dead_features_is_that_of_the_metric() -> None:
    real = np.concatenate([REAL, np.zeros((50, 1))], axis=1)
    x = torch.cat([features(3), torch.zeros(3, 1)], dim=1).double().requires_grad_(True)
    found = of(x, memory(real))
    expected = frechet_distance(Statistics.of(x.detach().numpy()), Statistics.of(real))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_the_gradient_is_that_of_the_closed_form_and_of_differences() -> None:
    known, x = memory(), features(12).requires_grad_(True)
    (ours,) = torch.autograd.grad(of(x, known), x)
    (theirs,) = torch.autograd.grad(closed_form(x), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    direction, step = features(12, seed=2), 1e-5
    slope = (of(x.detach() + step * direction, known) - of(x.detach() - step * direction, known)) / (2 * step)
    assert float((ours * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_it_scales_with_the_features(scale: float) -> None:
    x, known, scaled = features(12), memory(), memory(scale * REAL)
    assert float(of(scale * x, scaled)) == pytest.approx(scale**2 * float(of(x, known)), rel=1e-6)


def test_a_generator_converges_to_the_moments_of_the_data() -> None:
    known = memory()
    matrix, shift = torch.eye(4).double().requires_grad_(True), torch.zeros(4).double().requires_grad_(True)
    optimizer = torch.optim.Adam([matrix, shift], lr=0.05)
    torch.manual_seed(0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        x = torch.randn(400, 4).double() @ matrix + shift
        optimizer.zero_grad()
        distance(known.add(x), known.factor).backward()
        optimizer.step()
    real = torch.from_numpy(REAL)
    torch.testing.assert_close(shift.detach(), real.mean(dim=0), atol=0.1, rtol=0)
    torch.testing.assert_close((matrix.T @ matrix).detach(), real.T.cov(), atol=0.2, rtol=0)


def test_a_queue_covers_the_latest_features() -> None:
    """Also where it is not a multiple of the batch, and in the gradient, which is that of this batch alone."""
    known, parts = memory(queue=10), [features(4, seed=k) for k in range(7)]
    for number, part in enumerate(parts):
        part.requires_grad_(True)
        latest = torch.cat(parts[: number + 1])[-10:]
        found, expected = distance(known.add(part), known.factor), of(latest, known)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        ours, theirs = (torch.autograd.grad(value, part)[0] for value in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    with pytest.raises(BeelineError, match="a queue of 10 features cannot take 11 images"):
        known.add(features(11))


def test_an_average_discounts_earlier_features() -> None:
    """The statistics are those of weighted features: mean, unbiased covariance, and no memory at decay 0."""
    known, parts, decay = memory(decay=0.5), [features(6, seed=k) for k in range(3)], 0.5
    sums = [known.add(part) for part in parts][-1]
    weights = torch.tensor([decay**2, decay, 1.0]).double().repeat_interleave(6)
    x = torch.cat(parts) - known.mean
    mean = (weights[:, None] * x).sum(dim=0) / weights.sum()
    torch.testing.assert_close(sums.first / sums.weight, mean, rtol=1e-5, atol=1e-6)
    centred = x - mean
    scale = weights.sum() - weights.square().sum() / weights.sum()
    covariance = (weights[:, None] * centred).T @ centred / scale
    factor = known.factor
    product = factor.T @ covariance @ factor
    expected = mean.square().sum() + covariance.trace() + factor.square().sum()
    expected = expected - 2 * torch.linalg.eigvalsh(product).sqrt().sum()
    assert float(distance(sums, factor)) == pytest.approx(float(expected), rel=1e-4)
    assert float(distance(memory(decay=0.0).add(parts[0]), factor)) == pytest.approx(float(of(parts[0], known)), rel=1e-4)


@pytest.mark.parametrize("settings", [{"queue": 10}, {"decay": 0.5}])
def test_features_that_are_not_finite_are_not_remembered(settings: dict[str, Any]) -> None:
    known = memory(**settings)
    known.add(features(4))
    before = copy.deepcopy(known.state_dict())
    broken = features(4, seed=2)
    broken[1, 2] = math.nan
    assert math.isnan(float(distance(known.add(broken), known.factor)))
    for name, value in known.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_real_images_must_differ() -> None:
    with pytest.raises(BeelineError, match="a covariance of trace 0"):
        memory(np.ones((5, 4)))


def context(labels: int = small.CLASSES, images: Callable[[], Iterable[torch.Tensor]] | None = None) -> Context:
    torch.manual_seed(0)
    student = build(replace(small.NETWORK, label_dim=labels, dropout=0.1)).train()
    networks = {
        name: Probe(ProbeNetworkConfig(widths=(8, width), strides=(1, 2)), channels=1, num_classes=3).requires_grad_(False)
        for name, width in (("probe", 8), ("vgg16", 4))
    }
    features = cast(dict[str, FeatureNetwork], networks)
    real = [torch.rand(20, 1, 8, 8) - 0.5, torch.rand(13, 1, 8, 8) - 0.5]
    return Context(
        image_shape=(1, 8, 8),
        num_classes=labels,
        models={},
        features=features,
        average=student,
        images=images or (lambda: real),
    )


def train(
    config: FrechetLossConfig, made: Context, steps: Iterable[int], learner: Learner, objective: FrechetLoss
) -> list[float]:
    classes = torch.eye(small.CLASSES)[torch.arange(10) % small.CLASSES] if made.num_classes else None
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)
        noise = torch.randn(10, 1, 8, 8, generator=generator)
        figures = objective.backward(learner, None, Batch(size=10, step=step, total=9, noise=noise, labels=classes), generator)
        losses.append(float(figures["frechet_probe"]))
        norms = learner.update(step, 9)
        assert norms["grad_norm"] > 0
        assert norms["skipped"] == 0
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("labels", [small.CLASSES, 0])
@pytest.mark.parametrize("settings", [{}, {"queue": 25}, {"decay": 0.5}])
def test_a_student_trains(precision: Literal["fp32", "bf16"], labels: int, settings: dict[str, Any]) -> None:
    config, made = FrechetLossConfig(networks=("probe", "vgg16"), **settings), context(labels)
    before = copy.deepcopy(made.average)
    learner = Learner(made.average, OptimizerConfig(lr=1e-2), precision=precision)
    losses = train(config, made, range(4), learner, config.build(made))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), made.average.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"queue": 25}, {"decay": 0.5}])
def test_a_resumed_run_is_exact_and_does_not_read_images_again(settings: dict[str, Any]) -> None:
    config, made = FrechetLossConfig(**settings), context()
    learner, objective = Learner(made.average, OptimizerConfig()), config.build(made)
    train(config, made, range(3), learner, objective)
    saved = copy.deepcopy((learner.state_dict(), objective.state().state_dict()))
    undisturbed = train(config, made, range(3, 6), learner, objective)

    def refuse() -> Iterable[torch.Tensor]:
        raise AssertionError("the images are read again")

    again = context(images=refuse)
    learner, objective = Learner(again.average, OptimizerConfig()), config.build(again)
    learner.load_state_dict(saved[0])
    objective.state().load_state_dict(saved[1])
    assert train(config, again, range(3, 6), learner, objective) == undisturbed
    for a, b in zip(made.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_networks_count_relative_to_their_spread_and_micro_batches_by_their_weight() -> None:
    """The gradient to the images is that of the formula."""
    config, made = FrechetLossConfig(networks=("probe", "vgg16")), context()
    images = (torch.rand(10, 1, 8, 8) - 0.5).requires_grad_(True)
    batch = Batch(size=10, step=0, total=1, weight=0.25, noise=torch.zeros(10, 1, 8, 8))
    objective = config.build(made)
    figures = objective.backward(cast(Learner, lambda *_: images), None, batch, torch.Generator())
    real, terms = torch.cat(list(made.images())), {}
    for name, network in made.features.items():
        theirs, ours = (cast(Probe, network).features(x).double() for x in (real, images))
        d2 = of(ours, memory(theirs.numpy()))
        assert float(figures[f"frechet_{name}"]) == pytest.approx(float(d2.detach()), rel=1e-4)
        terms[name] = d2 / theirs.T.cov().trace()
    (expected,) = torch.autograd.grad(0.25 * torch.stack(list(terms.values())).mean(), images)
    assert images.grad is not None
    torch.testing.assert_close(images.grad, expected, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_two_ranks_is_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their average, as DDP forms it. Each rank also reads half of the real images."""
    everything = context()
    images = torch.rand(10, 1, 8, 8) - 0.5
    halves, real = images.split(5), list(everything.images())
    config = FrechetLossConfig()
    probe = cast(Probe, everything.features["probe"])
    batch = Batch(size=5, step=0, total=1, noise=torch.zeros(5, 1, 8, 8))

    def gradient(x: torch.Tensor, made: Context) -> tuple[torch.Tensor, FrechetLoss]:
        x, objective = x.clone().requires_grad_(True), config.build(made)
        objective.backward(cast(Learner, lambda *_: x), None, replace(batch, size=len(x)), torch.Generator())
        assert x.grad is not None
        return x.grad, objective

    expected, alone = gradient(images, everything)
    parts = []
    for rank in range(2):
        flat = [Statistics.of(probe.features(part).numpy()) for part in real]
        others = iter([
            torch.from_numpy(np.concatenate([[s.n], s.mean, s.m2.ravel()])) for s in flat[1 - rank :][:1]
        ] + [probe.features(halves[1 - rank])])  # fmt: skip
        order = itertools.repeat(rank)

        def gather(own: torch.Tensor, others: Any = others, order: Any = order) -> list[torch.Tensor]:
            other = next(others)
            return [own, other] if next(order) == 0 else [other, own]

        monkeypatch.setattr(fd_loss, "gather", gather)
        monkeypatch.setattr(fd_loss, "world_size", lambda: 2)
        found, objective = gradient(halves[rank], replace(everything, images=lambda rank=rank: [real[rank]]))
        torch.testing.assert_close(objective._memory("probe").mean, alone._memory("probe").mean)
        parts.append(found)
    torch.testing.assert_close(torch.cat(parts) / 2, expected, rtol=1e-4, atol=1e-8)


def test_needs_sampling_and_settings() -> None:
    config = FrechetLossConfig(num_steps=6, queue=2048)
    assert config.needs() == Needs(noise=True, all_images=True, features=("probe",))
    assert config.needs().image_folder
    assert (config.sampling().num_steps, config.sampling().trained_steps) == (6, (0,))
    assert config.about() == "Fréchet distance (probe), queue of 2048"
    with pytest.raises(SettingError, match="decay"):
        FrechetLossConfig(queue=5, decay=0.5)
    with pytest.raises(SettingError, match="networks"):
        FrechetLossConfig(networks=("probe", "probe"))
    FrechetLossConfig().check(8)
    FrechetLossConfig(networks=("vgg16", "tf_efficientnet_lite0"), resize=64).check(8)
    for name, side in (("vgg16", 8), ("tf_efficientnet_lite0", 40)):
        with pytest.raises(BeelineError, match=f"{name} .* {side}"):
            FrechetLossConfig(networks=(cast(Any, name),)).check(side)


@pytest.mark.parametrize("settings", [{}, {"queue": 100_000}, {"decay": 0.9}])
def test_the_cost_is_that_of_a_generated_image(settings: dict[str, Any]) -> None:
    """A forward and a backward pass of the student, forward and backward to the images of the probe. No part of a step grows
    with the queue; its bytes do."""
    probe, config = ProbeNetworkConfig(widths=(8,), strides=(1,)), FrechetLossConfig(**settings)
    found = counting.step_evaluations(small.NETWORK, probe, config)
    assert found == pytest.approx(3, rel=0.1)
    state = counting.phase_bytes(small.NETWORK, probe, config)[1]
    assert (state > 8 * 100_000) == bool(settings.get("queue"))
