"""Recipes: a function per data set that returns the settings of every stage, seeded as a whole.

A variant is `dataclasses.replace`. A recipe of one's own is a function like these in any module that Python can import:
commands take `package.module:function` in place of a recipe's name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from beeline.config import (
    EvaluateConfig,
    ImagesConfig,
    NetworkConfig,
    OptimizerConfig,
    PairsConfig,
    PhaseConfig,
    ProbeConfig,
    ProbeNetworkConfig,
    Recipe,
    StudentConfig,
    SweepConfig,
    TeacherConfig,
    WorkersConfig,
)
from beeline.discriminator import DiscriminatorConfig
from beeline.errors import BeelineError, plain
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.published import controls, edm_training, gpu_pairs, published
from beeline.settings import OWN_RECIPE


def digits(seed: int = 0) -> Recipe:
    """scikit-learn's 1,797 handwritten digits, 8x8, ten classes: the whole method in minutes on two CPU cores."""
    network = NetworkConfig(
        kind="ddpmpp",
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
    )
    pair_of_cores = WorkersConfig(count=2, threads=1)
    both_cores: dict[str, Any] = {"min_actors": 2, "max_actors": 2}
    one_core = WorkersConfig(count=1, threads=1)  # all but the main student train side by side
    lines = LinesMatchingConfig(distance="probe", pixel_weight=0.1)
    optimizer = OptimizerConfig(lr=1e-3, warmup=50, decay="cosine")
    reconstruction = PhaseConfig(iterations=300, optimizer=optimizer, objective=lines)
    critic = DiscriminatorConfig(optimizer=OptimizerConfig(lr=2e-3, betas=(0.5, 0.9)), augment=("translation",))
    sot = PhaseConfig(
        iterations=200,
        optimizer=replace(optimizer, lr=5e-4, warmup=20),
        objective=replace(lines, steps=(0,), discriminator=critic),
    )
    adversarial = replace(sot, objective=replace(sot.objective, adversarial_weight=0.3))
    lmm = StudentConfig(
        name="lmm",
        phases={"reconstruction": reconstruction, "adversarial": adversarial},
        batch_size=128,
        ema_half_lives=(50,),
        phase_switch="restart",
        seed=seed,
        checkpoint_every=200,
        workers=pair_of_cores,
    )
    alone = replace(lmm, workers=one_core)
    return Recipe(
        name="digits",
        images=ImagesConfig(source="digits", resolution=8, channels=1, shard_size=600),
        probe=ProbeConfig(
            losses=ProbeNetworkConfig(widths=(32, 64, 64, 64), strides=(1, 1, 2, 1), activation="relu", seed=2 * seed + 1),
            measure=ProbeNetworkConfig(
                widths=(24, 48, 96, 64), strides=(1, 2, 1, 1), kernel=3, activation="gelu", norm=False, seed=2 * seed + 2
            ),
            iterations=500,
        ),
        teacher=TeacherConfig(
            network=network,
            iterations=700,
            batch_size=128,
            optimizer=OptimizerConfig(lr=2e-3, warmup=100, decay="cosine"),
            ema_half_life=200,
            seed=seed,
            checkpoint_every=500,
            workers=pair_of_cores,
        ),
        pairs=PairsConfig(count=2500, shard_size=500, batch_size=250, seed=seed, **both_cores),
        students={
            "lmm": lmm,
            "l2": replace(
                alone, name="l2", phases={"reconstruction": replace(reconstruction, objective=replace(lines, distance="l2"))}
            ),
            "sot": replace(alone, name="sot", init="students/lmm/reconstruction", phases={"adversarial": sot}),
            **controls(alone, reconstruction, lines.num_steps),
        },
        few_steps=("0", "0,8", "0,6,12"),
        sweep=SweepConfig(trials=4, schedules=("0", "0,8"), ema_half_lives=(50.0,), iterations=40, max_concurrent=2),
        evaluate=EvaluateConfig(shard_size=599, batch_size=300, seed=1000 + seed, **both_cores),
    )


def cifar10(seed: int = 0) -> Recipe:
    """CIFAR-10, class-conditional, 32x32: EDM's teacher (DDPM++) and the paper's student."""
    network = NetworkConfig(
        kind="ddpmpp",
        img_resolution=32,
        img_channels=3,
        label_dim=10,
        augment_dim=9,
        model_channels=128,
        channel_mult=(2, 2, 2),
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.13,
    )
    return published(
        "cifar10",
        seed,
        source="cifar-10-python.tar.gz",
        teacher=edm_training(network, seed, batch_size=512, images=200e6, lr=1e-3, ema_images=500e3, augment=0.12),
        pairs=gpu_pairs(1_000_000, seed, num_steps=18, shard_size=8192, batch_size=512),
        lr=4e-4,
        adversarial_iterations=20_000,
        nfe=(35, 9, 3, 1),
    )


