"""How GPUs compute: the same flags in training, sampling and measuring, set once at the start of each process.

PyTorch computes float32 convolutions in TF32 by default (10 bits of mantissa) and may choose other algorithms from run to
run. Beeline promises that "fp32" is float32, that a resumed run ends with the same bits, and that pairs are made again
byte for byte. Speed comes from bf16 and fp16, which are settings. `python -m benchmarks.device` measures what this costs.
"""

from __future__ import annotations

import os

import torch


def set_numerics() -> None:
    """Set this process's flags: float32 without TF32, float32 sums in half-precision products, deterministic algorithms.

    Call it before the first CUDA operation. On a machine without CUDA nothing changes. An operation that has no deterministic
    algorithm raises PyTorch's RuntimeError, which names it; to warn instead would make attention's gradient differ from run
    to run.
    """
    if not torch.cuda.is_available():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
