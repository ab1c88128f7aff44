"""The Adams solver is exact where it should be, converges at its order, and calibration improves results on new noise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import beeline
from beeline.calibrate import Errors, calibrate, refined, search, uniform_levels
from beeline.checkpoint import dump
from beeline.errors import BeelineError
from beeline.sampling.adams import adams, check_levels, weights


class Gaussian(nn.Module):
    """The exact denoiser of N(0, variance): D = x variance / (variance + sigma^2). The flow is x ~ sqrt(variance + sigma^2)."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.variance = variance
        self.calls = 0

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return x.double() * self.variance / (self.variance + sigma.double().reshape(-1, 1, 1, 1) ** 2)


def error(count: int, predictor: int, corrector: int) -> float:
    """Compute the error of the image, from sigma 5 to 0.05, against the closed form."""
    denoiser, noise = Gaussian(0.25), torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    levels = np.geomspace(5, 0.05, count).tolist()
    image = adams(denoiser, noise, None, levels=levels, predictor=predictor, corrector=corrector)
    assert denoiser.calls == count
    x_end = 5 * math.sqrt((0.25 + 0.05**2) / (0.25 + 25))
    return abs(float(image) - x_end * 0.25 / (0.25 + 0.05**2))


@given(
    start=st.floats(-4, 6),
    step=st.floats(0.05, 6),
    gaps=st.lists(st.floats(0.1, 3), max_size=3),
    coefficients=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
)
def test_weights_integrate_polynomials_exactly(start: float, step: float, gaps: list[float], coefficients: list[float]) -> None:
    nodes = [start]
    for gap in gaps:
        nodes.append(nodes[-1] - gap)
    p = np.polynomial.Polynomial(coefficients[: len(nodes)])
    found = weights(start, start + step, nodes) @ [p(node) for node in nodes]
    l = np.linspace(start, start + step, 20001)  # noqa: E741
    reference = np.trapezoid(np.exp(l - start - step) * p(l), l)
    assert found == pytest.approx(reference, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(("predictor", "corrector", "order"), [(1, 0, 1), (2, 0, 2), (3, 0, 2), (3, 3, 3)])
def test_order_of_convergence(predictor: int, corrector: int, order: int) -> None:
    # without a corrector the first step, of order 1, limits the whole to 2
    coarse, fine = error(41, predictor, corrector), error(81, predictor, corrector)
    assert math.log2(coarse / fine) > order - 0.35


def test_the_corrector_pays_at_no_evaluation() -> None:
    assert error(41, 3, 3) < error(41, 3, 0) / 2


def test_levels_are_checked() -> None:
    for levels in [(1.0,), (1.0, 2.0), (1.0, 0.0), (float("inf"), 1.0), (1.0, 1.0)]:
        with pytest.raises(ValueError, match="expected at least two noise levels"):
            check_levels(levels)


def test_search_keeps_the_ends_and_only_improves() -> None:
    target = np.log(np.array([80, 20, 5, 1, 0.1, 0.002]))

    def distance(levels: list[float]) -> float:
        assert list(levels) == sorted(levels, reverse=True)
        return float(((np.log(levels) - target) ** 2).sum())

    start = uniform_levels(6)
    found, best = search(distance, start, trials=400, seed=0)
    assert (found[0], found[-1]) == pytest.approx((80, 0.002))
    assert best < distance(start.tolist()) / 50
    again, _ = search(distance, start, trials=400, seed=0)
    assert np.array_equal(found, again)


def test_refining_keeps_the_curve() -> None:
    assert refined(uniform_levels(6), 11) == pytest.approx(uniform_levels(11))


def test_errors_of_a_diverged_solver_are_infinite() -> None:
    assert Errors.of(torch.tensor([[float("nan")]]), torch.zeros(1, 1)).rms == float("inf")


def test_a_teacher_of_nan_is_not_calibrated(make_denoiser) -> None:
    teacher = make_denoiser()
    teacher.model.last_layer.data[:] = math.nan
    with pytest.raises(BeelineError, match="the teacher makes NaN or infinite images"):
        calibrate(teacher, noises=2, held_out=2, trials=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": (3, 8)}, r"--evaluations is \(3, 8\); expected values, each a whole number from 4"),
        ({"counts": ()}, r"--evaluations is \(\)"),
        ({"counts": (8, 8)}, r"expected increasing numbers from 4 up"),
        ({"heun_steps": 0}, "--heun-steps is 0"),
        ({"noises": 0}, "--noises is 0"),
        ({"held_out": -1}, "--held-out is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"trials": -1}, "--trials is -1"),
        ({"seed": 2**64}, "--seed is 18446744073709551616"),
    ],
)
def test_settings_of_calibrate_that_cannot_be(changes: dict[str, Any], message: str, make_denoiser) -> None:
    with pytest.raises(BeelineError, match=message):
        calibrate(make_denoiser(), **changes)


def test_calibrate_writes_what_generate_and_pairs_read(make_denoiser, tmp_path: Path) -> None:
    model = make_denoiser(label_dim=3)
    for name, data in dump(model, {}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BeelineError, match=r"python -m beeline\.calibrate"):
        beeline.generate(beeline.load(tmp_path), n=2, solver="calibrated")
    command = [sys.executable, "-m", "beeline.calibrate", str(tmp_path), "--evaluations", "5", "6", "--trials", "30"]
    sizes = ["--noises", "4", "--held-out", "6", "--heun-steps", "3"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "solver.json").read_text())
    assert len(found["levels"]) == found["evaluations"]
    assert found["tried"][0]["evaluations"] == 5
    assert {"rms", "worst_image_rms", "max"} <= found["heun"].keys()
    assert (tmp_path / "solver.png").read_bytes().startswith(b"\x89PNG")
    teacher = beeline.load(tmp_path)
    assert teacher.levels == tuple(found["levels"])
    images = beeline.generate(teacher, n=4, solver="calibrated")
    fine = beeline.generate(teacher, n=4, num_steps=64)
    assert (images - fine).abs().mean() < 0.5 * fine.abs().mean()

    (tmp_path / "solver.json").write_text(json.dumps({**found, "model_sha256": "0" * 64}))
    with pytest.raises(BeelineError, match="calibrated for other weights"):
        beeline.load(tmp_path)
    (tmp_path / "solver.json").write_text("{")
    with pytest.raises(BeelineError, match=r"solver\.json is damaged"):
        beeline.load(tmp_path)
