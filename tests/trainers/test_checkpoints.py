"""Checkpoints: any flipped bit is noticed, older ones are used instead, a GPU's load without a GPU, memory is freed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beeline.errors import StorageError
from pipeline.storage import Folder
from trainers import checkpoints, loop
from trainers.log import read_log

FLIPS = int(os.environ.get("BEELINE_FLIPS", "300"))  # bits that are flipped in each test of them


class Model:
    """A task whose state is a tensor and a record of its steps."""

    name, images_per_step, iterations, phase_ends = "model", 1, 6, (6,)

    def __init__(self, session: loop.Session, key: str = "weight") -> None:
        self.session, self.key = session, key
        self.weight = torch.zeros(3)

    def step(self, step: int) -> dict[str, float]:
        assert self.session.restored is None  # its memory is free
        self.weight += step
        return {"loss": 1.0, "skipped": 0.0}

    def validate(self, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> loop.State:
        return {"model": {self.key: self.weight}, "more": [1, 2.5, "text", None]}

    def load_state_dict(self, state: loop.State) -> None:
        self.weight.copy_(state["model"][self.key])

    def publish(self) -> None: ...


CADENCE = loop.Cadence(log_every=1, checkpoint_every=1, keep=3)


def trained(folder: Folder, key: str = "weight") -> list[Model]:
    """Train from the existing state; return the tasks that were built."""
    built: list[Model] = []

    def build(session: loop.Session) -> Model:
        built.append(Model(session, key))
        return built[-1]

    session = loop.Session(folder=folder)
    assert loop.train(build, session, CADENCE, lambda refused: checkpoints.newest(folder, refused))
    return built


def place(folder: Folder, step: int) -> Path:
    return Path(folder.uri) / "checkpoints" / f"step-{step:08d}"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A finished run with checkpoints of steps 3, 4 and 5."""
    folder = Folder(str(tmp_path))
    trained(folder)
    assert checkpoints.steps(folder) == [3, 4, 5]
    return folder


def test_every_flipped_bit_of_a_checkpoint_is_noticed(folder: Folder) -> None:
    """Includes the index. The checkpoint read equals the one written, or an older one is used."""
    files = sorted(place(folder, 5).iterdir())
    assert [path.name for path in files] == ["index.json", "loop.pt", "model.pt", "more.pt"]
    whole = checkpoints.load(folder, 5)
    chance = np.random.default_rng(0)
    for _ in range(FLIPS):
        path = files[chance.integers(len(files))]
        kept = path.read_bytes()
        data = bytearray(kept)
        data[chance.integers(len(data))] ^= 1 << chance.integers(8)
        path.write_bytes(data)
        found = checkpoints.newest(folder)
        path.write_bytes(kept)
        assert found is not None
        if found[0] == 5:  # white space of the index
            assert path.name == "index.json"
            assert found[1].keys() == whole.keys()
            assert torch.equal(found[1]["model"]["weight"], whole["model"]["weight"])
        else:
            assert found[0] == 4


