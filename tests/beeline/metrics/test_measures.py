"""Metrics against torch-fidelity's own, on the same images and the same (random) weights of Inception."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beeline.errors import BeelineError
from beeline.features.measuring import Eye, Inception, Looks, build_measuring
from beeline.features.torchvision_shim import import_torchvision
from beeline.files.arrays import spread
from beeline.metrics.frechet import Statistics
from beeline.metrics.measures import Reference, counted, measures, nearest, neighbourhoods, rises

N = 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    made = Inception()
    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn_like(module.weight)
            module.running_var = 0.5 + torch.rand_like(module.weight)
    return made


def pictures(seed: int, n: int = N) -> torch.Tensor:
    """Draw uint8 images (n, 3, 32, 32) with structure: waves whose colours and frequencies depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.linspace(0, 1, 32)
    frequency = (3 + 4 * seed) * torch.rand(n, 3, 1, 1, generator=generator)
    waves = torch.sin(6.28 * (frequency * grid + frequency.flip(1) * grid[:, None]) + seed)
    return ((waves + 0.3 * torch.randn(n, 3, 32, 32, generator=generator)).clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)


def test_figures_equal_torch_fidelitys(network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Double(FeatureExtractorInceptionV3):
        """torch-fidelity's network with float64 features, because its statistics keep the precision of their input."""

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(value.double() for value in super().forward(x))

    torch_fidelity.register_feature_extractor("inception-double", Double)
    torch.save(network.network.state_dict(), tmp_path / "inception.pth")
    monkeypatch.setattr("beeline.metrics.measures.KID_SUBSET", 20)
    fake, real = pictures(0), pictures(1)
    theirs: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=_Set(fake), input2=_Set(real), cuda=False, verbose=False, cache=False, save_cpu_ram=True, batch_size=8,
        fid=True, kid=True, isc=True, prc=True, kid_subset_size=20, feature_extractor="inception-double",
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
    )  # fmt: skip
    eye = Eye(network, CPU)
    seen, true = eye.look(fake), eye.look(real)
    monkeypatch.setattr("beeline.metrics.measures.BLOCK", 17)  # several blocks
    reference = Reference(Statistics.of(true.features), true.features, np.arange(N))
    ours = measures(seen, reference, "inception", neighbours=N)
    for name, key in {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "is": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }.items():
        assert ours[f"{name}_{N}"] == pytest.approx(theirs[key], rel=1e-6), name
    assert theirs["frechet_inception_distance"] > 1
    assert 0.1 < theirs["recall"] < theirs["precision"] < 1


