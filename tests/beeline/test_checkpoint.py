"""Model folders: round trips, bytes that depend only on the model, errors that name the problem, and the moving average."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import beeline
from beeline.checkpoint import CONFIG, FORMAT, WEIGHTS, digest, dump, load, restore
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.features.probe import Probe
from beeline.objectives.ema import ema_update
from beeline.sampling.few_step import FewStep, RuleName


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("few_step", [None, FewStep(num_steps=18, rule="line", line="ve", trained_steps=(0, 8))])
def test_denoisers_come_back(make_denoiser: Callable[..., Denoiser], kind: str, few_step: FewStep | None) -> None:
    model = make_denoiser(kind=kind, label_dim=3, augment_dim=9, dropout=0.2)
    model.few_step = few_step
    again = restore(dump(model, {"from": "a test"}), "here")
    assert isinstance(again, Denoiser)
    assert again.few_step == few_step
    assert again.network_config == model.network_config
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    x, sigma, labels = torch.randn(2, 2, 8, 8), torch.tensor([0.1, 10.0]), torch.tensor([2, 0])
    assert torch.equal(again(x, sigma, labels), model(x, sigma, labels))


def test_probes_come_back(probe: Probe) -> None:
    again = restore(dump(probe, {}), "here")
    assert isinstance(again, Probe)
    assert again.config == probe.config
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), probe(images))


def test_the_same_model_gives_the_same_bytes(make_denoiser: Callable[..., Denoiser]) -> None:
    model, about = make_denoiser(), {"trained": {"seed": 0}}
    files = dump(model, about)
    assert set(files) == {WEIGHTS, CONFIG}
    assert dump(make_denoiser(), about) == files
    again = restore(files, "here")
    assert dump(again, about) == files
    assert digest(dump(again, {"other": "provenance"})) == digest(files)
    next(again.parameters()).view(-1)[0] += 1e-3
    assert digest(dump(again, about)) != digest(files)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["few_step"].update(rule="same_noise"),
        lambda config: config["few_step"].update(line="ve"),
        lambda config: config["few_step"].update(num_steps=17),
        lambda config: config["few_step"].update(trained_steps=[0]),
        lambda config: config.update(few_step=None),
        lambda config: config["network"].update(dropout=0.5),
    ],
)
def test_what_changes_the_images_changes_the_identity(make_denoiser: Callable[..., Denoiser], change: Any) -> None:
    """Plans record the identity, so pairs and metrics of one model are never taken for those of another."""
    model = make_denoiser()
    model.few_step = FewStep(num_steps=18)
    files = dump(model, {})
    config = json.loads(files[CONFIG])
    assert digest(files | {CONFIG: json.dumps(config, indent=None).encode()}) == digest(files)
    change(config)
    assert digest(files | {CONFIG: json.dumps(config).encode()}) != digest(files)


@pytest.mark.parametrize(("key", "value"), [("rule", "sideways"), ("rule", None), ("line", "curve"), ("rule", "Line")])
def test_an_unknown_way_of_sampling_is_refused(make_denoiser: Callable[..., Denoiser], key: str, value: Any) -> None:
    model = make_denoiser()
    model.few_step = FewStep(num_steps=18)
    files = dump(model, {})
    config = json.loads(files[CONFIG])
    config["few_step"][key] = value
    with pytest.raises(BeelineError, match=rf"here/config.json does not describe a network.*{key}"):
        restore(files | {CONFIG: json.dumps(config).encode()}, "here")


def test_students_of_earlier_versions_know_their_line(make_denoiser: Callable[..., Denoiser]) -> None:
    model = make_denoiser()
    lines: dict[RuleName, str] = {"same_noise": "ve", "line": "lerp"}
    for rule, line in lines.items():
        model.few_step = FewStep(num_steps=18, rule=rule)
        files = dump(model, {})
        config = json.loads(files[CONFIG])
        del config["few_step"]["line"]
        again = restore(files | {CONFIG: json.dumps(config).encode()}, "here")
        assert isinstance(again, Denoiser)
        assert again.few_step is not None
        assert again.few_step.line == line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_published_nor_loaded(
    make_denoiser: Callable[..., Denoiser], probe: Probe, value: float
) -> None:
    for model in (make_denoiser(), probe):
        files = dump(model, {})
        tensors = safetensors.torch.load(files[WEIGHTS])
        name = next(iter(tensors))
        tensors[name].view(-1)[0] = value
        with pytest.raises(BeelineError, match=r"here/model.safetensors is refused: 1 of its tensors hold NaN or infinity"):
            restore(files | {WEIGHTS: safetensors.torch.save(tensors)}, "here")
        with torch.no_grad():
            model.state_dict()[name].view(-1)[0] = value
        with pytest.raises(BeelineError, match="the model is not published: 1 of its tensors hold NaN or infinity"):
            dump(model, {})


def test_config_says_what_it_is(make_denoiser: Callable[..., Denoiser]) -> None:
    config = json.loads(dump(make_denoiser(), {"seed": 3})[CONFIG])
    assert config["format"] == FORMAT
    assert config["kind"] == "denoiser"
    assert config["network"]["channel_mult"] == [1, 2]
    assert config["few_step"] is None
    assert config["about"] == {"seed": 3}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("as_text", [False, True])
def test_load_a_folder(make_denoiser: Callable[..., Denoiser], tmp_path: Path, as_text: bool) -> None:
    model = make_denoiser()
    folder = write(tmp_path, dump(model, {}))
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(beeline.load(str(folder) if as_text else folder)(x, torch.ones(1)), model(x, torch.ones(1)))


@pytest.mark.parametrize("missing", [(WEIGHTS,), (CONFIG,), (WEIGHTS, CONFIG)])
def test_incomplete_folders_are_refused(
    make_denoiser: Callable[..., Denoiser], tmp_path: Path, missing: tuple[str, ...]
) -> None:
    folder = write(tmp_path, {name: data for name, data in dump(make_denoiser(), {}).items() if name not in missing})
    with pytest.raises(BeelineError, match="not a model folder"):
        load(folder)


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="nowhere is not a model folder"):
        load(tmp_path / "nowhere")


def test_probes_are_no_models(probe: Probe, tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="holds a probe"):
        load(write(tmp_path, dump(probe, {})))


def changed(files: dict[str, bytes], **values: object) -> bytes:
    return json.dumps(json.loads(files[CONFIG]) | values).encode()


Damage = Callable[[dict[str, bytes]], dict[str, bytes]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda f: {CONFIG: f[CONFIG][:-5]}, "not a readable checkpoint", id="json cut off"),
        pytest.param(lambda f: {CONFIG: b"\xff\xfe\x00"}, "not a readable checkpoint", id="not text"),
        pytest.param(lambda f: {WEIGHTS: b""}, "not a readable checkpoint", id="no weights"),
        pytest.param(lambda f: {WEIGHTS: f[WEIGHTS][:100]}, "not a readable checkpoint", id="weights cut in the header"),
        pytest.param(lambda f: {WEIGHTS: f[WEIGHTS][:-1]}, "not a readable checkpoint", id="weights cut at the end"),
        pytest.param(lambda f: {CONFIG: changed(f, format=2)}, "'format': 2.* reads format 1", id="another format"),
        pytest.param(lambda f: {CONFIG: changed(f, kind="vae")}, "'kind': 'vae'", id="another kind"),
    ],
)
def test_damaged_files_are_refused(
    make_denoiser: Callable[..., Denoiser], tmp_path: Path, damage: Damage, message: str
) -> None:
    files = dump(make_denoiser(), {})
    with pytest.raises(BeelineError, match=message) as caught:
        load(write(tmp_path, files | damage(files)))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda f: {CONFIG: b"[]"}, id="not an object"),
        pytest.param(lambda f: {CONFIG: b'{"format": 1, "kind": "denoiser"}'}, id="no network"),
        pytest.param(lambda f: {CONFIG: changed(f, network={"zip": 1})}, id="unknown network key"),
    ],
)
def test_readable_json_that_describes_no_model_is_refused(make_denoiser: Callable[..., Denoiser], damage: Damage) -> None:
    files = dump(make_denoiser(), {})
    with pytest.raises(BeelineError):
        restore(files | damage(files), "here")


@pytest.mark.parametrize("change", [{"model_channels": 32}, {"num_blocks": 2}, {"label_dim": 3}])
def test_weights_of_another_shape_are_refused(
    make_denoiser: Callable[..., Denoiser], tmp_path: Path, change: dict[str, int]
) -> None:
    files = dump(make_denoiser(), {})
    network = json.loads(files[CONFIG])["network"] | change
    with pytest.raises(BeelineError, match="do not fit"):
        load(write(tmp_path, files | {CONFIG: changed(files, network=network)}))


class Point(nn.Module):
    """A module with one parameter and one buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.full((3,), value))
        self.register_buffer("seen", torch.full((2,), value))


@pytest.mark.parametrize("half_life", [1.0, 20.0, 693.0])
def test_ema_halves_the_distance_in_a_half_life(half_life: float) -> None:
    average, model = Point(1.0), Point(0.0)
    for _ in range(int(half_life)):
        ema_update(average, model, half_life, step=1, ramp=0.0)
    torch.testing.assert_close(average.at.detach(), torch.full((3,), 0.5), rtol=1e-3, atol=0)
    assert torch.equal(average.get_buffer("seen"), torch.zeros(2))
    assert torch.equal(model.at, torch.zeros(3))


@pytest.mark.parametrize(
    ("step", "beta"), [(0, 0.0), (20, 0.5), (100, 0.5 ** (1 / 5)), (4000, 0.5 ** (1 / 200)), (8000, 0.5**0.005)]
)
def test_ema_forgets_its_start(step: int, beta: float) -> None:
    average = Point(1.0)
    ema_update(average, Point(0.0), half_life=200, step=step, ramp=0.05)
    torch.testing.assert_close(average.at.detach(), torch.full((3,), beta), rtol=1e-5, atol=1e-7)
