"""The documents say what is there: every error has its cure, every command is one that exists, every link leads somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, parse_command

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ERRORS = ("BeelineError", "SettingError", "StorageError", "_fail", "reading")


def messages() -> Iterator[tuple[str, str]]:
    """Where an error is raised, and its message, with … for what is filled in."""
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


def test_every_error_has_its_cure_and_every_cure_its_error() -> None:
    table = (ROOT / "docs/troubleshooting.md").read_text()
    lines = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    fragments = [part for line in lines for part in re.findall(r"`([^`]+)`", line)]
    found = dict(messages())
    own = {where: text for where, text in found.items() if re.search(r"[a-z]{4}", text)}  # others pass a message on
    without = {where: text for where, text in own.items() if not any(part in text for part in fragments)}
    assert not without
    unused = [part for part in fragments if not any(part in text for text in own.values())]
    assert not unused


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def commands(path: Path) -> list[list[str]]:
    """The commands in a document's indented or fenced blocks, and in its tables, as words: python ..., make ...; those behind
    `ray job submit` as well."""
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_and_take_their_options(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(path):
        if words[0] == "make":
            assert words[1] in targets
        elif "..." not in words:
            with monkeypatch.context() as patch:
                parse_command(words, patch)
