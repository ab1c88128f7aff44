"""Downloads from a real HTTP server on loopback, and model folders of backbones. The originals are made here: random weights in
the layouts of the published files."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from beeline.checkpoint import CONFIG, WEIGHTS
from beeline.errors import BeelineError
from beeline.features.backbones import VGG16, TimmBackbone, build_backbone
from beeline.features.measuring import build_measuring
from beeline.weights import SOURCES, Source, dump_backbone, fetch, load_backbone, load_measuring, main, obtain, read

LITE0, DEIT = "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder and counts requests; a file named cut-... ends after half."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # pyright: ignore[reportAttributeAccessIssue]
        if "/cut-" not in self.path:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@dataclasses.dataclass
class Server:
    url: str
    folder: Path
    asked: list[str]

    def put(self, name: str, content: Any, **options: Any) -> Source:
        """Serve the content as saved by torch.save; return its source."""
        torch.save(content, self.folder / name, **options)
        return self.source(name)

    def source(self, name: str) -> Source:
        digest = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        return Source(url=f"{self.url}/{name}", sha256=digest, licence="made by a test")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    handler = functools.partial(_Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        asked: list[str] = []
        setattr(running, "asked", asked)  # noqa: B010
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield Server(f"http://127.0.0.1:{running.server_address[1]}", tmp_path / "served", asked)
        running.shutdown()
        thread.join()


def vgg16_original(seed: int = 0) -> dict[str, torch.Tensor]:
    """A file like torchvision's, with a smaller classifier."""
    torch.manual_seed(seed)
    features = {key: tensor for key, tensor in VGG16().state_dict().items() if key.startswith("features.")}
    return features | {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}


@pytest.fixture(scope="module")
def lite0() -> TimmBackbone:
    torch.manual_seed(3)
    network = build_backbone(LITE0)
    assert isinstance(network, TimmBackbone)
    return network


def lite0_original(network: TimmBackbone) -> dict[str, torch.Tensor]:
    """A file like timm's, with the layers after the last tap and without BatchNorm's counters, as in older files."""
    named = {key.removeprefix("network."): tensor for key, tensor in network.state_dict().items()}
    named |= {"conv_head.weight": torch.zeros(2, 2), "classifier.weight": torch.zeros(2, 2)}
    return {key: tensor for key, tensor in named.items() if not key.endswith("num_batches_tracked")}


def loaded(folder: Path) -> VGG16 | TimmBackbone:
    return load_backbone({name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}, str(folder))


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())["about"]


