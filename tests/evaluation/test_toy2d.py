"""The command of the 2-D flows: figures, numbers and table of a small run, and its message for a wrong option."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT
from PIL import Image

from beeline.errors import BeelineError
from evaluation import toy2d

SMALL = [
    "--toy.distributions", "two_moons", "checkerboard",
    "--toy.repeats", "2",
    "--toy.iterations", "3",
    "--toy.ot-batches", "16",
    "--toy.pairs", "64",
    "--toy.steps", "10",
    "--toy.points", "60",
    "--ot.dims", "1", "2", "8",
    "--ot.batches", "4", "16", "64",
    "--ot.points", "64",
]  # fmt: skip
METHODS = ["EDM", "CFM", "BOT-CFM 16", "1-RF", "2-RF", "LMM"]


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "new" / "toy2d"
    command = [sys.executable, "evaluation/toy2d.py", "--out", str(out), *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["flows.png", "ot_batch.png", "toy2d.json"]
    for picture in ("flows.png", "ot_batch.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**20) or ()) > 8  # not blank
    found = json.loads((out / "toy2d.json").read_text())
    assert list(found["flows"]) == ["data", *METHODS]
    straight = found["flows"]["LMM"]["straightness"]
    assert list(straight) == ["two_moons", "checkerboard", "all"]
    assert straight["all"]["mean"] == pytest.approx((straight["two_moons"]["mean"] + straight["checkerboard"]["mean"]) / 2)
    assert all(math.isfinite(v["all"]["std"]) for name in METHODS for v in found["flows"][name].values())
    assert found["toy"]["iterations"] == 3
    assert len(found["pairing"]) == 9
    for name in METHODS:
        assert f"\n{name}" in done.stdout
    assert f"{straight['all']['mean']:.4f} ± {straight['all']['std']:.4f}" in done.stdout


def fail(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["evaluation/toy2d.py", *arguments])
    with pytest.raises((SystemExit, BeelineError)) as ended:
        toy2d.main()
    if isinstance(ended.value, BeelineError):
        return 1, str(ended.value)
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--toy.iterations", "0"], "--toy.iterations is 0; expected a whole number from 1 to 1,000,000,000"),
        (["--toy.lr", "nan"], "--toy.lr is nan; expected a number above 0"),
        (["--toy.ot-batches", "4", "100"], "--toy.ot-batches is (4, 100); expected sizes that divide pairs, 8192"),
        (["--ot.batches", "64", "8"], "--ot.batches is (64, 8); expected rising batch sizes"),
        (["--seed", "-1"], "--seed is -1; expected a whole number from 0"),
        (["--threads", "0"], "--threads is 0; expected a whole number from 1"),
    ],
)
def test_a_setting_that_cannot_be(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    status, error = fail([*arguments, "--out", str(tmp_path / "out")], monkeypatch, capsys)
    assert status == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, error = fail(["--no-such-option", "1"], monkeypatch, capsys)
    assert status == 2
    assert "no-such-option" in error


def test_a_distribution_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, error = fail(["--toy.distributions", "spiral"], monkeypatch, capsys)
    assert status == 2
    assert "eight_gaussians" in error


def test_a_file_in_the_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    status, error = fail(["--out", str(tmp_path / "file" / "out")], monkeypatch, capsys)
    assert status == 1
    assert "choose another --out" in error
