"""Command line: python -m benchmarks.device."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import benchmarks.device
from benchmarks.device.checks import Setting
from benchmarks.device.runner import Row, Work, run_lanes, wanted
from benchmarks.machine import RESULTS, describe

# Lists of sections. Lists run at the same time, each in its own process; the sections that measure speed run afterwards.
LANES = (
    ("compiling",),
    ("memory",),
    ("training",),
    ("sampling", "solver", "straightness"),
    ("imports", "models", "teacher", "measuring", "numerics"),
)
ALONE = ("speeds",)
CHECKED = tuple(itertools.chain.from_iterable(LANES))
SECTIONS = CHECKED + ALONE
CHECKING = 0.6  # share of the budget after which speed measurements begin


def parsed() -> argparse.Namespace:
    """Parse the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=benchmarks.device.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "device.json", help="JSON file; results go into the same folder")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"{', '.join(SECTIONS)}, or words in the names of checks"
    )
    parser.add_argument("--budget", type=float, default=540, help="total seconds, after which checks are skipped")
    parser.add_argument("--small", action="store_true", help="tiny networks and batches")
    parser.add_argument("--no-compile", action="store_true", help="skip checks of compiled code")
    return parser.parse_args()


def main() -> None:
    """Run the checks, print a line for each, write the JSON file; exit with status 1 if one failed."""
    arguments, start = parsed(), time.time()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lanes' processes end as well
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device is cuda, but PyTorch finds no GPU; install a CUDA build, or pass --device cpu --small")
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    memory: dict[str, float] = {}
    result: dict[str, Any] = {"machine": describe(device), "small": arguments.small, "peak_mib": memory}

    def report(row: Row) -> None:
        rows.append(row)
        print(row.line(), flush=True)
        save()

    def save() -> None:
        checks = [dataclasses.asdict(row) for row in rows]
        text = json.dumps(result | {"seconds": round(time.time() - start, 1), "checks": checks}, indent=2)
        out.with_suffix(".tmp").write_text(text + "\n")
        out.with_suffix(".tmp").replace(out)

    print(f"machine: {', '.join(f'{key} {value}' for key, value in result['machine'].items())}", flush=True)
    setting = Setting(device=device, small=arguments.small, folder=str(out.parent), compiling=not arguments.no_compile)
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)

    def tasks(lanes: tuple[tuple[str, ...], ...], deadline: float) -> list[Work]:
        chosen = [tuple(name for name in lane if needed(name, arguments.only)) for lane in lanes]
        threads = 1 if arguments.small else max(1, len(os.sched_getaffinity(0)) // len(lanes))
        common: dict[str, Any] = {"setting": setting, "only": tuple(arguments.only), "done": frozenset(), "log": str(log)}
        return [Work(sections=lane, deadline=deadline, threads=threads, **common) for lane in chosen if lane]

    speeds_wanted = needed(ALONE[0], arguments.only)
    share = CHECKING if speeds_wanted else 1.0
    lanes = LANES if device.type == "cuda" else (CHECKED,)
    run_lanes(tasks(lanes, start + share * arguments.budget), report, memory)
    run_lanes(tasks((ALONE,), start + arguments.budget), report, memory)
    for section, peak in memory.items():
        print(f"peak GPU memory of {section}: {peak:,.0f} MiB")
    count = {status: sum(row.status == status for row in rows) for status in ("PASS", "FAIL", "SKIP")}
    for row in rows:
        if row.status == "FAIL":
            print(row.line())
    save()
    print(f"{time.time() - start:.0f} s: {count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped; {out}")
    sys.exit(1 if count["FAIL"] or not count["PASS"] else 0)


def needed(section: str, only: list[str]) -> bool:
    """Return whether a section may have requested checks: words that name no section may occur in any."""
    return wanted(section, "", only) or any(word not in SECTIONS for word in only)


if __name__ == "__main__":
    main()
