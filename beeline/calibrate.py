"""Noise levels of the Adams solver for one teacher: a short search, validated on noise that the search does not see.

    python -m beeline.calibrate runs/digits/teacher

writes solver.json and solver.png next to the weights. For each number of evaluations, the search moves one interior level
at a time, in log sigma, and keeps a move that lowers the images' RMS error against a fine reference. Longer schedules start
from the best shorter one. The result is the smallest number whose error on held-out noise, both RMS and tail, is at most that
of Heun.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from beeline.checkpoint import SOLVER, WEIGHTS, load
from beeline.denoiser import Denoiser
from beeline.entry import run_main
from beeline.errors import BeelineError, plain
from beeline.files.arrays import spread
from beeline.files.places import local_path
from beeline.noise import stream, stream_seed, unit_noise
from beeline.sampling import batches
from beeline.sampling.adams import CORRECTOR, PREDICTOR, adams
from beeline.sampling.solvers import evaluations, solve
from beeline.schedule import SIGMA_MAX, SIGMA_MIN
from beeline.settings import MAX_STEPS, Range, Seed, Size, Some, Steps, Whole, check

REFERENCE_STEPS = 128  # Heun steps of the reference
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors:
    """Difference between images and the reference, in units of [-1, 1]: RMS over all pixels, and the tail of the distribution.

    `p95_image_rms`: the 95th percentile of the images' RMS. `worst_image_rms`: its maximum. `max`: the largest pixel error.
    """

    rms: float
    p95_image_rms: float
    worst_image_rms: float
    max: float

    @classmethod
    def of(cls, images: torch.Tensor, reference: torch.Tensor) -> Errors:
        """Compute the errors of images (n, C, H, W) against their reference."""
        square = (images.double() - reference.double()) ** 2
        if not bool(square.isfinite().all()):
            return cls(**dict.fromkeys((field.name for field in dataclasses.fields(cls)), float("inf")))
        images_rms = square.flatten(1).mean(1).sqrt()
        return cls(
            rms=float(square.mean().sqrt()),
            p95_image_rms=float(images_rms.quantile(0.95)),
            worst_image_rms=float(images_rms.max()),
            max=float(square.max().sqrt()),
        )

    def reaches(self, other: Errors) -> bool:
        """Return whether these errors are at most the other's, both in RMS and in the tail."""
        return self.rms <= other.rms and self.p95_image_rms <= other.p95_image_rms


