"""Every reader of untrusted files: thousands of damaged and hostile files end in a result or a BeelineError, run no code and
stay within their memory limit.

BEELINE_FUZZ=20 python -m pytest tests/test_untrusted_files.py -s tries twenty times as many, and prints the counts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # which errors on the meta device import, and all that it imports
from edm_files import SMALLEST, edm_names, released
from measured import FRESH, ONE, TEACHER_WAYS, TWO, finished, measure, trained, with_pairs, with_sweep
from mutations import CASES, mutated, mutated_json, mutated_parts, outcomes, pickle_parts, safetensors
from torch import nn

from beeline import checkpoint
from beeline.checkpoint import CONFIG, WEIGHTS
from beeline.config import NetworkConfig, ProbeNetworkConfig
from beeline.edm_import import convert
from beeline.errors import BeelineError
from beeline.features.backbones import build_backbone
from beeline.features.probe import Probe
from beeline.files.arrays import pack, unpack
from beeline.metrics.frechet import Moments, Statistics
from beeline.recipes import RECIPES
from beeline.sampling.few_step import FewStep
from beeline.weights import dump_backbone, load_backbone, read
from evaluation import models
from evaluation.page import cost, provenance, sweeps, training
from evaluation.report import report
from pipeline.manifest import MANIFEST, read_manifest
from pipeline.records import LAYOUTS, plan_in
from pipeline.stage import Stage, require
from pipeline.storage import Folder
from trainers.train_teacher import imported_from
from trainers.trials import rungs_in

Cases = Iterable[bytes]


def drawn(name: str, count: int, make: Callable[[random.Random], bytes]) -> Iterator[bytes]:
    """Draw `count` cases, the same in every run; more with BEELINE_FUZZ."""
    rng = random.Random(zlib.crc32(name.encode()))
    return (make(rng) for _ in range(count * CASES))


def tried(name: str, call: Callable[[bytes], Any], cases: Cases, **limits: Any) -> None:
    """Try the cases; some must be refused."""
    counts = outcomes(call, cases, **limits)
    print(f"{name}: {dict(counts)}")
    assert counts["BeelineError"]


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


# Checkpoints --------------------------------------------------------------------------------------------------------------


def test_edm_pickles(tmp_path: Path) -> None:
    with edm_names() as edm:
        files = [released(edm, kind, half=half, sizes=SMALLEST)[0] for kind, half in (("ddpmpp", False), ("ncsnpp", True))]
    parts = [pickle_parts(data) for data in files]
    file = tmp_path / "file.pkl"

    def call(data: bytes) -> None:
        file.write_bytes(data)
        convert(file)

    tried("edm, opcodes", call, drawn("opcodes", 400, lambda rng: mutated_parts(rng.choice(parts), rng)), writes=True)
    tried("edm, bytes", call, drawn("bytes", 60, lambda rng: mutated(rng.choice(files), rng)), writes=True)
    others = [
        saved({"input_blocks.0.0.weight": torch.zeros(2)}),
        saved({"net": nn.Linear(1, 1), "optimizer_state": {}}),
        saved({"net": torch.zeros(1)}, _use_new_zipfile_serialization=False),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    ]
    tried("edm, other kinds", call, drawn("kinds", 60, lambda rng: mutated(rng.choice(others), rng)), writes=True)


def denoiser_files() -> dict[str, bytes]:
    config = NetworkConfig(
        kind="ddpmpp", img_resolution=8, img_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()
    )
    model = checkpoint.build(config)
    model.few_step = FewStep(num_steps=18, trained_steps=(0, 8))
    return checkpoint.dump(model, {"trained": {"seed": 0}})


def set_files() -> dict[str, bytes]:
    config = NetworkConfig(
        kind="ddpmpp", img_resolution=8, img_channels=1, label_dim=3, model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(),
    )  # fmt: skip
    return checkpoint.dump(checkpoint.build(config, 2), {"trained": {"seed": 0}})


def probe_files() -> dict[str, bytes]:
    config = ProbeNetworkConfig(widths=(8, 12), strides=(1, 2))
    return checkpoint.dump(Probe(config, channels=1, num_classes=3), {})


def headers(weights: bytes, rng: random.Random) -> bytes:
    """Return the weights under another header, or with other bytes."""
    if rng.random() < 0.3:
        return mutated(weights, rng)
    size = int.from_bytes(weights[:8], "little")
    return safetensors(mutated_json(json.loads(weights[8 : 8 + size]), rng), weights[8 + size :])


@pytest.mark.parametrize("make", [denoiser_files, set_files, probe_files])
def test_model_folders(make: Callable[[], dict[str, bytes]], tmp_path: Path) -> None:
    files = make()
    config = json.loads(files[CONFIG])
    configs = drawn("config", 150, lambda rng: mutated_json(config, rng))
    tried(f"{make.__name__}, config.json", lambda data: checkpoint.restore(files | {CONFIG: data}, "here"), configs)
    weights = drawn("weights", 100, lambda rng: headers(files[WEIGHTS], rng))
    tried(f"{make.__name__}, weights", lambda data: checkpoint.restore(files | {WEIGHTS: data}, "here"), weights)
    (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])

    def call(data: bytes) -> None:
        (tmp_path / CONFIG).write_bytes(data)
        imported_from(Folder(str(tmp_path)))

    configs = drawn("about", 60, lambda rng: mutated_json({"about": {"imported": {"file": "x", "sha256": "y"}}}, rng))
    tried("config.json, imported", call, configs, writes=True)


def test_solver_levels() -> None:
    found = {"levels": [80.0, 5.0, 0.1], "model_sha256": "ab", "about": {}}
    cases = drawn("solver", 300, lambda rng: mutated_json(found, rng))
    tried("solver.json", lambda data: checkpoint.solver_levels(data, "ab", "here"), cases)


def test_backbones(tmp_path: Path) -> None:
    files = dump_backbone(build_backbone("vgg16"), {})
    config = {key: value for key, value in json.loads(files[CONFIG]).items() if key != "about"}
    load_backbone(files, "here")
    small = {**files, WEIGHTS: safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))}
    configs = drawn("backbone", 100, lambda rng: mutated_json(config, rng))
    tried("backbone, config.json", lambda data: load_backbone(small | {CONFIG: data}, "here"), configs)
    plain = json.dumps({key: value for key, value in config.items() if key != "weights_sha256"}).encode()
    weights = drawn("backbone weights", 100, lambda rng: headers(small[WEIGHTS], rng))
    tried("backbone, weights", lambda data: load_backbone({CONFIG: plain, WEIGHTS: data}, "here"), weights)
    file = tmp_path / "a.pth"
    originals = [saved({"a": torch.zeros(3)}, _use_new_zipfile_serialization=zipped) for zipped in (True, False)]

    def call(data: bytes) -> None:
        file.write_bytes(data)
        read(file)

    # torch's own reader reserves what a file says before it looks; what is given to it has the SHA-256 that was expected.
    cases = drawn("torch.save", 150, lambda rng: mutated(rng.choice(originals), rng))
    tried("torch.save", call, cases, memory=1 << 42, writes=True)


# Arrays and tables ------------------------------------------------------------------------------------------------------------


def test_arrays() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 4))
    readers: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
        "statistics.npz": (Statistics.of(rows).to_npz(), Statistics.from_npz),
        "reference.npz": (pack({"mu": np.zeros(3), "sigma": np.eye(3)}), Moments.from_npz),
        "features.npz": (pack({"features": rows, "rows": np.arange(9)}), lambda data: unpack(data, "features")),
    }

    def call(read: Callable[[bytes], Any], data: bytes) -> None:
        try:
            read(data)
        except ValueError as error:  # for callers, who know the file's name
            raise BeelineError(str(error)) from error

    for name, (good, reader) in readers.items():
        cases = drawn(name, 200, lambda rng, good=good: mutated(good, rng))
        tried(name, functools.partial(call, reader), cases)


def in_workspace(tmp_path: Path, name: str, call: Callable[[], Any]) -> Callable[[bytes], Any]:
    """Call `call` after the file `name` has been written."""

    def both(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        call()

    return both


def test_tables(tmp_path: Path) -> None:
    place = Folder(str(tmp_path))
    with_pairs(place)
    with_sweep(place)
    manifest, trials = (tmp_path / "pairs" / MANIFEST).read_bytes(), (tmp_path / "sweeps/sot/trials.parquet").read_bytes()
    call = in_workspace(tmp_path, f"pairs/{MANIFEST}", lambda: read_manifest(place / "pairs"))
    with contextlib.redirect_stdout(io.StringIO()):
        counts = outcomes(call, drawn("manifest", 200, lambda rng: mutated(manifest, rng)), writes=True)
    assert set(counts) == {"result"}, "nothing but sums depends on a manifest: a damaged one is none"
    call = in_workspace(tmp_path, "sweeps/sot/trials.parquet", lambda: sweeps.sweeps(place))
    tried("trials.parquet", call, drawn("trials", 60, lambda rng: mutated(trials, rng)), writes=True)
    (tmp_path / "trial").mkdir()
    call = in_workspace(tmp_path, "trial/rungs.json", lambda: rungs_in(place / "trial"))
    rungs = [{"step": 20, "fd_probe_losses": 0.5}]
    tried("rungs.json", call, drawn("rungs", 150, lambda rng: mutated_json(rungs, rng)), writes=True)


# Plans, and what the report reads ---------------------------------------------------------------------------------------------

PLAN = {
    "pairs": {"count": 100, "shard_size": 50, "num_steps": 18, "seed": 0, "dtype": "float32"},
    "evaluations": 35, "num_classes": 10, "shape": [1, 8, 8], "sigmas": [80.0, 1.0],
}  # fmt: skip


def test_plans_and_markers(tmp_path: Path) -> None:
    place = Folder(str(tmp_path))
    finished(place, "pairs", PLAN, {"part-00000.parquet": b"x"}, pairs=100)
    plan, done = ((tmp_path / "pairs" / name) for name in ("plan.json", "_SUCCESS"))
    good = plan.read_bytes(), done.read_bytes()

    def both() -> None:
        assert plan_in(place / "pairs", LAYOUTS["pairs"]) == require(place, "pairs", "digits")
        Stage(place, "pairs", PLAN).begin(quiet=True)

    tried(
        "plan.json",
        in_workspace(tmp_path, "pairs/plan.json", both),
        drawn("plan", 300, lambda rng: mutated_json(PLAN, rng)),
        writes=True,
    )
    plan.write_bytes(good[0])
    marker = json.loads(good[1])
    tried(
        "_SUCCESS",
        in_workspace(tmp_path, "pairs/_SUCCESS", both),
        drawn("done", 300, lambda rng: mutated_json(marker, rng)),
        writes=True,
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with everything that the report reads."""
    path = tmp_path_factory.mktemp("untrusted") / "ws"
    place, recipe = Folder(str(path)), RECIPES["digits"](0)
    images = {"count": 1797, "resolution": 8, "channels": 1, "num_classes": 10, "source": "digits"}
    finished(place, "images", {"images": images}, {}, images=1797)
    log = b'{"step": 9, "loss": 0.5, "seconds": 7}\n{"step": 10, "loss": 0.4, "seconds": 8}'
    config = json.dumps({"about": {"imported": {"file": "x", "sha256": "y"}}}).encode()
    finished(place, "teacher", {"teacher": {}}, {"train.jsonl": log, "config.json": config}, images_seen=900)
    trained(place, "lmm", recipe.students["lmm"])
    measure(place, "teacher", TEACHER_WAYS[:1])
    measure(place, "students/lmm", [ONE, TWO, FRESH])
    with_pairs(place, device_seconds={"CPU": 3.0})
    with_sweep(place)
    return path