def test_vgg16_comes_with_the_layers_of_lpips(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = vgg16_original()
    source = server.put("vgg16.pth", original, _use_new_zipfile_serialization=False)  # the published file is as old as that
    source = dataclasses.replace(source, lins_sha256=SOURCES["vgg16"].lins_sha256)
    fetch(["vgg16"], tmp_path / "out", tmp_path / "cache", {"vgg16": source})
    assert "made by a test" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["vgg16.pth"]
    assert sorted(path.name for path in (tmp_path / "out" / "vgg16").iterdir()) == [CONFIG, WEIGHTS]
    network = loaded(tmp_path / "out" / "vgg16")
    assert isinstance(network, VGG16)
    for key, tensor in network.features.state_dict().items():
        assert torch.equal(tensor, original[f"features.{key}"])
    assert all(0.005 < float(weight.mean()) < 1 and float(weight.min()) >= 0 for weight in network.tap_weights)
    found = about(tmp_path / "out" / "vgg16")
    assert (found["source"], found["sha256"]) == (source.url, source.sha256)
    assert found["lins"]["sha256"] == source.lins_sha256


def test_other_linear_layers_are_refused(server: Server, tmp_path: Path) -> None:
    source = dataclasses.replace(server.put("vgg16.pth", vgg16_original()), lins_sha256="0" * 64)
    with pytest.raises(BeelineError, match=r"lpips/weights/v0.1/vgg.pth has SHA-256 a78928.*, expected 0{64}"):
        fetch(["vgg16"], tmp_path / "out", tmp_path / "cache", {"vgg16": source})
    assert not (tmp_path / "out").exists()


def test_a_second_call_downloads_and_writes_nothing(
    server: Server, tmp_path: Path, lite0: TimmBackbone, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dataclasses.replace(server.put("lite0.pth", lite0_original(lite0)), prefix="network.")
    source = dataclasses.replace(source, sha256=source.sha256[:8])  # all that is known of the published file
    folder = tmp_path / "out" / LITE0
    fetch([], tmp_path / "out", tmp_path / "cache", {LITE0: source})
    x = torch.rand(1, 1, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(loaded(folder).taps(x), lite0.taps(x), strict=True))
    assert about(folder)["sha256"] == hashlib.sha256((tmp_path / "cache" / "lite0.pth").read_bytes()).hexdigest()
    written = (folder / WEIGHTS).stat().st_mtime_ns
    capsys.readouterr()
    fetch([LITE0], tmp_path / "out", tmp_path / "cache", {LITE0: source})
    assert capsys.readouterr().out == f"{folder}: already complete\n"
    assert (folder / WEIGHTS).stat().st_mtime_ns == written
    (folder / CONFIG).unlink()  # as if it had been stopped half-way
    fetch([LITE0], tmp_path / "out", tmp_path / "cache", {LITE0: source})
    assert isinstance(loaded(folder), TimmBackbone)
    assert server.asked == ["/lite0.pth"]


def test_deit_from_the_downloads_folder_as_timm_reads_it(tmp_path: Path) -> None:
    import timm

    made: Any = timm.create_model(DEIT, weight_init="skip")
    for parameter in made.parameters():
        torch.nn.init.uniform_(parameter)
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / "deit.pth"
    torch.save({"model": made.state_dict(), "args": argparse.Namespace(lr=1e-3)}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    source = Source(url="http://127.0.0.1:9/deit.pth", sha256=digest, licence="none", prefix="network.model.")
    fetch([DEIT], tmp_path / "out", tmp_path / "cache", {DEIT: source})
    ours = loaded(tmp_path / "out" / DEIT).state_dict()
    taps = {"features_only": True, "out_indices": (2, 5, 8, 11), "weight_init": "skip"}
    wanted: Any = timm.create_model(DEIT, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **taps)
    assert {key.removeprefix("network."): tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in wanted.state_dict().items()
    }
    assert all(torch.equal(ours[f"network.{key}"], tensor) for key, tensor in wanted.state_dict().items())


@pytest.mark.parametrize("here", [False, True], ids=["downloaded", "put by hand"])
def test_another_file_is_refused_unread(here: bool, server: Server, tmp_path: Path) -> None:
    source = dataclasses.replace(server.put("a.pth", {"x": torch.zeros(1)}), sha256="0123abcd")
    (tmp_path / "cache").mkdir()
    if here:
        (tmp_path / "cache" / "a.pth").write_bytes((server.folder / "a.pth").read_bytes())
    put, downloaded = r"has SHA-256 [0-9a-f]{64}, expected 0123abcd\.\.\.; it was not read", "invalid hash value .*0123abcd"
    with pytest.raises(BeelineError, match=put if here else downloaded) as caught:
        fetch(["a"], tmp_path / "out", tmp_path / "cache", {"a": source})
    assert ("delete" in str(caught.value)) == here
    assert (source.url in str(caught.value)) != here
    assert [path.name for path in (tmp_path / "cache").iterdir()] == (["a.pth"] if here else [])
    assert not (tmp_path / "out").exists()


def test_downloads_that_fail_leave_nothing_and_say_what_to_do(server: Server, tmp_path: Path) -> None:
    cut = server.put("cut-a.pth", {"x": torch.zeros(1000)})
    absent = Source(url=f"{server.url}/absent.pth", sha256="0", licence="none")
    offline = Source(url="http://127.0.0.1:9/a.pth", sha256="0", licence="none")
    for source, reason in ((cut, "invalid hash value"), (absent, "404"), (offline, "refused")):
        with pytest.raises(BeelineError, match=reason) as caught:
            obtain(source, tmp_path / "cache")
        message = str(caught.value)
        assert message.startswith(f"{source.url} could not be downloaded (")
        assert message.endswith(f"or put the right file there by hand as {tmp_path}/cache/{source.url.rsplit('/', 1)[1]}")
        assert "\n" not in message
    assert list((tmp_path / "cache").iterdir()) == []


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_would_run_code_is_refused(zipped: bool, server: Server, tmp_path: Path) -> None:
    content = {"features.0.weight": Hostile(tmp_path / "it ran")}
    source = server.put("a.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BeelineError, match=r"asks for posix.mkdir\); it was refused"):
        fetch(["vgg16"], tmp_path / "out", tmp_path / "cache", {"vgg16": source})
    assert not (tmp_path / "it ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"y": torch.zeros(1)}, "does not hold the weights of vgg16: 31 tensors are missing, features.0.bias for example"),
        ({"model": 1}, "holds a dict; expected tensors by name"),
        ([torch.zeros(1)], "holds a list; expected tensors by name"),
        ({"features.0.weight": 1.0}, "31 tensors are missing, features.0.bias for example"),
        (
            vgg16_original()
            | {f"lins.{k}": torch.zeros(width) for k, width in enumerate(VGG16.tap_channels)}
            | {"features.0.weight": torch.zeros(64, 3, 5, 5)},
            "features.0.weight has shape .64, 3, 5, 5., expected .64, 3, 3, 3.",
        ),
    ],
)
def test_files_without_the_right_tensors(content: Any, message: str, server: Server, tmp_path: Path) -> None:
    source = server.put("a.pth", content)
    with pytest.raises(BeelineError, match=message) as caught:
        fetch(["vgg16"], tmp_path / "out", tmp_path / "cache", {"vgg16": source})
    assert str(tmp_path / "cache" / "a.pth") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"<html>", b"PK\x03\x04" + bytes(100)])
