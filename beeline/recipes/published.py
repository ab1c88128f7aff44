"""Recipes of the paper's data sets: EDM's training, pairs made on GPUs, and the paper's students."""

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
from beeline.objectives.discriminator import DiscriminatorConfig
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.recipes.methods import ablations, baselines

ONE_GPU_EACH: dict[str, Any] = {"max_actors": 64, "gpus": 1, "cpus": 1}


def edm_training(
    network: NetworkConfig, seed: int, *, batch_size: int, images: float, lr: float, ema_images: float, augment: float
) -> TeacherConfig:
    """Return EDM's training (Karras et al. 2022, table 7); quantities counted in images become iterations of `batch_size`."""
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
    """Return settings for pairs on GPUs: fp16, whose error is a seventh of bf16's (docs/training.md), stored as float16. A
    shard takes 12 to 18 PFLOP: one to three minutes at 100 to 200 TFLOP/s."""
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
    """Build a recipe of the paper around a teacher and its pairs."""
    network = teacher.network
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
        students=_students(teacher, pairs, lr, adversarial_iterations),
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


def _students(teacher: TeacherConfig, pairs: PairsConfig, lr: float, adversarial_iterations: int) -> dict[str, StudentConfig]:
    """The paper's students (LMM, table 6) of one teacher: all levels, SOT at the first, and the L2 ablation.

    LPIPS at 64 pixels in the first phase. In the second, LPIPS and the discriminator's two backbones at 224.
    """
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
        name="lmm", phases={"reconstruction": reconstruction, "adversarial": adversarial}, ema_half_lives=(693, 6931),
        precision="bf16", compiled=True, seed=teacher.seed, checkpoint_every=2000, validate_every=5000,
        workers=WorkersConfig(count=8, gpus=1),
    )  # fmt: skip
    sot = replace(adversarial, objective=replace(with_critic, steps=(0,)))
    return {"lmm": lmm, **ablations(lmm, reconstruction, sot), **baselines(lmm, reconstruction)}


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


def cifar10_uncond(seed: int = 0) -> Recipe:
    """CIFAR-10 without class labels."""
    recipe = cifar10(seed)
    network = replace(recipe.teacher.network, label_dim=0)
    return replace(recipe, name="cifar10_uncond", teacher=replace(recipe.teacher, network=network))


def afhqv2(seed: int = 0) -> Recipe:
    """AFHQv2, 64x64, unconditional. Only the probes use the classes of the folder (cat, dog, wild)."""
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
