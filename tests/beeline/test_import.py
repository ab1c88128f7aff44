"""Importing every module of `beeline` loads neither Ray nor storage libraries."""

from __future__ import annotations

import subprocess
import sys

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
