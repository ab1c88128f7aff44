"""The student's task by itself, in this process: parts and shares of a batch, resuming, averages, validation, other needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import beeline
from beeline.checkpoint import build, dump
from beeline.config import LmmConfig, PhaseConfig
from beeline.errors import BeelineError
from beeline.learner import Learner
from beeline.lines import point
from beeline.objectives import Batch, Needs, Setting
from beeline.perceptual import l2
from beeline.recipes import RECIPES
from beeline.samplers import FewStep
from pipeline.stage import require
from pipeline.storage import Folder
from trainers import checkpoints, loop
from trainers.student import StudentTask, all_needs, start_from

DIGITS = RECIPES["digits"](0).students["lmm"]
CADENCE = loop.Cadence(log_every=2, checkpoint_every=2)


def config(**changes: Any) -> LmmConfig:
    phases = {"reconstruction": 4, "adversarial": 4}
    made = {name: replace(getattr(DIGITS, name), iterations=count) for name, count in phases.items()}
    return replace(DIGITS, name="tried", batch_size=12, num_steps=6, **made, **changes)


Make = Callable[..., tuple[StudentTask, loop.Session]]


@pytest.fixture
def make(trained: Path, tmp_path: Path) -> Make:
    """A task on the trained workspace that publishes to a folder of its own."""

    def call(settings: LmmConfig, **session: Any) -> tuple[StudentTask, loop.Session]:
        workspace = Folder(str(trained))
        ours = loop.Session(folder=Folder(str(tmp_path / session.pop("name", "student"))), **session)
        plans = {name: require(workspace, name, "digits") for name in ("pairs", "images")}
        return StudentTask(session=ours, workspace=workspace, recipe="digits", config=settings, **plans), ours

    return call


def weights(task: StudentTask) -> dict[str, torch.Tensor]:
    return copy.deepcopy(task.model.state_dict())


def test_a_checkpoint_holds_all_that_steps_change(make: Make) -> None:
    """Two averages, both phases, critics with and without a frozen network: resumed anywhere, the end is the same."""
    critics = replace(DIGITS.discriminator, networks=("probe", "scratch"))
    settings = config(ema_half_lives=(3.0, 30.0), discriminator=critics)
    task, session = make(settings)
    assert loop.run(task, session, replace(CADENCE, keep=10))
    for step in (2, 4, 6):
        again, other = make(settings, name=f"from-{step}", restored=checkpoints.load(session.folder, step))
        other.folder.write(loop.LOG, session.folder.read(loop.LOG))
        assert loop.run(again, other, CADENCE)
        for ours, theirs in zip(again.averages, task.averages, strict=True):
            assert dump(ours, {})["model.safetensors"] == dump(theirs, {})["model.safetensors"]
        assert again.critic is not None
        assert task.critic is not None
        for name, tensor in task.critic.model.state_dict().items():
            assert torch.equal(again.critic.model.state_dict()[name], tensor), name
        figures = [[row["lines"] for row in loop.read_log(place.folder)] for place in (other, session)]
        assert figures[0] == figures[1]


def test_what_is_published(make: Make, tmp_path: Path) -> None:
    task, session = make(config(ema_half_lives=(3.0, 30.0), validate_every=4, validate_count=100))
    loop.run(task, session, replace(CADENCE, validate_every=4))
    folder = tmp_path / "student"
    models = {name: beeline.load(folder / name) for name in (".", "reconstruction", "ema-30", "best")}
    assert [model.few_step and model.few_step.trained_steps for model in models.values()] == [(0,), None, (0,), (0,)]
    assert {path.name for path in (folder / "samples").iterdir()} == {"step-00000004.png", "step-00000008.png"}
    judged = {row["step"]: row["fd_probe_losses"] for row in loop.read_log(session.folder) if "fd_probe_losses" in row}
    assert list(judged) == [4, 8]
    best = min(judged, key=lambda step: judged[step])
    assert f'"step": {best}' in (folder / "best" / "config.json").read_text()
    assert checkpoints.steps(session.folder) == [4, 6]


def test_a_student_has_no_input_without_gradients() -> None:
    """DDP refuses parameters without gradients: the augmentation input of EDM's teachers is gone, the output is the same."""
    network = replace(RECIPES["digits"](0).teacher.network, augment_dim=9, dropout=0.1)
    torch.manual_seed(0)
    teacher = build(network).eval()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    student = start_from(teacher)
    assert student.network_config == replace(network, augment_dim=0, dropout=0.0)
    assert teacher.state_dict().keys() - student.state_dict().keys() == {"model.map_augment.weight"}
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.arange(4)
    seen = student(x, sigma, labels)
    torch.testing.assert_close(seen, teacher(x, sigma, labels))
    seen.square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("switch", ["continue", "restart"])
def test_averages_go_on_through_the_phases(make: Make, switch: Literal["continue", "restart"]) -> None:
    """Each average has a constant decay over the whole run: sum over steps of (1 - beta) beta^(last - step) weights."""
    settings = config(ema_half_lives=(3.0, 30.0), phase_switch=switch)
    task, _ = make(settings)
    wanted = [weights(task) for _ in settings.ema_half_lives]
    for step in range(8):
        starts = {"continue": weights(task), "restart": copy.deepcopy(task.averages[0].state_dict())}
        optimizer = task.student.optimizer
        task.step(step)
        for average, half_life in zip(wanted, settings.ema_half_lives, strict=True):
            beta = 0.5 ** (1 / half_life)
            for name, tensor in weights(task).items():
                average[name] = beta * average[name] + (1 - beta) * tensor
        if step == 4:  # the first of the second phase: one step of Adam from where it starts
            assert (task.student.optimizer is optimizer) == (switch == "continue")
            rate = task.student.optimizer.param_groups[0]["lr"]
            for name, tensor in weights(task).items():
                assert float((tensor - starts[switch][name]).abs().max()) <= 4 * rate
    for average, ours in zip(task.averages, wanted, strict=True):
        for name, tensor in average.state_dict().items():
            torch.testing.assert_close(tensor, ours[name], rtol=1e-4, atol=1e-6)


