"""Speed of sampling, training and measuring relative to the machine's ceilings; writes the results that the estimate reads.

Networks, policies and baselines are those of benchmarks.sampling, benchmarks.training and benchmarks.evaluation, and so is the
layout of the results: `sampling-gpu-cifar10.json`, `training-gpu-cifar10.json` and `measuring-gpu.json`.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from beeline.denoiser import Denoiser
from beeline.features.backbones import BACKBONES
from beeline.features.measuring import DINOV2, GPU_BATCH, Eye
from beeline.sampling.inference import DTYPES, prepare
from beeline.sampling.solvers import solve
from benchmarks.device.checks import COMPILING, Check, Checks, Outcome, Setting, Skip, measured, set_flags
from benchmarks.device.measuring import measuring_network
from benchmarks.device.networks import backbone, batch_of, classes, network_config, noise, random_denoiser, student_config
from benchmarks.device.runner import free
from benchmarks.machine import ceilings, describe, describe_model, timed
from benchmarks.sampling import errors, exact, plain
from benchmarks.training import POLICIES, Step

PHASES = ("reconstruction", "adversarial")
RUN = "the flags of a run"


def settled(call: Callable[[], Any], setting: Setting) -> float:
    """Measure the median seconds of a step over one to two seconds, after a few steps: the first after compilation are slow."""
    seconds = timed({"step": call}, setting.device, 1 if setting.small else 3)["step"]
    return seconds if setting.small else timed({"step": call}, setting.device, min(30, max(3, int(1.5 / seconds))))["step"]


def largest(setting: Setting, model: Denoiser) -> dict[str, Any]:
    """Run both phases, compiled in bf16, at the largest batch that fits: images/s, GiB and seconds of the first step."""
    for size in (2,) if setting.small else (512, 256, 128):
        free()
        try:
            return _both_phases(setting, model, size)
        except torch.OutOfMemoryError:
            gc.collect()
    raise Skip("a batch of 128 does not fit")


def _both_phases(setting: Setting, model: Denoiser, size: int) -> dict[str, Any]:
    config = student_config(setting, **POLICIES["bf16 compiled"])
    networks: dict[str, Any] = {name: backbone(name) for name in BACKBONES}
    step, found = Step(model, networks, config, config.phases["reconstruction"]), {}
    batch = batch_of(setting, network_config(setting, augment_dim=0), size, setting.device)
    generator = torch.Generator(setting.device).manual_seed(0)
    for phase in PHASES:
        if phase != PHASES[0]:
            step.begin(config.phases["adversarial"])  # the same compiled network
        if setting.gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        float(step(batch, generator)["lines"])
        first = time.perf_counter() - start
        seconds = settled(lambda: step(batch, generator), setting)
        peak = torch.cuda.max_memory_allocated() / 2**30 if setting.gpu else 0.0
        found[phase] = {"batch_size": size, "images_per_s": size / seconds, "peak_gib": peak, "first_step_s": round(first, 1)}
    return found


def worded(found: dict[str, Any]) -> str:
    """Format the result of `largest` as a line."""
    return "; ".join(
        f"{phase} {row['images_per_s']:,.0f} images/s at batch {row['batch_size']}"
        + (f", {row['share_of_ceiling']:.0%} of the ceiling" if "share_of_ceiling" in row else "")
        + f", {row['peak_gib']:.0f} GiB"
        for phase, row in found.items()
    )


class Speeds:
    """State shared by the checks of this section, and the results so far."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, setting.device
        self.rounds = 1 if setting.small else 3
        self.config = network_config(setting, augment_dim=0)
        self.model = random_denoiser(self.config).to(self.device)
        self.batch = 4 if setting.small else 512
        self.noises = 2 if setting.small else 16
        self.steps = 2 if setting.small else 18
        self.kind = "gpu" if setting.gpu else "cpu"
        self.images = noise(setting, self.config, self.batch).to(self.device)
        self.sigma = torch.full((self.batch,), 1.0, device=self.device)
        self.labels = classes(self.config, self.batch)
        self.labels = None if self.labels is None else self.labels.to(self.device)
        self.ceilings: dict[str, float] = {}
        self.reference: torch.Tensor | None = None
        self.policies: dict[str, dict[str, Any]] = {}
        self.phases: dict[str, dict[str, Any]] = {phase: {} for phase in PHASES}
        self.looking: dict[str, dict[str, float]] = {}
        self.largest: dict[str, Any] = {}
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            self.model(self.images[:1], self.sigma[:1], None if self.labels is None else self.labels[:1])
        self.flops = float(counter.get_total_flops())
        self.step_flops: dict[str, float] = {}

    def common(self) -> dict[str, Any]:
        """Return the description of machine and model for every result."""
        return {"machine": describe(self.device), "model": describe_model(self.model, None)}

    def save(self) -> None:
        """Write the current results."""
        folder, common = Path(self.setting.folder), self.common()
        sampling = {
            "batch_size": self.batch,
            "images_for_error": self.noises,
            "gflop_per_evaluation": self.flops / 1e9,
            "ceilings_tflops": {name: value / 1e12 for name, value in self.ceilings.items()},
            "policies": self.policies,
        }
        training = {"batch_size": 2 if self.setting.small else 64, "phases": self.phases, "largest_batch": self.largest}
        for name, result in {
            f"sampling-{self.kind}-cifar10": common | sampling,
            f"training-{self.kind}-cifar10": common | training,
            f"measuring-{self.kind}": {"machine": common["machine"], "networks": self.looking},
        }.items():
            (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")

    def sampling(self, policy: str) -> Outcome:
        """Measure evaluations/s of one policy, and the error of its images against float64."""
        if policy == "plain":
            made: Denoiser = plain(self.model)
        else:
            precision, compiled = policy.split()[0], "compiled" in policy
            size = self.batch if compiled else None
            made = prepare(self.model, precision=precision, compiled=compiled, batch_size=size)  # pyright: ignore[reportArgumentType]
        few = None if self.labels is None else self.labels[: self.noises]
        with torch.inference_mode():
            if self.reference is None:
                self.reference = exact(self.model, self.images[: self.noises], few, self.steps)
            start = time.perf_counter()
            made(self.images, self.sigma, self.labels)[0, 0, 0, 0].item()
            first = time.perf_counter() - start
            found = solve(made, self.images[: self.noises], few, solver="heun", num_steps=self.steps)
            seconds = settled(lambda: made(self.images, self.sigma, self.labels), self.setting)
        rate = self.batch / seconds
        base = self.policies.get("plain", {}).get("evaluations_per_s", rate)
        ceiling = self.ceilings["fp32" if policy == "plain" else policy.split()[0]]
        self.policies[policy] = {
            "first_call_s": round(first, 1),
            "error": errors(found, self.reference),
            "evaluations_per_s": rate,
            "images_per_s_heun18": rate / 35,
            "against_plain": rate / base,
            "share_of_ceiling": rate * self.flops / ceiling,
        }
        self.save()
        row = self.policies[policy]
        text = f"{rate:,.0f} evaluations/s at batch {self.batch}, {row['against_plain']:.2f}x plain"
        return measured(f"{text}, {row['share_of_ceiling']:.0%} of the ceiling, RMS {row['error']['rms']:.1g}", **row)

    def step(self, phase: str, policy: str) -> Step:
        """Build a training step under a policy."""
        config = student_config(self.setting, **POLICIES[policy])
        networks: dict[str, Any] = {name: backbone(name) for name in BACKBONES}
        if policy == "plain":
            networks = {name: network.to(self.device) for name, network in networks.items()}
        return Step(self.model, networks, config, config.phases[phase], as_written=policy == "plain")

    def seconds_of(self, step: Step, count: int) -> tuple[float, float]:
        """Measure the seconds of one step, and of the first."""
        batch, generator = batch_of(self.setting, self.config, count, self.device), torch.Generator(self.device).manual_seed(0)
        start = time.perf_counter()
        float(step(batch, generator)["lines"])
        first = time.perf_counter() - start
        return settled(lambda: step(batch, generator), self.setting), first

    def training(self, phase: str, policy: str) -> Outcome:
        """Measure images/s of one phase under one policy."""
        count = 2 if self.setting.small else 64
        step = self.step(phase, policy)
        if phase not in self.step_flops:
            batch = batch_of(self.setting, self.config, count, self.device)
            with FlopCounterMode(display=False) as counter:
                step.objective.backward(step.student, step.critic, batch, torch.Generator(self.device).manual_seed(0))
            step.student.optimizer.zero_grad(set_to_none=True)
            self.step_flops[phase] = counter.get_total_flops() / count
        seconds, first = self.seconds_of(step, count)
        rate = count / seconds
        base = self.phases[phase].get("plain", {}).get("images_per_s", rate)
        share = rate * self.step_flops[phase] / self.ceilings["fp32" if policy == "plain" else policy.split()[0]]
        row = {"images_per_s": rate, "against_plain": rate / base, "share_of_ceiling": share, "first_step_s": round(first, 1)}
        if self.setting.gpu or phase == PHASES[0]:
            batch = batch_of(self.setting, self.config, count, self.device)
            parts = timed(step.parts(batch, torch.Generator(self.device).manual_seed(0)), self.device, self.rounds)
            row["share_of_step"] = {part: value / seconds for part, value in parts.items()}
        self.phases[phase][policy] = row
        self.save()
        text = f"{rate:,.0f} images/s at batch {count}, {row['against_plain']:.2f}x plain, {share:.0%} of the ceiling"
        return measured(text, gflop_per_image=self.step_flops[phase] / 1e9, **row)

    def largest_batch(self) -> Outcome:
        """Measure images/s and memory of both phases, compiled in bf16, at the largest batch that fits."""
        found = largest(self.setting, self.model)
        for phase, row in found.items():
            if phase in self.step_flops:
                flops = row["images_per_s"] * self.step_flops[phase]
                row["share_of_ceiling"] = flops / self.ceilings["bf16"]
        self.largest = found
        self.save()
        return measured(worded(found), **found)

    def flags(self, what: str, policy: str) -> Outcome:
        """Measure how TF32 and determinism change the speed of the same code."""
        if not self.setting.gpu:
            raise Skip("a CPU has no such flags")
        call: Callable[[], Any]
        if what == "sampling":
            made, few = prepare(self.model, precision=policy), self.images[:64]  # pyright: ignore[reportArgumentType]
            labels = None if self.labels is None else self.labels[:64]

            def call() -> Any:
                with torch.inference_mode():
                    return made(few, self.sigma[:64], labels)
        else:
            step, batch = self.step(what, policy), batch_of(self.setting, self.config, 64, self.device)
            generator = torch.Generator(self.device).manual_seed(0)

            def call() -> Any:
                return step(batch, generator)

        seconds: dict[str, float] = {}
        kinds = {RUN: (False, True), "not deterministic": (False, False)}
        if policy == "fp32":
            kinds |= {"TF32": (True, True), "TF32, not deterministic": (True, False)}
        try:
            for name, (tf32, deterministic) in kinds.items():
                set_flags(tf32=tf32, deterministic=deterministic)
                seconds[name] = settled(call, self.setting)
        finally:
            set_flags(tf32=False, deterministic=True)
        ratios = {name: seconds[RUN] / value for name, value in seconds.items() if name != RUN}
        text = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        return measured(f"the run's flags {64 / seconds[RUN]:,.0f} images/s; {text}", seconds=seconds)

    def look(self, name: str) -> Outcome:
        """Measure images/s of a measuring network, optimised and as written."""
        size = network_config(self.setting).img_resolution
        network = measuring_network(name)
        eye, as_written = Eye(network, self.device), network.to(self.device)
        shown = torch.zeros(2 if self.setting.small else 512, 3, size, size, dtype=torch.uint8)

        def plainly() -> None:
            with torch.inference_mode():
                for part in shown.split(GPU_BATCH):
                    as_written.look(part.to(self.device))[0].cpu()

        seconds = timed({"plain": plainly, name: lambda: eye.look(shown)}, self.device, self.rounds)
        row = {"images_per_s": len(shown) / seconds[name], "against_plain": seconds["plain"] / seconds[name]}
        self.looking[name] = row
        self.save()
        return measured(f"{row['images_per_s']:,.0f} images/s, {row['against_plain']:.2f}x plain", **row)


def checks(setting: Setting) -> Checks:
    """List the checks of this section, the most important ones first, because time may run out."""
    speeds = Speeds(setting)
    precisions = ("fp32", "bf16", "fp16") if setting.gpu else ("fp32", "bf16")

    def ceiling() -> Outcome:
        speeds.ceilings |= ceilings(setting.device, {name: DTYPES[name] for name in precisions}, rounds=speeds.rounds)
        shown = {name: value / 1e12 for name, value in speeds.ceilings.items()}
        return measured(", ".join(f"{name} {value:.3g} TFLOP/s" for name, value in shown.items()), **shown)

    def sampling(policy: str) -> Check:
        return Check(f"sampling {policy}", lambda: speeds.sampling(policy), COMPILING)

    def training(phase: str, policy: str) -> Check:
        return Check(f"{phase} {policy}", lambda: speeds.training(phase, policy), COMPILING)

    yield Check("ceilings", ceiling)
    for policy in ("plain", *precisions):
        yield sampling(policy)
    for phase in PHASES:
        yield training(phase, "plain")
        yield training(phase, "bf16")
    yield sampling("bf16 compiled")
    for phase in PHASES:
        yield training(phase, "bf16 compiled")
    yield Check("bf16 compiled at the largest batch", speeds.largest_batch, COMPILING)
    if "fp16" in precisions:
        yield sampling("fp16 compiled")
    for what, policy in (("sampling", "fp32"), ("sampling", "bf16"), ("adversarial", "bf16"), ("reconstruction", "fp32")):
        yield Check(f"cost of flags, {what} {policy}", lambda w=what, p=policy: speeds.flags(w, p))
    for name in ("inception", *DINOV2):
        if not (setting.small and name in ("inception", "dinov2_vitl14")):
            yield Check(f"measuring in {name}", lambda n=name: speeds.look(n))
    for phase in PHASES:
        yield training(phase, "fp32")
    yield sampling("fp32 compiled")
