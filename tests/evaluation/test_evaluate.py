"""A measurement does not depend on actors or kills, rows accumulate, and invalid requests fail before any work."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import ADVERSARIAL, FRECHET, LINES, ROOT, Head, Run, wait_for
from PIL import Image

import beeline
from beeline.checkpoint import build, dump
from beeline.config import EvaluateConfig, NetworkConfig
from beeline.errors import BeelineError
from beeline.features.measuring import Inception
from beeline.files.arrays import pack, unpack
from beeline.metrics.frechet import Moments, Statistics, frechet_distance
from beeline.pixels import quantised
from beeline.sampling.few_step import FewStep, parse_steps
from beeline.weights import dump_backbone
from evaluation import results
from evaluation.bench import Bench, Setup
from evaluation.evaluate import Measurement
from evaluation.jobs import Judge, RealImages, Samples
from evaluation.reference import FEATURES, STATISTICS, groups, merge_reference, reference_folder
from evaluation.samplings import teacher_sampling
from pipeline.shards import encode, shard_name
from pipeline.sheet import GAP, sheet_png
from pipeline.stage import Stage
from pipeline.storage import Folder
from trainers.validation import Validation

SMALL = ["--draws", "2", "--count", "200", "--shard-size", "60", "--batch-size", "50", "--samples", "10"]
ROWS = ["--nfe", "15", "2"]
RESULTS = ("metrics.json", "samples.png", "nearest.png")


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "ws"))


def published(workspace: Path, model: str = "teacher") -> dict[str, bytes]:
    folder = workspace / "evaluation" / model
    return {name: (folder / name).read_bytes() for name in RESULTS}


def figures(workspace: Path, model: str = "teacher") -> dict[str, dict[str, Any]]:
    """Return the rows of metrics.json by sampler and metric."""
    rows = json.loads(published(workspace, model)["metrics.json"])["rows"]
    return {f"{row['sampler']} {row['metric']}": row for row in rows}


@pytest.fixture(scope="module")
def undisturbed(run: Run, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained workspace, with its teacher measured by one actor."""
    workspace = Path(shutil.copytree(trained, tmp_path_factory.mktemp("measured") / "ws"))
    run("evaluation/evaluate.py", "digits", "--workspace", workspace, *SMALL, *ROWS, "--min-actors", "1", "--max-actors", "1")
    return workspace


def test_what_a_measurement_says(undisturbed: Path) -> None:
    made = figures(undisturbed)
    metrics = ("fd", "precision", "recall", "density", "coverage", "authenticity")
    names = [f"{name}_{network}_200" for network in ("probe", "probe_losses") for name in metrics]
    assert list(made) == [f"{row} {name}" for row in ("heun 8", "euler 2") for name in (*names, "pair_rms_256")]
    for key, row in made.items():
        assert row["mean"] == pytest.approx(sum(row["draws"]) / len(row["draws"]))
        assert row["min"] == min(row["draws"])
        assert row["n"] == (256 if "pair_rms" in key else 200)
    distance = made["heun 8 fd_probe_200"]
    assert (distance["model"], distance["nfe"], distance["steps"], len(distance["draws"])) == ("teacher", 15, None, 2)
    assert distance["draws"][0] != distance["draws"][1]
    assert made["heun 8 pair_rms_256"]["mean"] < made["euler 2 pair_rms_256"]["mean"]  # the pairs are Heun's with 18 steps
    metrics = json.loads(published(undisturbed)["metrics.json"])
    assert {len(metrics["straightness"][key]) for key in ("sigmas", "values", "own", "speed")} == {18}
    assert metrics["provenance"]["libraries"]["torch"] == torch.__version__
    assert metrics["provenance"]["resize"] == {"probe": "none", "probe_losses": "none"}
    left = {path.name for path in (undisturbed / "evaluation/teacher").iterdir()}
    rows = {f"{kind}-{row}" for row in ("heun-8", "euler-2") for kind in ("row", "sheet")}
    assert {name.partition(".")[0] for name in left} - {"plan", "_SUCCESS", "lines"} == rows | {"metrics", "samples", "nearest"}
    width = 10 * 44 - 4
    assert Image.open(undisturbed / "evaluation/teacher/samples.png").size == (width, 2 * 44 - 4)
    assert Image.open(undisturbed / "evaluation/teacher/nearest.png").size == (width, 4 * 44 - 4)