REPORTED = (
    *(f"evaluation/{model}/metrics.json" for model in ("teacher", "students/lmm")),
    *(f"students/lmm/{name}" for name in ("config.json", "plan.json", "train.jsonl")),
    *(f"teacher/{name}" for name in ("config.json", "train.jsonl", "_SUCCESS")),
    *(f"{folder}/{name}" for folder in ("pairs", "sweeps/sot") for name in ("plan.json", "_SUCCESS")),
    *("images/plan.json", "evaluation/students/lmm/_SUCCESS"),
)


def changed(data: bytes, name: str, rng: random.Random) -> bytes:
    if not name.endswith(".jsonl"):
        return mutated_json(json.loads(data), rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(json.loads(lines[at]), rng)
    return b"\n".join(lines)


@pytest.mark.parametrize("name", REPORTED)
def test_what_the_report_reads(workspace: Path, name: str) -> None:
    """Every reader for every case; the whole page for some."""
    place, file = Folder(str(workspace)), workspace / name
    good = file.read_bytes()

    def read_all() -> None:
        found = models.measured_models(place)
        cost.stages(place, found)
        pairs = cost.pairs_cost(place)
        _ = pairs and pairs.sentences(1)
        models.disagreements(found)
        training.trainings(place, found)
        provenance.plans(place, found)
        provenance.measurements(place, found)
        provenance.facts(place, found[0])

    def whole_page() -> None:
        report(str(workspace), "digits")

    try:
        cases = drawn(name, 25, lambda rng: changed(good, name, rng))
        counts = outcomes(in_workspace(workspace, name, read_all), cases, writes=True)
        cases = drawn(f"page {name}", 1, lambda rng: changed(good, name, rng))
        counts += outcomes(in_workspace(workspace, name, whole_page), cases, writes=True, memory=1 << 30)
        print(f"report, {name}: {dict(counts)}")
    finally:
        file.write_bytes(good)


def test_sheets(workspace: Path) -> None:
    file = workspace / "evaluation/teacher/samples.png"
    good = file.read_bytes()
    call = in_workspace(workspace, "evaluation/teacher/samples.png", lambda: report(str(workspace), "digits"))
    try:
        tried("samples.png", call, drawn("sheets", 3, lambda rng: mutated(good, rng)), writes=True, memory=1 << 30)
    finally:
        file.write_bytes(good)
