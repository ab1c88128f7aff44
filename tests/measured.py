"""Workspaces as the commands leave them, written without the work, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from beeline.config import StudentConfig, to_dict
from beeline.files.names import CONFIG, LOG
from beeline.sampling.few_step import Step
from evaluation.models import Figure, Model, Sampling
from evaluation.results import METRICS, NEAREST, SAMPLES
from evaluation.sweep_table import write_trials
from pipeline.manifest import Manifest
from pipeline.sheet import sheet_png
from pipeline.stage import Stage
from pipeline.storage import Folder

LEVELS = [80.0, 5.3, 0.5, 0.002]
DIGITS = ("fd_probe_1797", "recall_probe_1797", "pair_rms_256")
TEACHER_WAYS = (("heun 18", 35, None), ("euler 3", 3, None))
ONE, TWO, FRESH = ("0", 1, [0]), ("0,8", 2, [0, 8]), ("0,8 fresh_noise", 2, [0, 8])
Way = tuple[str, int, Sequence[Step] | None]


def finished(place: Folder, name: str, plan: Mapping[str, Any], files: Mapping[str, bytes], **facts: Any) -> None:
    """Write a finished stage with these files; `facts` go into its _SUCCESS."""
    stage = Stage(place, name, plan)
    assert stage.begin()
    for file, data in files.items():
        stage.folder.write(file, data)
    stage.finish(**facts)


def figures(model: str, ways: Sequence[Way], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows of metrics.json with unique means."""
    made = []
    for k, (label, nfe, steps) in enumerate(ways):
        for j, metric in enumerate(metrics):
            draws = [1 + k + j / 10 + len(model) / 100 + d / 1000 for d in (0.1, 0.2, 0.9)]
            made.append(
                {
                    "model": model, "nfe": nfe, "steps": steps, "sampler": label, "metric": metric, "n": 100,
                    "mean": float(np.mean(draws)), "std": float(np.std(draws, ddof=1)), "min": min(draws), "draws": draws,
                }
            )  # fmt: skip
    return made


def measure(place: Folder, model: str, ways: Sequence[Way], metrics: Sequence[str] = DIGITS, **provenance: Any) -> None:
    """Write evaluation/<model> as evaluate.py leaves it."""
    curve = [0.5, 0.1, 0.02, 0.0]
    straight = {"sigmas": LEVELS, "values": curve, "own": curve, "speed": curve[::-1], "pairs": 256}
    means = {"mean": 0.155, "own_mean": 0.155, "speed_mean": 0.155}
    found = {
        "rows": figures(model, ways, metrics),
        "order": [{"label": label, "sheet": f"sheet-{k}.npz"} for k, (label, _, _) in enumerate(ways)],
        "straightness": means | straight if len(ways) > 1 else None,
        "provenance": {"model_sha256": "ab" * 32, "devices": ["AVX2"], "noise_seeds": [1, 2, 3], **provenance},
    }
    pixels = np.random.default_rng(len(model)).integers(0, 255, (40 * len(ways), 1, 8, 8), np.uint8)
    files = {
        METRICS: json.dumps(found).encode(),
        SAMPLES: sheet_png(pixels, columns=40),
        NEAREST: sheet_png(pixels, columns=20),
    }
    finished(place, f"evaluation/{model}", {"model": model}, files, samples=300, evaluations=300)


def trained(place: Folder, name: str, config: StudentConfig, loss: str = "lines", cost: Any = None) -> None:
    """Write students/<name> as train_lmm.py leaves it, without weights; `loss` is its objective's figure, `cost` the record of
    what its training cost, None for a student from before such records."""
    phases = list(config.running)
    log = [{"step": step, "phase": 0.0, loss: 1 / step, "skipped": 0, "data_wait": 0.01, "seconds": step} for step in (5, 10)]
    configs = {phase: json.dumps({"format": 1, "kind": "denoiser", "about": config.record(phase)}).encode() for phase in phases}
    files = {CONFIG: configs[phases[-1]], LOG: "\n".join(map(json.dumps, log)).encode()}
    finished(place, f"students/{name}", {"student": to_dict(config, resources=False)}, files, images_seen=1280, cost=cost)
    for phase in phases[:-1]:
        (place / f"students/{name}" / phase).write(CONFIG, configs[phase])


def with_pairs(place: Folder, **facts: Any) -> None:
    """Write pairs/ as gen_pairs.py leaves it, without shards."""
    manifest = Manifest(place / "pairs", {0: 10})
    manifest.add({"shard": 0, "pairs": 2500, "bytes": 10, "sampling_seconds": 34.5})
    manifest.publish()
    finished(place, "pairs", {"evaluations": 35}, {}, pairs=2500, shards=1, evaluations=87_500, **facts)


def with_sweep(place: Folder) -> None:
    """Write sweeps/sot as sweep_lmm.py leaves it, without trials."""
    first = {"trial": 0, "steps": "0", "nfe": 1, "lr": 1e-4, "ema_half_life": 50.0, "step": 40, "fd_probe_losses": 0.09}
    first |= {"stopped": False, "metric": "fd_probe_losses_1797", "distance": 0.082, "std": 0.003}
    stopped = {"trial": 1, "lr": 1e-3, "step": 20, "stopped": True, "metric": None, "distance": None, "std": None}
    trials = [first, first | stopped, first | {"trial": 2, "steps": "0,8", "nfe": 2, "distance": 0.071}]
    write_trials(place / "sweeps/sot", trials)
    finished(place, "sweeps/sot", {"sweep": {"init": "students/lmm"}}, {}, trials=2)


def made(name: str, ways: Sequence[Way], metrics: Sequence[str], config: StudentConfig | None = None) -> Model:
    """Build a model with those figures, trained with `config`."""
    rows = tuple(
        Figure(**{**row, "steps": tuple(row["steps"]) if row["steps"] else None, "draws": tuple(row["draws"])})
        for row in figures(name, ways, metrics)
    )
    samplings = tuple(Sampling.parse(label) for label, _, _ in ways)
    part = name.rpartition("/")[2]
    phase = part if config and part in config.phases else list(config.phases)[-1] if config else ""
    training = config.record(phase) if config else {}
    return Model(name=name, figures=rows, samplings=samplings, straightness=None, provenance={}, training=training)
