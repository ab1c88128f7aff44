"""The student's task by itself, in this process: parts and shares of a batch, resuming, averages, validation, other needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import small
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from methods import Consistency, ConsistencyConfig, JumpConfig, Matching, MatchingConfig

import beeline
from beeline import counting
from beeline.checkpoint import build, dump
from beeline.config import OptimizerConfig, StudentConfig, to_dict
from beeline.errors import BeelineError
from beeline.noise import stream_seed, unit_noise
from beeline.objectives import Needs, ObjectiveConfig
from beeline.objectives.fd_loss import FrechetLoss, FrechetLossConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.maps.progressive import Progressive, ProgressiveConfig, rounds
from beeline.objectives.scores.dmd import DMD2Config, DMDConfig
from beeline.objectives.scores.fake_score import ScoreDistillation
from beeline.pixels import to_float
from beeline.recipes import RECIPES
from pipeline.reader import some_images
from pipeline.storage import Folder
from trainers import checkpoints, loop, sizes
from trainers.log import LOG, read_log
from trainers.student import check_phases, start_from, student_training
from trainers.training import Training

DIGITS = RECIPES["digits"](0).students["lmm"]
CADENCE = loop.Cadence(log_every=2, checkpoint_every=2)


def config(**changes: Any) -> StudentConfig:
    """Four iterations of each phase of lines matching of the digits' student; `changes` are those of all settings."""
    phases = {
        name: replace(phase, iterations=4, objective=replace(phase.objective, num_steps=6))
        for name, phase in DIGITS.phases.items()
        if isinstance(phase.objective, LinesMatchingConfig)
    }
    return replace(DIGITS, **{"name": "tried", "batch_size": 12, "phases": phases, **changes})


def alone(objective: ObjectiveConfig, *, iterations: int = 4, **changes: Any) -> StudentConfig:
    """One phase of another objective."""
    phase = replace(DIGITS.phases["reconstruction"], iterations=iterations, objective=objective)
    return config(phases={"alone": phase}, **changes)


