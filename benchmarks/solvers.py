"""Error of a teacher's images by network evaluations: Euler, Heun, DPM-Solver++, Adams, and Adams on calibrated levels.

    python -m benchmarks.solvers runs/digits/teacher

Errors are RMS over pixels, in [-1, 1] units, against Heun with 128 steps, on noise that the calibration does not use.
Euler and Heun run on EDM's levels down to 0. The others, as is usual for them, stop at sigma_min and return the denoised
image there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import beeline
from beeline.calibrate import Bench, Errors, refined, search, uniform_levels
from beeline.denoiser import Denoiser
from beeline.noise import stream_seed
from beeline.sampling.solvers import solve
from beeline.schedule import edm_sigmas
from benchmarks.machine import describe, describe_model, write


def dpm_solver(
    model: Denoiser, noise: torch.Tensor, labels: torch.Tensor | None, levels: Sequence[float], order: int
) -> torch.Tensor:
    """Sample by multistep DPM-Solver++ in data prediction, without noise, order 2 or 3 (Lu et al. 2022, algorithm 2, app.
    B)."""
    x, history = noise.double() * levels[0], []
    for n, sigma in enumerate(levels):
        denoised = model(x.float(), torch.full((len(x),), sigma, device=x.device), labels).double()
        history = [(-math.log(sigma), denoised), *history][:3]
        if n + 1 == len(levels):
            return denoised.float()
        here = history[0][0]
        h = -math.log(levels[n + 1]) - here
        phi = -math.expm1(-h)
        x = math.exp(-h) * x + phi * denoised
        if len(history) >= 2:
            (l0, d0), (l1, d1) = history[:2]
            first = (d0 - d1) / ((l0 - l1) / h)
            if order == 2 or len(history) == 2:
                x = x + 0.5 * phi * first
            else:
                l2, d2 = history[2]
                r0, r1 = (l0 - l1) / h, (l1 - l2) / h
                older = (d1 - d2) / r1
                slope = first + r0 / (r0 + r1) * (first - older)
                curve = (first - older) / (r0 + r1)
                x = x + (1 - phi / h) * slope + ((phi - h) / h**2 + 0.5) * curve
    raise AssertionError("unreachable: the last level returns")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Error by evaluations.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of a teacher")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[6, 8, 10, 12, 14, 16, 20])
    parser.add_argument("--heun-steps", type=int, nargs="+", default=[8, 10, 12, 14, 18, 24])
    parser.add_argument("--noises", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = beeline.load(arguments.folder).to(device)
    seen = Bench(model, arguments.noises, stream_seed(0, "calibrate"), arguments.batch_size)
    bench = Bench(model, arguments.held_out, stream_seed(0, "held out"), arguments.batch_size)
    rows: list[dict[str, Any]] = []

    def record(solver: str, nfe: int, errors: Errors, **facts: Any) -> None:
        rows.append({"solver": solver, "evaluations": nfe, **dataclasses.asdict(errors), **facts})
        print(f"{solver:28} {nfe:3} evaluations: RMS {errors.rms:.4f}, worst image {errors.worst_image_rms:.4f}", flush=True)

    for steps in arguments.heun_steps:
        record("heun", 2 * steps - 1, bench.heun(steps))
    calibrated = uniform_levels(arguments.evaluations[0])
    for count in arguments.evaluations:
        schedules = {"rho 7": edm_sigmas(count).tolist(), "log": uniform_levels(count).tolist()}
        solvers: dict[str, Callable[..., torch.Tensor]] = {
            "euler": functools.partial(solve, model, solver="euler", num_steps=count),
            **{
                f"dpm-solver++({order}M), {name}": functools.partial(dpm_solver, model, levels=levels, order=order)
                for order in (2, 3)
                for name, levels in schedules.items()
            },
        }
        for name, solver in solvers.items():
            record(name, count, Errors.of(bench.run(solver), bench.reference))
        for name, levels in schedules.items():
            record(f"adams, {name}", count, bench.adams(levels))
        calibrated, trained = search(lambda tried: seen.adams(tried).rms, refined(calibrated, count), arguments.trials, 0)
        record("adams, calibrated", count, bench.adams(calibrated.tolist()), levels=calibrated.tolist(), search_rms=trained)
    write(
        f"solvers-{arguments.folder.resolve().parent.name}",
        {
            "machine": describe(device),
            "model": describe_model(model, arguments.folder),
            "noises": arguments.noises,
            "held_out": arguments.held_out,
            "trials": arguments.trials,
            "rows": rows,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
