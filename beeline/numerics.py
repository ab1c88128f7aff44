"""Numerical flags for GPUs: the same in training, sampling and measuring, set once at the start of each process.

By default PyTorch computes float32 convolutions in TF32 (10 bits of mantissa) and may choose other algorithms in every run.
Beeline promises that "fp32" is float32, that a resumed run ends with the same bits, and that pairs can be made again byte for
byte. Speed comes from the settings bf16 and fp16. `python -m benchmarks.device` measures the cost of these flags.
"""

from __future__ import annotations

import os

import torch


def set_numerics() -> None:
    """Set this process's flags: float32 without TF32, float32 sums in half-precision products, deterministic algorithms.

    Call it before the first CUDA operation. Without CUDA it does nothing. An operation without a deterministic algorithm raises
    PyTorch's RuntimeError, which names it. A mere warning would let the gradient of attention differ between runs.
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
    # This debugging aid costs a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
