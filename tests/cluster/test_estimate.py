"""An estimate follows the recipe and names the source of every speed; --check finds what is not ready."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import measured
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from harness import ROOT, Head, free_port, wait_for
from methods import ConsistencyConfig, MatchingConfig
from ray.core.generated.autoscaler_pb2 import ClusterConfig  # pyright: ignore[reportAttributeAccessIssue]
from s3 import forget
from torch.utils.flop_counter import FlopCounterMode

from beeline import counting
from beeline.checkpoint import build, dump
from beeline.config import PairsConfig, Recipe
from beeline.errors import BeelineError
from beeline.objectives import Batch, Context
from beeline.objectives.learner import Learner
from beeline.objectives.lmm import LinesMatchingConfig
from beeline.recipes import cifar10, digits
from cluster.estimate import Machines, Plan, estimate, plan
from cluster.planning import nodes, readiness, speeds
from cluster.planning.nodes import Node, Surroundings
from cluster.planning.readiness import Line, access, check_all
from cluster.planning.stages import stages
from cluster.planning.workspace import Workspace
from pipeline.gen_pairs import plan_of
from pipeline.manifest import SCHEMA
from pipeline.shards import encode, shard_count, shard_rows, store_bytes
from pipeline.stage import Stage
from pipeline.storage import Folder
from trainers import checkpoints

H200 = Machines(gpu="h200", gpus=8, cores=64)
TWO_CORES = Machines(gpu="cpu", gpus=0, cores=2)


@pytest.fixture(scope="module")
def on_gpus() -> Recipe:
    """The digits recipe, small enough to count, with GPUs requested by every stage as in the large recipes."""
    recipe = digits()
    lmm = replace(recipe.students["lmm"], precision="bf16", workers=replace(recipe.teacher.workers, count=4, gpus=1))
    return replace(
        recipe,
        probe=replace(recipe.probe, gpus=0.5),
        teacher=replace(recipe.teacher, workers=replace(recipe.teacher.workers, count=8, gpus=1)),
        pairs=replace(recipe.pairs, precision="bf16", gpus=1, max_actors=64, count=100_000, shard_size=1000),
        students={"lmm": lmm, "l2": replace(recipe.students["l2"], workers=lmm.workers)},
        sweep=replace(recipe.sweep, gpus=1),
        evaluate=replace(recipe.evaluate, gpus=1),
    )


def planned(recipe: Recipe, workspace: Path, machines: Machines = H200, **settings: Any) -> Plan:
    there = Workspace(str(workspace), recipe)
    return plan(stages(recipe, there, "train"), machines, measured=there.measured(), **settings)


def row(made: Plan, stage: str) -> Any:
    return next(row for row in made.rows if row.stage == stage)


def test_the_cifar10_network_is_counted_exactly() -> None:
    network = cifar10().teacher.network
    assert counting.evaluation(network) == pytest.approx(42.4e9, rel=0.02)
    assert counting.network_bytes(network) / 4 == pytest.approx(55.735e6, rel=1e-3)
    (denoising,) = cifar10().teacher.running.values()
    step = counting.phase_flops(network, cifar10().probe.losses, denoising.objective)
    assert step == pytest.approx(3 * counting.evaluation(network), rel=0.02)


def test_a_step_without_data_counts_as_a_real_one() -> None:
    recipe = digits()
    phase, network = recipe.main.phases["adversarial"], recipe.teacher.network
    assert isinstance(phase.objective, LinesMatchingConfig)
    torch.manual_seed(0)
    model = build(network)
    student = Learner(model, phase.optimizer)
    probe = counting._probe(recipe.probe.losses, 1).eval().requires_grad_(False)
    features = {"probe": probe}
    context = Context(image_shape=(1, 8, 8), num_classes=10, models={}, features=features, average=copy.deepcopy(model))
    objective = phase.objective.build(context)
    assert objective.critic is not None
    critic = Learner(objective.critic, phase.objective.discriminator.optimizer)
    x, labels = torch.rand(4, 1, 8, 8), torch.eye(10)[:4]
    batch = Batch(size=4, step=0, total=1, noise=x, x1=x, labels=labels, real=x, real_labels=labels)
    with FlopCounterMode(display=False) as counter:
        objective.backward(student, critic, batch, torch.Generator())
    arguments = network, recipe.probe.losses, phase.objective
    assert counting.phase_flops(*arguments) == counter.get_total_flops() / 4
    state = sum(tensor.numel() * 4 for tensor in objective.critic.state_dict().values())
    critic_bytes, state_bytes = counting.phase_bytes(*arguments)
    assert state < critic_bytes < 3 * state + 1
    assert state_bytes == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_what_an_objective_keeps_is_counted(weighted: bool) -> None:
    """A target network counts once, a learned weighting together with its optimiser's two moments."""
    recipe = digits()
    arguments = recipe.teacher.network, recipe.probe.losses, ConsistencyConfig(weighted=weighted)
    state_bytes = counting.network_bytes(recipe.teacher.network) + 4 + 2 * 4 * weighted
    assert counting.phase_bytes(*arguments) == (0, state_bytes)
    assert counting.phase_flops(*arguments) > 0


