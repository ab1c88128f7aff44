"""Table 1 and appendix A.2 of the LMM paper on a laptop: the straightness of the flows of six methods in 2-D.

python evaluation/toy2d.py

Takes minutes on one core, without Ray. Writes <out>/flows.png, ot_batch.png and toy2d.json, and prints the table.
evaluation/toy/flows.py and evaluation/toy/transport.py define the measures.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import dataclasses
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
import tyro
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from beeline.entry import run_main
from beeline.errors import BeelineError
from beeline.noise import stream_seed
from beeline.settings import Seed, Threads, check, naming_options
from evaluation.toy import transport
from evaluation.toy.flows import Field, ToyConfig, integrate, measure, sliced_w2, train_all
from evaluation.toy.transport import OtConfig

COLUMNS = {"late": "share at t > 0.9", "known": "known at t = 0", "w2": "W2", "w2_one_step": "W2, one step"}
REFERENCE = "CFM"
SLOPES = (0.3, 0.5, 0.7, 0.9)
TIMES = (0.0, 0.5, 0.9)
BLUE, ORANGE = "#27496d", "#e08a3c"


def toy2d(
    out: Path = Path("runs/toy2d"),
    seed: Seed = 0,
    threads: Threads = 1,
    toy: ToyConfig = ToyConfig(),  # noqa: B008
    ot: OtConfig = OtConfig(),  # noqa: B008
) -> None:
    """Train EDM, CFM, BOT-CFM, 1-RF, 2-RF and LMM between 2-D distributions, and measure minibatch optimal transport.

    Args:
        out: Folder for the figures and the numbers.
        seed: Seed of all random numbers.
        threads: CPU threads of PyTorch.
        toy: Settings of the flows.
        ot: Settings of the pairings of appendix A.2.
    """
    check("--seed", seed, Seed)
    check("--threads", threads, Threads)
    torch.set_num_threads(threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BeelineError(f"{out} cannot be created ({error}); choose another --out") from None
    start = time.process_time()
    generator = torch.Generator().manual_seed(stream_seed(seed, "toy", "held out"))
    x0, real, other = (draw(toy.points, generator) for draw in (toy.noise, toy.data, toy.data))
    fields: dict[str, Field] = {}
    results = {"data": {"w2": summary(sliced_w2(other, real), toy)}}
    for name, field in train_all(toy, seed):
        fields[name] = field
        results[name] = {key: summary(values, toy) for key, values in measure(field, x0, real, toy.steps).items()}
        straight = results[name]["straightness"]["all"]["mean"]
        print(f"{name}: straightness {straight:.4f}, {time.process_time() - start:.0f} s of CPU time so far", flush=True)
    rows = transport.measure_ot(ot, seed)
    needed = needed_batches(rows, ot)
    save(draw_flows(fields, x0, real, toy), out / "flows.png", colours=32)
    save(draw_ot(rows, needed, ot), out / "ot_batch.png", colours=256)
    found = {
        "seed": seed,
        "toy": dataclasses.asdict(toy),
        "ot": dataclasses.asdict(ot),
        "flows": results,
        "pairing": rows,
        "batch_needed": needed,
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    (out / "toy2d.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(["", *table(results, toy), "", *needed_table(needed), "", f"{out}: flows.png, ot_batch.png, toy2d.json"]))


def summary(values: torch.Tensor, toy: ToyConfig) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation of `values` (K,) over repeats, for each distribution and for their mean ("all")."""
    each = values.reshape(len(toy.distributions), toy.repeats)
    rows = dict(zip(toy.distributions, each, strict=True)) | {"all": each.mean(dim=0)}
    return {
        name: {"mean": float(row.mean()), "std": float(row.std()) if toy.repeats > 1 else None} for name, row in rows.items()
    }


