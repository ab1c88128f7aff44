"""Write report.html of a workspace: one self-contained page that opens without a network.

    python evaluation/report.py digits

The page shows what the workspace holds and leaves out what it lacks; a teacher and one student are enough. The sections are
in evaluation/page/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import tyro

from beeline.errors import BeelineError
from beeline.files.names import EVALUATION, TEACHER
from evaluation.models import measured_models
from evaluation.page.render import render
from pipeline.command import run_command
from pipeline.stage import require
from pipeline.storage import Folder

REPORT = "report.html"


def report(workspace: str, recipe: tyro.conf.Suppress[str]) -> None:
    """Write <workspace>/report.html.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    require(place, f"{EVALUATION}/{TEACHER}", recipe)
    models = measured_models(place)
    if len(models) == 1:
        raise BeelineError(
            f"no student is measured in {place}; do that with: python evaluation/evaluate.py {recipe} "
            f"--workspace {place} --model students/lmm"
        )
    page = render(place, recipe, models)
    place.write(REPORT, page.encode())
    print(f"report: {place}/{REPORT} ({len(page) / 1e6:.1f} MB)", flush=True)


if __name__ == "__main__":
    run_command(report)
