"""What the published recipes share: EDM's training, pairs made on GPUs, and the paper's students (recipes.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from beeline.config import (
    DiscriminatorConfig,
    EvaluateConfig,
    ImagesConfig,
    LmmConfig,
    NetworkConfig,
    OptimizerConfig,
    PairsConfig,
    PhaseConfig,
    ProbeConfig,
    ProbeNetworkConfig,
    Recipe,
    SweepConfig,
    TeacherConfig,
    WorkersConfig,
)

ONE_GPU_EACH: dict[str, Any] = {"max_actors": 64, "gpus": 1, "cpus": 1}


def other_objectives(student: LmmConfig) -> dict[str, LmmConfig]:
    """What else can be learned from the same pairs, as controls: distillation of the end points, and rectified flow."""
    return {
        "kd": replace(student, name="kd", objective="beeline.objectives.kd:Distillation"),
        "rf": replace(student, name="rf", objective="beeline.objectives.rectified_flow:RectifiedFlow"),
    }


def edm_training(
    network: NetworkConfig, seed: int, *, batch_size: int, images: float, lr: float, ema_images: float, augment: float
) -> TeacherConfig:
    """EDM's training (Karras et al. 2022, table 7): everything that it counts in images, in iterations of `batch_size`."""
    return TeacherConfig(
        network=network,
        iterations=round(images / batch_size),
        batch_size=batch_size,
        optimizer=OptimizerConfig(lr=lr, warmup=round(10e6 / batch_size), clip=0),
        ema_half_life=ema_images / batch_size,
        flip=True,
        augment=augment,
        seed=seed,
        checkpoint_every=2000,
        workers=WorkersConfig(count=8, gpus=1),
    )


def gpu_pairs(count: int, seed: int, *, num_steps: int, shard_size: int, batch_size: int) -> PairsConfig:
    """Pairs on GPUs: fp16, whose error is a seventh of bf16's (docs/training.md), stored as float16. A shard is 12 to 18
    PFLOP: one to three minutes at 100 to 200 TFLOP/s."""
    return PairsConfig(
        count=count, shard_size=shard_size, batch_size=batch_size, num_steps=num_steps, precision="fp16", dtype="float16",
        seed=seed, **ONE_GPU_EACH,
    )  # fmt: skip


def published(
    name: str,
    seed: int,
    *,
    source: str,
    teacher: TeacherConfig,
    pairs: PairsConfig,
    lr: float,
    adversarial_iterations: int,
    nfe: tuple[int, ...],
) -> Recipe:
    """The paper's students (LMM, table 6) of one teacher: all levels, SOT at the first, and the L2 ablation.

    LPIPS at 64 pixels in the first phase, at 224 in the second, as the two backbones of the discriminator.
    """
    network = teacher.network
    reconstruction = PhaseConfig(
        iterations=80_000, optimizer=OptimizerConfig(kind="radam", lr=lr, clip=0), distance="lpips", resize=64
    )
    adversarial = replace(reconstruction, iterations=adversarial_iterations, resize=224, adversarial_weight=1.0)
    none = replace(reconstruction, iterations=0)
    lmm = LmmConfig(
        num_steps=pairs.num_steps,
        ema_half_lives=(693, 6931),
        precision="bf16",
        compiled=True,
        seed=seed,
        reconstruction=reconstruction,
        adversarial=adversarial,
        discriminator=DiscriminatorConfig(
            optimizer=OptimizerConfig(kind="radam", lr=2e-3, betas=(0.5, 0.9), clip=0),
            networks=("tf_efficientnet_lite0", "deit_base_distilled_patch16_224"),
            mirror=teacher.flip,
        ),
        checkpoint_every=2000,
        validate_every=5000,
        workers=WorkersConfig(count=8, gpus=1),
    )
    widths, strides = (64, 128, 128, 256, 256, 256), (1, 1, 2, 1, 2, 1)
    return Recipe(
        name=name,
        images=ImagesConfig(
            source=source, resolution=network.img_resolution, channels=network.img_channels, shard_size=4096,
            max_actors=16, cpus=1,
        ),
        probe=ProbeConfig(
            losses=ProbeNetworkConfig(widths=widths, strides=strides, activation="relu", seed=2 * seed + 1),
            measure=ProbeNetworkConfig(
                widths=(48, 96, 192, 192, 256), strides=(1, 2, 2, 1, 1), activation="gelu", norm=False, seed=2 * seed + 2
            ),
            iterations=20_000,
            min_accuracy=0.3,
            gpus=1,
        ),
        teacher=teacher,
        pairs=pairs,
        students={
            "lmm": lmm,
            "sot": replace(
                lmm,
                name="sot",
                init="students/lmm/reconstruction",
                reconstruction=none,
                adversarial=replace(adversarial, steps=(0,)),
            ),
            "l2": replace(lmm, name="l2", reconstruction=replace(reconstruction, distance="l2"), adversarial=none),
            **other_objectives(replace(lmm, adversarial=none)),
        },
        few_steps=("0", "0,1", "0,1,2", "0,3,5", "0,1,3,5"),
        sweep=SweepConfig(
            trials=32, schedules=("0", "0,1", "0,1,2", "0,3,5"), learning_rates=(lr / 10, lr),
            adversarial_weights=(0.5, 1.0), ema_half_lives=(693.0, 2000.0), iterations=5000, rungs=4, gpus=1,
        ),
        evaluate=EvaluateConfig(
            features=("inception", "dinov2_vitl14", "probe"),
            count=50_000, shard_size=2500, batch_size=500, precision="fp16", seed=1000 + seed, nfe=nfe, steps=("0",),
            **ONE_GPU_EACH,
        ),
    )  # fmt: skip