def test_a_killed_measurement_goes_on_to_the_same_last_bit(run: Run, head: Head, workspace: Path, undisturbed: Path) -> None:
    command = ["evaluation/evaluate.py", "digits", "--workspace", str(workspace), *SMALL, *ROWS]
    folder = workspace / "evaluation/teacher"
    driver = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=head.environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(folder.glob("part-*"))) >= 3, 120, "the first shards")
    driver.kill()
    driver.wait()
    wait_for(lambda: not head.workers("MapWorker"), 60, "the actors to end")
    parts = sorted(folder.glob("part-*.npz"))
    assert parts
    assert not (folder / "metrics.json").exists()
    parts[0].write_bytes(parts[0].read_bytes()[:100])  # torn
    before = {path: path.stat().st_mtime_ns for path in parts[1:]}
    watched: dict[Path, int] = {}
    again = subprocess.Popen(
        [sys.executable, *command, "--min-actors", "2"], cwd=ROOT, env=head.environment(), stdout=subprocess.PIPE, text=True
    )
    while again.poll() is None:
        watched |= {path: path.stat().st_mtime_ns for path in before if path.exists()}
        time.sleep(0.1)
    assert again.returncode == 0
    assert f"{parts[0].name}: unreadable" in (again.stdout.read() if again.stdout else "")
    assert watched == before  # what was there was not made again
    assert published(workspace) == published(undisturbed)


def test_two_commands_side_by_side(head: Head, workspace: Path, undisturbed: Path) -> None:
    """The same model and rows at the same time: both commands succeed, and the results are those of a single one."""
    command = [sys.executable, "evaluation/evaluate.py", "digits", "--workspace", str(workspace), *SMALL, *ROWS]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=head.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for process in both:
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output[-4000:]
    assert published(workspace) == published(undisturbed)
    assert Stage(Folder(str(workspace)), "evaluation/teacher", {}).is_complete()


def test_rows_add_up(run: Run, workspace: Path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed / "evaluation", workspace / "evaluation")
    command = ("evaluation/evaluate.py", "digits", "--workspace", workspace, *SMALL)
    same = run(*command, *ROWS)
    assert "already complete" in same.stdout
    more = run(*command, "--nfe", "2", "3")
    assert "euler 3: NFE 3, fd_probe_200" in more.stdout
    assert "euler 2:" not in more.stdout
    before, after = figures(undisturbed), figures(workspace)
    assert {key: after[key] for key in before} == before
    assert [key for key in after if key not in before] == [
        key.replace("euler 2", "euler 3") for key in before if "euler" in key
    ]
    assert Image.open(workspace / "evaluation/teacher/samples.png").height == 3 * 44 - 4
    other = run(*command, *ROWS, "--seed", "1", ok=False)
    assert "evaluate.seed: 1000 there, 1001 asked for" in other.stderr
    plan = workspace / "evaluation/reference/probe/plan.json"
    plan.write_text(plan.read_text().replace('"kept": 50000', '"kept": 1'))
    stale = run(*command, "--nfe", "5", ok=False)
    assert "reference/probe was made with other settings: kept: 1 there, 50000 asked for" in stale.stderr


def test_students_are_measured_at_any_steps_they_know(run: Run, workspace: Path) -> None:
    run(
        "trainers/train_lmm.py", "digits", "--workspace", workspace, "--student.name", "brief",
        f"{LINES}.iterations", "40", f"{LINES}.objective.num-steps", "6", f"{LINES}.objective.steps", "0", "2",
        f"{ADVERSARIAL}.iterations", "0", f"{FRECHET}.iterations", "0",
        "--student.batch-size", "16", "--student.ema-half-lives", "5", "0.2",
    )  # fmt: skip
    command = ("evaluation/evaluate.py", "digits", "--workspace", workspace, *SMALL, "--model")
    refused = run(*command, "students/brief", "--steps", "0,1", ok=False)
    assert "trained with SOT on (0, 2) alone and has never seen level 1" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = run(*command, "students/brief", "students/brief/ema-0.2", "--steps", "0", "0,2")
    assert "students/brief, 0,2: NFE 2, fd_probe_200" in done.stdout
    assert "students/brief/ema-0.2, 0: NFE 1, fd_probe_200" in done.stdout
    own, average = figures(workspace, "students/brief"), figures(workspace, "students/brief/ema-0.2")
    assert own["0 fd_probe_200"]["draws"] != average["0 fd_probe_200"]["draws"]
    run(*command, "students/brief", "--steps", "0,2", "--rule", "fresh_noise")
    fresh = figures(workspace, "students/brief")
    assert fresh["0,2 fresh_noise fd_probe_200"]["draws"] != own["0,2 fd_probe_200"]["draws"]
    assert json.loads(published(workspace, "students/brief")["metrics.json"])["straightness"] is None