class Bench:
    """Fixed noise for a teacher, and the errors of solvers on it."""

    def __init__(self, teacher: Denoiser, count: int, seed: int, batch_size: int) -> None:
        self.teacher, self.batch_size = teacher, batch_size
        self.device = next(teacher.parameters()).device
        self.noise = torch.from_numpy(unit_noise(seed, range(count), teacher.image_shape)).to(self.device)
        classes = torch.from_numpy(spread(count, max(teacher.label_dim, 1))).to(self.device)
        self.labels = classes if teacher.label_dim else None
        self.reference = self.run(lambda noise, labels: self._heun(noise, labels, REFERENCE_STEPS))
        if not bool(self.reference.isfinite().all()):
            raise BeelineError(
                "the teacher makes NaN or infinite images, which no choice of levels can fix; check the teacher's training"
            )

    @torch.inference_mode()
    def run(self, solver: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> torch.Tensor:
        """Sample images (n, C, H, W) from all noise by `solver(noise, labels)`, on the CPU."""
        parts = []
        for rows in batches(len(self.noise), self.batch_size):
            labels = None if self.labels is None else self.labels[rows.start : rows.stop]
            parts.append(solver(self.noise[rows.start : rows.stop], labels).cpu())
        return torch.cat(parts)

    def _heun(self, noise: torch.Tensor, labels: torch.Tensor | None, num_steps: int) -> torch.Tensor:
        return solve(self.teacher, noise, labels, solver="heun", num_steps=num_steps)

    def heun(self, num_steps: int) -> Errors:
        """Compute the errors of Heun with EDM's levels."""
        return Errors.of(self.run(lambda noise, labels: self._heun(noise, labels, num_steps)), self.reference)

    def adams(self, levels: Sequence[float], predictor: int = PREDICTOR, corrector: int = CORRECTOR) -> Errors:
        """Compute the errors of Adams on `levels`."""
        images = self.run(
            lambda noise, labels: adams(
                self.teacher, noise, labels, levels=levels, predictor=predictor, corrector=corrector
            )
        )  # fmt: skip
        return Errors.of(images, self.reference)


def uniform_levels(count: int) -> np.ndarray:
    """Return `count` levels from sigma_max to sigma_min, evenly spaced in log sigma."""
    return np.geomspace(SIGMA_MAX, SIGMA_MIN, count)


def search(error: Callable[[list[float]], float], levels: np.ndarray, trials: int, seed: int) -> tuple[np.ndarray, float]:
    """Lower `error(levels)` by moving one interior level at a time; the ends are fixed. Returns the levels and their error.

    A move shifts one level by a random fraction of its distance to a neighbour; the fractions shrink during the search. The
    result depends only on `seed`.
    """
    random = stream(seed, "calibrate", len(levels))
    logs, best = np.log(levels), error(levels.tolist())
    for trial in range(trials):
        place = 1 + trial % (len(logs) - 2)
        reach = 0.6 * (0.08 / 0.6) ** (trial / trials)
        towards = place - 1 if random.random() < 0.5 else place + 1
        moved = logs.copy()
        moved[place] += random.random() * reach * (logs[towards] - logs[place])
        candidate = error(np.exp(moved).tolist())
        if candidate < best:
            logs, best = moved, candidate
    return np.exp(logs), best


def refined(levels: np.ndarray, count: int) -> np.ndarray:
    """Interpolate a good shorter schedule to `count` levels, as the start of a search."""
    old = np.linspace(0, 1, len(levels))
    return np.exp(np.interp(np.linspace(0, 1, count), old, np.log(levels)))


def check_settings(
    *, counts: Sequence[int], heun_steps: int, noises: int, held_out: int, trials: int, seed: int, batch_size: int
) -> None:
    """Raise BeelineError for settings that `calibrate` cannot use."""
    check("--evaluations", tuple(counts), Some[Annotated[int, Range(4, MAX_STEPS)]])
    if list(counts) != sorted(set(counts)):
        raise BeelineError(f"evaluations are {list(counts)}; expected increasing numbers from 4 up")
    check("--heun-steps", heun_steps, Steps)
    for name, value in {"--noises": noises, "--held-out": held_out, "--batch-size": batch_size}.items():
        check(name, value, Size)
    check("--trials", trials, Whole)
    check("--seed", seed, Seed)


def calibrate(
    teacher: Denoiser,
    *,
    counts: Sequence[int] = (8, 10, 12, 14),
    heun_steps: int = 18,
    noises: int = 32,
    held_out: int = 128,
    trials: int = 400,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Compute the content of solver.json: levels for each of `counts` evaluations, errors on held-out noise, and the choice.

    The search uses `noises` samples of noise; all reported errors come from `held_out` others. It ends at the first count whose
    error is at most that of Heun with `heun_steps`, both in RMS and in the tail.
    """
    check_settings(
        counts=counts, heun_steps=heun_steps, noises=noises, held_out=held_out, trials=trials, seed=seed, batch_size=batch_size
    )
    start = time.monotonic()
    seen = Bench(teacher, noises, stream_seed(seed, "calibrate"), batch_size)
    unseen = Bench(teacher, held_out, stream_seed(seed, "held out"), batch_size)
    heun = unseen.heun(heun_steps)
    nfe = evaluations("heun", heun_steps)
    print(f"heun, {nfe} evaluations: RMS {heun.rms:.4f}, 95 % of images below {heun.p95_image_rms:.4f}", flush=True)
    rows, levels, reached = [], uniform_levels(counts[0]), False
    for count in counts:
        levels, trained = search(lambda tried: seen.adams(tried).rms, refined(levels, count), trials, seed)
        errors = unseen.adams(levels.tolist())
        rows.append({"evaluations": count, "levels": levels.tolist(), "search_rms": trained, **dataclasses.asdict(errors)})
        print(
            f"adams, {count} evaluations: RMS {errors.rms:.4f} ({trained:.4f} in the search), 95 % of images "
            f"below {errors.p95_image_rms:.4f}, {time.monotonic() - start:.0f} s so far", flush=True,
        )  # fmt: skip
        reached = errors.reaches(heun)
        if reached:
            break
    chosen = rows[-1]
    if not reached:
        print(f"no count up to {counts[-1]} reached Heun's error; the largest is used. Try larger --evaluations", flush=True)
    return {
        "format": FORMAT,
        "solver": "adams",
        "predictor": PREDICTOR,
        "corrector": CORRECTOR,
        "levels": chosen["levels"],
        "evaluations": chosen["evaluations"],
        "reaches_heun": reached,
        "heun": {"evaluations": nfe, **dataclasses.asdict(heun)},
        "tried": rows,
        "noises": noises,
        "held_out": held_out,
        "trials": trials,
        "seed": seed,
        "reference": f"heun {REFERENCE_STEPS}",
        "seconds": round(time.monotonic() - start, 1),
    }


def _plot(result: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    errors, levels = figure.subplots(1, 2)
    for key, label in {"rms": "RMS", "p95_image_rms": "95 % of images"}.items():
        (line,) = errors.plot(
            [row["evaluations"] for row in result["tried"]], [row[key] for row in result["tried"]], "o-", label=label
        )
        errors.axhline(
            result["heun"][key], color=line.get_color(), linestyle=":", label=f"Heun {result['heun']['evaluations']}, {label}"
        )
    errors.set(xlabel="network evaluations", ylabel="error on held-out noise", yscale="log")
    errors.legend(frameon=False, fontsize=8)
    for row in result["tried"]:
        levels.plot(np.linspace(0, 1, row["evaluations"]), row["levels"], ".-", label=f"{row['evaluations']} evaluations")
    levels.set(xlabel="share of the steps", ylabel="sigma", yscale="log")
    levels.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=140)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m beeline.calibrate", description="Find noise levels for the Adams solver.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=local_path, help="folder of the teacher, for example runs/digits/teacher")
    parser.add_argument(
        "--evaluations",
        dest="counts",
        type=int,
        nargs="+",
        default=[8, 10, 12, 14],
        help="numbers of evaluations to try, increasing",
    )
    parser.add_argument(
        "--heun-steps", type=int, default=18, help="Heun steps to match: 18 steps take 35 evaluations, 40 take 79"
    )
    parser.add_argument("--noises", type=int, default=32, help="samples of noise that the search uses")
    parser.add_argument("--held-out", type=int, default=128, help="other samples of noise, used for all reported errors")
    parser.add_argument("--trials", type=int, default=400, help="moves to try for each number of evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    teacher = load(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    if teacher.few_step is not None:
        raise BeelineError(f"{folder} holds a student; expected a teacher, because only teachers use a solver")
    if not os.access(folder, os.W_OK):
        raise BeelineError(
            f"{folder} cannot be written, so {SOLVER} cannot be stored. Change its permissions, or copy the model"
        )
    result = calibrate(teacher, **arguments)
    result["model_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    try:
        (folder / f"{SOLVER}.tmp").write_text(json.dumps(result, indent=2))
        (folder / f"{SOLVER}.tmp").replace(folder / SOLVER)
        _plot(result, folder / "solver.png")
    except OSError as error:
        raise BeelineError(f"{folder / SOLVER} cannot be written ({plain(error)}); free some space and run it again") from error
    print(f"{folder / SOLVER}: {result['evaluations']} evaluations instead of {result['heun']['evaluations']}")


if __name__ == "__main__":
    run_main(main)