def test_steps_of_all_turns_are_counted() -> None:
    """Count the student's steps, and the critic's four times as often, with no more in the batch than required."""
    network, probe = digits().teacher.network, digits().probe.losses
    configs = [MatchingConfig(every=every) for every in (1, 10_000, 5)]
    bytes_of_critics = {counting.phase_bytes(network, probe, config)[0] for config in configs}
    assert len(bytes_of_critics) == 1
    assert bytes_of_critics.pop() > counting.network_bytes(network)
    always, never, often = (counting.phase_flops(network, probe, config) for config in configs)
    assert never > 0
    assert min(always, never) < often < max(always, never)


def test_phases_by_any_name_and_number_are_planned(on_gpus: Recipe, tmp_path: Path) -> None:
    """A third phase adds its own work; a skipped phase adds none."""
    l2 = on_gpus.students["l2"]
    (phase,) = l2.phases.values()
    phases = {f"phase-{k}": replace(phase, iterations=count) for k, count in enumerate((100, 0, 200, 300))}
    found = row(
        planned(replace(on_gpus, students=on_gpus.students | {"l2": replace(l2, phases=phases)}), tmp_path), "students/l2"
    )
    before = row(planned(on_gpus, tmp_path), "students/l2")
    assert found.work == "600 iterations of 128"
    assert found.flops == pytest.approx(600 / phase.iterations * before.flops)
    assert found.stored_bytes - before.stored_bytes >= 2 * counting.network_bytes(on_gpus.teacher.network)


def test_a_set_of_students_is_a_training_for_each_part(on_gpus: Recipe, tmp_path: Path) -> None:
    """Each costs as much as one student, is measured by its own log and continues by itself; joining them costs nothing."""
    l2, before = on_gpus.students["l2"], row(planned(on_gpus, tmp_path), "students/l2")
    recipe = replace(on_gpus, students=on_gpus.students | {"l2": replace(l2, subsets=3)})
    found = planned(recipe, tmp_path)
    for number in range(3):
        part = row(found, f"students/l2/{number}")
        assert (part.flops, part.work, part.stored_bytes) == (before.flops, before.work, before.stored_bytes)
    joined, weights = row(found, "students/l2"), counting.network_bytes(recipe.teacher.network)
    assert (joined.work, joined.flops) == ("3 parts joined", 0)
    assert 3 * weights <= joined.stored_bytes < 3 * weights + 1e5
    needs = {job.need for stage in stages(recipe, Workspace(str(tmp_path), recipe), "train") for job in stage.jobs}
    assert {need.option for need in needs if need.stage == "students/l2/1"} == {"--students.l2.workers.count"}
    row_of_log = {"step": 50, "phase": 0, "images_per_s": 100.0, "seconds": 5.0}
    log = "".join(json.dumps(row_of_log | {"step": 50 * k}) + "\n" for k in range(1, 4))
    Folder(str(tmp_path)).write("students/l2/1/train.jsonl", log.encode())
    assert [speed.task.kind for speed in Workspace(str(tmp_path), recipe).measured()] == ["reconstruction"]
    checkpoints.save(Folder(str(tmp_path)) / "students/l2/1", 20, {}, keep=2)
    left = [row(planned(recipe, tmp_path), f"students/l2/{number}").amount for number in range(3)]
    assert left == [before.amount, before.amount - 20, before.amount]


