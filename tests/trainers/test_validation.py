"""A validation's figures: recall shows a student that has collapsed."""

from __future__ import annotations

from pathlib import Path

import pytest
import small
import torch

from pipeline.model_folders import require_model
from pipeline.storage import Folder
from trainers import validation
from trainers.validation import Validation

COUNT = 48
CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    return small.workspace(tmp_path / "ws")


def test_a_collapsed_student_has_no_recall(place: Folder) -> None:
    """Its images are all alike: the last layer is 0, and what is left of the noise is far below a grey level."""
    model, _ = require_model(place, "students/lmm", "digits")
    last = model.model.last_layer
    assert isinstance(last, torch.Tensor)
    last.data.zero_()
    figures, _ = Validation(place, "digits", small.plans(place)["images"], count=COUNT, seed=0, device=CPU).judge(model)
    assert figures["recall_probe_losses"] < 0.05
    assert figures["fd_probe_losses"] > 0.01


def test_images_like_the_real_ones_have_all_of_it(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Validation(place, "digits", small.plans(place)["images"], count=COUNT, seed=0, device=CPU)
    rows = validation.ShardReader(place / "images", small.plans(place)["images"]["images"], 0).batch(0, COUNT)
    real = torch.from_numpy(rows["image"]).float() / 127.5 - 1
    monkeypatch.setattr(validation, "draw", lambda *_, **__: real)
    model, _ = require_model(place, "students/lmm", "digits")
    figures, _ = judge.judge(model)
    assert figures["precision_probe_losses"] == figures["recall_probe_losses"] == 1
    assert figures["fd_probe_losses"] == pytest.approx(0, abs=1e-3)