def test_damaged_originals_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(BeelineError, match="is not a file of tensors"):
        read(tmp_path / "a.pth")


def test_an_out_folder_that_cannot_be_written(server: Server, tmp_path: Path, lite0: TimmBackbone) -> None:
    source = dataclasses.replace(server.put("lite0.pth", lite0_original(lite0)), prefix="network.")
    (tmp_path / "out").touch()
    with pytest.raises(BeelineError, match=r"cannot be written .*; choose another --out"):
        fetch([LITE0], tmp_path / "out", tmp_path / "cache", {LITE0: source})


def test_the_config_is_written_last(server: Server, tmp_path: Path, lite0: TimmBackbone) -> None:
    source = dataclasses.replace(server.put("lite0.pth", lite0_original(lite0)), prefix="network.")
    folder = tmp_path / "out" / LITE0
    (folder / CONFIG).mkdir(parents=True)  # so that writing it fails
    with pytest.raises(BeelineError, match="cannot be written"):
        fetch([LITE0], tmp_path / "out", tmp_path / "cache", {LITE0: source})
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_what_is_dumped_loads_and_dumps_the_same_bytes(lite0: TimmBackbone) -> None:
    files = dump_backbone(lite0, {"note": "x"})
    before = torch.get_rng_state()
    network = load_backbone(files, "w")
    assert torch.equal(before, torch.get_rng_state())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert dump_backbone(network, {"note": "x"}) == files
    vgg = build_backbone("vgg16")
    assert dump_backbone(load_backbone(dump_backbone(vgg, {}), "w"), {}) == dump_backbone(vgg, {})


def test_what_does_not_load(lite0: TimmBackbone) -> None:
    files = dump_backbone(lite0, {})
    config = {key: value for key, value in json.loads(files[CONFIG]).items() if key != "weights_sha256"}
    tensors = safetensors.torch.load(files[WEIGHTS])
    less = {key: tensor for key, tensor in tensors.items() if key != "network.conv_stem.weight"}
    reshaped = tensors | {"network.conv_stem.weight": torch.zeros(32, 3, 5, 5)}

    def refused(message: str, **changes: bytes | None) -> None:
        names = {"weights": WEIGHTS, "config": CONFIG}
        changed = (
            files
            | {CONFIG: json.dumps(config).encode()}
            | {names[key]: data for key, data in changes.items() if data is not None}
        )
        with pytest.raises(BeelineError, match=message) as caught:
            load_backbone({key: data for key, data in changed.items() if key not in lacking}, "weights/lite0")
        assert str(caught.value).startswith("weights/lite0")
        assert "\n" not in str(caught.value)

    lacking: set[str] = set()
    refused("not a readable backbone", config=b"{")
    refused("not a readable backbone", weights=files[WEIGHTS][:-5])
    refused(r"holds list; this version reads format 1", config=b"[]")
    refused("'format': 2", config=json.dumps(config | {"format": 2}).encode())
    refused("'kind': 'probe'", config=json.dumps(config | {"kind": "probe"}).encode())
    refused(
        "names backbone 'vgg19'; this version has: vgg16", config=json.dumps(config | {"network": {"name": "vgg19"}}).encode()
    )
    refused("names backbone None", config=json.dumps(config | {"network": None}).encode())
    refused("do not fit vgg16", config=json.dumps(config | {"network": {"name": "vgg16"}}).encode())
    refused("1 tensors are missing, network.conv_stem.weight", weights=safetensors.torch.save(less))
    refused("network.conv_stem.weight has shape", weights=safetensors.torch.save(reshaped))
    refused("1 tensors are unexpected, extra", weights=safetensors.torch.save(tensors | {"extra": torch.zeros(1)}))
    lacking = {CONFIG}
    refused("KeyError")


