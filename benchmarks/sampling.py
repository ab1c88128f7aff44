"""Sampling speed of each policy (beeline/sampling/inference.py) against a plain baseline, and the error in the images.

    python -m benchmarks.sampling                                  # EDM's CIFAR-10 network, random weights
    python -m benchmarks.sampling --model runs/digits/teacher      # a trained network, for the true error of low precision

The baseline is the network as in EDM's code: eager, float32, NCHW, attention by einsum. Errors are those of images
after 18 Heun steps against float64 throughout, as RMS and as the share of changed uint8 pixels, with their tail.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import beeline
from beeline.checkpoint import build
from beeline.config import NetworkConfig
from beeline.denoiser import Denoiser
from beeline.networks.layers import UNetBlock
from beeline.sampling.inference import DTYPES, prepare
from beeline.sampling.solvers import solve
from beeline.schedule import edm_sigmas
from benchmarks.machine import ceilings, describe, describe_model, timed, write

Policy = Callable[[], Denoiser]
CIFAR10 = NetworkConfig(
    kind="ddpmpp", img_resolution=32, img_channels=3, label_dim=10, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
    attn_resolutions=(16,),
)  # fmt: skip


class PlainBlock(UNetBlock):
    """A U-Net block with explicit attention, as in EDM's code base."""

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(x).reshape(batch * self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(dim=2)
        return torch.einsum("nqk,nck->ncq", scores, v).reshape(x.shape)


def plain(model: Denoiser) -> Denoiser:
    """Return a copy that runs like the baseline."""
    baseline = copy.deepcopy(model)
    for module in baseline.modules():
        if isinstance(module, UNetBlock):
            module.__class__ = PlainBlock
    return baseline


def exact(model: Denoiser, noise: torch.Tensor, labels: torch.Tensor | None, num_steps: int) -> torch.Tensor:
    """Sample by Heun with network, preconditioning and state in float64."""
    network, sd = copy.deepcopy(model.model).double(), model.sigma_data
    one_hot = None if labels is None else torch.nn.functional.one_hot(labels, model.label_dim).double()
    sigmas = [*edm_sigmas(num_steps).tolist(), 0.0]
    x = noise.double() * sigmas[0]

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        total = (sigma**2 + sd**2) ** 0.5
        level = torch.full((len(x),), sigma, dtype=torch.float64, device=x.device).log() / 4
        denoised = sd**2 / total**2 * x + sigma * sd / total * network(x / total, level, one_hot)
        return (x - denoised) / sigma

    for sigma, following in itertools.pairwise(sigmas):
        d = slope(x, sigma)
        ahead = x + (following - sigma) * d
        if following > 0:
            ahead = x + (following - sigma) * (d + slope(ahead, following)) / 2
        x = ahead
    return x


def quantized(images: torch.Tensor) -> torch.Tensor:
    """Quantise to the uint8 values that would be saved, as signed integers for differences."""
    return (images.double() * 127.5 + 128).clamp(0, 255).floor().to(torch.int16)


def errors(images: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Compare with the float64 reference: RMS, the worst pixel, the share of changed uint8 pixels and the largest change."""
    difference = (images.double() - reference).abs()
    levels = (quantized(images) - quantized(reference)).abs()
    return {
        "rms": float((difference**2).mean().sqrt()),
        "max": float(difference.max()),
        "pixels_changed": float((levels > 0).double().mean()),
        "pixels_changed_by_more_than_1": float((levels > 1).double().mean()),
        "max_levels": int(levels.max()),
    }


def parsed() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description="Sampling speed by policy.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a teacher; default: EDM's CIFAR-10 network with random weights")
    parser.add_argument("--batch-size", type=int, default=0, help="0 means 8 on a CPU, 256 on a GPU")
    parser.add_argument("--images", type=int, default=0, help="images whose error is measured; 0 means 4 on a CPU, 64 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results")
    return parser.parse_args()


def load(folder: Path | None, device: torch.device) -> Denoiser:
    """The teacher in `folder`, or EDM's CIFAR-10 network with random weights."""
    if folder:
        return beeline.load(folder).to(device)
    model = build(CIFAR10).eval().requires_grad_(False)
    for parameter in model.parameters():  # the zero initialisation of the output layers would hide errors
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.to(device)


def policies_of(model: Denoiser, precisions: Sequence[str], batch_size: int, *, compiling: bool) -> dict[str, Policy]:
    """The ways to run `model`, by name."""
    policies: dict[str, Policy] = {"plain": lambda: plain(model)}
    for precision, compiled in itertools.product(precisions, (False, True) if compiling else (False,)):
        name = f"{precision}{' compiled' if compiled else ''}"
        policies[name] = lambda p=precision, c=compiled: prepare(model, precision=p, compiled=c, batch_size=batch_size)  # pyright: ignore[reportArgumentType]
    return policies


def main() -> None:
    """Measure every policy and write the JSON file."""
    arguments = parsed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    batch_size, count = arguments.batch_size or (256 if gpu else 8), arguments.images or (64 if gpu else 4)
    torch.manual_seed(0)
    model = load(arguments.model, device)
    precisions = ["fp32", "bf16", *(["fp16"] if gpu else [])]
    policies = policies_of(model, precisions, batch_size, compiling=not arguments.no_compile)

    def classes(number: int) -> torch.Tensor | None:
        return torch.arange(number, device=device) % model.label_dim if model.label_dim else None

    x, noise = (torch.randn(number, *model.image_shape, device=device) for number in (batch_size, count))
    sigma, labels, few = torch.full((batch_size,), 1.0, device=device), classes(batch_size), classes(count)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model(x[:1], sigma[:1], classes(1))
        flops = counter.get_total_flops()
        ceiling = ceilings(device, {name: DTYPES[name] for name in precisions})
        shown = ", ".join(f"{key} {value / 1e12:.2f}" for key, value in ceiling.items())
        print(f"{flops / 1e9:.1f} GFLOP per evaluation; ceilings in TFLOP/s: {shown}")
        reference = exact(model, noise, few, 18)
        for name, make in policies.items():
            start = time.perf_counter()
            policy = make()
            calls[name] = lambda policy=policy: policy(x, sigma, labels)
            calls[name]()
            first = time.perf_counter() - start
            images = [
                solve(policy, part, None if few is None else few[k * batch_size :][: len(part)], solver="heun", num_steps=18)
                for k, part in enumerate(noise.split(batch_size))
            ]
            rows[name] = {"first_call_s": round(first, 1), "error": errors(torch.cat(images), reference)}
            print(f"{name}: first call {first:.1f} s, {rows[name]['error']}", flush=True)
        seconds = timed(calls, device, arguments.rounds)
    for name, row in rows.items():
        rate = batch_size / seconds[name]
        share = rate * flops / ceiling["fp32" if name == "plain" else name.split()[0]]
        row |= {"evaluations_per_s": rate, "images_per_s_heun18": rate / 35, "against_plain": seconds["plain"] / seconds[name]}
        row |= {"share_of_ceiling": share}
        print(f"{name}: {rate:,.1f} evaluations/s, {row['against_plain']:.2f}x plain, {share:.0%} of ceiling")
    result = {
        "machine": describe(device), "model": describe_model(model, arguments.model), "batch_size": batch_size,
        "images_for_error": count, "gflop_per_evaluation": flops / 1e9,
        "ceilings_tflops": {name: value / 1e12 for name, value in ceiling.items()}, "policies": rows,
    }  # fmt: skip
    kind = arguments.model.parent.name if arguments.model else "cifar10"
    write(f"sampling-{'gpu' if gpu else 'cpu'}-{kind}", result, arguments.out)


if __name__ == "__main__":
    main()