Make = Callable[..., tuple[Training, loop.Session]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A small one, to read from."""
    return small.workspace(tmp_path_factory.mktemp("student") / "ws")


@pytest.fixture
def make(workspace: Folder, tmp_path: Path) -> Make:
    """A task on the workspace that publishes to a folder of its own."""

    def call(settings: StudentConfig, **session: Any) -> tuple[Training, loop.Session]:
        ours = loop.Session(folder=Folder(str(tmp_path / session.pop("name", "student"))), **session)
        task = student_training(session=ours, workspace=workspace, recipe="digits", config=settings, **small.plans(workspace))
        return task, ours

    return call


def weights(task: Training) -> dict[str, torch.Tensor]:
    return copy.deepcopy(task.model.state_dict())


def test_a_checkpoint_holds_all_that_steps_change(make: Make) -> None:
    """Two averages, both phases, critics with and without a frozen network: resumed anywhere, the end is the same."""
    settings = config(ema_half_lives=(3.0, 30.0))
    phase = settings.phases["adversarial"]
    assert isinstance(phase.objective, LinesMatchingConfig)
    critics = replace(phase.objective.discriminator, networks=("probe", "scratch"))
    phase = replace(phase, objective=replace(phase.objective, discriminator=critics))
    settings = replace(settings, phases=settings.phases | {"adversarial": phase})
    task, session = make(settings)
    assert loop.run(task, session, replace(CADENCE, keep=10))
    for step in (2, 4, 6):
        again, other = make(settings, name=f"from-{step}", restored=checkpoints.load(session.folder, step))
        other.folder.write(LOG, session.folder.read(LOG))
        assert loop.run(again, other, CADENCE)
        for ours, theirs in zip(again.averages, task.averages, strict=True):
            assert dump(ours, {})["model.safetensors"] == dump(theirs, {})["model.safetensors"]
        assert again.critic is not None
        assert task.critic is not None
        for learner, name in ((task.student, "student"), (task.critic, "critic")):
            written = (session.folder / f"checkpoints/step-{6:08d}").sizes()[f"{name}.pt"]
            assert counting.learner_bytes(learner.model) == pytest.approx(
                written, rel=0.2
            )  # a small network's file is half names
        for name, tensor in task.critic.model.state_dict().items():
            assert torch.equal(again.critic.model.state_dict()[name], tensor), name
        figures = [[row["lines"] for row in read_log(place.folder)] for place in (other, session)]
        assert figures[0] == figures[1]


def test_what_is_published(make: Make, tmp_path: Path) -> None:
    settings = config(ema_half_lives=(3.0, 30.0), validate_every=4, validate_count=40)
    task, session = make(settings)
    loop.run(task, session, replace(CADENCE, validate_every=4))
    folder = tmp_path / "student"
    models = {name: beeline.load(folder / name) for name in (".", "reconstruction", "ema-30", "best")}
    assert sizes.published(settings) == len(models)
    assert [model.few_step and model.few_step.trained_steps for model in models.values()] == [(0,), None, (0,), (0,)]
    assert {path.name for path in (folder / "samples").iterdir()} == {"step-00000004.png", "step-00000008.png"}
    judged = {row["step"]: row["fd_probe_losses"] for row in read_log(session.folder) if "fd_probe_losses" in row}
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


def test_a_second_level_is_added_and_dropped() -> None:
    """A student with the input starts as its teacher wherever the jump ends, all of its parameters have gradients, and one
    that starts from it without the input is the teacher again."""
    torch.manual_seed(0)
    teacher = build(small.NETWORK).eval()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    student = start_from(teacher, needs=Needs(second_level=True))
    assert student.takes_second_level
    assert student.network_config == replace(small.NETWORK, second_level=True)
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.arange(4)
    wanted = teacher(x, sigma, labels)
    for to in (None, torch.zeros(4), torch.full((4,), 0.5)):
        torch.testing.assert_close(student(x, sigma, labels, to=to), wanted)
    student(x, sigma, labels, to=torch.full((4,), 0.5)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    again = start_from(student)
    assert not again.takes_second_level
    torch.testing.assert_close(again(x, sigma, labels), wanted)


def test_new_weights_are_a_function_of_the_seed(make: Make) -> None:
    """Whatever this process has drawn before: ranks start alike, and so do a run and its repetition."""
    settings = alone(JumpConfig())
    found = []
    for number in range(2):
        torch.manual_seed(number)
        task, _ = make(settings, name=f"run-{number}")
        assert task.model.takes_second_level
        found.append(weights(task))
    assert [name for name, tensor in found[0].items() if not torch.equal(found[1][name], tensor)] == []


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
    second = settings.phases["adversarial"]
    other = replace(second, optimizer=replace(second.optimizer, kind="radam"))
    check_phases(settings)
    changed = replace(settings, phases=settings.phases | {"adversarial": other})
    with pytest.raises(BeelineError, match="adam and radam"):
        check_phases(changed)
    check_phases(replace(changed, phase_switch="restart"))
    check_phases(replace(changed, phases=changed.phases | {"adversarial": replace(other, iterations=0)}))
    for phases in ({}, {"adversarial": replace(other, iterations=0)}):
        with pytest.raises(BeelineError, match="student 'tried' needs at least one phase with iterations above 0"):
            check_phases(replace(settings, phases=phases))


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_add_up_to_the_batch(make: Make, parts: int) -> None:
    """Levels are drawn part by part, so only an objective without draws is the same to rounding."""
    settings = alone(DistillationConfig(num_steps=6))
    whole, _ = make(settings, name="whole")
    divided, _ = make(replace(settings, accumulate=parts), name="parts")
    assert [len(batch.x1) for batch, _ in divided._batches(0, 0) if batch.x1 is not None] == (
        [6, 6] if parts == 2 else [3, 3, 2, 2, 2]
    )
    for step in range(2):
        ours, theirs = divided.step(step), whole.step(step)
        assert float(ours["distillation"]) == pytest.approx(float(theirs["distillation"]), rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@hypothesis_settings(deadline=None)
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


def test_an_objective_of_ones_own(make: Make) -> None:
    """Real images, the teacher in the loop, and a target network with a decay of its own."""
    settings = alone(ConsistencyConfig(decay=0.9))
    task, session = make(settings)
    before = weights(task)
    assert task.pairs is None
    assert task.images is not None
    wanted = copy.deepcopy(task.averages[0].state_dict())
    for step in range(4):
        task.step(step)
        wanted = {name: tensor + 0.1 * (task.model.state_dict()[name] - tensor) for name, tensor in wanted.items()}
    assert isinstance(task.objective, Consistency)
    for name, tensor in task.objective.target.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])
    again, session = make(settings, name="again")
    loop.run(again, session, CADENCE)
    assert all(row["consistency"] > 0 for row in read_log(session.folder))
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(again).items())


def kept(task: Training) -> dict[str, torch.Tensor]:
    """All that the task holds at its end: students, averages, critic, the objective's own, the moments of the optimisers."""
    modules: dict[str, Any] = {
        "student": task.model,
        "critic": task.critic and task.critic.model,
        "own": task.objective.state(),
    }
    modules |= {f"average {k}": average for k, average in enumerate(task.averages)}
    found = {f"{name}.{key}": value for name, module in modules.items() if module for key, value in module.state_dict().items()}
    for name, learner in {"student": task.student, "critic": task.critic, "own": task.weighting}.items():
        for number, moments in (learner.optimizer.state_dict()["state"] if learner else {}).items():
            found |= {f"{name} {number} {key}": torch.as_tensor(value) for key, value in moments.items()}
    return found


def resumed_from_every_step(make: Make, settings: StudentConfig) -> tuple[Training, loop.Session]:
    """Train in one go, then again from each checkpoint: all ends alike, to the last bit. Returns the first."""
    cadence = loop.Cadence(log_every=3, checkpoint_every=1, keep=100)
    task, session = make(settings, name="in-one-go")
    assert loop.run(task, session, cadence)
    assert checkpoints.steps(session.folder) == list(range(1, task.iterations))
    wanted, timed = kept(task), {"seconds", "images_per_s", "data_wait", "peak_mb"}
    for step in range(1, task.iterations):
        again, other = make(settings, name=f"from-{step}", restored=checkpoints.load(session.folder, step))
        other.folder.write(LOG, session.folder.read(LOG))
        assert loop.run(again, other, cadence)
        found = kept(again)
        assert found.keys() == wanted.keys()
        assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
        rows = [[{k: v for k, v in row.items() if k not in timed} for row in read_log(s.folder)] for s in (other, session)]
        assert rows[0] == rows[1]
        published = [path.relative_to(other.folder.uri) for path in Path(other.folder.uri).rglob("model.safetensors")]
        over = {name for end, (name, _) in zip(task.phase_ends[:-1], task.phases[:-1], strict=True) if end < step}
        assert {str(path.parent) for path in published} == {".", "ema-30", *(name for name, _ in task.phases[:-1])} - over
        for path in published:
            assert other.folder.read(str(path)) == session.folder.read(str(path))
    return task, session


@pytest.mark.parametrize("weighted", [False, True])
def test_target_networks_and_learned_weightings_are_in_checkpoints(make: Make, weighted: bool) -> None:
    settings = alone(ConsistencyConfig(weighted=weighted), iterations=5, ema_half_lives=(3.0, 30.0))
    task, _ = resumed_from_every_step(make, settings)
    assert isinstance(task.objective, Consistency)
    assert (task.weighting is not None) == weighted
    assert (float(task.objective.log_weight.detach()) != 0) == weighted
    average, target = (model.state_dict() for model in (task.averages[0], task.objective.target))
    assert not all(torch.equal(average[name], tensor) for name, tensor in target.items())


@pytest.mark.parametrize("settings", [{"queue": 20}, {"decay": 0.5}])
def test_statistics_of_features_are_in_checkpoints(make: Make, settings: dict[str, Any]) -> None:
    ours = alone(FrechetLossConfig(**settings), iterations=3, accumulate=2, ema_half_lives=(3.0, 30.0))
    task, _ = resumed_from_every_step(make, ours)
    assert isinstance(task.objective, FrechetLoss)
    assert float(task.objective.memories.get_buffer("probe.weight")) > 6


def stored_images(task: Training) -> torch.Tensor:
    """All images of images/, in order."""
    plan = small.plans(task.workspace)["images"]["images"]
    return torch.from_numpy(to_float(some_images(task.workspace / "images", plan, small.COUNT)[0]))


@pytest.mark.parametrize("ranks", [1, 5])
def test_the_ranks_read_every_real_image_once(make: Make, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr("trainers.training.READ", 7)
    task, session = make(alone(FrechetLossConfig()), name="images")
    parts: list[torch.Tensor] = []
    for rank in range(ranks):
        session.rank, session.world_size = rank, ranks
        parts += list(task._real_images())
    images, wanted = torch.cat(parts), stored_images(task)
    assert max(map(len, parts)) <= 7
    assert sorted(map(float, images.double().sum(dim=(1, 2, 3)))) == sorted(map(float, wanted.double().sum(dim=(1, 2, 3))))


def test_a_learned_weighting_follows_its_gradient(make: Make) -> None:
    """Of w L - log w: towards 1 / L, by the optimiser of the phase."""
    task, _ = make(alone(ConsistencyConfig(weighted=True), iterations=40))
    assert task.weighting is not None
    assert isinstance(task.objective, Consistency)
    optimizer = task.weighting.optimizer.param_groups[0]
    assert [parameter is task.objective.log_weight for parameter in optimizer["params"]] == [True]
    loss = float(task.step(0)["consistency"])
    rate = task.phase.optimizer.lr / task.phase.optimizer.warmup
    assert float(task.objective.log_weight.detach()) == pytest.approx(
        rate if loss < 1 else -rate, rel=1e-3
    )  # Adam's first step
    assert task.step(1)["skipped"] == 0


def test_the_critic_learns_in_four_steps_and_the_student_in_the_fifth(make: Make) -> None:
    task, _ = make(alone(MatchingConfig(), iterations=10, ema_half_lives=(3.0, 30.0)))
    assert (task.pairs, task.images) == (None, None)
    assert task.critic is not None
    assert isinstance(task.objective, Matching)
    for step in range(10):
        before = copy.deepcopy([model.state_dict() for model in (task.model, *task.averages, task.critic.model)])
        figures = task.step(step)
        after = [model.state_dict() for model in (task.model, *task.averages, task.critic.model)]
        moved = [
            not all(torch.equal(a[name], tensor) for name, tensor in b.items()) for a, b in zip(after, before, strict=True)
        ]
        learns = step % 5 == 4
        assert moved == [learns, learns, learns, not learns]
        assert figures.keys() == {"phase", "skipped", *(("gap", "grad_norm") if learns else ("fake", "critic_grad_norm"))}
        assert figures["skipped"] == 0
        assert task.objective.followed == (step + 1) // 5


def test_a_figures_mean_is_over_the_steps_that_had_it(make: Make) -> None:
    settings = alone(MatchingConfig(), iterations=11)
    task, _ = make(settings, name="by-hand")
    steps = [task.step(step) for step in range(11)]
    again, session = make(settings)
    loop.run(again, session, loop.Cadence(log_every=3, checkpoint_every=100))
    rows = read_log(session.folder)
    assert [row["step"] for row in rows] == [3, 6, 9, 11]
    for row, first in zip(rows, (0, 3, 6, 9), strict=True):
        ours = steps[first : row["step"]]
        for name in ("fake", "gap", "grad_norm", "critic_grad_norm"):
            values = [float(figures[name]) for figures in ours if name in figures]
            assert row.get(name) == (pytest.approx(sum(values) / len(values)) if values else None)
    assert "gap" not in rows[0]


def test_taking_turns_is_resumed_from_any_step(make: Make) -> None:
    resumed_from_every_step(make, alone(MatchingConfig(), iterations=10, ema_half_lives=(3.0, 30.0)))


@pytest.mark.parametrize(
    "objective",
    [
        DMD2Config(fake_steps=2, fake_optimizer=OptimizerConfig(lr=1e-2)),
        DMDConfig(start_levels=(20.0, 1.0), fake_optimizer=OptimizerConfig(lr=1e-2)),
    ],
    ids=["DMD2", "DMD"],
)
def test_a_fake_score_is_in_checkpoints(make: Make, objective: DMDConfig | DMD2Config) -> None:
    """Resumed from turns of both networks and of the fake score alone. The teacher stays as it is."""
    settings = alone(objective, iterations=5, ema_half_lives=(3.0, 30.0))
    task, _ = resumed_from_every_step(make, settings)
    assert isinstance(task.objective, ScoreDistillation)
    assert task.critic is not None
    assert any(name.startswith("critic.") for name in kept(task))
    fresh, _ = make(settings, name="fresh")
    assert isinstance(fresh.objective, ScoreDistillation)
    assert fresh.critic is not None
    for name, tensor in fresh.objective.teacher.state_dict().items():
        assert torch.equal(task.objective.teacher.state_dict()[name], tensor)
    started, learned = (model.state_dict() for model in (fresh.critic.model, task.critic.model))
    assert not any(torch.equal(learned[name], tensor) for name, tensor in started.items() if name.endswith("conv0.weight"))


def test_three_phases(make: Make) -> None:
    """Pairs, then images and the teacher, then noise and a critic: each phase is published, and resumed from any step."""
    first = config().phases["reconstruction"]
    phases = {
        "lines": replace(first, iterations=3),
        "consistency": replace(first, iterations=4, objective=ConsistencyConfig(weighted=True)),
        "left-out": replace(first, iterations=0),
        "matching": replace(first, iterations=5, objective=MatchingConfig(every=2)),
    }
    settings = config(phases=phases, ema_half_lives=(3.0, 30.0))
    task, session = resumed_from_every_step(make, settings)
    assert task.phase_ends == [3, 7, 12]
    assert [(row["step"], row["phase"]) for row in read_log(session.folder)] == [(3, 0), (6, 1), (7, 1), (9, 2), (12, 2)]
    place = Path(session.folder.uri)
    models = {name: beeline.load(place / name) for name in ("lines", "consistency", ".")}
    rules = [(model.few_step and (model.few_step.rule, model.few_step.trained_steps)) for model in models.values()]
    assert rules == [("line", None), ("fresh_noise", None), (MatchingConfig().sampling().rule, (0,))]
    about = [json.loads((place / name / "config.json").read_text())["about"] for name in models]
    assert [found["phase"] for found in about] == ["lines", "consistency", "matching"]
    assert [found["method"] for found in about][1:] == ["consistency distillation", "distribution matching"]
    assert {json.dumps(found["trained"]) for found in about} == {json.dumps(to_dict(settings, resources=False))}
    assert not (place / "left-out").exists()
    assert not (place / "matching").exists()


def test_rounds_of_progressive_distillation(make: Make) -> None:
    """Each round's teacher is what the round before published, also in a run that is resumed in the middle of it."""
    first = ProgressiveConfig(steps=2, num_steps=4, solver="heun")
    phases = rounds(first, (3, 3), OptimizerConfig(lr=1e-2))
    settings = config(phases=phases, ema_half_lives=(3.0, 30.0), phase_switch="restart")
    task, session = resumed_from_every_step(make, settings)
    assert isinstance(task.objective, Progressive)
    published = beeline.load(Path(session.folder.uri) / "steps-2").state_dict()
    assert published.keys() == task.objective.teacher.state_dict().keys()
    for name, tensor in task.objective.teacher.state_dict().items():
        assert torch.equal(tensor, published[name])
    assert not all(torch.equal(tensor, published[name]) for name, tensor in task.averages[0].state_dict().items())


@pytest.mark.parametrize("parts", [1, 3])
def test_fresh_noise_is_a_function_of_seed_and_position(make: Make, parts: int) -> None:
    """Of the row of the stream: however many ranks and parts share the batch, and whatever was trained before."""

    def rows(settings: StudentConfig, step: int, ranks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for rank in range(ranks):
            task, session = make(settings, name="noise")
            session.rank, session.world_size = rank, ranks
            found += [batch for batch, _ in task._batches(step, step)]
        assert all(batch.x1 is None and batch.real is None and batch.real_labels is None for batch in found)
        assert sum(batch.size for batch in found) == settings.batch_size
        noise, labels = zip(*((batch.noise, batch.labels) for batch in found), strict=True)
        return torch.cat(noise), torch.cat(labels)

    settings = alone(MatchingConfig(), accumulate=parts)
    noise, labels = rows(settings, 2)
    wanted = range(24, 36)
    assert torch.equal(noise, torch.from_numpy(unit_noise(stream_seed(settings.seed, "training noise"), wanted, (1, 8, 8))))
    assert labels.argmax(dim=1).tolist() == [row % small.CLASSES for row in wanted]
    for ranks in (1, 2, 3):
        again = rows(settings, 2, ranks)
        assert torch.equal(again[0], noise)
        assert torch.equal(again[1], labels)
    assert not torch.equal(rows(settings, 3)[0], noise)
    assert not torch.equal(rows(replace(settings, seed=1), 2)[0], noise)
    assert not torch.equal(torch.from_numpy(unit_noise(settings.seed, wanted, (1, 8, 8))), noise)  # that of pairs


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