def test_a_flipped_bit_is_noticed(tmp_path: Path, lite0: TimmBackbone, server: Server) -> None:
    """Damage is noticed on loading and by the fetch command, which then makes the folder again."""
    files = dump_backbone(lite0, {})
    weights = bytearray(files[WEIGHTS])
    weights[-1] ^= 1
    with pytest.raises(BeelineError, match=r"weights/lite0/model.safetensors does not belong to config.json"):
        load_backbone(files | {WEIGHTS: bytes(weights)}, "weights/lite0")
    source = dataclasses.replace(server.put("lite0.pth", lite0_original(lite0)), prefix="network.")
    fetch([LITE0], tmp_path, tmp_path / "cache", {LITE0: source})
    good = (tmp_path / LITE0 / WEIGHTS).read_bytes()
    for damage in (good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        (tmp_path / LITE0 / WEIGHTS).write_bytes(damage)
        fetch([LITE0], tmp_path, tmp_path / "cache", {LITE0: source})
        assert (tmp_path / LITE0 / WEIGHTS).read_bytes() == good
    (tmp_path / LITE0 / CONFIG).write_bytes(b"[]")
    fetch([LITE0], tmp_path, tmp_path / "cache", {LITE0: source})
    assert isinstance(loaded(tmp_path / LITE0), TimmBackbone)


@pytest.mark.parametrize("name", ["../vgg16", "/etc/passwd", "vgg16/../../x", "VGG16", "", ".", "vgg16\0"])
def test_names_that_are_not_backbones_write_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(BeelineError, match="is unknown; expected some of: vgg16, "):
        fetch([name], tmp_path / "out", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "more"), [("inception", ""), ("dinov2_vits14", "mask_token")])
def test_networks_to_measure_in(server: Server, tmp_path: Path, name: str, more: str) -> None:
    """Files as published: the network's own tensors, and for DINOv2 one that only its training needed."""
    torch.manual_seed(4)
    network = build_measuring(name)
    original = {key.removeprefix("network."): tensor for key, tensor in network.state_dict().items()}
    original |= {more: torch.zeros(1, 3)} if more else {}
    source = dataclasses.replace(server.put(f"{name}.pth", original), prefix="network.")
    fetch([name], tmp_path / "out", tmp_path / "cache", {name: source})
    files = {file: (tmp_path / "out" / name / file).read_bytes() for file in (WEIGHTS, CONFIG)}
    found = load_measuring(files, name)
    assert found.name == name
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), network.state_dict().values(), strict=True))
    with pytest.raises(BeelineError, match=f"names backbone '{name}'; this version has: vgg16"):
        load_backbone(files, name)


def test_published_sources_are_spelled_as_their_files() -> None:
    """torch.hub's convention: a file's name ends with the beginning of its SHA-256. Meta's DINOv2 does not follow it."""
    for name, source in SOURCES.items():
        assert source.url.endswith("_pretrain.pth" if name.startswith("dinov2") else f"-{source.sha256[:8]}.pth")
        assert source.url.startswith("https://")
        assert len(source.sha256) in (8, 64)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-W", "error", "-m", "beeline.weights", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)

    told = command("fetch", "--help")
    assert told.returncode == 0
    assert "--downloads" in told.stdout
    assert all(name in told.stdout for name in SOURCES)
    unknown = command("fetch", "vgg19", "--out", tmp_path)
    assert unknown.returncode == 1
    assert unknown.stderr == f"error: backbone 'vgg19' is unknown; expected some of: {', '.join(SOURCES)}\n"

    (tmp_path / "vgg16-397923af.pth").touch()
    monkeypatch.setattr(sys, "argv", ["weights", "fetch", "vgg16", "--out", "here", "--downloads", str(tmp_path)])
    with pytest.raises(BeelineError, match=f"{tmp_path}/vgg16-397923af.pth has SHA-256 e3b0c442"):
        main()
