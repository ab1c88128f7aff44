"""Places that can hold files are accepted, others are refused with one line, and passwords are never repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

from beeline.errors import BeelineError
from beeline.files.places import holds_credentials, local_path, resolve


@pytest.mark.parametrize(
    ("place", "resolved"),
    [
        ("/data/x/", "/data/x"),
        ("x/y", f"{os.getcwd()}/x/y"),
        ("a:b/c", f"{os.getcwd()}/a:b/c"),
        ("file:///data/my%20images", "/data/my images"),
        ("file:/data", "/data"),
        ("file://localhost/data", "/data"),
        ("~/x", "/home/somebody/x"),
        ("~", "/home/somebody"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://my-bucket.example", "s3://my-bucket.example"),
    ],
)
def test_places(place: str, resolved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert resolve(place) == resolved
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("~nobody-of-that-name/x", "no such user"),
        ("file://server/share", "write file:///folder"),
        ("s3:/x", "expected s3://bucket/prefix"),
        ("s3://", "expected s3://bucket/prefix"),
        ("s3:///x", "expected s3://bucket/prefix"),
        ("S3://bucket/x", "expected s3://bucket/prefix, in lower case"),
        ("gs://bucket/x", "pip install gcsfs"),
        ("az://container/x", "pip install adlfs"),
        ("hf://datasets/a/b", "would be a commit"),
        ("memory://x", "its own memory"),
        ("foo://x", "cannot hold files"),
        ("https://host/x", "cannot hold files"),
        ("simplecache::s3://bucket/x", "a chain of file systems"),
    ],
)
def test_what_is_no_place(place: str, said: str) -> None:
    with pytest.raises(BeelineError) as caught:
        resolve(place)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://key:topsecret@bucket/x",
        "s3://key:top/secret@bucket/x",
        "simplecache::s3://key:topsecret@bucket/x",
        "postgresql+psycopg2://user:topsecret@host:5432/mlflow",
        "--workspace=s3://topsecret@bucket",
    ],
)
def test_credentials_are_seen_and_not_repeated(text: str) -> None:
    assert holds_credentials(text)
    with pytest.raises(BeelineError) as caught:
        resolve(text)
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000",
        "http://host:5000/a@b",
        "sqlite:////data/a@b.db",
        "s3://bucket/a@b",
        "you@example.org",
        "file:///a@b",
    ],
)
def test_what_only_looks_like_credentials(text: str) -> None:
    assert not holds_credentials(text)


def test_commands_that_write_here_take_local_paths_alone(tmp_path: Path) -> None:
    assert local_path(f"file://{tmp_path}") == tmp_path
    with pytest.raises(BeelineError, match="in an object store; give a local path"):
        local_path("s3://bucket/weights")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "beeline.edm_import", "file.pkl", "--out", "s3://bucket/teacher"],
        ["-m", "beeline.calibrate", "gs://bucket/teacher"],
        ["pipeline/gen_pairs.py", "digits", "--workspace", "S3://bucket/x"],
        ["cluster/run_pipeline.py", "digits", "--workspace", "simplecache::s3://key:topsecret@bucket/x"],
    ],
    ids=lambda words: " ".join(words[-3:]),
)
def test_commands_refuse_them_in_one_line(arguments: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *(str(ROOT / word) if word.endswith(".py") else word for word in arguments)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "topsecret" not in done.stderr
    assert not list(tmp_path.iterdir())
