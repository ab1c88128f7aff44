"""Networks and their files: import of released checkpoints, writing and loading folders, a training step of NCSN++ and ADM."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

import beeline
from beeline.checkpoint import dump, restore
from beeline.edm_import import edm_import
from beeline.objectives.edm import edm_loss
from beeline.objectives.learner import Learner
from beeline.recipes import RECIPES
from beeline.sampling import generate
from beeline.sampling.few_step import FewStep
from benchmarks.device.checks import Check, Checks, Outcome, SameDraws, Setting, at_most, relative, rms, worst
from benchmarks.device.networks import classes, images, network_config, random_denoiser
from benchmarks.device.released import write_released
from benchmarks.device.sampling import LIMITS


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""

    def imported() -> Outcome:
        arguments = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "augment_dim": 9}
        small = Setting(device=setting.device, small=True, folder="")
        source = random_denoiser(network_config(small))
        with tempfile.TemporaryDirectory() as folder:
            write_released(source, arguments, Path(folder) / "released.pkl")
            edm_import(Path(folder) / "released.pkl", Path(folder) / "teacher")
            model = beeline.load(Path(folder) / "teacher").to(setting.device)
        made, wanted = (generate(m, 4, num_steps=4, batch_size=3) for m in (model, source))
        return at_most(rms(made, wanted), LIMITS["fp32"])

    def written() -> Outcome:
        model = random_denoiser(network_config(setting, augment_dim=0))
        model.few_step = FewStep(num_steps=18, trained_steps=(0, 1))
        files = dump(model, {})
        again = restore(dump(model.to(setting.device), {}), "memory")
        same = dump(again, {}) == files
        return Outcome(passed=same, figure="the same bytes" if same else "other bytes", expected="the same bytes")

    def labels_on_cpu() -> Outcome:
        config = network_config(setting, augment_dim=0)
        student, count = random_denoiser(config), 2
        student.few_step = FewStep(num_steps=18)
        labels = torch.tensor([3, 5])[:count]
        wanted = generate(student, count, labels=labels, steps=(0, 1))
        found = generate(student.to(setting.device), count, labels=labels, steps=(0, 1))
        return at_most(rms(found, wanted), LIMITS["fp32"])

    def gradients(recipe: str, kind: str, precision: str, device: torch.device) -> tuple[float, list[torch.Tensor]]:
        """Compute loss and gradients of a training step of a network at full size."""
        config = network_config(setting, recipe, kind=kind, augment_dim=0)
        model = random_denoiser(config).to(device).train().requires_grad_(True)
        learner = Learner(model, RECIPES[recipe](0).teacher.optimizer, precision=precision)  # pyright: ignore[reportArgumentType]
        with SameDraws(0):
            shown = images(config, 2, 0).to(device)
            loss = edm_loss(learner, shown, classes(config, 2), torch.Generator(device).manual_seed(0))
        loss.backward()
        return float(loss.detach()), [p.grad.cpu() for p in learner.parameters if p.grad is not None]

    reference = functools.lru_cache(1)(lambda recipe, kind: gradients(recipe, kind, "fp32", torch.device("cpu")))

    def trained(recipe: str, kind: str, precision: str) -> Outcome:
        found, wanted = gradients(recipe, kind, precision, setting.device), reference(recipe, kind)
        values = {"loss": abs(found[0] / wanted[0] - 1), "gradient": relative(found[1], wanted[1])}
        limits = {"loss": 1e-4, "gradient": 2e-3} if precision == "fp32" else {"loss": 2e-2, "gradient": 0.1}
        return worst(values, limits)

    yield Check("a released EDM checkpoint, imported and sampled", imported)
    yield Check("a model folder written from the device and read again", written)
    yield Check("labels on the CPU, images against the CPU's", labels_on_cpu)
    yield Check("ncsnpp fp32, a training step against the CPU's", lambda: trained("cifar10", "ncsnpp", "fp32"))
    yield Check("imagenet64 (ADM) fp32, a training step against the CPU's", lambda: trained("imagenet64", "adm", "fp32"))
    yield Check("imagenet64 (ADM) bf16, a training step against the CPU's fp32", lambda: trained("imagenet64", "adm", "bf16"))
