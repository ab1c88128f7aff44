"""Sampling in every precision: against the CPU, compiled with CUDA graphs, few-step rules, filled batches, repeats."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch

from beeline.denoiser import Denoiser
from beeline.networks.layers import Conv2d
from beeline.sampling import Sampling, sample
from beeline.sampling.few_step import FewStep, RuleName
from beeline.sampling.inference import Precision, prepare
from beeline.sampling.solvers import solve
from benchmarks.device.checks import (
    COMPILING,
    NONE,
    Check,
    Checks,
    Outcome,
    Setting,
    Skip,
    at_most,
    compiling_troubles,
    identical,
    rms,
    start_compiling,
    worst,
)
from benchmarks.device.networks import classes, network_config, noise, random_denoiser

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
# RMS of images in [-1, 1] against float32 on the CPU; small networks have larger errors.
LIMITS: dict[str, float] = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 3e-3}
ROUGHER = 4
STEPS = (0, 6, 12)
RULES: tuple[RuleName, ...] = ("same_noise", "line", "fresh_noise")


class Here(Executor):
    """Executor that runs calls immediately, in this thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def version() -> tuple[int, ...]:
    """Return PyTorch's version as numbers: (2, 13)."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


class Sampler:
    """A teacher with random weights, and its images computed on the CPU."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.config = network_config(setting, augment_dim=0)
        self.model = random_denoiser(self.config)
        self.count = 2 if setting.small else 4
        self.full = 4 if setting.small else 512  # as in the benchmark: compiled code is reused for the same shape
        self.steps = 4 if setting.small else 18
        self.noise = noise(setting, self.config, self.count)
        self.labels = classes(self.config, self.count)
        self.on_device = random_denoiser(self.config).to(setting.device)
        self.limits = {name: limit * (ROUGHER if setting.small else 1) for name, limit in LIMITS.items()}
        self.reference = functools.cache(lambda: self.solved(self.model))
        self.few_step_reference = functools.cache(lambda rule: self.few_step_images(self.model, rule))

    def solved(self, model: Denoiser, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Sample images from the noise by Heun; labels stay on the CPU, as in `beeline.generate`."""
        device = next(model.parameters()).device
        latents = self.noise if latents is None else latents
        with torch.inference_mode():
            return solve(model, latents.to(device), self.labels, solver="heun", num_steps=self.steps)

    def prepared(self, precision: Precision, *, compiled: bool = False, batch_size: int | None = None) -> Denoiser:
        """Return the teacher on the device, prepared for sampling."""
        return prepare(self.on_device, precision=precision, compiled=compiled, batch_size=batch_size)

    def against_cpu(self, precision: Precision) -> Outcome:
        """Compare images with those of the CPU."""
        return at_most(rms(self.solved(self.prepared(precision)), self.reference()), self.limits[precision])

    def repeated(self, precision: Precision) -> Outcome:
        """Compare the images of two models prepared from the same teacher."""
        first, second = (self.solved(self.prepared(precision)) for _ in range(2))
        return identical([first], [second])

    def filled(self, precision: Precision) -> Outcome:
        """Compare a small batch alone with one filled up with copies."""
        alone = self.solved(self.prepared(precision))
        return at_most(rms(self.solved(self.prepared(precision, batch_size=3 * self.count)), alone), self.limits[precision])

    def layout(self) -> Outcome:
        """Count weights and outputs that are not channels last."""
        made = self.prepared("bf16")
        weights = [module.weight for module in made.modules() if isinstance(module, Conv2d) and module.weight is not None]
        bad = sum(not weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.shape[-1] > 1)
        seen: list[torch.Tensor] = []

        def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
            seen.append(output)

        for module in made.modules():
            if isinstance(module, Conv2d):
                module.register_forward_hook(keep)
        self.solved(made)
        bad += sum(not output.is_contiguous(memory_format=torch.channels_last) for output in seen if output.shape[1] > 1)
        return at_most(float(bad), 0.0, layers=len(weights), outputs=len(seen))

    def few_step_images(self, model: Denoiser, rule: RuleName) -> torch.Tensor:
        """Sample a student's images by a rule."""
        student = copy.copy(model)
        student.few_step = FewStep(num_steps=18, rule=rule)
        return sample(student, range(self.count), self.labels, Sampling(steps=STEPS), seed=0)

    def few_steps(self, rule: RuleName, precision: Precision) -> Outcome:
        """Compare few-step images with the CPU's."""
        found = self.few_step_images(self.prepared(precision), rule)
        return at_most(rms(found, self.few_step_reference(rule)), self.limits[precision])

    def compiled(self, precision: Precision, executor: Callable[[], Executor]) -> Outcome:
        """Check compiled code with filled batches: images equal the CPU's, repeat exactly, and survive later batches."""
        start_compiling()
        full = self.full if precision != "fp32" else min(self.full, 64)
        made = self.prepared(precision, compiled=True, batch_size=full)
        others = noise(self.setting, self.config, self.count, seed=1)
        with executor() as thread:
            first = thread.submit(self.solved, made).result()
            kept = first.clone()
            thread.submit(self.solved, made, others).result()
            again = thread.submit(self.solved, made).result()
        values = {
            "RMS against the CPU": rms(kept, self.reference()),
            "change of images by a later batch": float((first - kept).abs().max()),
            "difference of a repeat": float((again - kept).abs().max()),
            **compiling_troubles(),
        }
        return worst(values, {name: self.limits[precision] if name.startswith("RMS") else NONE for name in values})

    def in_a_thread(self) -> Outcome:
        """Check sampling in a thread, as in gen_pairs.py."""
        if self.setting.gpu and version() < (2, 13):
            raise Skip(f"PyTorch {torch.__version__} has no CUDA graphs in threads (pytorch issue 123177); 2.13 has")
        return self.compiled("bf16", lambda: ThreadPoolExecutor(1, "sampler"))

    def full_batch(self) -> Outcome:
        """Check that a smaller last batch, filled and cut, gives the same as the same rows in a full batch."""
        many = noise(self.setting, self.config, 2 * self.count)
        made = self.prepared("fp32", batch_size=2 * self.count)
        labels = classes(self.config, 2 * self.count)
        with torch.inference_mode():
            sigma = torch.full((len(many),), 2.0, device=self.setting.device)
            whole = made(many.to(self.setting.device), sigma, labels)
            part = made(many[: self.count].to(self.setting.device), sigma[: self.count], self.labels)
        return identical([part], [whole[: self.count]])


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""
    sampler = Sampler(setting)
    for precision in PRECISIONS:
        yield Check(f"heun {precision}, images against the CPU's fp32", lambda p=precision: sampler.against_cpu(p))
        yield Check(f"heun {precision}, the same twice", lambda p=precision: sampler.repeated(p))
        yield Check(f"heun {precision}, a filled batch against a small one", lambda p=precision: sampler.filled(p))
    for rule, precision in itertools.product(RULES, ("fp32",) if setting.small else PRECISIONS):
        yield Check(
            f"few steps by {rule} {precision}, against the CPU's fp32", lambda r=rule, p=precision: sampler.few_steps(r, p)
        )
    yield Check("layers that leave channels last", sampler.layout)
    yield Check("a filled batch against the same rows in a full one", sampler.full_batch)
    for precision in ("bf16", "fp16", "fp32"):
        what = "CUDA graphs" if setting.gpu else "no CUDA graphs on a CPU"
        name = f"heun {precision} compiled ({what}), against the CPU's fp32, repeated"
        yield Check(name, lambda p=precision: sampler.compiled(p, Here), COMPILING)
    yield Check("heun bf16 compiled, in a thread of its own", sampler.in_a_thread, COMPILING)