def table(results: Mapping[str, Any], toy: ToyConfig) -> list[str]:
    """Lines of Table 1: straightness by distribution, then the other measures, averaged over all distributions."""
    places = (*toy.distributions, "all")
    flows = {name: found for name, found in results.items() if name != "data"}
    reference = flows[REFERENCE]["straightness"]["all"]["mean"]
    lines = [row("straightness", [*places, f"{REFERENCE} / it"])]
    for name, found in flows.items():
        straight = found["straightness"]
        ratio = reference / straight["all"]["mean"]
        lines.append(row(name, [*(figure(straight[place]) for place in places), f"{ratio:.1f}"]))
    lines += ["", row("", list(COLUMNS.values()))]
    for name, found in results.items():
        lines.append(row(name, [figure(found[key]["all"]) if key in found else "" for key in COLUMNS]))
    return lines


def row(name: str, cells: Sequence[str]) -> str:
    return f"{name:14}" + "".join(f"{cell:>18}" for cell in cells)


def figure(found: Mapping[str, float | None]) -> str:
    spread = "" if found["std"] is None else f" ± {found['std']:.4f}"
    return f"{found['mean']:.4f}{spread}"


def needed_batches(rows: list[dict[str, float]], ot: OtConfig) -> list[dict[str, Any]]:
    """Batch sizes that reach each slope in each dimension: measured (None if no size in `ot.batches` does) and predicted."""
    found = []
    for slope in SLOPES:
        for dim in ot.dims:
            slopes = [row["slope"] for row in rows if row["dim"] == dim]
            predicted = transport.predicted_batch(dim, slope) if dim > 1 else None
            measured = transport.batch_for(slope, ot.batches, slopes)
            found.append({"slope": slope, "dim": dim, "measured": measured, "predicted": predicted})
    return found


def needed_table(needed: list[dict[str, Any]]) -> list[str]:
    """Lines of the table for appendix A.2: the batch size for each slope and dimension."""
    lines = [row("batch for", [f"d = {entry['dim']}" for entry in needed if entry["slope"] == SLOPES[0]])]
    for slope in SLOPES:
        cells = []
        for entry in (entry for entry in needed if entry["slope"] == slope):
            measured = "-" if entry["measured"] is None else f"{entry['measured']:.3g}"
            cells.append(measured + ("" if entry["predicted"] is None else f" ({entry['predicted']:.2g})"))
        lines.append(row(f"slope {slope}", cells))
    return [*lines, "measured (predicted); -: outside the batch sizes tried"]