def test_a_model_of_other_images_is_refused_before_any_work(run: Run, workspace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
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


def test_what_cannot_be_measured_is_an_error_before_any_work(run: Run, workspace: Path, tmp_path: Path) -> None:
    command = ("evaluation/evaluate.py", "digits", "--workspace", workspace)
    few = run(*command, "--count", "64", ok=False)
    assert "64 samples are too few for a distance in the 64 features of probe" in few.stderr
    missing = run(*command, "--features", "probe", "inception", ok=False)
    assert "python -m beeline.weights fetch inception" in missing.stderr
    elsewhere = run(*command, "--reference", tmp_path / "cifar10.npz", ok=False)
    assert "add inception to --features" in elsewhere.stderr
    (tmp_path / "cifar10.npz").write_bytes(pack({"mu": np.zeros(3)}))
    wrong = run(*command, "--features", "inception", "--reference", tmp_path / "cifar10.npz", ok=False)
    assert "an .npz file with mu; expected mu and sigma" in wrong.stderr
    assert not any("Traceback" in done.stderr for done in (few, missing, elsewhere, wrong))
    assert not (workspace / "evaluation").exists()


def test_samples_that_are_not_finite_have_no_figure(workspace: Path) -> None:
    """The model's weights are finite, but its images exceed float32."""
    place, plan = Folder(str(workspace)), json.loads((workspace / "images/plan.json").read_text())
    model = beeline.load(workspace / "teacher")
    last = model.model.last_layer
    assert isinstance(last, torch.Tensor)
    last.data[:] = 3e38
    for name, data in dump(model, {}).items():
        (workspace / "teacher" / name).write_bytes(data)
    config = EvaluateConfig(batch_size=4)
    setup = Setup(workspace=place, recipe="digits", config=config, images=plan, pairs=None, count=100)
    with pytest.raises(BeelineError, match="teacher makes NaN or infinite samples by 'euler 1' in precision fp32"):
        Bench(setup, [Samples("teacher", teacher_sampling(1), 0, 0, range(4))]).work(0)
    assert not (workspace / "evaluation").exists()
    model.few_step = FewStep(num_steps=4)
    judge = Validation(place, "digits", plan, count=100, seed=0, device=torch.device("cpu"))
    assert math.isnan(judge.judge(model)[0]["fd_probe_losses"])


def test_few_evaluations_of_a_teacher_are_euler() -> None:
    assert [(teacher_sampling(n).solver, teacher_sampling(n).num_steps) for n in (35, 15, 9, 1)] == [
        ("heun", 18),
        ("heun", 8),
        ("euler", 9),
        ("euler", 1),
    ]
    with pytest.raises(BeelineError, match="nfe 16 is not possible with solver"):
        teacher_sampling(16)
    with pytest.raises(BeelineError, match="not indices or noise levels separated by commas"):
        parse_steps("0;8")


def test_pretrained_features_from_images_to_figures(trained: Path, tmp_path: Path) -> None:
    """Run every item of a measurement in Inception's features, in this process, with random weights."""
    place = Folder(str(tmp_path))
    shutil.copytree(trained / "teacher", tmp_path / "teacher")
    for name, data in dump_backbone(Inception(), {"source": "made by a test"}).items():
        (place / "weights/inception").write(name, data)
    rng, size = np.random.default_rng(0), 8
    for k in range(2):
        pixels = rng.integers(0, 256, (size, 1, 8, 8), dtype=np.uint8)
        rows = range(k * size, (k + 1) * size)
        (place / "images").write(shard_name(k), encode("image", pixels, np.arange(size, dtype=np.int32), rows, {}))
    images = {"images": {"count": 2 * size, "shard_size": size, "num_classes": 10}}
    config = EvaluateConfig(features=("inception",), draws=1, samples=4, shard_size=size, neighbours=8)
    setup = Setup(workspace=place, recipe="digits", config=config, images=images, pairs=None, count=2 * size)
    made = Measurement("teacher", Stage(place, "evaluation/teacher", {}), [teacher_sampling(1)], True)
    real = [RealImages("inception", group) for group in range(2)]
    jobs = [*real, *made.samples(setup), *made.sheets(setup), *made.judgements(setup)]
    bench = Bench(setup, jobs)
    for number in range(len(real)):
        bench.work(number)
    merge_reference(place / reference_folder("inception"), [job.file for job in real])
    for number in range(len(real), len(jobs)):
        bench.work(number)
    results.publish(setup, "teacher", made.samplings, {"plan": "a test's"}, straight=True)
    metrics = (place / "evaluation/teacher").read_json("metrics.json")
    assert [row["metric"] for row in metrics["rows"]] == [
        "fid_16", "is_16", "precision_8", "recall_8", "density_8", "coverage_8", "authenticity_8",
    ]  # fmt: skip
    assert metrics["rows"][0]["mean"] > 0
    assert metrics["provenance"]["resize"] == {"inception": "TensorFlow 1 bilinear to 299"}
    part = unpack((place / "evaluation/teacher").read(jobs[2].file), "features")
    assert {name: array.shape for name, array in part.items()} == {
        "inception.features": (8, 2048), "inception.logits": (8, 1008),
    }  # fmt: skip


def test_a_reference_file_takes_the_place_of_the_images(tmp_path: Path) -> None:
    """With a reference file, FID uses its statistics, and nothing else changes."""
    rng, folder = np.random.default_rng(0), Folder(str(tmp_path))
    real, seen = rng.standard_normal((30, 2048)).astype(np.float32), rng.standard_normal((20, 2048)).astype(np.float32)
    place = folder / reference_folder("inception")
    place.write(FEATURES, pack({"features": real, "rows": np.arange(30)}))
    place.write(STATISTICS, Statistics.of(real).to_npz())
    part = {"inception.features": seen, "inception.logits": rng.standard_normal((20, 1008))}
    (folder / "evaluation/teacher").write("part-0.npz", pack(part))
    config = EvaluateConfig(features=("inception",))
    setup = Setup(workspace=folder, recipe="digits", config=config, images={}, pairs=None, count=20)
    judge = Judge("teacher", teacher_sampling(1), 0, ("part-0.npz",))

    def judged(setup: Setup) -> dict[str, float]:
        Bench(setup, [judge]).work(0)
        return (folder / "evaluation/teacher").read_json(judge.file)

    own = judged(setup)
    shifted = Moments(real.mean(axis=0, dtype=np.float64) + 1, np.cov(real, rowvar=False))
    given = judged(replace(setup, moments=shifted))
    assert own["fid_20"] == pytest.approx(frechet_distance(Statistics.of(seen), Statistics.of(real)))
    assert given.pop("fid_20") == pytest.approx(frechet_distance(Statistics.of(seen), shifted))
    assert given == {key: value for key, value in own.items() if key != "fid_20"}
    assert {"is_20", "precision_20", "authenticity_20"} < given.keys()
    assert "kid_20" not in given  # not defined below a thousand


def test_real_images_are_merged_in_order_whatever_the_groups(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = json.loads((trained / "images/plan.json").read_text())
    assert [list(group) for group in groups({"count": 10, "shard_size": 1})] == [[k] for k in range(10)]
    monkeypatch.setattr("evaluation.reference.GROUPS", 3)
    assert [list(group) for group in groups({"count": 10, "shard_size": 1})] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert images["images"]["count"] == 1797


def test_items_cover_every_row_draw_and_sample_once(tmp_path: Path) -> None:
    config = EvaluateConfig(draws=3, shard_size=7)
    folder = Folder(str(tmp_path))
    setup = Setup(workspace=folder, recipe="digits", config=config, images={}, pairs=None, count=20)
    rows = [teacher_sampling(35), teacher_sampling(1)]
    made = Measurement("teacher", Stage(folder, "evaluation/teacher", {}), rows, True)
    jobs = made.samples(setup)
    seen = [(job.sampling.nfe, job.draw, i) for job in jobs for i in job.indices]
    assert seen == [(nfe, draw, i) for nfe in (35, 1) for draw in range(3) for i in range(20)]
    assert len({job.file for job in jobs}) == len(jobs)
    judged = made.judgements(setup)
    assert [name for job in judged for name in job.parts] == [job.file for job in jobs]
    assert not made.comparisons(setup)  # without pairs


def test_sheets_enlarge_small_images() -> None:
    assert quantised(torch.tensor([-1.0, 0.0, 1.0, 9.0])).tolist() == [0, 128, 255, 255]
    png = sheet_png(torch.zeros(6, 1, 8, 8), columns=3)
    assert int.from_bytes(png[16:20], "big") == 3 * 40 + 2 * 4
    assert int.from_bytes(png[20:24], "big") == 2 * 40 + 4


def test_a_sheet_cut_into_strips_gives_the_rows_back() -> None:
    """The report cuts samples.png into strips: row r of models is strip r, to the pixel."""
    images = torch.linspace(-1, 1, 12).reshape(12, 1, 1, 1).expand(12, 1, 8, 8)
    sheet = Image.open(io.BytesIO(sheet_png(images, columns=3))).convert("L")
    height = (sheet.height + GAP) // 4
    for r in range(4):
        strip = np.asarray(sheet.crop((0, r * height, sheet.width, (r + 1) * height - GAP)))
        assert len(strip) == 40
        for column in range(3):
            picture = strip[:, column * 44 : column * 44 + 40]
            assert (picture == quantised(images[3 * r + column])[0, 0, 0].item()).all()
