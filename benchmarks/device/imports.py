"""Check that every module of `beeline` can be imported here."""

from __future__ import annotations

import importlib
import pkgutil

import beeline
from benchmarks.device.checks import Check, Checks, Outcome, Setting


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""

    def imported() -> Outcome:
        names = [module.name for module in pkgutil.walk_packages(beeline.__path__, "beeline.")]
        failed = {}
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        first = next((f"; {name}: {reason}" for name, reason in failed.items()), "")
        return Outcome(passed=not failed, figure=f"{len(names) - len(failed)} of {len(names)} modules{first}", details=failed)

    yield Check("modules of beeline", imported)
