"""Published results of a measurement: metrics.json, a sheet of samples, and one of samples with their nearest real images."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from beeline.errors import BeelineError, reading
from beeline.features.measuring import RESIZES
from beeline.files.layout import check_layout
from beeline.metrics.measures import nearest
from beeline.sampling import Sampling, slug_of
from evaluation.bench import Setup
from evaluation.jobs import Fidelity, Judge, Lines, Sheet
from evaluation.reference import arrays_in, reference
from evaluation.samplings import noise_seed
from pipeline.reader import decoded
from pipeline.sheet import sheet_png
from pipeline.storage import Folder

METRICS, SAMPLES, NEAREST = "metrics.json", "samples.png", "nearest.png"
LIBRARIES = ("torch", "torchvision", "torch-fidelity", "timm", "numpy", "scipy", "ray", "beeline")
SHOWN_NEAREST = 20
TEMPORARY = ("part-", "draw-", "pairs-")  # prefixes of the files that rows are made of
FIGURE = {
    "model": str, "nfe": 1, "steps?": [float], "sampler": str, "metric": str, "n": 1, "mean": float, "std": float, "min": float,
    "draws": [float],
}  # fmt: skip
CURVES = {"sigmas": [float], "values": [float], "own": [float], "speed": [float]}
MEANS = {"mean": float, "own_mean": float, "speed_mean": float}
METRICS_LAYOUT = {
    "rows": [FIGURE], "order": [{"label": str, "sheet": str}], "straightness?": CURVES | MEANS, "provenance": {},
}  # fmt: skip


def metrics_in(folder: Folder) -> dict[str, Any] | None:
    """The metrics.json of a model's evaluation; None if it is missing. Raises BeelineError for another layout."""
    with reading(f"{folder}/{METRICS} is not as expected", again(folder)):
        metrics = folder.read_json(METRICS)
        if metrics is not None:
            check_layout(metrics, METRICS_LAYOUT)
            if not all(re.fullmatch(r"[\w.-]+\.npz", entry["sheet"]) for entry in metrics["order"]):
                raise ValueError("a sheet is not the name of an .npz file")
        return metrics


def again(folder: Folder) -> str:
    """The fix for damaged metrics."""
    workspace, _, model = str(folder).partition("/evaluation/")
    command = f"python evaluation/evaluate.py RECIPE --workspace {workspace} --model {model}"
    return f"remove {folder} and measure again with: {command}"


def measured(folder: Folder) -> list[str]:
    """Labels of the published samplings, in their order. Empty if there are none."""
    return [entry["label"] for entry in _published(folder, [])["order"]]


def publish(setup: Setup, model: str, samplings: Sequence[Sampling], plan: Mapping[str, Any], straight: bool) -> None:
    """Add the figures of `samplings` to metrics.json, draw the sheets again, and print the new figures.

    Each sampling gets a file of its own first. Another command may measure the same model at the same time: the one that
    writes metrics.json last includes the figures of both.
    """
    folder = setup.workspace / "evaluation" / model
    for sampling in samplings:
        if (rows := _figures(setup, folder, model, sampling)) is not None:
            sheet = Sheet(model, sampling, 0).file
            folder.write_json(f"row-{sampling.slug}.json", {"label": sampling.label, "sheet": sheet, "rows": rows})
            print(_summary(model, sampling, rows), flush=True)
    asked, written = [sampling.label for sampling in samplings], None
    while (current := _published(folder, asked)) != written:
        _write(setup, folder, current, plan, straight)
        written = current


def temporary(folder: Folder) -> list[str]:
    """Files that published rows were made of, and that are no longer needed."""
    slugs = "|".join(re.escape(slug_of(label)) for label in measured(folder))
    pattern = re.compile(rf"part-({slugs})-\d+-\d{{5,}}\.npz|draw-({slugs})-\d+\.json|pairs-({slugs})\.json")
    return [name for name in folder.sizes() if pattern.fullmatch(name)]


def _published(folder: Folder, asked: Sequence[str]) -> dict[str, Any]:
    """The "rows" and "order" of metrics.json, with new samplings added at the end.

    New samplings have a row file, but are not in metrics.json yet. Those in `asked` come first, in that order, then those
    that another command measured.
    """
    metrics = metrics_in(folder) or {"rows": [], "order": []}
    labels = {entry["label"] for entry in metrics["order"]}
    entries = [_row_in(folder, name) for name in folder.sizes() if name.startswith("row-")]
    new = [entry for entry in entries if entry is not None and entry["label"] not in labels]
    new.sort(key=lambda entry: asked.index(entry["label"]) if entry["label"] in asked else len(asked))
    return {
        "rows": [*metrics["rows"], *(row for entry in new for row in entry["rows"])],
        "order": [*metrics["order"], *({key: entry[key] for key in ("label", "sheet")} for entry in new)],
    }