class _Set(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


def test_a_network_made_ready_sees_the_same(network: Inception) -> None:
    images = pictures(2, 4)
    with torch.inference_mode():
        features, logits = network.look(images)
    seen = Eye(network, CPU).look(images)
    np.testing.assert_allclose(seen.features, features, rtol=1e-4, atol=1e-5)
    assert logits is not None
    assert seen.logits is not None
    np.testing.assert_allclose(seen.logits, logits, rtol=1e-4, atol=1e-4)


def test_grey_images_are_seen_as_colours_and_dinov2_looks_at_any_size() -> None:
    torch.manual_seed(0)
    eye = Eye(build_measuring("dinov2_vits14"), CPU)
    grey = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    seen, same = eye.look(grey), eye.look(grey.expand(-1, 3, -1, -1))
    assert seen.logits is None
    assert seen.features.shape == (3, 384)
    np.testing.assert_array_equal(seen.features, same.features)


def plane(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float32)


GRID = plane(*((float(x), float(y)) for x in range(4) for y in range(4)))


def test_the_real_images_themselves_are_precise_complete_and_copied() -> None:
    found = neighbourhoods(GRID, GRID)
    assert found.pop("density") > 0.8
    assert found == {"precision": 1, "recall": 1, "coverage": 1, "authenticity": 0}


def test_far_away_nothing_is_reached() -> None:
    assert set(neighbourhoods(GRID + 100, GRID).items()) == {
        ("precision", 0), ("recall", 0), ("density", 0), ("coverage", 0), ("authenticity", 1),
    }  # fmt: skip


def test_a_collapsed_model_is_precise_and_finds_little() -> None:
    rng = np.random.default_rng(0)
    found = neighbourhoods(GRID[5] + 1e-3 * rng.standard_normal((40, 2)).astype(np.float32), GRID)
    assert found["precision"] == 1
    assert found["recall"] <= 1 / 16
    assert found["coverage"] < 1
    assert found["authenticity"] == 0


@given(st.integers(6, 40), st.integers(6, 40), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_neighbourhoods_as_their_papers_define_them(n: int, m: int, seed: int) -> None:
    """Compare with the definitions, written out over all pairs."""
    rng = np.random.default_rng(seed)
    fake, real = rng.standard_normal((n, 3)), rng.standard_normal((m, 3)) + 0.5
    between = np.linalg.norm(fake[:, None] - real, axis=2)
    own = np.sort(np.linalg.norm(real[:, None] - real, axis=2), axis=1)
    of_fake = np.sort(np.linalg.norm(fake[:, None] - fake, axis=2), axis=1)
    least = between.argmin(axis=1)
    assert neighbourhoods(fake, real) == pytest.approx(
        {
            "precision": (between <= own[:, 3]).any(axis=1).mean(),
            "recall": (between <= of_fake[:, 3:4]).any(axis=0).mean(),
            "density": (between < own[:, 5]).sum() / (5 * n),
            "coverage": (between.min(axis=0) < own[:, 5]).mean(),
            "authenticity": (between.min(axis=1) > own[least, 1]).mean(),
        }
    )
    assert nearest(fake, real).tolist() == least.tolist()


def test_too_few_neighbours_are_an_error() -> None:
    with pytest.raises(BeelineError, match="5 samples and 16 real images; expected more than 5 of each"):
        neighbourhoods(GRID[:5], GRID)


def test_names_say_what_was_measured_and_on_how_many() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((30, 4)).astype(np.float32)
    reference = Reference(Statistics.of(real), real, np.arange(30))
    found = measures(Looks(real[:20]), reference, "probe", neighbours=12)
    assert list(found) == [
        "fd_probe_20",
        *(f"{name}_probe_12" for name in ("precision", "recall", "density", "coverage", "authenticity")),
    ]
    assert [counted("fid", n) for n in (50_000, 10_000, 1797, 500)] == ["fid_50k", "fid_10k", "fid_1797", "fid_500"]
    assert [rises(name) for name in ("is_50k", "recall_probe_10k", "fid_50k", "kid_50k", "fd_probe_200", "pair_rms_256")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_samples_in_class_order_are_judged_as_if_they_were_mixed() -> None:
    """Twenty distant classes, with samples and real images in class order. The first samples cover only four of them."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(20), 50)
    centres = 20 * rng.standard_normal((20, 4))
    fake, real = ((centres[labels] + rng.standard_normal((1000, 4))).astype(np.float32) for _ in range(2))
    names = ("precision", "recall", "density", "coverage", "authenticity")
    found = measures(Looks(fake), Reference(Statistics.of(real), real, np.arange(1000)), "probe", neighbours=200)
    mixed = [neighbourhoods(fake[rng.permutation(1000)[:200]], real[rng.permutation(1000)[:200]]) for _ in range(5)]
    first = neighbourhoods(fake[:200], real[spread(200, 1000)])
    for name in names:
        assert found[f"{name}_probe_200"] == pytest.approx(np.mean([one[name] for one in mixed]), abs=0.1)
    assert first["recall"] < 0.3 < 0.8 < found["recall_probe_200"]


@given(st.integers(1, 200), st.integers(1, 200))
def test_rows_are_spread_evenly(count: int, total: int) -> None:
    rows = spread(count, total)
    assert len(rows) == count
    if count <= total:
        assert rows[0] == 0 and set(np.diff(rows)) <= {total // count, total // count + 1}  # noqa: PT018
    else:
        times = np.bincount(rows, minlength=total)
        assert times.min() >= count // total
        assert times.max() - times.min() <= 1
        halves = times[: total // 2].sum(), times[-(total // 2) :].sum()  # the first are not preferred
        assert total < 2 or abs(halves[0] - halves[1]) <= 1