@pytest.mark.parametrize("factor", [2, 5])
def test_work_grows_with_the_recipe(factor: int, on_gpus: Recipe, tmp_path: Path) -> None:
    l2, pairs = on_gpus.students["l2"], on_gpus.pairs
    (phase,) = l2.phases.values()
    phases = {"reconstruction": replace(phase, iterations=factor * phase.iterations)}
    larger = replace(
        on_gpus,
        pairs=replace(pairs, count=factor * pairs.count),
        students=on_gpus.students | {"l2": replace(l2, phases=phases)},
        evaluate=replace(on_gpus.evaluate, draws=factor * on_gpus.evaluate.draws),
    )
    before, after = planned(on_gpus, tmp_path), planned(larger, tmp_path)
    for name in ("gpu_hours", "stored_bytes", "amount"):
        assert getattr(row(after, "pairs"), name) == pytest.approx(factor * getattr(row(before, "pairs"), name), rel=1e-4)
    assert row(after, "students/l2").flops == pytest.approx(factor * row(before, "students/l2").flops)
    assert row(after, "evaluation").passing_bytes == pytest.approx(factor * row(before, "evaluation").passing_bytes)
    assert row(after, "teacher") == row(before, "teacher")


def test_measurements_are_counted_as_they_are_made(tmp_path: Path) -> None:
    """Each model at its own schedules: those of all levels at 1, 2, 3, 3 and 4 evaluations, SOT and distillation at 1."""
    recipe = cifar10()
    evaluation = next(
        stage for stage in stages(recipe, Workspace(str(tmp_path), recipe), "train") if stage.name == "evaluation"
    )
    any_level, held_out, samples = 1 + 2 + 3 + 3 + 4, 256, 3 * 50_000
    each = (35 + 9 + 3 + 1) + 4 * any_level + 2
    lines = 5 * 3 * 18 * held_out  # of the teacher, and of students of all levels
    total = each * (samples + 40 + held_out) + lines + 35 * held_out
    assert evaluation.work == f"26 rows of 3 x 50,000 samples, {total:,} evaluations"
    assert evaluation.jobs[0].count() == total * counting.evaluation(recipe.teacher.network)


def test_a_calibrated_teacher_is_one_row_and_published_rows_are_not_counted(on_gpus: Recipe, tmp_path: Path) -> None:
    calibrated = replace(on_gpus, evaluate=replace(on_gpus.evaluate, solver="calibrated"))
    before = row(planned(on_gpus, tmp_path), "evaluation").work
    assert int(row(planned(calibrated, tmp_path), "evaluation").work.split()[0]) == int(before.split()[0]) - 3
    measured.measure(Folder(str(tmp_path)), "students/l2", [measured.ONE, measured.TWO])
    after = row(planned(on_gpus, tmp_path), "evaluation").work
    assert int(after.split()[0]) == int(before.split()[0]) - 2


def test_a_sweep_keeps_no_checkpoints(on_gpus: Recipe, tmp_path: Path) -> None:
    """Those of a trial go when it ends: the students stay, and what is kept of their measurement."""
    found, weights = row(planned(on_gpus, tmp_path), "sweeps/sot"), counting.network_bytes(on_gpus.teacher.network)
    assert 4 * weights < found.stored_bytes < 4 * (weights + 1e6)
    assert found.passing_bytes == 2 * 4 * weights  # two trials side by side


def test_a_student_without_phases_is_refused(tmp_path: Path) -> None:
    recipe = digits()
    sot = recipe.students["sot"]
    phases = {name: replace(phase, iterations=0) for name, phase in sot.phases.items()}
    with pytest.raises(BeelineError, match="student 'sot' needs at least one phase with iterations above 0"):
        estimate(str(tmp_path), replace(recipe, students=recipe.students | {"sot": replace(sot, phases=phases)}))


def test_gpus_share_the_pairs_and_students_wait_for_theirs(on_gpus: Recipe, tmp_path: Path) -> None:
    one, eight = (planned(on_gpus, tmp_path, replace(H200, gpus=n)) for n in (1, 8))
    start = speeds.starting()[0] / 3600
    walls = [row(made, "pairs").wall_hours - start for made in (one, eight)]
    assert walls[0] / walls[1] == pytest.approx(100 / 13, rel=1e-6)  # 100 shards are 13 rounds of 8
    assert row(one, "pairs").gpu_hours == row(eight, "pairs").gpu_hours
    assert any("teacher requests 8 GPUs at once, of 1" in note for note in one.notes)
    assert not any("at once" in note for note in eight.notes)


