"""Importing every module of `beeline` loads neither Ray nor storage libraries."""

from __future__ import annotations

import subprocess
import sys
import tomllib

from harness import ROOT

CODE = """
import importlib, pkgutil, sys
import beeline
names = [module.name for module in pkgutil.walk_packages(beeline.__path__, "beeline.")]
assert "beeline.sampling.solvers" in names and "beeline.networks.layers" in names, names
for name in names:
    importlib.import_module(name)
print(*sorted({"ray", "fsspec", "s3fs", "boto3", "pyarrow", "tyro"} & sys.modules.keys()))
"""


def test_importing_every_module_loads_neither_ray_nor_storage() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_all_packages_are_installed() -> None:
    """`pip install .` copies the packages that pyproject.toml lists; the tests' own environment reads the checkout."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = ("beeline", "pipeline", "evaluation", "trainers", "cluster")
    found = [path.parent.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("__init__.py")]
    assert set(listed) == {".".join(path.parts) for path in found}
