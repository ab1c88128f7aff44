"""One self-contained report.html of a workspace: samples, distances, ablation, losses, straightness, sweep, cost.

python evaluation/report.py digits
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import tyro
from matplotlib.axes import Axes
from PIL import Image

from beeline.errors import BeelineError
from evaluation.evaluate import METRICS, SAMPLES
from pipeline.command import run_command
from pipeline.sheet import GAP
from pipeline.stage import SUCCESS, require
from pipeline.storage import Folder

REPORT = "report.html"
RECONSTRUCTION = "students/lmm/reconstruction"
ABLATION = {
    "students/kd": "end points alone (knowledge distillation, L2)",
    "students/rf": "rectified flow",
    "students/l2": "lines, pixel distance (L2)",
    RECONSTRUCTION: "+ perceptual distance",
    "students/sot": "+ SOT (second phase at the steps sampled)",
    "students/lmm": "+ adversarial term",
}


def report(workspace: str, recipe: tyro.conf.Suppress[str]) -> None:
    """Write <workspace>/report.html from what is there.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    require(place, "evaluation/teacher", recipe)
    students = [name for name in ABLATION if (place / "evaluation" / name).read_json(SUCCESS)]
    if not students:
        raise BeelineError(
            f"no student is measured in {place}; do that with: python evaluation/evaluate.py {recipe} "
            f"--workspace {place} --model students/lmm"
        )
    models = ["teacher", *students]
    metrics = {name: (place / "evaluation" / name).read_json(METRICS) for name in models}
    rows = [row for name in models for row in metrics[name]["rows"]]
    teacher_best = min((row for row in metrics["teacher"]["rows"]), key=lambda row: row["mean"])
    sweep = _sweep(place)
    template = jinja2.Template(
        (Path(__file__).parent / "report.html.j2").read_text(), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = template.render(
        recipe=recipe,
        workspace=str(place) if not place.is_local else Path(place.uri).name,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=_headline(metrics, teacher_best),
        strips=[strip for name in models for strip in _strips(place, name, metrics[name]["rows"])],
        metric_note=(
            f"fd_probe: Fréchet distance over {rows[0]['n']:,} samples with the class labels of the real images, in the "
            "features of a probe that no loss has used. It is not FID. Lower is better; the figure is the mean over "
            f"{len(rows[0]['draws'])} independent noise seeds."
        ),
        table=[_table_row(row, teacher_best) for row in sorted(rows, key=lambda row: row["mean"])],
        draws=len(rows[0]["draws"]),
        ablation=_ablation(place, metrics),
        plots={
            "distance": _plot(lambda axes: _plot_distance(axes, metrics)),
            "losses": _plot(lambda axes: _plot_losses(axes, place, models)),
            "straightness": _plot(lambda axes: _plot_straightness(axes, metrics)),
            "sweep": _data_uri((place / "sweeps" / sweep[0]).read("pareto.png")) if sweep else "",
        },
        straightness=", ".join(
            f"{_short(name)} {metrics[name]['straightness']['mean']:.3f}" for name in models if metrics[name]["straightness"]
        ),
        sweep=sweep[1] if sweep else [],
        stages=_stages(place, models),
        cost_note=_cost(place, teacher_best),
        provenance=json.dumps({name: metrics[name]["provenance"] for name in models}, indent=1),
    )
    place.write(REPORT, page.encode())
    print(f"report: {place}/{REPORT}", flush=True)


def _short(name: str) -> str:
    return {RECONSTRUCTION: "lmm, all levels"}.get(name, name.removeprefix("students/"))


def _headline(metrics: dict[str, Any], teacher: dict[str, Any]) -> list[tuple[str, str]]:
    best = min((row for m in metrics.values() for row in m["rows"] if row["steps"]), key=lambda row: (row["nfe"], row["mean"]))
    found = [
        (f"{best['mean'] / teacher['mean']:.2f}×", f"the teacher's distance, with {best['nfe']} evaluation"),
        (f"{teacher['nfe'] / best['nfe']:.0f}×", "fewer evaluations per image"),
    ]
    for row in metrics["teacher"]["rows"]:
        if row is not teacher:
            ratio = row["mean"] / best["mean"]
            found.append((f"{ratio:.1f}×", f"better than the teacher in {row['nfe']} evaluation{'s' * (row['nfe'] > 1)}"))
    return found


def _table_row(row: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": _short(row["model"]),
        "sampler": row["sampler"] if row["steps"] is None else f"steps {row['sampler']}",
        "nfe": row["nfe"],
        "mean": f"{row['mean']:.3f}",
        "std": f"{row['std']:.3f}",
        "min": f"{row['min']:.3f}",
        "ratio": f"{row['mean'] / teacher['mean']:.2f}×",
        "ours": row["steps"] is not None,
    }


def _strips(place: Folder, name: str, rows: list[dict[str, Any]]) -> Iterable[dict[str, str]]:
    """One strip of samples per row of the model: samples.png cut at its rows."""
    sheet = Image.open(io.BytesIO((place / "evaluation" / name).read(SAMPLES)))
    height = (sheet.height + GAP) // len(rows)
    for r, row in enumerate(rows):
        buffer = io.BytesIO()
        sheet.crop((0, r * height, sheet.width * 2 // 5, (r + 1) * height - GAP)).save(buffer, "PNG", optimize=True)
        evaluations = f"{row['nfe']} evaluation{'s' * (row['nfe'] > 1)}"
        how = row["sampler"] if row["steps"] is None else f"steps {row['sampler']}"
        yield {
            "name": f"{_short(name)}, {evaluations}",
            "note": f"{how}, fd_probe {row['mean']:.2f}",
            "src": _data_uri(buffer.getvalue()),
        }


def _ablation(place: Folder, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    made = []
    for name, text in ABLATION.items():
        row = next((row for row in metrics.get(name, {"rows": []})["rows"] if row["nfe"] == 1), None)
        if row:
            log = _log(place / (name if name != RECONSTRUCTION else "students/lmm"))
            steps = [entry["step"] for entry in log if name != RECONSTRUCTION or entry["phase"] == 0]
            total = max(steps, default=0) + (max(_phase_one_steps(place), default=0) if name == "students/sot" else 0)
            made.append({"name": text, "iterations": total, "mean": f"{row['mean']:.3f}", "std": f"{row['std']:.3f}"})
    return made


def _phase_one_steps(place: Folder) -> list[int]:
    return [entry["step"] for entry in _log(place / "students/lmm") if entry["phase"] == 0]


def _log(folder: Folder) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in folder.read("train.jsonl").splitlines()]
    except FileNotFoundError:
        return []


def _sweep(place: Folder) -> tuple[str, list[dict[str, str]]] | None:
    folder = place / "sweeps" / "sot"
    if folder.read_json(SUCCESS) is None:
        return None
    table = pd.read_parquet(io.BytesIO(folder.read("trials.parquet")))
    metric = next(column for column in table.columns if column.startswith("fd_"))
    rows = [
        {"steps": row["steps"], "lr": f"{row['lr']:.0e}", "step": row["step"], "distance": f"{row[metric]:.3f}"}
        for row in table.sort_values(metric).to_dict("records")
    ]
    return "sot", rows


def _stages(place: Folder, models: list[str]) -> list[dict[str, str]]:
    students = sorted({name.removesuffix("/reconstruction") for name in models if name != "teacher"})
    names = ["images", "probe", "teacher", "pairs", *students, "sweeps/sot", *(f"evaluation/{m}" for m in models)]
    found = []
    for name in names:
        done = (place / name).read_json(SUCCESS)
        if done:
            facts = {key: value for key, value in done.items() if key not in ("seconds", "files")}
            text = ", ".join(f"{key.replace('_', ' ')} {_figure(value)}" for key, value in facts.items())
            found.append({"name": name, "seconds": f"{done['seconds']:.0f}", "facts": text})
    total = sum(int(row["seconds"]) for row in found)
    return [*found, {"name": "together", "seconds": str(total), "facts": "stages that ran side by side count twice"}]


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(f"{v:.3f}" for v in value.values())
    return f"{value:,}"


def _cost(place: Folder, teacher: dict[str, Any]) -> str:
    done = (place / "pairs").read_json(SUCCESS)
    if not done:
        return ""
    saved = teacher["nfe"] - 1
    return (
        f"The pairs cost {done['evaluations']:,} evaluations of the teacher. A one-step student saves {saved} evaluations per "
        f"image, so they are paid back after {done['evaluations'] / saved:,.0f} images (training not counted)."
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _plot(draw: Callable[[Axes], None]) -> str:
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return _data_uri(buffer.getvalue())


def _plot_distance(axes: Axes, metrics: dict[str, Any]) -> None:
    for name, found in metrics.items():
        rows = sorted(found["rows"], key=lambda row: row["nfe"])
        axes.errorbar(
            [row["nfe"] for row in rows], [row["mean"] for row in rows], [row["std"] for row in rows],
            marker="o", markersize=4, capsize=3, label=_short(name),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = sorted({row["nfe"] for found in metrics.values() for row in found["rows"]})
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per image")
    axes.set_ylabel("fd_probe")


def _plot_losses(axes: Axes, place: Folder, models: list[str]) -> None:
    for name in models:
        key = "loss" if name == "teacher" else "lines"  # other objectives' losses are of other kinds
        log = [] if name == RECONSTRUCTION else [row for row in _log(place / name) if key in row]
        if log:
            axes.plot([row["step"] for row in log], [row[key] for row in log], label=_short(name), linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("EDM loss (teacher), line loss (students)")


def _plot_straightness(axes: Axes, metrics: dict[str, Any]) -> None:
    for name, found in metrics.items():
        if found["straightness"]:
            axes.plot(found["straightness"]["sigmas"], found["straightness"]["values"], label=_short(name), marker=".")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("noise level sigma")
    axes.set_ylabel("relative residual")


if __name__ == "__main__":
    run_command(report)