def cifar10_small(seed: int = 0) -> Recipe:
    """CIFAR-10 at 32x32 in small, without pretrained weights: about 100 PFLOP in bf16 with its own teacher and all students,
    reckoned to take one H200 some 20 minutes. From any zip in EDM's layout: `--images.source FILE`."""
    network = NetworkConfig(
        kind="ddpmpp",
        img_resolution=32,
        img_channels=3,
        label_dim=10,
        model_channels=64,
        channel_mult=(1, 2, 2),
        num_blocks=2,
        attn_resolutions=(16,),
    )
    recipe = cifar10(seed)
    one_gpu = WorkersConfig(count=1, gpus=1, threads=4)
    one_actor: dict[str, Any] = {"max_actors": 1}
    lines = LinesMatchingConfig(distance="probe", pixel_weight=0.1)
    optimizer = OptimizerConfig(lr=5e-4, warmup=200, decay="cosine")
    reconstruction = PhaseConfig(iterations=3000, optimizer=optimizer, objective=lines)
    critic = DiscriminatorConfig(optimizer=OptimizerConfig(lr=1e-3, betas=(0.5, 0.9)), networks=("probe",), mirror=True)
    sot = PhaseConfig(
        iterations=1500,
        optimizer=replace(optimizer, lr=2e-4),
        objective=replace(lines, steps=(0,), discriminator=critic),
    )
    adversarial = replace(sot, objective=replace(sot.objective, adversarial_weight=0.3))
    lmm = replace(
        recipe.main,
        phases={"reconstruction": reconstruction, "adversarial": adversarial},
        batch_size=256,
        ema_half_lives=(200,),
        phase_switch="restart",
        compiled=False,
        checkpoint_every=500,
        validate_every=500,
        workers=one_gpu,
    )
    return replace(
        recipe,
        name="cifar10_small",
        images=replace(recipe.images, source="cifar10-train.zip"),
        probe=replace(recipe.probe, iterations=4000, gpus=0.5),
        teacher=TeacherConfig(
            network=network,
            iterations=15_000,
            batch_size=256,
            optimizer=OptimizerConfig(lr=1e-3, warmup=500, decay="cosine"),
            ema_half_life=1000,
            flip=True,
            precision="bf16",
            seed=seed,
            checkpoint_every=2000,
            workers=one_gpu,
        ),
        pairs=replace(recipe.pairs, count=50_000, shard_size=4096, batch_size=512, **one_actor),
        students={
            "lmm": lmm,
            "l2": replace(
                lmm, name="l2", phases={"reconstruction": replace(reconstruction, objective=replace(lines, distance="l2"))}
            ),
            "sot": replace(lmm, name="sot", init="students/lmm/reconstruction", phases={"adversarial": sot}),
            **controls(lmm, reconstruction, lines.num_steps),
        },
        sweep=replace(recipe.sweep, trials=4, learning_rates=(1e-4, 5e-4), adversarial_weights=(0.0, 0.3), iterations=500),
        evaluate=replace(recipe.evaluate, features=("probe",), count=10_000, **one_actor),
    )


def cifar10_uncond(seed: int = 0) -> Recipe:
    """CIFAR-10 without class labels."""
    recipe = cifar10(seed)
    network = replace(recipe.teacher.network, label_dim=0)
    return replace(recipe, name="cifar10_uncond", teacher=replace(recipe.teacher, network=network))


def afhqv2(seed: int = 0) -> Recipe:
    """AFHQv2, 64x64, unconditional. The classes of the folder (cat, dog, wild) serve the probes alone."""
    network = NetworkConfig(
        kind="ddpmpp",
        img_resolution=64,
        img_channels=3,
        augment_dim=9,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.25,
    )
    return published(
        "afhqv2",
        seed,
        source="afhqv2-64x64.zip",
        teacher=edm_training(network, seed, batch_size=256, images=200e6, lr=2e-4, ema_images=500e3, augment=0.15),
        pairs=gpu_pairs(2_000_000, seed, num_steps=40, shard_size=2048, batch_size=256),
        lr=1e-4,
        adversarial_iterations=25_000,
        nfe=(79, 9, 3, 1),
    )


def imagenet64(seed: int = 0) -> Recipe:
    """ImageNet at 64x64, class-conditional: ADM."""
    network = NetworkConfig(
        kind="adm",
        img_resolution=64,
        img_channels=3,
        label_dim=1000,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
    )
    teacher = edm_training(network, seed, batch_size=4096, images=2500e6, lr=1e-4, ema_images=50e6, augment=0.0)
    recipe = published(
        "imagenet64",
        seed,
        source="imagenet-64x64.zip",
        teacher=replace(teacher, flip=False, precision="bf16", workers=WorkersConfig(count=32, gpus=1)),
        pairs=gpu_pairs(4_000_000, seed, num_steps=40, shard_size=1024, batch_size=256),
        lr=8e-6,
        adversarial_iterations=30_000,
        nfe=(79, 9, 3, 1),
    )
    return replace(recipe, images=replace(recipe.images, fit="adm"))


RECIPES: dict[str, Callable[[int], Recipe]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar10_small": cifar10_small,
    "cifar10_uncond": cifar10_uncond,
    "afhqv2": afhqv2,
    "imagenet64": imagenet64,
}


def find(name: str, seed: int = 0) -> Recipe:
    """The recipe called `name`: one of RECIPES, or `package.module:function`, which is imported and called with `seed`.

    Raises BeelineError where there is no such recipe, or the function returns something else.
    """
    if name in RECIPES:
        return RECIPES[name](seed)
    module, colon, function = name.partition(":")
    if not colon:
        raise BeelineError(f"recipe {name!r} is unknown; expected {', '.join(RECIPES)}, or package.module:function")
    if re.fullmatch(OWN_RECIPE, name) is None:
        raise BeelineError(f"recipe {name!r} is no package.module:function; write for example recipes:mine, without .py or /")
    try:
        made = getattr(importlib.import_module(module), function)(seed)
    except (ImportError, AttributeError) as error:
        raise BeelineError(
            f"recipe {name!r} cannot be imported ({plain(error)}); expected a function {function}(seed) in a module that is in "
            "this folder, or installed"
        ) from error
    if not isinstance(made, Recipe):
        raise BeelineError(f"recipe {name!r} returns a {type(made).__name__}; expected a beeline.config.Recipe")
    return replace(made, name=name)  # as messages, and commands in them, call it
