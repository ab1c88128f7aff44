"""Numerical flags for GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from beeline.numerics import set_numerics


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore PyTorch's own flags after the test."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = [
        (place, name, getattr(place, name))
        for place, names in ((matmul, ("allow_tf32",)), (cudnn, ("allow_tf32", "benchmark", "deterministic")))
        for name in names
    ]
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    for place, name, value in saved:
        setattr(place, name, value)


def test_with_a_gpu_float32_is_float32_and_algorithms_are_deterministic(flags: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_numerics()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()


def test_without_a_gpu_nothing_changes(flags: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_numerics()
    assert not torch.are_deterministic_algorithms_enabled()
