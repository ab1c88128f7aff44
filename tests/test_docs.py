"""The documents match the code: every message, command, path and link in them exists."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from harness import ROOT, parse_command

import beeline
from beeline.recipes import find
from pipeline.storage import Folder
from trainers import checkpoints, loop
from trainers.log import read_log
from trainers.student import student_training
from trainers.training import Training

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ERRORS = ("BeelineError", "SettingError", "StorageError", "_fail", "reading")


def messages() -> Iterator[tuple[str, str]]:
    """List the places where errors are raised, and their messages, with … for inserted values."""
    for folder in ("beeline", "pipeline", "evaluation", "trainers", "cluster"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
                    parts = node.args[:2] if getattr(node.func, "id", "") == "reading" else node.args[:1]
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", " (…); ".join(map(_text, parts))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def test_every_cure_is_of_a_message_that_exists() -> None:
    table = (ROOT / "docs/troubleshooting.md").read_text()
    lines = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    fragments = [part for line in lines for part in re.findall(r"`([^`]+)`", line)]
    texts = [text for _, text in messages()]
    assert fragments
    assert not [part for part in fragments if not any(part in text for text in texts)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#?)([^)]*)\)", path.read_text()):
        file = path.parent / target if target else path
        assert target.startswith("http") or file.exists(), target
        assert not anchor or target.startswith("http") or anchor in anchors(file), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(path: Path) -> None:
    folders = "beeline|pipeline|evaluation|trainers|cluster|benchmarks|tests|docs"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", path.read_text()):
        assert (ROOT / name).exists(), name


def commands(path: Path) -> list[list[str]]:
    """List the commands in a document's indented or fenced blocks, and in its tables, as words: python ..., make ...; also
    those in `ray job submit`."""
    text = path.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python [^`]+)`", text)
    found = []
    for line in lines:
        command = re.sub(r"^.* -- (?=python )", "", line.split("  #")[0].strip())
        if command.startswith(("python ", "make ")):
            found.append(shlex.split(command))
    return found


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the modules that documents show to a folder on Python's path."""
    for path in DOCUMENTS:
        for name, block in re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            (tmp_path / f"{name}.py").write_text(block)
            monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_and_take_their_options(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(path):
        if words[0] == "make":
            assert words[1] in targets
        elif "..." not in words:
            with monkeypatch.context() as patch:
                parse_command(words, patch)


@pytest.mark.usefixtures("modules")
def test_the_method_of_the_documentation_trains_and_resumes(tmp_path: Path) -> None:
    place, recipe = small.workspace(tmp_path / "ws"), find("mine:recipe", 3)
    assert list(recipe.students) == ["lmm", "l2", "sot", "consistency"]
    student = recipe.students["consistency"]
    phases = {name: replace(phase, iterations=6) for name, phase in student.phases.items()}
    student, cadence = replace(student, batch_size=8, phases=phases), loop.Cadence(log_every=1, checkpoint_every=2, keep=9)

    def train(name: str, restored: loop.State | None = None) -> Training:
        session = loop.Session(folder=Folder(str(tmp_path / name)), restored=restored)
        task = student_training(session=session, workspace=place, recipe="mine:recipe", config=student, **small.plans(place))
        assert loop.run(task, session, cadence)
        return task

    first = train("first")
    assert all(row["consistency"] > 0 for row in read_log(first.folder))
    model = beeline.load(tmp_path / "first")
    assert model.few_step is not None
    assert (model.few_step.rule, model.few_step.trained_steps) == ("fresh_noise", None)
    assert beeline.generate(model, 2, labels=torch.tensor([0, 1]), steps=(0, 8)).shape == (2, 1, 8, 8)
    for step in (2, 4):
        again = train(f"from-{step}", checkpoints.load(first.folder, step))
        for ours, theirs in ((again.averages[0], first.averages[0]), (again.state, first.state)):
            assert ours is not None
            assert theirs is not None
            assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
