"""A model of several networks: each row goes to the network of its class, at the cost of one evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st

import beeline
from beeline.checkpoint import CONFIG, WEIGHTS, build, digest, dump, joined, restore
from beeline.config import NetworkConfig
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.labels import subset, subset_of
from beeline.networks.songunet import SongUNet
from beeline.sampling.inference import prepare

CLASSES, COUNT = small.CLASSES, 2


def part(seed: int, network: NetworkConfig = small.NETWORK) -> Denoiser:
    torch.manual_seed(seed)
    model = build(network)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    model.few_step = small.FEW_STEP
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def parts() -> list[Denoiser]:
    return [part(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def routed(parts: list[Denoiser]) -> Denoiser:
    return joined(parts)


@given(st.integers(1, 60), st.data())
def test_subsets_are_consecutive_and_cover_the_classes(num_classes: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_classes))
    subsets = [subset(number, count, num_classes) for number in range(count)]
    assert [c for each in subsets for c in each.classes] == list(range(num_classes))
    sizes = [len(each.classes) for each in subsets]
    assert max(sizes) - min(sizes) <= 1
    numbers = subset_of(torch.eye(num_classes), count).tolist()
    assert numbers == [each.number for each in subsets for _ in each.classes]
    assert numbers == [c * count // num_classes for c in range(num_classes)]


@pytest.mark.parametrize("label", range(CLASSES))
def test_a_label_gets_the_output_of_its_part(label: int, parts: list[Denoiser], routed: Denoiser) -> None:
    x, sigma, labels = torch.randn(5, 1, 8, 8), torch.linspace(0.1, 80, 5), torch.full((5,), label)
    assert torch.equal(routed(x, sigma, labels), parts[label // 2](x, sigma, labels))


def test_mixed_rows_come_back_in_order(parts: list[Denoiser], routed: Denoiser) -> None:
    labels = torch.tensor([3, 0, 2, 2, 1, 0, 3])
    x, sigma = torch.randn(7, 1, 8, 8), torch.linspace(0.1, 80, 7)
    found = routed(x, sigma, labels)
    for number, model in enumerate(parts):
        rows = labels // 2 == number
        assert torch.equal(found[rows], model(x[rows], sigma[rows], labels[rows]))
    one_hot = torch.nn.functional.one_hot(labels, CLASSES)
    assert torch.equal(routed(x, sigma, one_hot), found)
    torch.testing.assert_close(routed(x, torch.tensor(2.0), labels)[0], parts[1](x[:1], torch.tensor(2.0), labels[:1])[0])


def test_a_row_costs_one_evaluation(routed: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], SongUNet.forward

    def counted(self: SongUNet, x: torch.Tensor, *inputs: object) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, x, *inputs)  # type: ignore

    monkeypatch.setattr(SongUNet, "forward", counted)
    beeline.generate(routed, 10, steps=(0,))
    assert seen == [6, 4]  # classes 0 and 1, then 2 and 3, of 0, 1, 2, 3, 0, 1, ...


@pytest.mark.parametrize("batch_size", [None, 3, 16])
def test_parts_share_padded_batches(batch_size: int | None, parts: list[Denoiser], routed: Denoiser) -> None:
    """`batch_size` 3 makes batches of two rows, and divides larger ones."""
    x, sigma, labels = torch.randn(7, 1, 8, 8), torch.linspace(0.1, 80, 7), torch.tensor([0, 1, 1, 0, 3, 1, 2])
    prepared = prepare(routed, batch_size=batch_size)
    torch.testing.assert_close(prepared(x, sigma, labels), routed(x, sigma, labels), rtol=1e-4, atol=1e-4)
    own, single = labels < 2, prepare(parts[0], batch_size=None if batch_size is None else -(-batch_size // COUNT))
    assert torch.equal(prepared(x[own], sigma[own], labels[own]), single(x[own], sigma[own], labels[own]))


def test_half_precision(parts: list[Denoiser], routed: Denoiser) -> None:
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 3.0), torch.full((4,), 3)
    found = prepare(routed, precision="bf16")(x, sigma, labels)
    assert torch.equal(found, prepare(parts[1], precision="bf16")(x, sigma, labels))
    assert not torch.equal(found, routed(x, sigma, labels))


def test_rows_without_a_class_are_refused(routed: Denoiser) -> None:
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"conditional on 4 classes; pass labels"):
        routed(x, sigma)
    for row in ([0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]):
        labels = torch.tensor([[0.0, 1.0, 0.0, 0.0], row, [0.0, 0.0, 0.0, 1.0]])
        with pytest.raises(ValueError, match=r"1 of 3 rows of labels do not name one class"):
            routed(x, sigma, labels)


@pytest.mark.parametrize("inputs", [{"second_level": True}, {"guidance": True}, {"guess": True}])
def test_additional_inputs_reach_the_parts(inputs: dict[str, bool]) -> None:
    network = replace(small.NETWORK, **inputs)
    parts = [part(seed, network) for seed in range(COUNT)]
    if parts[0].guess is not None:  # the frozen network of the model that both started from
        for model in parts:
            model.guess = parts[0].guess
    routed = joined(parts)
    labels, x, sigma = torch.tensor([3, 0, 1, 2]), torch.randn(4, 1, 8, 8), torch.full((4,), 5.0)
    values = torch.linspace(0.1, 1, 4)
    extra = {"second_level": {"to": values}, "guidance": {"guidance": values}, "guess": {}}[next(iter(inputs))]
    found = routed(x, sigma, labels, **extra)
    for row in range(4):
        own = {name: value[row : row + 1] for name, value in extra.items()}
        wanted = parts[int(labels[row]) // 2](x[row : row + 1], sigma[:1], labels[row : row + 1], **own)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-4)
    again = restore(dump(routed, {}), "here")
    assert torch.equal(again(x, sigma, labels, **extra), found)


def test_files_keep_the_parts(routed: Denoiser, parts: list[Denoiser]) -> None:
    files = dump(routed, {})
    again = restore(files, "here")
    assert isinstance(again, Denoiser)
    assert (again.parts, again.network_config, again.few_step) == (COUNT, small.NETWORK, small.FEW_STEP)
    labels = torch.arange(8) % CLASSES
    assert torch.equal(beeline.generate(again, 8, labels=labels), beeline.generate(routed, 8, labels=labels))
    plain = dump(parts[0], {})
    assert "parts" not in json.loads(plain[CONFIG])
    digests = {digest(files), digest(plain), digest({**plain, CONFIG: changed(plain, parts=2)})}
    assert len(digests) == 3


def changed(files: dict[str, bytes], **config: object) -> bytes:
    return json.dumps(json.loads(files[CONFIG]) | config).encode()


@pytest.mark.parametrize("count", [10**9, 10**30, -1, 0, 5, 2.0, "2", None, True, [2]])
def test_numbers_of_parts_are_not_trusted(count: object, routed: Denoiser, parts: list[Denoiser]) -> None:
    for files in (dump(routed, {}), dump(parts[0], {})):
        with pytest.raises(BeelineError, match=r"parts is .*; expected 1 to 4, one for each class at most"):
            restore({**files, CONFIG: changed(files, parts=count)}, "here")


def test_many_parts_are_refused_before_they_are_built(routed: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the blueprint: a file may claim any number of classes."""
    files = dump(routed, {})
    network = json.loads(files[CONFIG])["network"] | {"label_dim": 100_000}
    built: list[Callable[[], object]] = []
    monkeypatch.setattr("beeline.checkpoint.shapes_of", built.append)
    with pytest.raises(BeelineError, match=r"tensors for at least 100,000 layers"):
        restore({**files, CONFIG: changed(files, parts=100_000, network=network)}, "here")
    assert not built


@pytest.mark.parametrize("count", [1, 3, 4])
def test_weights_of_another_number_of_parts_are_refused(count: int, routed: Denoiser) -> None:
    files = dump(routed, {})
    with pytest.raises(BeelineError, match="the weights do not fit the network"):
        restore({CONFIG: changed(files, parts=count), WEIGHTS: files[WEIGHTS]}, "here")
