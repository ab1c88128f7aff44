"""EDM preconditioning: turns a raw network F into a denoiser D(x; sigma) that predicts the clean image at any noise level.

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))

(Karras et al. 2022, eq. 7 and Table 1.) Teacher and student are both denoisers; no other code calls F.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from beeline.labels import as_one_hot
from beeline.schedule import SIGMA_MIN

if TYPE_CHECKING:
    from beeline.config import NetworkConfig
    from beeline.sampling.few_step import FewStep


class Denoiser(nn.Module):
    """EDM-preconditioned denoiser around a network `model(x, c_noise, labels) -> (B, C, H, W)`.

    Parameter names are those of EDM's own state dict (they begin with `model.`), so released weights load without renaming.
    """

    sigma_data: float = 0.5

    def __init__(self, model: nn.Module, *, img_resolution: int, img_channels: int, label_dim: int) -> None:
        super().__init__()
        self.model = model
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.network_config: NetworkConfig | None = None  # the config that `checkpoint.build` used, of each of the parts
        self.guess: Denoiser | None = None  # frozen network that makes the first guess, for networks with `guess`
        self.few_step: FewStep | None = None  # set on students: allowed sampling
        self.parts = 1  # networks, each for a subset of the classes (networks/routed.py)
        self.levels: tuple[float, ...] | None = None  # set on calibrated teachers: noise levels of the Adams solver

    @property
    def takes_second_level(self) -> bool:
        """Return whether the network has an input for a second noise level."""
        return self.network_config is not None and self.network_config.second_level

    @property
    def takes_guidance(self) -> bool:
        """Return whether the network has an input for a weight of guidance."""
        return self.network_config is not None and self.network_config.guidance

    def _extra(
        self, sigma: torch.Tensor, batch: int, to: torch.Tensor | None, guidance: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The network's additional inputs, with defaults for those that are not given."""
        if to is not None and not self.takes_second_level:
            raise ValueError("a second noise level was given, but the network has no input for it; build it with second_level")
        if guidance is not None and not self.takes_guidance:
            raise ValueError("a weight of guidance was given, but the network has no input for it; build it with guidance")
        extra = {}
        if self.takes_second_level:
            to = sigma if to is None else to.to(sigma)
            extra["to"] = to.clamp_min(SIGMA_MIN).log().flatten().expand(batch) / 4
        if self.takes_guidance:
            weight = sigma.new_zeros(batch) if guidance is None else guidance.to(sigma)
            extra["guidance"] = weight.flatten().expand(batch)
        return extra

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return self.img_channels, self.img_resolution, self.img_resolution

    def check_input(self, x: torch.Tensor) -> None:
        """Raise ValueError unless `x` is (B, C, H, W) of this model's resolution and channel count."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; this model takes (B, {', '.join(map(str, self.image_shape))})")

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        guess: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise images `x` (B, C, H, W) at noise levels `sigma` (B,) or (); returns float32 (B, C, H, W).

        `labels`: None, class indices (B,) or one-hot (B, K). `augment_labels` (B, A) are for training with non-leaking
        augmentation; omit them when sampling. `to` (B,) or (), at least 0, is the level at which a flow map's jump ends. Only
        networks with `second_level` accept it; its default is `sigma`. `guidance` (B,) or () is the weight of guidance. Only
        networks with `guidance` accept it; its default is 0, the unguided model. `guess` (B, C, H, W) is the first guess of a
        trajectory, the output of the network `guess` at its start. Only networks with `guess` accept it; by default it is
        computed here, as if the trajectory started at `x`. Raises ValueError for other shapes, missing labels, or sigma <= 0.
        """
        total, inputs = self._inputs(x, sigma, labels, augment_labels, to, guidance, guess)
        x, sigma = x.to(torch.float32), sigma.to(device=x.device, dtype=torch.float32).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / total**2
        c_out = sigma * self.sigma_data / total
        return c_skip * x + c_out * self.model(*inputs).to(torch.float32)

    def bottleneck(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the features (B, C', H', W') at the end of the network's encoder, for arguments as in `forward`. Takes about
        half of its time. Discriminators classify these features."""
        encode = self.model.encode
        assert callable(encode)
        _, inputs = self._inputs(x, sigma, labels)
        return encode(*inputs)[0]

    def _inputs(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        to: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        guess: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Check the arguments of `forward`. Returns 1 / c_in, (B, 1, 1, 1) or (1, 1, 1, 1), and the network's inputs."""
        self.check_input(x)
        known = sigma.device.type == "cpu" and not is_fake(sigma) and not torch.compiler.is_compiling()
        if known and sigma.numel():  # on a GPU this check would force a synchronisation
            low, high = (float(end) for end in sigma.aminmax())
            if not 0 < low <= high < float("inf"):
                raise ValueError(f"sigma lies in {low} ... {high}; expected finite noise levels above 0")
        x = x.to(torch.float32)
        sigma = sigma.to(device=x.device, dtype=torch.float32).reshape(-1, 1, 1, 1)
        one_hot = as_one_hot(labels, self.label_dim, len(x), x.device)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_noise = (sigma.log() / 4).flatten().expand(len(x))
        extra = self._extra(sigma, len(x), to, guidance)
        if self.guess is not None:
            with torch.no_grad():
                first = self.guess(x, sigma.flatten(), one_hot) if guess is None else guess.to(x)
            extra["guess"] = first / self.sigma_data
        elif guess is not None:
            raise ValueError("a guess was given, but the network has no input for it; build it with guess")
        inputs = (x / total, c_noise, one_hot, augment_labels)
        return total, (*inputs, extra) if extra else inputs
