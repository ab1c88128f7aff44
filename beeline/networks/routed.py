"""Several networks as one: each is for a subset of the classes, and a row goes to the network of its class.

A sample costs one evaluation, as with one network (multi-student distillation; Song et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from beeline.labels import subset_of
from beeline.networks.layers import NOTHING, Extra


class Routed(nn.Module):
    """Routes rows to one of `parts` by their class: labels.py says to which. For inference: the number of rows that a part gets
    depends on the labels, so on a GPU the host waits for them."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
        extra: Extra = NOTHING,
    ) -> torch.Tensor:
        """Same arguments and result as those of the parts. Raises ValueError without labels, and for rows that do not name one
        class."""
        if labels is None:
            raise ValueError("a set of students needs labels; pass the class of each row")
        numbers = subset_of(labels, len(self.parts))
        present = numbers.unique().tolist()
        if len(present) <= 1:  # unchanged: the result is exactly that of the part
            return self.parts[present[0] if present else 0](x, noise_labels, labels, augment_labels, extra)
        rows = [(numbers == number).nonzero().flatten() for number in present]
        outputs = [
            self.parts[number](
                x[chosen],
                noise_labels[chosen],
                labels[chosen],
                None if augment_labels is None else augment_labels[chosen],
                {name: value[chosen] for name, value in extra.items()},
            ).clone()  # a compiled part may reuse its memory
            for number, chosen in zip(present, rows, strict=True)
        ]
        return torch.cat(outputs)[torch.cat(rows).argsort()]