@pytest.mark.parametrize(("dtype", "shape", "count"), [("float16", (3, 32, 32), 700), ("float32", (1, 8, 8), 1300)])
def test_storage_is_that_of_a_real_store(dtype: Any, shape: tuple[int, int, int], count: int) -> None:
    config = PairsConfig(count=count, shard_size=300, dtype=dtype)
    network = replace(digits().teacher.network, img_channels=shape[0], img_resolution=shape[1])
    made_of = plan_of(config, build(network), "0" * 64, None)
    real = 0
    for k in range(shard_count(count, 300)):
        rows = shard_rows(k, 300, count)
        images = np.random.default_rng(k).random((len(rows), *shape)).astype(dtype)
        real += len(encode("x1", images, np.zeros(len(rows), np.int32), rows, made_of, x0_generator="philox", x0_crc32=1))
    settings = {"pairs": dataclasses.asdict(config), "sigmas": made_of["sigmas"], "teacher_sha256": "0" * 64}
    assert store_bytes("x1", shape, dtype, count, 300, settings) == pytest.approx(real, rel=0.03)


def without_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks' results as if no GPU had been measured."""
    folder.mkdir()
    for path in speeds.RESULTS.glob("*.json"):
        if not json.loads(path.read_text()).get("machine", {}).get("gpu"):
            (folder / path.name).write_text(path.read_text())
    monkeypatch.setattr(speeds, "RESULTS", folder)


