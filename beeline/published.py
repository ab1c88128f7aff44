"""What the published recipes share: EDM's training, pairs made on GPUs, and the paper's students (recipes.py)."""

from __future__ import annotations

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
from beeline.objectives.kd import DistillationConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.objectives.rectified_flow import RectifiedFlowConfig

ONE_GPU_EACH: dict[str, Any] = {"max_actors": 64, "gpus": 1, "cpus": 1}


def controls(student: StudentConfig, phase: PhaseConfig, num_steps: int) -> dict[str, StudentConfig]:
    """Other methods on the same pairs at the cost of `phase`: distillation of the end points, and rectified flow."""
    methods = {
        "kd": ("distillation", DistillationConfig(num_steps=num_steps)),
        "rf": ("flow", RectifiedFlowConfig(num_steps=num_steps)),
    }
    return {
        name: replace(student, name=name, phases={called: replace(phase, objective=objective)})
        for name, (called, objective) in methods.items()
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
    lines = LinesMatchingConfig(num_steps=pairs.num_steps, distance="lpips", resize=64)
    optimizer = OptimizerConfig(kind="radam", lr=lr, clip=0)
    reconstruction = PhaseConfig(iterations=80_000, optimizer=optimizer, objective=lines)
    with_critic = replace(
        lines,
        resize=224,
        adversarial_weight=1.0,
        discriminator=DiscriminatorConfig(
            optimizer=OptimizerConfig(kind="radam", lr=2e-3, betas=(0.5, 0.9), clip=0),
            networks=("tf_efficientnet_lite0", "deit_base_distilled_patch16_224"),
            mirror=teacher.flip,
        ),
    )
    adversarial = PhaseConfig(iterations=adversarial_iterations, optimizer=optimizer, objective=with_critic)
    lmm = StudentConfig(
        name="lmm",
        phases={"reconstruction": reconstruction, "adversarial": adversarial},
        ema_half_lives=(693, 6931),
        precision="bf16",
        compiled=True,
        seed=seed,
        checkpoint_every=2000,
        validate_every=5000,
        workers=WorkersConfig(count=8, gpus=1),
    )
    sot = replace(adversarial, objective=replace(with_critic, steps=(0,)))
    l2 = replace(reconstruction, objective=replace(lines, distance="l2"))
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
            "sot": replace(lmm, name="sot", init="students/lmm/reconstruction", phases={"adversarial": sot}),
            "l2": replace(lmm, name="l2", phases={"reconstruction": l2}),
            **controls(lmm, reconstruction, pairs.num_steps),
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
