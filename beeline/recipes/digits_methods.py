"""All methods on digits: each trains from the same teacher, at the same cost, and is compared with the others.

A short training costs about BUDGET network evaluations of one image, a backward pass counted as two; a long one, with the
suffix `_3x`, three times as many. Evaluations spent on pairs, and on models that a student starts from, come in addition; the
record of each student lists them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from beeline.config import OptimizerConfig, PhaseConfig, Recipe, StudentConfig
from beeline.config.student import SCRATCH
from beeline.objectives import ObjectiveConfig
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.edm import EDMConfig
from beeline.objectives.fd_loss import FrechetLossConfig
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.maps.ayf import AlignYourFlowConfig
from beeline.objectives.maps.boot import BootConfig
from beeline.objectives.maps.caf import AccelerationConfig
from beeline.objectives.maps.consistency import ConsistencyConfig
from beeline.objectives.maps.ctm import CTMConfig
from beeline.objectives.maps.guided import GuidedConfig
from beeline.objectives.maps.imm import IMMConfig
from beeline.objectives.maps.meanflow import MeanFlowConfig
from beeline.objectives.maps.progressive import ProgressiveConfig, rounds
from beeline.objectives.maps.scm import SCMConfig
from beeline.objectives.maps.shortcut import ShortcutConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig
from beeline.objectives.scores.dmd import DMD2Config, DMDConfig
from beeline.objectives.scores.sid import SiDAConfig, SiDConfig, SIMConfig
from beeline.recipes.digits import digits

BUDGET = 96_000
"""Network evaluations of a short training."""
LONG = "_3x"
"""Suffix of the students that train three times as long."""
WEAK = "weak"
"""The weaker teacher of autoguidance."""
ADAM = OptimizerConfig(lr=1e-3, warmup=50, decay="cosine")
SECOND = replace(ADAM, lr=5e-4, warmup=20)
"""Optimiser of a second phase."""
LARGE: dict[str, Any] = {"batch_size": 128}
LINES = LinesMatchingConfig(distance="probe", pixel_weight=0.1)
CRITIC = DiscriminatorConfig(optimizer=OptimizerConfig(lr=2e-3, betas=(0.5, 0.9)), augment=("translation",))


def digits_methods(seed: int = 0) -> Recipe:
    """Digits with a student of every method, at a short budget and, with the suffix _3x, at three times that."""
    recipe = digits(seed)
    base = replace(recipe.students["l2"], batch_size=64)
    short = {name: replace(base, name=name, **changes) for name, changes in _methods().items()}
    long = {f"{name}{LONG}": three_times(student) for name, student in short.items() if name != WEAK}
    return replace(
        recipe, name="digits_methods", students=short | long, few_steps=("0", "0,8", "0,1.0", "0,4,8,12"),
        evaluate=replace(recipe.evaluate, draws=2),
    )  # fmt: skip


def three_times(student: StudentConfig) -> StudentConfig:
    """The same student with three times the iterations of each phase. Students that it starts from or has pairs of are the long
    ones too; the weak teacher stays the short one."""
    phases = {name: replace(phase, iterations=3 * phase.iterations) for name, phase in student.phases.items()}
    models = {key: getattr(student, key) for key in ("init", "pairs")}
    long = {key: f"{model}{LONG}" for key, model in models.items() if model.startswith("students/")}
    return replace(student, name=f"{student.name}{LONG}", phases=phases, **long)


def _methods() -> dict[str, dict[str, Any]]:
    """Settings of the students of a short training, by name. A student reads only those before it."""
    return _pairs_and_flows() | _consistency() | _flow_maps() | _progressive() | _scores() | _frechet()


def _pairs_and_flows() -> dict[str, dict[str, Any]]:
    """Knowledge distillation, lines matching, rectified flows, constant acceleration."""
    flow = RectifiedFlowConfig()
    images = replace(flow, data="images")
    own: dict[str, Any] = {"init": "students/rf", "pairs": "students/rf"}
    return {
        "kd": _phases((250, DistillationConfig())) | LARGE,
        "lmm": _phases((130, LINES), (55, replace(LINES, steps=(0,), adversarial_weight=0.3, discriminator=CRITIC))) | LARGE,
        "rf": _phases((250, flow)) | LARGE,
        "rf_plus": _phases((250, replace(flow, times="u_shaped", distance="huber"))) | LARGE,
        "rf_distilled": _phases((250, DistillationConfig())) | LARGE | own,
        "rf3": _phases((250, flow)) | LARGE | own,
        "cfm": _phases((500, images), lr=3e-3) | {"init": SCRATCH},
        "ot_cfm": _phases((500, replace(images, coupling="ot")), lr=3e-3) | {"init": SCRATCH},
        "caf": _phases((187, AccelerationConfig())) | LARGE | {"init": "students/kd"},
    }


def _consistency() -> dict[str, dict[str, Any]]:
    """Consistency models, in discrete and in continuous time."""
    cd = ConsistencyConfig(teacher="teacher", levels="schedule", weighting="none", distance="probe", pixel_weight=0.1)
    cd_gan = replace(cd, adversarial_weight=0.05, adversarial_start=0.33, discriminator=CRITIC)
    scm = SCMConfig(
        p_mean=0.3, p_std=1.6, tangent_warmup=10, tangent_weight=0.5, normalisation=None, weight="uniform", learned_weight=False
    )  # fmt: skip
    return {
        "cd": _phases((240, cd)),
        "cd_gan": _phases((160, cd), (58, cd_gan)),
        "ct": _phases((375, ConsistencyConfig(levels="ct", target_decay=0.9, weighting="none", distance="l2"))),
        "ict": _phases((375, ConsistencyConfig(levels="ict", neighbours="lognormal", huber_c=None))),
        "ect": _phases((375, ConsistencyConfig())),
        "scd": _phases((250, scm), lr=2e-3),
        "sct": _phases((300, replace(scm, reference="data")), lr=2e-3),
    }


def _flow_maps() -> dict[str, dict[str, Any]]:
    """Flow maps: students with a second level."""
    ctm = CTMConfig(solver_steps=1, denoising_weight=0, target_decay=0.9)
    denoised = replace(ctm, denoising_weight=0.1)
    ayf = AlignYourFlowConfig(law="lognormal", t_normal=(-0.6, 1.6), same=0.25, r=1.0, normalisation=1.0)
    ayf_gan = replace(ayf, adversarial_weight=0.1, discriminator=CRITIC)
    return {
        "ctm": _phases((250, replace(ctm, compare="predictions", distance="l2", zero=0.3, top=0.15))),
        "ctm_images": _phases((158, ctm)),
        "ctm_full": _phases((90, denoised), (30, replace(denoised, adversarial_weight=0.3, discriminator=CRITIC))),
        "meanflow": _phases((300, MeanFlowConfig()), lr=2e-3),
        WEAK: _phases((150, EDMConfig()), lr=3e-3) | {"init": SCRATCH},
        "ayf": _phases((250, ayf), lr=2e-3),
        "ayf_auto": _phases((214, replace(ayf, weak=f"students/{WEAK}", guidance=1.5)), lr=2e-3),
        "ayf_gan": _phases((170, ayf), (45, ayf_gan), lr=2e-3),
        "ayf_lmd": _phases((250, replace(ayf, equation="lmd", law="schedule", top=0.5, same=0.0, normalisation=None)), lr=3e-3),
        "boot": _phases((250, BootConfig(num_steps=9, solver="heun")), warmup=30) | {"ema_half_lives": (25.0,)},
        "imm": _phases((375, IMMConfig())),
        "shortcut": _phases((330, ShortcutConfig(bootstrap=0.25))),
    }


def _progressive() -> dict[str, dict[str, Any]]:
    """Progressive distillation, of the teacher and of a guided one."""
    adam = replace(ADAM, warmup=10)
    halving = ProgressiveConfig(num_steps=8, steps=4, solver="heun")
    weights: dict[str, Any] = {"guidance_max": 2.0, "guidance": 0.5}
    guided = PhaseConfig(iterations=100, optimizer=adam, objective=GuidedConfig(weak=f"students/{WEAK}", **weights))
    return {
        "pd": {"phases": rounds(halving, (100, 75, 85), adam), "ema_half_lives": (10.0,)},
        "guided": {
            "phases": {"guided": guided} | rounds(replace(halving, **weights), (67, 50, 57), adam),
            "ema_half_lives": (10.0,),
        },
    }


def _scores() -> dict[str, dict[str, Any]]:
    """Score distillation, by divergences and by distances of scores; `msd` has a student for each half of the classes."""
    faster = OptimizerConfig(lr=1e-3, betas=(0.0, 0.999), clip=0.0)
    dmd2 = DMD2Config(fake_steps=1, fake_levels="lognormal", judged_levels="lognormal")
    return {
        "dmd": _score(187, DMDConfig()),
        "dmd_pairs": _score(132, DMDConfig(start_levels=(80.0,), regression_weight=0.25, distance="probe", pixel_weight=0.1)),
        "di": _score(187, DMDConfig(scaled=False, levels="lognormal", start_levels=(1.0,))),
        "msd": _score(93, DMDConfig()) | {"subsets": 2},
        "dmd2": _score(165, dmd2),
        "dmd2_two": _score(155, replace(dmd2, start_levels=(80.0, 2.5))),
        "fdistill": _score(162, replace(dmd2, divergence="kl")),
        "sid": _score(150, SiDConfig(fake_optimizer=faster), lr=faster.lr, half_life=20.0),
        "sida": _score(135, SiDAConfig(fake_optimizer=faster), lr=faster.lr, half_life=20.0),
        "sim": _score(150, SIMConfig(fake_optimizer=faster), lr=faster.lr),
    }


def _frechet() -> dict[str, dict[str, Any]]:
    """The Fréchet distance as the loss, from a student of one step."""
    settings: dict[str, Any] = {"init": "students/lmm", "ema_half_lives": (20.0,)}
    return {"fd": _phases((230, FrechetLossConfig(queue=2048)), lr=2e-5, warmup=20) | LARGE | settings}


def _score(iterations: int, objective: ObjectiveConfig, *, lr: float = 5e-4, half_life: float = 10.0) -> dict[str, Any]:
    """A phase of score distillation: Adam without momentum, as all its papers have it, and without clipping."""
    optimizer = OptimizerConfig(lr=lr, betas=(0.0, 0.999), warmup=10, decay="cosine", clip=0.0)
    phase = PhaseConfig(iterations=iterations, optimizer=optimizer, objective=objective)
    return {"phases": {"training": phase}, "ema_half_lives": (half_life,)}


def _phases(
    *objectives: tuple[int, ObjectiveConfig],
    lr: float = ADAM.lr,
    warmup: int = ADAM.warmup,
) -> dict[str, Any]:
    """Phases of these iterations and objectives: "first" and "second", or "training" alone."""
    optimizers = (replace(ADAM, lr=lr, warmup=warmup), SECOND)
    names = ("first", "second") if len(objectives) > 1 else ("training",)
    return {
        "phases": {
            name: PhaseConfig(iterations=iterations, optimizer=optimizer, objective=objective)
            for name, optimizer, (iterations, objective) in zip(names, optimizers, objectives, strict=False)
        }
    }