def _row_in(folder: Folder, name: str) -> dict[str, Any] | None:
    with reading(f"{folder}/{name} is not as expected", again(folder)):
        entry = folder.read_json(name)
        if entry is not None:
            check_layout(entry, {"label": str, "sheet": str, "rows": [FIGURE]})
        return entry


def _write(setup: Setup, folder: Folder, published: Mapping[str, Any], plan: Mapping[str, Any], straight: bool) -> None:
    sheets = [arrays_in(folder, entry["sheet"]) for entry in published["order"]]
    _draw_sheets(setup, folder, sheets)
    config = setup.config
    folder.write_json(
        METRICS,
        {
            **published,
            "straightness": folder.read_json(Lines.file) if straight and setup.pairs is not None else None,
            "provenance": {
                **plan,
                "noise_seeds": [noise_seed(config, number) for number in range(config.draws)],
                "resize": {name: RESIZES[name] for name in config.features},
                "quantised": "uint8: (127.5 x + 128), clipped",
                "devices": sorted({str(sheet["device"]) for sheet in sheets}),
                "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            },
        },
    )


def _summary(model: str, sampling: Sampling, rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures of a sampling in one line of text, the first with its spread."""
    first, *others = rows
    spread = f" +- {first['std']:.3f}" if len(first["draws"]) > 1 else ""
    rest = "".join(f", {row['metric']} {row['mean']:.3f}" for row in others)
    return f"{model}, {sampling.label}: NFE {sampling.nfe}, {first['metric']} {first['mean']:.3f}{spread}{rest}"


def _figures(setup: Setup, folder: Folder, model: str, sampling: Sampling) -> list[dict[str, Any]] | None:
    """The rows of a sampling in metrics.json, one for each metric.

    None if another command has published them and removed the files that they were made of.
    """
    judged = [folder.read_json(Judge(model, sampling, number, ()).file) for number in range(setup.config.draws)]
    near = folder.read_json(Fidelity(model, sampling, 0).file) if setup.pairs is not None else {}
    if None in [*judged, near]:
        if sampling.label in measured(folder):
            return None
        raise BeelineError(f"{folder}: files of {sampling.label!r} were removed during the run; run the command again")
    figures = {metric: [draw[metric] for draw in judged] for metric in judged[0]}
    figures |= {metric: [value] for metric, value in near.items()}
    return [
        {
            "model": model,
            "nfe": sampling.nfe,
            "steps": sampling.steps,
            "sampler": sampling.label,
            "metric": metric,
            "n": _count(metric),
            "mean": float(np.mean(draws)),
            "std": float(np.std(draws, ddof=1)) if len(draws) > 1 else 0.0,
            "min": min(draws),
            "draws": draws,
        }
        for metric, draws in figures.items()
    ]


def _count(metric: str) -> int:
    """The number of samples at the end of a metric's name: 50000 for fid_50k."""
    text = metric.rsplit("_", 1)[1]
    return int(text[:-1]) * 1000 if text.endswith("k") else int(text)


def _draw_sheets(setup: Setup, folder: Folder, sheets: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Draw samples.png, a line of samples for each sampling, and nearest.png.

    nearest.png has two lines for each sampling: samples, and below them the nearest real images in the features of the first
    measuring network.
    """
    folder.write(SAMPLES, sheet_png(np.concatenate([sheet["images"] for sheet in sheets]), columns=setup.config.samples))
    real = reference(setup.workspace, setup.config.features[0])
    shown = min(SHOWN_NEAREST, setup.config.samples)
    rows = [real.rows[nearest(sheet["features"][:shown], real.features)] for sheet in sheets]
    pictures = _real_images(setup, sorted({int(i) for indices in rows for i in indices}))
    lines: list[np.ndarray] = []
    for sheet, indices in zip(sheets, rows, strict=True):
        lines += [sheet["images"][:shown], np.stack([pictures[int(i)] for i in indices])]
    folder.write(NEAREST, sheet_png(np.concatenate(lines), columns=shown))


def _real_images(setup: Setup, indices: Sequence[int]) -> dict[int, np.ndarray]:
    """Images (C, H, W), uint8, of images/ by index; each shard is read once."""
    size, images = int(setup.images["images"]["shard_size"]), {}
    for k in sorted({i // size for i in indices}):
        shard = decoded(setup.workspace / "images", k)
        images |= {int(i): shard.images[j] for j, i in enumerate(shard.indices) if int(i) in indices}
    return images
