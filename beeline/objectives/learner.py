"""A learning network and its optimiser. Objectives call it, trainers update it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from beeline.denoiser import Denoiser
from beeline.objectives.derivative import Derivative, rate
from beeline.objectives.optimizer import OptimizerConfig, learning_rate, make_optimizer

GRAD_NORM, SKIPPED = "grad_norm", "skipped"
"""Figures of an update: the norm of the gradients, and 1 for a step without an update because they are not finite."""


class Learner:
    """Wraps a network for objectives. A call runs `model` under autocast, through the wrapper that `parallel` returns.

    That wrapper averages gradients over ranks. The attribute `model` is the network itself.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        parallel: Callable[[nn.Module], nn.Module] = lambda model: model,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.model, self.config = model, config
        self.precision: Literal["fp32", "bf16"] = precision
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config)
        self._parallel = parallel(model)
        self._drops = isinstance(model, Denoiser) and model.network_config is not None and model.network_config.dropout > 0
        self._dropout: torch.Tensor | None = None  # state of the random generator at the last call

    def __call__(self, *inputs: Any) -> Any:
        """The network's output, with gradients for its parameters."""
        if self._drops:
            self._dropout = _random_state(self.parameters[0].device)
        with self.autocast():
            return self._parallel(*inputs)

    @torch.no_grad()
    def target(self, *inputs: Any, model: nn.Module | None = None) -> Any:
        """The network's output without gradients, under the dropout mask of the last call. `model`: its average, for example.

        Consistency models compare two outputs under one mask (Song et al. 2023, appendix C).
        """
        with self._mask(), self.autocast():
            return (model or self.model)(*inputs)

    def frozen(self, *inputs: Any) -> Any:
        """The network's output, with gradients for the inputs only."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        try:
            with self.autocast():
                return self.model(*inputs)
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    def rate(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None,
        velocity: torch.Tensor,
        *,
        to: torch.Tensor | None = None,
        derivative: Derivative = "difference",
        value: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The denoiser's output and its derivative along (dx, d ln sigma) = (velocity, 1), under the dropout mask of the last
        call: see derivative.py. `value`: the output of that call, if it was at the same point."""
        assert isinstance(self.model, Denoiser)
        with self.autocast():
            return rate(self.model, x, sigma, labels, velocity, to=to, derivative=derivative, value=value, mask=self._mask)

    def _mask(self) -> contextlib.AbstractContextManager[None]:
        """Context with the dropout mask of the last call."""
        return contextlib.nullcontext() if self._dropout is None else _replayed(self._dropout, self.parameters[0].device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context manager for the precision that this network computes in."""
        return torch.autocast(self.parameters[0].device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context manager for one of several backward passes whose gradients add up. Ranks exchange them only in the last."""
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._parallel.no_sync()

    def update(self, step: int, total: int) -> dict[str, float]:
        """Apply the gradients at the schedule's rate for `step` of `total`, and clear them.

        A step whose gradients are not finite is skipped. Gradients are the same on all ranks, so all ranks skip it. Returns
        the figures GRAD_NORM (0 for a skipped step) and SKIPPED (1 for a skipped step, else 0).
        """
        config = self.config
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {GRAD_NORM: norm if math.isfinite(norm) else 0.0, SKIPPED: float(not math.isfinite(norm))}

    def continue_with(self, config: OptimizerConfig) -> None:
        """Switch to other settings of the same kind of optimiser. Keeps weights and moments."""
        assert config.kind == self.config.kind
        self.config = config
        for group in self.optimizer.param_groups:
            group["betas"] = config.betas

    def state_dict(self) -> dict[str, Any]:
        """Weights and the optimiser's state, as tensors and plain Python."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _replayed(state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Context in which torch's global generator starts from `state`; afterwards it continues as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def compile_trunk(model: Denoiser) -> None:
    """Compile the network in place, except its output convolution.

    The adaptive weight differentiates that convolution alone. In a compiled network this would take a whole backward pass.
    """
    network = model.model
    network.trunk = torch.compile(network.trunk, dynamic=False)  # pyright: ignore[reportArgumentType, reportCallIssue]