def save(figure: Figure, file: Path, colours: int) -> None:
    """Save a figure as a PNG with a palette of `colours`, which takes a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=95)
    Image.open(buffer).convert("RGB").quantize(colours).save(file, optimize=True)


def draw_flows(fields: Mapping[str, Field], x0: torch.Tensor, real: torch.Tensor, toy: ToyConfig) -> Figure:
    """Draw velocities at three times and trajectories of each method, for the first distribution and repeat.

    The last column shows one coordinate over time. Flows deviate from straight ones more in speed than in path.
    """
    figure = Figure(figsize=(10.2, 2.02 * len(fields) + 0.4), layout="constrained")
    axes = figure.subplots(len(fields), len(TIMES) + 2, squeeze=False)
    grid = torch.linspace(-2.4, 2.4, 15)
    places = torch.cartesian_prod(grid, grid)
    for row, (name, field) in zip(axes, fields.items(), strict=True):
        path = integrate(field, x0, toy.steps)[0][:, 0]
        for ax, t in zip(row, TIMES, strict=False):
            with torch.inference_mode():
                velocity = field(places.expand(toy.members, -1, 2), torch.tensor(t).reshape(1, 1, 1))[0]
            now = path[round(t * toy.steps)]
            ax.scatter(*now[:700].T, s=1.5, color=ORANGE, linewidths=0)
            near = torch.cdist(places.double(), now).min(dim=1).values < 0.35  # no trajectory passes elsewhere
            ax.quiver(*places[near].T, *velocity[near].T, color=BLUE, angles="xy", scale=28, width=0.006)
        row[-2].scatter(*real[0, :700].T, s=1.5, color="#cfcfcf", linewidths=0)
        lines = {"colors": BLUE, "linewidths": 0.7, "alpha": 0.8}
        row[-2].add_collection(LineCollection(list(path[:, :80].transpose(0, 1).numpy()), **lines))
        row[-2].scatter(*path[0, :80].T, s=5, color=BLUE, linewidths=0)
        row[-2].scatter(*path[-1, :80].T, s=9, color=ORANGE, linewidths=0, zorder=3)
        times = torch.linspace(0, 1, toy.steps + 1, dtype=path.dtype).expand(50, -1)
        row[-1].add_collection(LineCollection(list(torch.stack([times, path[:, :50, 0].T], dim=-1).numpy()), **lines))
        row[0].set_ylabel(name, fontsize=11)
    titles = (*(f"velocity at t = {t:g}" for t in TIMES), "trajectories", "one coordinate over t")
    for column, title in zip(axes.T, titles, strict=True):
        column[0].set_title(title, fontsize=11)
        for ax in column:
            ax.set(xlim=(0, 1) if title is titles[-1] else (-2.7, 2.7), ylim=(-2.7, 2.7), xticks=[], yticks=[], box_aspect=1)
            ax.spines[:].set_color("#cccccc")
    return figure


def draw_ot(rows: list[dict[str, float]], needed: list[dict[str, Any]], ot: OtConfig) -> Figure:
    """Draw appendix A.2: velocity at the source by batch size, measured against predicted, and the batch size for a slope."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_batch, against, by_dim = figure.subplots(1, 3)
    shades = dict(zip(ot.dims, matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(ot.dims))), strict=True))
    for dim in ot.dims:
        own = [row for row in rows if row["dim"] == dim]
        measured, predicted = ([1 - row[key] for row in own] for key in ("slope", "predicted"))
        error = [2 * row["error"] for row in own]
        style = {"color": shades[dim], "markersize": 4, "capsize": 2, "linestyle": "none", "marker": "o"}
        by_batch.errorbar(ot.batches, measured, error, label=f"d = {dim}", **style)
        by_batch.plot(ot.batches, predicted, color=shades[dim], linewidth=1)
        against.errorbar(predicted, measured, error, **style)
    by_batch.set(xscale="log", xlabel="batch n that is paired optimally", ylabel="velocity at the source, |v(x0)| / |x0|")
    by_batch.set_title("measured (points) and predicted (lines)", fontsize=10)
    by_batch.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0)
    against.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    against.set(xlabel="predicted |v(x0)| / |x0|", ylabel="measured |v(x0)| / |x0|", aspect="equal")
    against.set_title("0: optimal transport, 1: paired at random", fontsize=10)
    for slope, shade in zip(SLOPES, ("#8fb8de", "#4a7fb5", "#27496d", "#101f30"), strict=True):
        own = [row for row in needed if row["slope"] == slope and row["dim"] > 1]
        by_dim.plot([row["dim"] for row in own], [row["predicted"] for row in own], color=shade, linewidth=1)
        seen = [(row["dim"], row["measured"]) for row in own if row["measured"] is not None]
        by_dim.plot(*zip(*seen, strict=True), "o", color=shade, markersize=5) if seen else None
        by_dim.plot([], [], "o-", color=shade, markersize=5, linewidth=1, label=f"{1 - slope:.1f}")
    by_dim.set(yscale="log", ylim=(1, 1e7), xlabel="dimension d", ylabel="batch n")
    by_dim.set_title("batch that brings |v(x0)| / |x0| down to", fontsize=10)
    by_dim.legend(frameon=False, fontsize=8)
    for ax in (by_batch, against, by_dim):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Run the command."""
    with naming_options(sys.argv[1:]):
        tyro.cli(toy2d)


if __name__ == "__main__":
    run_main(main)
