"""Operations that repeat bit by bit, and the errors due to TF32 and determinism; speeds.py measures the speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from beeline.augmentation import diff_augment
from benchmarks.device.checks import Check, Checks, Outcome, Setting, Skip, identical, measured, relative, rms, set_flags
from benchmarks.device.sampling import Sampler

Operation = Callable[[torch.Tensor], torch.Tensor]
TIMES = 5


def attention(x: torch.Tensor) -> torch.Tensor:
    """Compute attention of queries, keys and values (3, B, heads, L, D)."""
    q, k, v = x.unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def operations(setting: Setting, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], Operation]]:
    """Return operations with the shapes of their inputs: those that training differentiates, at its networks' sizes."""
    device, batch = setting.device, 2 if setting.small else 32
    channels = 32 if setting.small else 256

    def module(made: nn.Module) -> nn.Module:
        return made.to(device, dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    conv = module(nn.Conv2d(channels, channels, 3, padding=1))
    down, up = module(nn.Conv2d(channels, channels, 4, 2, 1)), module(nn.ConvTranspose2d(channels, channels, 4, 4))
    norm, batch_norm = module(nn.GroupNorm(8, channels)), module(nn.BatchNorm2d(channels, track_running_stats=False))
    generator = torch.Generator(device)
    maps = (batch, channels, 16, 16)
    return {
        "3x3 convolution": (maps, conv),
        "4x4 convolution of stride 2": (maps, down),
        "transposed convolution": (maps, up),
        "group norm": (maps, norm),
        "batch norm": (maps, batch_norm),
        "attention": ((3, batch, 1, 256, channels), attention),
        "attention of 12 heads": ((3, batch, 12, 198, 64), attention),
        "bilinear resize": ((batch, 3, 32, 32), lambda x: F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)),
        "bilinear by two": (maps, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)),
        "nearest by two": (maps, lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest")),
        "max pooling": (maps, lambda x: F.max_pool2d(x, 2)),
        "DiffAugment": (
            (batch, 3, 32, 32),
            lambda x: diff_augment(x, ("color", "translation", "cutout"), generator.manual_seed(0)),
        ),
    }


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""

    def repeated(name: str, dtype: torch.dtype) -> Outcome:
        shape, call = operations(setting, dtype)[name]
        torch.manual_seed(0)
        x = torch.randn(shape, device=setting.device, dtype=dtype)
        module = call if isinstance(call, nn.Module) else None
        made = []
        for _ in range(TIMES):
            inputs = x.clone().requires_grad_()
            output = call(inputs)
            output.backward(torch.sin(torch.arange(output.numel(), device=x.device)).reshape(output.shape).to(output.dtype))
            parameters = [] if module is None else list(module.parameters())
            made.append([output.detach(), inputs.grad, *(p.grad for p in parameters)])
            for parameter in parameters:
                parameter.grad = None
        first = made[0]
        outcomes = [identical(again, first) for again in made[1:]]
        return next((outcome for outcome in outcomes if not outcome.passed), outcomes[0])

    for dtype in (torch.float32, torch.bfloat16):
        for name in operations(setting, dtype):
            kind = str(dtype).removeprefix("torch.")
            yield Check(f"{name} {kind}, forward and backward {TIMES} times", lambda n=name, d=dtype: repeated(n, d))

    def tf32_error(what: str) -> Outcome:
        if not setting.gpu:
            raise Skip("a CPU has no TF32")
        found = {}
        try:
            for tf32 in (False, True):
                set_flags(tf32=tf32, deterministic=True)
                found[tf32] = error(setting, what)
        finally:
            set_flags(tf32=False, deterministic=True)
        return measured(f"float32 {found[False]:.2g}, TF32 {found[True]:.2g}", float32=found[False], tf32=found[True])

    def images() -> Outcome:
        if not setting.gpu:
            raise Skip("a CPU has no TF32")
        sampler = Sampler(setting)
        exact = sampler.solved(sampler.prepared("fp32"))
        try:
            set_flags(tf32=True, deterministic=True)
            found = sampler.solved(sampler.prepared("fp32"))
        finally:
            set_flags(tf32=False, deterministic=True)
        return measured(f"{rms(found, exact):.2g}", rms=rms(found, exact))

    yield Check("relative error of a matrix product against float64", lambda: tf32_error("matmul"))
    yield Check("relative error of a convolution against float64", lambda: tf32_error("conv"))
    yield Check("RMS of heun's images in TF32 against float32", images)


def error(setting: Setting, what: str) -> float:
    """Compute the relative error of an operation against float64, under the current flags."""
    torch.manual_seed(0)
    if what == "matmul":
        a, b = (torch.randn(1024, 1024, device=setting.device) for _ in range(2))
        return relative([a @ b], [a.double() @ b.double()])
    x, w = torch.randn(8, 256, 16, 16, device=setting.device), torch.randn(256, 256, 3, 3, device=setting.device)
    return relative([F.conv2d(x, w, padding=1)], [F.conv2d(x.double(), w.double(), padding=1)])