def test_a_phase_cannot_continue_with_the_moments_of_another_optimiser() -> None:
    settings = config(phase_switch="continue")
    other = replace(settings.adversarial, optimizer=replace(settings.adversarial.optimizer, kind="radam"))
    with pytest.raises(BeelineError, match="adam and radam"):
        all_needs(replace(settings, adversarial=other))
    all_needs(replace(settings, adversarial=other, phase_switch="restart"))


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_add_up_to_the_batch(make: Make, parts: int) -> None:
    """Levels are drawn part by part, so only an objective without draws is the same to rounding."""
    settings = config(objective="beeline.objectives.kd:Distillation")
    whole, _ = make(settings, name="whole")
    divided, _ = make(replace(settings, accumulate=parts), name="parts")
    assert [len(batch.x1) for batch, _ in divided._batches(0) if batch.x1 is not None] == (
        [6, 6] if parts == 2 else [3, 3, 2, 2, 2]
    )
    for step in range(2):
        ours, theirs = divided.step(step), whole.step(step)
        assert float(ours["distillation"]) == pytest.approx(float(theirs["distillation"]), rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@given(batch=st.integers(1, 600), world=st.integers(1, 64), step=st.integers(0, 10))
def test_shares_cover_the_batch_and_weigh_what_they_hold(batch: int, world: int, step: int) -> None:
    world = min(world, batch)
    sessions = [loop.Session(rank=rank, world_size=world, folder=Folder("unused")) for rank in range(world)]
    shares = [session.share(batch, step) for session in sessions]
    rows = [row for start, size in shares for row in range(start, start + size)]
    assert rows == list(range(step * batch, (step + 1) * batch))
    assert max(size for _, size in shares) - min(size for _, size in shares) <= 1
    assert sum(size * world / batch for _, size in shares) / world == pytest.approx(1)


def test_bf16_follows_fp32(make: Make) -> None:
    settings = config()
    exact, _ = make(settings, name="fp32")
    rough, _ = make(replace(settings, precision="bf16"), name="bf16")
    for step in range(8):
        ours, theirs = rough.step(step), exact.step(step)
        assert not ours["skipped"]
        assert float(ours["lines"]) == pytest.approx(float(theirs["lines"]), rel=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in weights(rough).values())
    assert not all(torch.equal(a, b) for a, b in zip(weights(rough).values(), weights(exact).values(), strict=True))


@pytest.mark.slow
def test_a_compiled_student_follows_the_eager_one(make: Make) -> None:
    settings = config()
    eager, _ = make(settings, name="eager")
    compiled, _ = make(replace(settings, compiled=True), name="compiled")
    for step in (0, 1, 4, 5):
        ours, theirs = compiled.step(step), eager.step(step)
        assert float(ours["lines"]) == pytest.approx(float(theirs["lines"]), rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


class ConsistencyDistillation:
    """What an objective of another kind looks like: real images, the teacher in the loop, the average as the target
    (Song et al. 2023). One Euler step of the teacher's ODE between neighbouring levels."""

    critic = None

    @staticmethod
    def needs(settings: LmmConfig, phase: PhaseConfig) -> Needs:
        return Needs(images=True, teacher=True, average=True)

    def __init__(self, setting: Setting) -> None:
        assert setting.teacher is not None
        assert setting.average is not None
        self.config, self.teacher, self.average = setting.config, setting.teacher, setting.average

    @property
    def few_step(self) -> FewStep:
        return FewStep(num_steps=self.config.num_steps, rule="fresh_noise", trained_steps=None)

    def backward(
        self, student: Learner, critic: Learner | None, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        assert batch.real is not None
        assert batch.noise is None
        sigma, following = (torch.full((len(batch.real),), level) for level in (2.0, 1.0))
        x = point(batch.real, torch.randn(batch.real.shape, generator=generator), sigma, "ve")
        with torch.no_grad():
            ahead = x + (1.0 - 2.0) * (x - self.teacher(x, sigma, batch.real_labels)) / 2.0
            target = self.average(ahead, following, batch.real_labels)
        loss = l2(student(x, sigma, batch.real_labels), target).mean()
        (batch.weight * loss).backward()
        return {"consistency": loss.detach()}


def test_an_objective_of_ones_own(make: Make) -> None:
    settings = config(objective="test_student:ConsistencyDistillation")
    task, session = make(settings)
    before = weights(task)
    assert task.pairs is None
    loop.run(task, session, CADENCE)
    assert all(row["consistency"] > 0 for row in loop.read_log(session.folder))
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(task).items())


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    state = {"a": {"weight": torch.arange(4.0)}, "b": [1, 2.5, "text", None]}
    for step in (1, 2, 3):
        checkpoints.save(folder, step, state, keep=2)
    assert checkpoints.steps(folder) == [2, 3]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    found = checkpoints.load(folder, 3)
    assert torch.equal(found["a"]["weight"], state["a"]["weight"])
    assert found["b"] == state["b"]
    place = tmp_path / "checkpoints/step-00000003"
    (place / "a.pt").write_bytes((place / "a.pt").read_bytes()[:-9])
    with pytest.raises(beeline.BeelineError, match="step-00000003 is damaged"):
        checkpoints.load(folder, 3)
    (place / "index.json").unlink()  # as one that was being written when the process was killed
    assert checkpoints.steps(folder) == [2]
