"""Pairs are made exactly once: killed at any moment and run again, the files are those of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from harness import ROOT, TINY_PAIRS, Head, Run, files, wait_for

import beeline
from beeline.errors import BeelineError
from beeline.noise import crc32, unit_noise
from beeline.recipes import digits
from beeline.sampling import Sampling, sample
from beeline.sampling.inference import prepare
from pipeline import prometheus
from pipeline.gen_pairs import PairShards, plan_of
from pipeline.reader import ShardReader
from pipeline.shards import decode
from pipeline.stage import fingerprint
from pipeline.storage import Folder


def fresh(trained: Path, tmp_path: Path) -> Path:
    """A copy of the workspace without its pairs."""
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace, ignore=shutil.ignore_patterns("pairs"))
    return workspace


@pytest.mark.parametrize("victim", ["driver", "actor"])
def test_kill_and_rerun_gives_the_same_bytes(victim: str, head: Head, run: Run, trained: Path, tmp_path: Path) -> None:
    workspace, chance = fresh(trained, tmp_path), random.Random(victim)
    expected = files(trained / "pairs", "part-*")
    assert len(expected) == 6
    command = [sys.executable, "pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS]
    for already in sorted(chance.sample(range(0, 5), 2)):
        if victim == "actor":
            shutil.rmtree(workspace / "pairs", ignore_errors=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=head.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda n=already: len(files(workspace / "pairs", "part-*.parquet")) >= n, 120, f"{already} shards")
        if victim == "actor":
            wait_for(lambda p=process: bool(head.workers("MapWorker")) or p.poll() is not None, 120, "an actor")
            victims = head.workers("MapWorker")
            assert victims, "the run was over before it could be disturbed"
            for worker in victims:
                worker.send_signal(signal.SIGKILL)
            assert process.wait(300) == 0
        else:
            process.kill()
            assert process.wait() == -signal.SIGKILL, "the run was over before it could be disturbed"
    run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS)
    assert files(workspace / "pairs", "part-*") == expected
    assert (workspace / "pairs" / "_SUCCESS").exists()


def test_a_truncated_shard_is_found_and_made_again(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    shard = workspace / "pairs" / "part-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    failed = run("trainers/train_lmm.py", "digits", "--workspace", workspace, ok=False)
    assert "part-00002.parquet has" in failed.stderr
    assert "repair it with: python pipeline/gen_pairs.py digits" in failed.stderr
    mended = run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS)
    assert "part-00002.parquet: unreadable" in mended.stdout
    assert shard.read_bytes() == whole


def test_pairs_are_the_teachers_and_x0_is_not_stored(trained: Path) -> None:
    data = (trained / "pairs" / "part-00003.parquet").read_bytes()
    (x1, labels, indices), metadata = decode(data)
    assert set(pq.read_schema(trained / "pairs" / "part-00003.parquet").names) == {"index", "label", "x1"}
    assert list(indices) == list(range(150, 200))
    assert labels.tolist() == [i % 10 for i in indices]
    assert metadata["x0_crc32"] == crc32(unit_noise(0, indices, (1, 8, 8)))
    teacher = beeline.load(trained / "teacher")
    again = sample(teacher, indices.tolist(), torch.from_numpy(labels.copy()), Sampling(), seed=0)
    np.testing.assert_allclose(again.numpy(), x1, atol=1e-4)


def test_pairs_of_a_calibrated_solver(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = fresh(trained, tmp_path)
    arguments = ["pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *TINY_PAIRS, "--pairs.solver", "calibrated"]
    missing = run(*arguments, ok=False)
    assert f"python -m beeline.calibrate {workspace}/teacher" in missing.stderr
    calibrate = [sys.executable, "-m", "beeline.calibrate", str(workspace / "teacher"), "--evaluations", "6", "--trials", "10"]
    subprocess.run([*calibrate, "--noises", "8", "--held-out", "8"], check=True, capture_output=True)
    run(*arguments)
    (x1, labels, indices), metadata = decode((workspace / "pairs" / "part-00001.parquet").read_bytes())
    teacher = beeline.load(workspace / "teacher")
    assert metadata["plan"]["pairs"]["solver"] == "calibrated"
    assert tuple(metadata["plan"]["sigmas"]) == teacher.levels
    again = sample(teacher, indices.tolist(), torch.from_numpy(labels.copy()), Sampling(solver="calibrated"), seed=0)
    np.testing.assert_allclose(again.numpy(), x1, atol=1e-4)


def test_reflow(run: Run, trained: Path, tmp_path: Path) -> None:
    """Pairs of a student are in its folder, equal samples of it, and another student trains on them."""
    workspace = tmp_path / "ws"
    shutil.copytree(trained, workspace)
    place, kept = ("digits_methods", "--workspace", workspace), files(trained / "pairs", "part-*")
    short = ["--student.workers.count", "1", "--student.batch-size", "16"]
    run("trainers/train_lmm.py", *place, "--student", "rf", *short, "--student.phases.training.iterations", "4")
    reflow = [*TINY_PAIRS, "--pairs.model", "students/rf", "--pairs.num-steps", "3"]
    made = run("pipeline/gen_pairs.py", *place, *reflow)
    assert "students/rf/pairs: 0 of 6 shards exist (0.00 GB); 300 of 300 pairs are left, 5 evaluations each" in made.stdout
    (x1, labels, indices), metadata = decode((workspace / "students/rf/pairs/part-00002.parquet").read_bytes())
    flow = beeline.load(workspace / "students/rf")
    again = sample(flow, indices.tolist(), torch.from_numpy(labels.copy()), Sampling(solver="heun", num_steps=3), seed=0)
    np.testing.assert_allclose(again.numpy(), x1, atol=1e-4)
    assert metadata["plan"]["pairs"]["model"] == "students/rf"
    assert files(workspace / "pairs", "part-*") == kept
    checked = run("pipeline/verify_pairs.py", *place, "--verify.model", "students/rf", "--verify.resample", "2")
    assert "6 shards are intact" in checked.stdout
    distilled = ["--student", "kd", *short, "--student.phases.training.iterations", "4"]
    run("trainers/train_lmm.py", *place, *distilled, "--student.init", "students/rf", "--student.pairs", "students/rf")
    plan = json.loads((workspace / "students/kd/plan.json").read_text())
    assert plan["student"]["pairs"] == "students/rf"
    assert plan["pairs"] == fingerprint(json.loads((workspace / "students/rf/pairs/plan.json").read_text()))


def test_an_imported_teacher_is_used_as_it_is(run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = fresh(trained, tmp_path)
    teacher = workspace / "teacher"
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "about": {"imported": {"file": "released.pkl"}}}))
    for name in ("plan.json", "_SUCCESS", "train.jsonl"):
        (teacher / name).unlink()
    assert "imported from released.pkl" in run("trainers/train_teacher.py", "digits", "--workspace", workspace).stdout
    run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS)
    assert files(workspace / "pairs", "part-*") == files(trained / "pairs", "part-*")


def test_one_shard_is_published_while_the_next_is_sampled(trained: Path, tmp_path: Path) -> None:
    sampling = threading.Semaphore(0)

    class Watched(PairShards):
        def _sample(self, rows: range) -> Any:
            sampling.release()
            return super()._sample(rows)

    class Slow(Folder):
        def write(self, name: str, data: bytes) -> None:
            if name == "part-00000.parquet":
                assert sampling.acquire(timeout=60), "nothing was sampled while a shard was published"
            super().write(name, data)

    teacher = beeline.load(trained / "teacher")
    config = dataclasses.replace(digits().pairs, count=50, shard_size=25, num_steps=2)
    worker = Watched(Slow(str(tmp_path)), plan_of(config, teacher, "", None), config, lambda: teacher)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(worker.work, 0)
        assert sampling.acquire(timeout=60)
        rows = [first, threads.submit(worker.work, 1)]
        assert [row.result()["shard"] for row in rows] == [0, 1]


def test_images_that_are_not_finite_are_never_stored(trained: Path, tmp_path: Path) -> None:
    """The weights fit float32 but not float16; the error names the teacher, its precision and the fix."""
    teacher = beeline.load(trained / "teacher")
    last = teacher.model.last_layer
    assert isinstance(last, torch.Tensor)
    last.data *= 1e6
    config = dataclasses.replace(digits().pairs, count=4, shard_size=4, batch_size=4, num_steps=1)

    def make(**changes: Any) -> None:
        changed = dataclasses.replace(config, **changes)
        plan, model = plan_of(changed, teacher, "ab" * 32, None), prepare(teacher, precision=changed.precision)
        PairShards(Folder(str(tmp_path)), plan, changed, lambda: model).work(0)

    half = r"the teacher \(SHA-256 abababababab\.\.\.\) makes NaN or infinite images in precision fp16: 4 of the pairs 0 to 3"
    with pytest.raises(BeelineError, match=rf"{half}, the first is 0\..*choose --pairs.precision bf16 or fp32"):
        make(precision="fp16")
    with pytest.raises(BeelineError, match=r"images in precision fp32.*check the teacher's training"):
        make(dtype="float16")  # x1 is finite, and over what float16 holds
    last.data[:] = np.nan
    with pytest.raises(BeelineError, match="makes NaN or infinite images in precision fp32"):
        make(dtype="uint8")
    assert not list(tmp_path.iterdir())
    last.data[:] = 0
    make()
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]


def test_what_is_watched(head: Head, trained: Path, tmp_path: Path) -> None:
    """Progress and cost are in the log, the remaining work in the first line, and counters on Ray's Prometheus endpoint."""
    workspace = fresh(trained, tmp_path)
    settings = ["--pairs.count", "1500", "--pairs.shard-size", "25", "--pairs.batch-size", "25", "--pairs.price", "3600"]
    process = subprocess.Popen(
        [sys.executable, "pipeline/gen_pairs.py", "digits", "--workspace", str(workspace), *settings],
        cwd=ROOT, env=head.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    series = {f"ray_beeline_{name}_total" for name in prometheus.COUNTERS.keys() - {"images", "samples"}}
    wait_for(lambda: series <= head.metrics().keys(), 120, f"{series} on the endpoint")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "pairs: 0 of 60 shards exist (0.00 GB); 1,500 of 1,500 pairs are left, 35 evaluations each" in output
    assert re.search(
        r"pairs: [\d,]+ of 1,500 pairs, [\d.]+/s, \d+ s left; 0\.\d\d actor-hours costing \d+\.\d\d so far", output
    )
    assert re.search(r"actors sampled \d+ s, waited \d+ s, published \d+ s meanwhile, repeated 0 requests", output)


def test_a_full_disk_loses_nothing(trained: Path, tmp_path: Path) -> None:
    """Uses a separate mount namespace with a small disk: the message names the disk, and with more space the run continues."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    source = fresh(trained, tmp_path)
    command = f"{sys.executable} pipeline/gen_pairs.py digits --workspace {disk}/ws {' '.join(TINY_PAIRS)}"
    script = f"""
        mount -t tmpfs -o size=200m small {disk} || exit 99
        cp -r {source} {disk}/ws
        cat /dev/zero >{disk}/full 2>/dev/null
        truncate -s -60K {disk}/full
        {command} 2>{tmp_path}/first && exit 98
        ls {disk}/ws/pairs >{tmp_path}/listing
        rm {disk}/full
        {command} >{tmp_path}/second && cp -r {disk}/ws/pairs {kept}
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a small disk")
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "first").read_text()
    assert re.fullmatch("error: .* cannot be written: No space left on device.*\n", told), told
    there = (tmp_path / "listing").read_text().split()
    assert not [name for name in there if name.endswith(".tmp")]
    shards = sum(name.startswith("part-") for name in there)
    assert f"pairs: {shards} of 6 shards exist" in (tmp_path / "second").read_text()
    assert files(kept, "part-*") == files(trained / "pairs", "part-*")


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2.5e-4), ("uint8", 4e-3)])
def test_smaller_stores_are_near(dtype: str, bound: float, run: Run, trained: Path, tmp_path: Path) -> None:
    workspace = fresh(trained, tmp_path)
    run("pipeline/gen_pairs.py", "digits", "--workspace", workspace, *TINY_PAIRS, "--pairs.dtype", dtype)
    small, whole = (
        ShardReader(Folder(str(place / "pairs")), json.loads((place / "pairs/plan.json").read_text())["pairs"], seed=0).batch(
            0, 300
        )
        for place in (workspace, trained)
    )
    np.testing.assert_array_equal(small["index"], whole["index"])
    within = np.abs(whole["x1"]) <= 1
    np.testing.assert_allclose(small["x1"][within], whole["x1"][within], atol=bound)
    assert small["x1"].dtype == np.float32


def test_a_shard_that_is_too_large_is_refused(run: Run, trained: Path) -> None:
    too_large = ["--pairs.count", "1000000", "--pairs.shard-size", "1000000"]
    failed = run("pipeline/gen_pairs.py", "digits", "--workspace", trained, *too_large, ok=False)
    assert "over 128 MB; expected at most --pairs.shard-size 524288" in failed.stderr
