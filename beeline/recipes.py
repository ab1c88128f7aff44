"""Recipes: a function per data set that returns the settings of every stage,
seeded as a whole. A variant is `dataclasses.replace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from beeline.config import (
    DiscriminatorConfig,
    EvaluateConfig,
    ImagesConfig,
    LmmConfig,
    NetworkConfig,
    OptimizerConfig,
    PairsConfig,
    PhaseConfig,
    PoolConfig,
    ProbeConfig,
    ProbeNetworkConfig,
    Recipe,
    SweepConfig,
    TeacherConfig,
    WorkersConfig,
)


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
    both_cores = PoolConfig(min_actors=2, max_actors=2)
    reconstruction = PhaseConfig(
        iterations=350, optimizer=OptimizerConfig(lr=1e-3, warmup=50, decay="cosine"), distance="perceptual"
    )
    one_core = WorkersConfig(count=1, threads=1)  # the ablations train side by side
    no_phase = replace(reconstruction, iterations=0)
    sot = replace(reconstruction, iterations=200, optimizer=OptimizerConfig(lr=5e-4, warmup=20, decay="cosine"), steps=(0,))
    lmm = LmmConfig(
        batch_size=128,
        ema_half_life=50,
        seed=seed,
        reconstruction=reconstruction,
        adversarial=replace(sot, adversarial_weight=0.3),
        discriminator=DiscriminatorConfig(optimizer=OptimizerConfig(lr=2e-3, betas=(0.5, 0.9)), augment=("translation",)),
        checkpoint_every=200,
        workers=pair_of_cores,
    )
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
            iterations=800,
            batch_size=128,
            optimizer=OptimizerConfig(lr=2e-3, warmup=100, decay="cosine"),
            ema_half_life=200,
            seed=seed,
            checkpoint_every=500,
            workers=pair_of_cores,
        ),
        pairs=PairsConfig(count=3000, shard_size=500, batch_size=250, seed=seed, pool=both_cores),
        students={
            "lmm": lmm,
            "l2": replace(
                lmm,
                name="l2",
                reconstruction=replace(reconstruction, distance="l2"),
                adversarial=no_phase,
                workers=one_core,
            ),
            "sot": replace(
                lmm,
                name="sot",
                init="students/lmm/reconstruction",
                reconstruction=no_phase,
                adversarial=sot,
                workers=one_core,
            ),
        },
        few_steps=("0", "0,8", "0,6,12"),
        sweep=SweepConfig(schedules=("0", "0,8"), learning_rates=(1e-4, 1e-3), iterations=50),
        evaluate=EvaluateConfig(shard_size=599, batch_size=300, seed=1000 + seed, pool=both_cores),
    )


RECIPES: dict[str, Callable[[int], Recipe]] = {"digits": digits}
