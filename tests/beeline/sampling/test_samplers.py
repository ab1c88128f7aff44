"""Samplers against flows with a known solution, few-step rules, and images that depend only on (seed, index)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import nn

from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.noise import stream_seed, unit_noise
from beeline.objectives.lines import point
from beeline.sampling import Sampling, batches, generate, sample
from beeline.sampling.few_step import FewStep, few_step
from beeline.sampling.solvers import evaluations, solve
from beeline.schedule import edm_sigmas

SIGMA_D = 0.5
LEVELS = edm_sigmas(18).tolist()
Rule = Literal["same_noise", "line", "fresh_noise"]


class Gaussian(nn.Module):
    """The ideal denoiser of data N(0, SIGMA_D^2); records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        self.calls.append((x, sigma, labels))
        return x * (SIGMA_D**2 / (SIGMA_D**2 + sigma**2)).to(x.dtype)[:, None, None, None]


def noise(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def solution_error(solver: Literal["heun", "euler"], num_steps: int) -> float:
    """Compute the relative error against x(0) = x(sigma_max) SIGMA_D / sqrt(SIGMA_D^2 + sigma_max^2)."""
    latents = noise(0)
    wanted = latents * 80 * SIGMA_D / (SIGMA_D**2 + 80**2) ** 0.5
    images = solve(Gaussian(), latents, None, solver=solver, num_steps=num_steps)
    return float((images - wanted).norm() / wanted.norm())


def test_solvers_converge_at_their_orders() -> None:
    heun = [solution_error("heun", n) for n in (16, 32, 64)]
    euler = [solution_error("euler", n) for n in (32, 64, 128)]
    assert heun[1] < euler[1] / 2  # 63 evaluations against 64
    assert heun[2] < 5e-3
    assert euler[2] < 5e-2
    for coarse, fine in itertools.pairwise(euler):
        assert 1.7 < coarse / fine < 2.4
    for coarse, fine in itertools.pairwise(heun):
        assert 3.2 < coarse / fine < 6


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_evaluations_are_counted_right(solver: Literal["heun", "euler"], num_steps: int) -> None:
    denoiser, labels = Gaussian(), torch.zeros(4)
    solve(denoiser, noise(0), labels, solver=solver, num_steps=num_steps)
    assert len(denoiser.calls) == evaluations(solver, num_steps)
    assert all(given is labels and sigma.shape == (4,) for _, sigma, given in denoiser.calls)


def test_euler_with_one_step_is_one_denoiser_call() -> None:
    images = solve(Gaussian(), noise(0), None, solver="euler", num_steps=1)
    torch.testing.assert_close(images, Gaussian()(80 * noise(0), torch.full((4,), 80.0), None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["same_noise", "line", "fresh_noise"])
def test_few_step_with_one_step_is_one_denoiser_call(rule: Rule) -> None:
    denoiser, labels = Gaussian(), torch.zeros(4)
    image = few_step(denoiser, noise(0), labels, steps=(0,), how=FewStep(num_steps=18, rule=rule))
    assert len(denoiser.calls) == 1
    assert denoiser.calls[0][2] is labels
    assert image.dtype == torch.float32
    assert torch.equal(image, Gaussian()(80 * noise(0), torch.full((4,), 80.0), None))


@pytest.mark.parametrize("rule", ["same_noise", "line", "fresh_noise"])
@pytest.mark.parametrize("steps", [(0, 1), (0, 3, 5), (0, 1, 17)])
def test_transitions(rule: Rule, steps: tuple[int, ...]) -> None:
    denoiser = Gaussian()
    result = few_step(
        denoiser, noise(0), None, steps=steps, how=FewStep(num_steps=18, rule=rule), fresh=lambda n: noise(100 + n)
    )
    assert len(denoiser.calls) == len(steps)
    for n, step in enumerate(steps):
        x, sigma, _ = denoiser.calls[n]
        assert sigma.tolist() == pytest.approx([LEVELS[step]] * 4)
        if n == 0:
            torch.testing.assert_close(x, 80 * noise(0))
            continue
        image, before, now = Gaussian()(*denoiser.calls[n - 1]), LEVELS[steps[n - 1]], LEVELS[step]
        wanted = {
            "same_noise": image + now / 80 * (80 * noise(0)),
            "line": now / before * denoiser.calls[n - 1][0] + (1 - now / before) * image,
            "fresh_noise": image + abs(now**2 - 0.002**2) ** 0.5 * noise(100 + n - 1),
        }[rule]
        torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result, Gaussian()(*denoiser.calls[-1]))


@pytest.mark.parametrize(("line", "rule"), [("ve", "same_noise"), ("lerp", "line")])
def test_a_perfect_student_stays_on_its_line(line: Literal["ve", "lerp"], rule: Rule) -> None:
    """With the rule for its line, a student that always predicts x1 is only evaluated at points of that line."""
    x1, asked = noise(1).clamp(-1, 1), []

    class Student(nn.Module):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: None) -> torch.Tensor:
            asked.append((x, sigma))
            return x1

    few_step(Student(), noise(0), None, steps=(0, 3, 9, 15), how=FewStep(num_steps=18, rule=rule))
    for x, sigma in asked[1:] if line == "ve" else asked:  # at sigma_max the `ve` point still holds x1, pure noise does not
        torch.testing.assert_close(x, point(x1, noise(0), sigma, line), rtol=1e-5, atol=1e-5)


def test_fresh_noise_needs_fresh() -> None:
    with pytest.raises(ValueError, match="fresh"):
        few_step(Gaussian(), noise(0), None, steps=(0, 1), how=FewStep(num_steps=18, rule="fresh_noise"))