def test_every_speed_names_its_source(on_gpus: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(tmp_path / "results", monkeypatch)
    made = planned(on_gpus, tmp_path)
    assert all(found.sources for found in made.rows if found.flops)
    said = row(made, "pairs").sources["sampling"]
    assert said.startswith(
        "297 TFLOP/s per GPU in bf16, assumed, not measured: 30 % of the data sheet's 989 TFLOP/s dense bf16"
    )
    assert "NVIDIA H200 SXM" in said
    on_cpu = planned(digits(), tmp_path, TWO_CORES)
    said = row(on_cpu, "pairs").sources["sampling"]
    assert "measured: benchmarks/results/sampling-cpu-digits.json" in said
    assert row(planned(on_gpus, tmp_path, utilisation=0.1), "pairs").gpu_hours == pytest.approx(
        3 * row(made, "pairs").gpu_hours
    )


def test_a_benchmark_of_the_gpu_is_taken_before_its_data_sheet(
    on_gpus: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in speeds.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    result = json.loads((speeds.RESULTS / "sampling-cpu-digits.json").read_text())
    result["machine"] |= {"gpu": "NVIDIA H200"}
    result["policies"]["bf16"]["evaluations_per_s"] = 1e6
    (tmp_path / "sampling-gpu-digits.json").write_text(json.dumps(result))
    monkeypatch.setattr(speeds, "RESULTS", tmp_path)
    found = row(planned(on_gpus, tmp_path / "ws"), "pairs")
    assert found.sources["sampling"].endswith("measured: benchmarks/results/sampling-gpu-digits.json, on one NVIDIA H200")
    assert found.gpu_hours == pytest.approx(100_000 * 35 / 1e6 / 3600)
    h100 = row(planned(on_gpus, tmp_path / "ws", replace(H200, gpu="h100")), "pairs")
    assert "assumed" in h100.sources["sampling"]


def pairs_plan(pairs: PairsConfig) -> dict[str, Any]:
    """Return a plan of pairs/ of the digits, as gen_pairs.py writes it."""
    facts = {"evaluations": 35, "num_classes": 10, "shape": [1, 8, 8], "sigmas": [80.0, 0.002], "teacher_sha256": "0" * 64}
    return {"pairs": dataclasses.asdict(pairs), **facts}


def test_the_workspace_is_believed_first_and_not_made_twice(on_gpus: Recipe, tmp_path: Path) -> None:
    pairs, place = on_gpus.pairs, Folder(str(tmp_path))
    there = Stage(place, "pairs", pairs_plan(pairs))
    there.begin()
    rows: list[dict[str, Any]] = [{"shard": k, "pairs": 1000, "bytes": 1, "sampling_seconds": 20.0} for k in range(40)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
    there.folder.write("manifest.parquet", sink.getvalue())
    for k in range(40):
        there.folder.write(f"part-{k:05d}.parquet", b"")
    log = [{"step": 50, "images_per_s": 1.0}, *({"step": 50 * k, "images_per_s": 1000.0} for k in (2, 3))]
    (place / "teacher").write("train.jsonl", "\n".join(map(json.dumps, log)).encode())
    made = planned(on_gpus, tmp_path)
    found = row(made, "pairs")
    assert found.amount == 60_000
    assert found.gpu_hours == pytest.approx(60_000 / 50 / 3600)
    assert f"{tmp_path}/pairs/manifest.parquet, 50.00 pairs per actor-second over 40 shards" in found.sources["sampling"]
    teacher = row(made, "teacher")
    assert f"{tmp_path}/teacher/train.jsonl, 1,000.0 images/s" in teacher.sources["teacher"]
    assert teacher.gpu_hours == pytest.approx(8 * 700 * 128 / 1000 / 3600)
    there.finish()
    assert row(planned(on_gpus, tmp_path), "pairs").work == "complete"


def test_the_digits_take_what_they_take(tmp_path: Path) -> None:
    """The README's demo takes eight and a half minutes on two cores."""
    assert 4.25 < planned(digits(), tmp_path, TWO_CORES).wall_hours * 60 < 17


def test_money_is_counted_only_with_a_price(on_gpus: Recipe, tmp_path: Path) -> None:
    free, paid = planned(on_gpus, tmp_path), planned(on_gpus, tmp_path, price=2.5)
    assert free.held_money is None
    assert all(found.money is None for found in free.rows)
    assert paid.total("money") == pytest.approx(2.5 * paid.total("gpu_hours"))
    assert paid.held_money == pytest.approx(2.5 * 8 * paid.wall_hours)


def test_the_command_follows_overrides(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [
            sys.executable, "cluster/estimate.py", "digits", "--workspace", str(tmp_path / "ws"), "--gpu", "cpu", "--gpus", "0",
            "--cores", "2", "--json", "--pairs.count", "20000", "--teacher", "import",
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {stage["stage"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert found["pairs"]["work"] == "20,000 pairs of 35 evaluations"
    assert found["teacher"]["work"] == "imported"
    assert "money" not in found["pairs"]
    assert not (tmp_path / "ws").exists()


def test_the_table_has_every_stage_and_its_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate(str(tmp_path), digits(), gpu="cpu", cores=2)
    page = capsys.readouterr().out
    for stage in ("images", "probe", "teacher", "pairs", "students/lmm", "students/sot", "sweeps/sot", "evaluation", "report"):
        assert f"\n{stage} " in page
    assert "measured: benchmarks/results/sampling-cpu-digits.json" in page
    assert "money" not in page


def test_an_unknown_gpu_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="'h2000', which has no known speed; expected one of: h200, h100, a100, l40s"):
        estimate(str(tmp_path), digits(), gpu="h2000")
    with pytest.raises(BeelineError, match="for machines without GPUs give --gpu cpu"):
        estimate(str(tmp_path), digits(), gpu="h200", gpus=0)


def checked(recipe: Recipe, workspace: str, teacher: str = "train") -> dict[str, Line]:
    place = Folder(workspace)
    lines = check_all(recipe, Workspace(workspace, recipe, access(place)), teacher)
    return {line.what: line for line in lines}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run without a cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("alone")
def test_a_good_workspace_is_ready_and_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(digits(), str(tmp_path / "a/b"))
    assert {"workspace", "settings", "weights", "teacher", "images", "disk", "machine", "room"} <= found.keys()
    assert not [line for line in found.values() if line.fix]
    assert not list(tmp_path.iterdir())
    estimate(str(tmp_path), digits(), check=True)
    assert "ok      workspace" in capsys.readouterr().out


@pytest.mark.usefixtures("alone")
def test_what_is_missing_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = digits()
    recipe = replace(
        recipe,
        images=replace(recipe.images, source="photos.zip"),
        evaluate=replace(recipe.evaluate, features=("probe", "dinov2_vits14", "inception")),
        pairs=replace(recipe.pairs, gpus=2, min_actors=3, max_actors=3),
    )
    for name in ("model.safetensors", "config.json"):
        Folder(str(tmp_path)).write(f"weights/inception/{name}", b"{}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda path: _Usage(10))
    found = checked(recipe, str(tmp_path), "import")
    assert found["weights"].fix.endswith(f"python -m beeline.weights fetch dinov2_vits14 --out {tmp_path}/weights")
    assert "python -m beeline.edm_import FILE.pkl" in found["teacher"].fix
    assert "photos.zip does not exist" in found["images"].found
    assert found["disk"].fix
    assert "3 x 2 GPU and 0.5 CPU are requested at once" in found["pairs"].found
    assert "has room for 2" in found["pairs"].found
    with pytest.raises(BeelineError, match="checks failed: weights, teacher, images, disk, pairs"):
        readiness.report(list(found.values()))


@dataclasses.dataclass
class _Usage:
    free: int


@pytest.mark.usefixtures("alone")
def test_other_settings_and_another_teacher_are_found_before_they_are_refused(tmp_path: Path) -> None:
    recipe, place = digits(), Folder(str(tmp_path))
    Stage(place, "pairs", pairs_plan(replace(recipe.pairs, count=77))).begin()
    for name, data in dump(build(replace(recipe.teacher.network, img_channels=3)), {}).items():
        (place / "teacher").write(name, data)
    found = checked(recipe, str(tmp_path))
    assert "pairs: pairs.count: 77 there, 2500 asked for" in found["settings"].found
    assert found["settings"].fix
    assert "img_channels: 3 there, 1 asked for" in found["teacher"].found


@pytest.mark.usefixtures("alone")
def test_a_workspace_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = checked(digits(), str(tmp_path / "file/ws"))
    assert "Set --workspace to a writable folder" in found["workspace"].fix
    assert "weights" not in found  # what cannot be read is not judged


@pytest.mark.s3
@pytest.mark.usefixtures("alone")
def test_buckets_and_credentials(bucket: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = digits()
    found = checked(recipe, str(bucket))
    assert not [line for line in found.values() if line.fix]
    assert bucket.sizes() == {}

    assert "The bucket does not exist" in checked(recipe, "s3://no-such-bucket/x")["workspace"].fix
    with monkeypatch.context() as changed:
        changed.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        forget()
        assert "credentials" in checked(recipe, str(bucket))["workspace"].fix
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            changed.delenv(name)
        changed.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        changed.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        forget()
        assert "No credentials were found: set AWS_ACCESS_KEY_ID" in checked(recipe, str(bucket))["workspace"].fix
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        changed.setattr(readiness, "PATIENCE", 3.0)
        forget()
        line = checked(recipe, str(bucket))["workspace"]
        assert "The endpoint does not answer: check AWS_ENDPOINT_URL" in line.fix


def test_a_running_cluster_is_asked(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    recipe = digits()
    wait_for(lambda: "no node" not in checked(recipe, str(tmp_path))["cluster"].found, 60, "the head's own node")
    found = checked(recipe, str(tmp_path))
    assert not [line for line in found.values() if line.fix]
    assert "4 CPUs and 0 GPUs" in found["cluster"].found
    assert found["versions"].found.endswith("here and there")
    many = replace(recipe.teacher, workers=replace(recipe.teacher.workers, count=5))
    found = checked(replace(recipe, pairs=replace(recipe.pairs, gpus=0.5), teacher=many), str(tmp_path))
    assert "2 x 0.5 GPU" in found["pairs"].found
    assert "5 x 1 CPU are requested at once; 1 node with 4 CPUs and 0 GPUs has room for 4" in found["teacher"].found
    assert "--teacher.workers.count" in found["teacher"].fix
    assert "room" not in found

    config, client = ClusterConfig(), nodes._raylet.GcsClient(address=head.address)
    config.node_group_configs.add(name="gpus", max_count=2).resources.update({"CPU": 8, "GPU": 4})
    key, space = (
        getattr(nodes._raylet, f"GCS_AUTOSCALER_{name}").encode() for name in ("CLUSTER_CONFIG_KEY", "STATE_NAMESPACE")
    )
    client.internal_kv_put(key, config.SerializeToString(), True, namespace=space)
    try:
        assert nodes.look_at_cluster(head.address).promised == [Node(8, 4, 2)]
    finally:
        client.internal_kv_del(key, False, namespace=space)

    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert "does not answer" in checked(recipe, str(tmp_path))["cluster"].found


def test_what_an_autoscaler_may_bring_counts() -> None:
    config = ClusterConfig()
    for name, resources, most in (("head", {"CPU": 2}, 0), ("spot", {"CPU": 8, "GPU": 1}, 3), ("any", {"CPU": 4}, -1)):
        group = config.node_group_configs.add(name=name, max_count=most)
        group.resources.update(resources)
    around = Surroundings(nodes=[Node(2, 0)], promised=nodes.promised(config))
    assert "may scale it to 3 nodes with 1 GPUs, 8 CPUs, any number of nodes with 0 GPUs, 4 CPUs" in str(around)
    need = nodes.Need(stage="teacher", option="", least=3, most=3, gpus=1, cpus=1)
    assert not readiness.room(need, around).fix
    assert readiness.room(replace(need, least=4), around).fix
    assert not readiness.room(replace(need, gpus=0.25, least=12), around).fix