def forge(folder: Folder, step: int, name: str, data: bytes) -> None:
    """Put another part into a checkpoint, and its digest into the index."""
    (place(folder, step) / name).write_bytes(data)
    index = json.loads((place(folder, step) / "index.json").read_text())
    index["sha256"][name] = hashlib.sha256(data).hexdigest()
    (place(folder, step) / "index.json").write_text(json.dumps(index))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (place(f, 5) / "model.pt").write_bytes(b"PK"), "model.pt has SHA-256"),
        (lambda f: (place(f, 5) / "model.pt").unlink(), "model.pt"),
        (lambda f: (place(f, 5) / "index.json").write_bytes(b"[]"), "is damaged"),
        (lambda f: (place(f, 5) / "index.json").write_bytes(b'{"step": 4, "sha256": {}}'), "is of step 4"),
        (lambda f: forge(f, 5, "model.pt", b"no archive"), "is damaged"),
        (lambda f: forge(f, 5, "model.pt", saved({"model": 1})[:-40]), "is damaged"),
        (lambda f: forge(f, 5, "model.pt", saved({"bias": torch.zeros(3)})), "of another task (KeyError: 'weight')"),
        (lambda f: forge(f, 5, "model.pt", saved({"weight": torch.zeros(4)})), "of another task (RuntimeError"),
        (lambda f: forge(f, 5, "loop.pt", saved({"step": 5})), "of another task (ValueError: it lacks 'done')"),
        (lambda f: forge(f, 5, "loop.pt", saved(None)), "of another task (ValueError: it is None; expected an object)"),
    ],
)
def test_what_does_not_fit_is_said_and_the_one_before_is_taken(
    folder: Folder, damage: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    capsys.readouterr()
    tasks = trained(folder)
    output = capsys.readouterr().out
    assert said in output
    assert "step-00000005" in output
    assert "model: resumed at step 4 of 6" in output
    assert tasks[-1].weight.tolist() == [15.0] * 3  # 0 + 1 + ... + 5, each once


def test_without_any_that_fits_training_starts_anew(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    tasks = trained(folder, key="other")
    output = capsys.readouterr().out
    assert output.count("of another task") == 3
    assert "resumed" not in output
    assert len(tasks) == 4
    assert tasks[-1].weight.tolist() == [15.0] * 3


def test_strangers_and_a_cut_log_do_not_stop_a_run(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(folder.uri)
    for name in ("step-0000000x", "step-4", ".ipynb_checkpoints", "step-", "best", "step-²"):
        (root / "checkpoints" / name).mkdir()
        (root / "checkpoints" / name / "index.json").write_text("{}")
    (root / "checkpoints" / "notes.txt").write_text("mine")
    (place(folder, 3) / "a folder").mkdir()
    log = (root / "train.jsonl").read_bytes()
    (root / "train.jsonl").write_bytes(log[: log.index(b'"step": 4') + 20])
    assert checkpoints.steps(folder) == [3, 4, 5]
    capsys.readouterr()
    tasks = trained(folder)
    assert "train.jsonl is damaged after row 3" in capsys.readouterr().out
    assert tasks[-1].weight.tolist() == [15.0] * 3
    assert [row["step"] for row in read_log(folder)] == [1, 2, 3, 6]


def of_a_gpu(state: Any) -> bytes:
    """Build a file as `torch.save` writes tensors on cuda:0; the storages' location is a word of the pickle."""
    source, target = zipfile.ZipFile(io.BytesIO(saved(state))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for entry in source.namelist():
            data = source.read(entry)
            if entry.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            archive.writestr(entry, data)
    return target.getvalue()


def test_a_gpus_checkpoint_is_read_into_main_memory(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    data = of_a_gpu({"weight": torch.full((3,), 10.0)})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(io.BytesIO(data), weights_only=True)
    forge(folder, 5, "model.pt", data)
    assert checkpoints.load(folder, 5)["model"]["weight"].device == torch.device("cpu")
    capsys.readouterr()
    tasks = trained(folder)
    assert "model: resumed at step 5 of 6" in capsys.readouterr().out
    assert tasks[-1].weight.tolist() == [15.0] * 3


def test_a_restored_state_is_released_before_the_first_step(folder: Folder) -> None:
    """The state is several times the size of the model."""
    alive: list[bool] = []

    class Large(Model):
        def load_state_dict(self, state: loop.State) -> None:
            self.given = weakref.ref(state["model"][self.key])
            super().load_state_dict(state)

        def step(self, step: int) -> dict[str, float]:
            alive.append(self.given() is not None)
            return super().step(step)

    session = loop.Session(folder=folder)
    assert loop.train(Large, session, CADENCE, lambda refused: checkpoints.newest(folder, refused))
    assert alive == [False]


def test_a_folder_that_cannot_be_read_is_no_damage(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a bucket that does not answer would cost the work since the previous checkpoint."""

    def unreachable(self: Folder, name: str) -> bytes:
        raise StorageError(f"{name} cannot be read: no answer")

    monkeypatch.setattr(Folder, "read", unreachable)
    with pytest.raises(StorageError, match="no answer"):
        checkpoints.newest(folder)
