"""A distance does not depend on actors or restarts; students are only measured at steps they know."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Run, files
from PIL import Image

from beeline.checkpoint import build, dump
from beeline.config import EvaluateConfig, NetworkConfig
from beeline.errors import BeelineError
from evaluation.measure import jobs_of, parse_steps, teacher_row
from pipeline.sheet import GAP, sheet_png, to_uint8

SMALL = [
    "--evaluate.draws", "2",
    "--evaluate.count", "200",
    "--evaluate.shard-size", "60",
    "--evaluate.batch-size", "50",
    "--evaluate.nfe", "15", "2",
]  # fmt: skip


def measured(run: Run, workspace: Path, actors: int) -> tuple[dict, dict[str, bytes]]:
    run(
        "evaluation/evaluate.py", "digits", "--workspace", workspace, "--model", "teacher", *SMALL,
        "--evaluate.min-actors", str(actors), "--evaluate.max-actors", str(actors),
    )  # fmt: skip
    folder = workspace / "evaluation/teacher"
    return json.loads((folder / "metrics.json").read_text()), files(folder, "part-*")


@pytest.fixture(scope="module")
def workspace(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("evaluate") / "ws"
    shutil.copytree(trained, copy)
    return copy


def test_one_and_two_actors_and_a_restart_agree_to_the_last_bit(run: Run, workspace: Path) -> None:
    first, parts = measured(run, workspace, 1)
    assert len(parts) == 2 * 2 * 4
    folder = workspace / "evaluation/teacher"
    # as if it had been killed with three parts there, one of them torn
    for name in list(parts)[3:]:
        (folder / name).unlink()
    (folder / "part-00001.npz").write_bytes(parts["part-00001.npz"][:100])
    (folder / "metrics.json").unlink()
    (folder / "_SUCCESS").unlink()
    second, again = measured(run, workspace, 2)
    assert again == parts
    assert second == first
    rows = first["rows"]
    assert [(row["nfe"], row["metric"], row["n"], len(row["draws"])) for row in rows] == [
        (15, "fd_probe", 200, 2),
        (2, "fd_probe", 200, 2),
    ]
    for row in rows:
        assert row["mean"] == pytest.approx(sum(row["draws"]) / 2)
        assert row["min"] == min(row["draws"])
        assert row["draws"][0] != row["draws"][1]
    assert first["straightness"]["mean"] > 0
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_sot_student_is_refused_other_steps(run: Run, workspace: Path) -> None:
    run(
        "trainers/train_lmm.py", "digits", "--workspace", workspace, "--lmm.name", "brief", "--lmm.num-steps", "6",
        "--lmm.reconstruction.iterations", "2", "--lmm.reconstruction.steps", "0", "2", "--lmm.adversarial.iterations", "0",
    )  # fmt: skip
    arguments = ("digits", "--workspace", workspace, "--model", "students/brief", *SMALL)
    refused = run("evaluation/evaluate.py", *arguments, "--evaluate.steps", "0,1", ok=False)
    assert "trained with SOT on (0, 2) alone and has never seen level 1" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = run("evaluation/evaluate.py", *arguments, "--evaluate.steps", "0,2")
    assert "students/brief, 0,2: NFE 2, fd_probe" in done.stdout
    other = run("evaluation/evaluate.py", *arguments, "--evaluate.steps", "0", ok=False)
    assert "was made with other settings" in other.stderr


def test_a_model_of_other_images_is_refused_before_any_work(run: Run, workspace: Path, tmp_path: Path) -> None:
    other = tmp_path / "ws"
    shutil.copytree(workspace, other, ignore=shutil.ignore_patterns("teacher", "evaluation"))
    network = NetworkConfig(
        kind="ddpmpp", img_resolution=16, img_channels=3, model_channels=16, channel_mult=(1,), num_blocks=1
    )
    (other / "teacher").mkdir()
    for name, data in dump(build(network), {}).items():
        (other / "teacher" / name).write_bytes(data)
    refused = run("evaluation/evaluate.py", "digits", "--workspace", other, *SMALL, ok=False)
    assert "1 channels at 8 pixels; teacher takes 3 at 16" in refused.stderr
    assert not (other / "evaluation").exists()


def test_too_few_samples_are_an_error(run: Run, workspace: Path) -> None:
    few = run("evaluation/evaluate.py", "digits", "--workspace", workspace, "--evaluate.count", "64", ok=False)
    assert "64 samples are too few for a distance in 64 features" in few.stderr


def test_few_evaluations_of_a_teacher_are_euler() -> None:
    assert [(teacher_row(n).solver, teacher_row(n).num_steps) for n in (35, 15, 9, 1)] == [
        ("heun", 18),
        ("heun", 8),
        ("euler", 9),
        ("euler", 1),
    ]
    with pytest.raises(BeelineError, match="nfe 16 cannot be had"):
        teacher_row(16)
    with pytest.raises(BeelineError, match="not indices separated by commas"):
        parse_steps("0;8")


def test_jobs_cover_every_row_draw_and_sample_once() -> None:
    config = EvaluateConfig(draws=3, shard_size=7)
    rows = [teacher_row(35), teacher_row(1)]
    jobs = jobs_of("teacher", rows, config, 20)
    assert [job.item for job in jobs] == list(range(2 * 3 * 3))
    seen = [(job.row.nfe, job.draw, i) for job in jobs for i in job.indices]
    assert seen == [(nfe, draw, i) for nfe in (35, 1) for draw in range(3) for i in range(20)]


def test_sheets_enlarge_small_images() -> None:
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, 9.0]).reshape(4, 1, 1, 1)).ravel().tolist() == [0, 128, 255, 255]
    png = sheet_png(torch.zeros(6, 1, 8, 8), columns=3)
    assert int.from_bytes(png[16:20], "big") == 3 * 40 + 2 * 4
    assert int.from_bytes(png[20:24], "big") == 2 * 40 + 4


def test_a_sheet_cut_into_strips_gives_the_rows_back() -> None:
    """What the report does with samples.png: row r of models is strip r, to the pixel."""
    images = torch.linspace(-1, 1, 12).reshape(12, 1, 1, 1).expand(12, 1, 8, 8)
    sheet = Image.open(io.BytesIO(sheet_png(images, columns=3))).convert("L")
    height = (sheet.height + GAP) // 4
    for r in range(4):
        strip = np.asarray(sheet.crop((0, r * height, sheet.width, (r + 1) * height - GAP)))
        assert len(strip) == 40
        for column in range(3):
            picture = strip[:, column * 44 : column * 44 + 40]
            assert (picture == to_uint8(images[3 * r + column])[0, 0, 0]).all()
