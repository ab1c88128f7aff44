"""torchvision with a CPU build of torch: makes it importable, as timm and lpips require.

torchvision's wheel on PyPI is a CUDA build. With a CPU build of torch, its compiled part does not load, and the import fails
with "operator torchvision::nms does not exist", because torchvision describes two of its operators to torch without checking
that they exist. Declaring those two, without an implementation, makes the import work; the networks from timm and lpips that we
use call neither. If torch and torchvision match, nothing is declared, because a second declaration would keep torchvision's
own from loading.
"""

from __future__ import annotations

import torch

from beeline.errors import BeelineError

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> None:
    """Import torchvision, declaring `torchvision::nms` and `torchvision::qnms` first if they are missing.

    Call it before timm or lpips is imported; a second call does nothing. Raises BeelineError if torchvision is not installed.
    """
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise BeelineError("torchvision is not installed; install the release that goes with this torch") from None
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", SCHEMA)
        import torchvision  # noqa: F401