@pytest.mark.parametrize(("trained", "steps"), [(None, (0, 5)), ((0,), (0,)), ((0, 8), (0, 8)), ((0, 8), (0,))])
def test_steps_the_student_knows(trained: tuple[int, ...] | None, steps: tuple[int, ...]) -> None:
    assert FewStep(num_steps=18, trained_steps=trained).check(list(steps)) == steps


@pytest.mark.parametrize(
    ("trained", "steps", "message"),
    [((0,), (0, 1), "level 1"), ((0, 8), (0, 5, 8), "level 5"), (None, (1,), "begin with 0"), (None, (0, 18), "18 levels")],
)
def test_steps_the_student_does_not_know(trained: tuple[int, ...] | None, steps: tuple[int, ...], message: str) -> None:
    with pytest.raises(BeelineError, match=message):
        FewStep(num_steps=18, trained_steps=trained).check(steps)


@pytest.fixture(scope="module")
def teacher(make_denoiser: Callable[..., Denoiser]) -> Denoiser:
    return make_denoiser(label_dim=3)


@pytest.fixture(scope="module", params=["same_noise", "fresh_noise"])
def student(make_denoiser: Callable[..., Denoiser], request: pytest.FixtureRequest) -> Denoiser:
    model = make_denoiser(label_dim=3)
    model.few_step = FewStep(num_steps=18, rule=request.param)
    return model


def assert_same_images(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert (a.abs() < 1).float().mean() > 0.1, "clamped images would compare equal whatever they were"


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_teacher_images_do_not_depend_on_the_batch(teacher: Denoiser, solver: Literal["heun", "euler"]) -> None:
    whole = generate(teacher, 7, seed=5, solver=solver, num_steps=4)
    assert whole.shape == (7, 2, 8, 8)
    assert whole.abs().max() <= 1
    assert_same_images(generate(teacher, 7, seed=5, solver=solver, num_steps=4, batch_size=3), whole)
    assert_same_images(generate(teacher, 4, seed=5, solver=solver, num_steps=4), whole[:4])


def test_student_images_do_not_depend_on_the_batch(student: Denoiser) -> None:
    whole = generate(student, 7, seed=5, steps=(0, 8, 14))
    assert_same_images(generate(student, 7, seed=5, steps=(0, 8, 14), batch_size=2), whole)
    assert_same_images(generate(student, 3, seed=5, steps=(0, 8, 14)), whole[:3])


def test_images_depend_on_seed_index_and_label(teacher: Denoiser) -> None:
    def first(seed: int, label: int) -> torch.Tensor:
        return generate(teacher, 2, seed=seed, labels=torch.tensor([label, label]), num_steps=3)

    images = first(0, 0)
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    assert not torch.allclose(images, first(1, 0), atol=1e-2)
    assert not torch.allclose(images, first(0, 1), atol=1e-3)


def test_default_labels_cycle_through_the_classes(teacher: Denoiser) -> None:
    given = generate(teacher, 5, labels=torch.tensor([0, 1, 2, 0, 1]), num_steps=3)
    assert torch.equal(generate(teacher, 5, num_steps=3), given)


def test_students_default_to_one_step(student: Denoiser) -> None:
    assert torch.equal(generate(student, 3), generate(student, 3, steps=(0,)))


def test_a_student_that_follows_an_ode_is_sampled_by_solvers(student: Denoiser) -> None:
    """Euler's method is the rule "line" at the same levels."""
    assert student.few_step is not None
    flow = copy.deepcopy(student)
    flow.few_step = FewStep(num_steps=5, rule="line")
    euler = generate(flow, 3, solver="euler", num_steps=5)
    torch.testing.assert_close(euler, generate(flow, 3, steps=(0, 1, 2, 3, 4)), rtol=0, atol=1e-5)
    assert not torch.allclose(generate(flow, 3, solver="heun", num_steps=5), euler)
    with pytest.raises(ValueError, match="choose one"):
        generate(flow, 3, steps=(0,), solver="euler")
    for other in (FewStep(num_steps=5, trained_steps=(0,)), FewStep(num_steps=5, rule="fresh_noise")):
        flow.few_step = other
        with pytest.raises(BeelineError, match="follows no ODE"):
            generate(flow, 3, solver="heun")


def test_generate_nothing(teacher: Denoiser) -> None:
    assert generate(teacher, 0).shape == (0, 2, 8, 8)


def test_generate_refuses_labels_of_another_count(teacher: Denoiser) -> None:
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        generate(teacher, 3, labels=torch.tensor([0, 1]))


def test_teachers_refuse_steps(teacher: Denoiser) -> None:
    with pytest.raises(BeelineError, match="teacher"):
        generate(teacher, 2, steps=(0,))


def test_sample_takes_the_noise_of_its_indices(student: Denoiser) -> None:
    how, labels = student.few_step, torch.tensor([2, 0])
    assert how is not None

    def rows(seed: int) -> torch.Tensor:
        return torch.from_numpy(unit_noise(seed, [11, 4], (2, 8, 8)))

    wanted = few_step(student, rows(9), labels, steps=(0, 5), how=how, fresh=lambda n: rows(stream_seed(9, "fresh", n)))
    assert torch.equal(sample(student, [11, 4], labels, Sampling(steps=(0, 5)), seed=9), wanted)


@pytest.mark.parametrize(("count", "size", "lengths"), [(0, 3, []), (3, 3, [3]), (7, 3, [3, 3, 1])])
def test_batches_cover_the_range(count: int, size: int, lengths: list[int]) -> None:
    parts = list(batches(count, size))
    assert [len(part) for part in parts] == lengths
    assert [i for part in parts for i in part] == list(range(count))
