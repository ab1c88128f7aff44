"""References for tests of training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import TINY_LMM, TWO_RANKS, Run


@pytest.fixture(scope="session")
def undisturbed(run: Run, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a student that two ranks have trained through both phases without disturbance."""
    workspace = tmp_path_factory.mktemp("undisturbed") / "ws"
    shutil.copytree(trained, workspace)
    run("trainers/train_lmm.py", "digits", "--workspace", workspace, *TINY_LMM, *TWO_RANKS)
    return workspace
