"""Import of released checkpoints as data: correct weights for every layout, and no code of the file is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from edm_files import Call, Persistent, edm_names, released, tensor
from mutations import outcomes
from torch import nn

import beeline
from beeline.edm_import import convert
from beeline.errors import BeelineError
from beeline.networks.songunet import SongUNet


@pytest.fixture
def edm() -> Iterator[types.SimpleNamespace]:
    with edm_names() as names:
        yield names


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("kind", "label_dim"), [("ddpmpp", 10), ("ddpmpp", 0), ("ncsnpp", 0), ("adm", 10)])
def test_the_imported_model_is_the_released_one(edm: Any, tmp_path: Path, kind: str, label_dim: int, half: bool) -> None:
    data, original = released(edm, kind, label_dim, half)
    file, out = tmp_path / "released.pkl", tmp_path / "ws/teacher"
    file.write_bytes(data)
    command = [sys.executable, "-m", "beeline.edm_import", str(file), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CC BY-NC-SA" in done.stdout
    model = beeline.load(out)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 20.0])
    labels = torch.tensor([3, 4]) if label_dim else None
    assert torch.equal(model(x, sigma, labels), original(x, sigma, labels))
    about = json.loads((out / "config.json").read_text())["about"]["imported"]
    assert len(about["sha256"]) == 64
    assert "non-commercial" in about["licence"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "was not changed" in again.stderr


def test_the_weights_load_in_plain_pytorch(edm: Any, tmp_path: Path) -> None:
    data, original = released(edm, "ddpmpp")
    file = tmp_path / "released.pkl"
    file.write_bytes(data)
    tensors = safetensors.torch.load(convert(file)["model.safetensors"])
    plain = SongUNet(
        img_resolution=8, in_channels=3, out_channels=3, label_dim=10, augment_dim=9, model_channels=16, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,),
    )  # fmt: skip
    plain.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert torch.equal(plain.last_layer, original.model.last_layer)


class Evil:
    """Runs a command when unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("open('touched', 'w')",)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"ema": Evil()}, "builtins.exec"),
        ({"ema": nn.Linear(1, 1)}, "torch.nn.modules.linear.Linear"),
        ({"ema": np.zeros(3)}, r"numpy\._core\.numeric|multiarray\._reconstruct|numpy\._core"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(BeelineError, match=f"asks for ({name}).*no code was run"):
        convert(file)
    assert not (tmp_path / "touched").exists()


def test_evil_in_a_storage_does_not_run(edm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inner = io.BytesIO()
    torch.save(Evil(), inner, _use_new_zipfile_serialization=False)

    class Storage:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps({"ema": Storage()}))
    with pytest.raises(BeelineError):
        convert(file)
    assert not (tmp_path / "touched").exists()


def test_damaged_and_foreign_files(edm: Any, tmp_path: Path) -> None:
    data, _ = released(edm, "ddpmpp")
    file = tmp_path / "file.pkl"
    for content, message in [
        (data[: len(data) // 2], "is cut off .*; download it again"),
        (pickle.dumps([1, 2]), "expected a dict whose 'ema' is a network"),
        (pickle.dumps({"state": 1}), "holds 'state'; expected a dict whose 'ema'"),
        (b"\x80\x02hello", "is not a network as EDM releases it.*KeyError"),
        (pickle.dumps({"ema": Persistent(edm, "VPPrecond", {})}), "is a VPPrecond; expected EDMPrecond"),
        (pickle.dumps({"ema": Persistent(edm, "Precond", {})}), "one of EDM2"),
        (released(edm, "ncsnpp", resample_filter=[1, 2, 1])[0], r"resample_filter \[1, 2, 1\] is neither DDPM"),
        (released(edm, "ddpmpp", num_blocks=2)[0], "do not fit the architecture.*missing"),
        (released(edm, "ddpmpp", model_channels=32)[0], "do not fit the architecture.*has shape"),
        (released(edm, "ddpmpp", magic=2)[0], "arguments unknown to EDM's release: magic"),
        (released(edm, "ddpmpp", out_channels=6)[0], "different input and output channels"),
    ]:
        file.write_bytes(content)
        with pytest.raises(BeelineError, match=message) as caught:
            convert(file)
        assert str(caught.value).startswith(str(file))
        assert ("download it again" in str(caught.value)) == message.startswith("is cut off")


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def test_other_kinds_of_files_are_called_by_their_name(tmp_path: Path) -> None:
    weights = {"input_blocks.0.0.weight": torch.zeros(2), "time_embed.0.bias": torch.zeros(2)}
    state = {"net": nn.Linear(1, 1), "optimizer_state": {}}
    page = b"\n <!DOCTYPE html><html><body>Sign in</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name, content, message in [
        ("cd_imagenet64_l2.pt", saved(weights), "a state dict in OpenAI's layout"),
        ("cd_imagenet64_l2.pt", saved(weights, _use_new_zipfile_serialization=False), "a state dict in OpenAI's layout"),
        ("training-state-000100.pt", saved(state), "a state to resume .*use the network-snapshot"),
        ("other.pt", saved({"weight": torch.zeros(1)}), "a file of torch.save"),
        ("model.safetensors", safetensors.torch.save(weights), "a safetensors file.*needs no import"),
        ("page.pkl", page, "a web page.*download the file again"),
        ("pointer.pkl", pointer, "a pointer of Git LFS"),
        ("empty.pkl", b"", "an empty file.*download"),
        ("photo.pkl", b"\x89PNG\r\n\x1a\n", "a PNG picture"),
        ("notes.pkl", b"hello, world", r"not a pickle \(it begins with b'hello, w'\)"),
        ("archive.pkl", b"PK\x03\x04" + bytes(100), "a zip archive"),
    ]:
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(BeelineError, match=f"{name} is {message}") as caught:
            convert(file)
        assert ("download" in str(caught.value)) == (name in ("page.pkl", "pointer.pkl", "empty.pkl"))
    os.mkfifo(tmp_path / "pipe")
    for name, message in [("absent.pkl", "does not exist"), ("", "is a folder"), ("pipe", "is not a regular file")]:
        with pytest.raises(BeelineError, match=message):
            convert(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(edm: Any, tmp_path: Path, value: float) -> None:
    data, _ = released(edm, "ddpmpp", edit=lambda network: network.map_layer0.bias.data[3:4].fill_(value))
    (tmp_path / "file.pkl").write_bytes(data)
    with pytest.raises(BeelineError, match=r"NaN or infinite weights in 1 tensors, model\.map_layer0\.bias for example"):
        convert(tmp_path / "file.pkl")


def test_tensors_may_be_views_of_larger_storages(edm: Any, tmp_path: Path) -> None:
    """Transposed tensors, and tensors from the middle of a storage, as PyTorch writes them."""

    def edit(network: Any) -> None:
        weight = network.map_layer0.weight
        rows, columns = weight.shape
        larger = torch.zeros(columns + 2, rows)
        larger[1:-1] = weight.detach().t()
        weight.stand_in = larger[1:-1].t()

    data, original = released(edm, "ddpmpp", edit=edit)
    (tmp_path / "file.pkl").write_bytes(data)
    weights = safetensors.torch.load(convert(tmp_path / "file.pkl")["model.safetensors"])
    assert torch.equal(weights["model.map_layer0.weight"], original.model.map_layer0.weight)


def with_stand_in(edm: Any, stand_in: Any) -> bytes:
    return released(edm, "ddpmpp", edit=lambda network: setattr(network.map_layer0.weight, "stand_in", stand_in))[0]


KWARGS = {"img_resolution": 8, "in_channels": 3, "out_channels": 3}


def modules(edm: Any, depth: int, children: int) -> bytes:
    """Build nested modules, in which all `children` names refer to the same object."""
    inner: Any = {"_modules": {}}
    for _ in range(depth):
        module = Persistent(edm, "Block", inner)
        inner = {"_modules": {str(k): module for k in range(children)}}
    inner["_modules"]["model"] = Persistent(edm, "SongUNet", {"_init_kwargs": KWARGS})
    state = inner | {"_init_kwargs": {"img_resolution": 8, "img_channels": 3}}
    return pickle.dumps({"ema": Persistent(edm, "EDMPrecond", state)})


def cyclic(edm: Any) -> bytes:
    """Build a module that contains itself."""
    state: dict[str, Any] = {"_init_kwargs": KWARGS}
    outer: dict[str, Any] = {"_init_kwargs": {"img_resolution": 8, "img_channels": 3}}
    outer["_modules"] = {"model": Persistent(edm, "SongUNet", state)}
    loop = nn.ModuleDict()
    loop.__dict__["_modules"] = {"self": loop}
    state["_modules"] = {"loop": loop}
    return pickle.dumps({"ema": Persistent(edm, "EDMPrecond", outer)})


SHARED = b"(" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(60))  # each a tuple of the one before, twice
HOSTILE: dict[str, tuple[Any, str]] = {
    "an index of the memo beyond all memory": (lambda edm: b"\x80\x02Nr\xff\xff\xff\xff.", "holds NoneType"),
    "bytes beyond the file": (
        lambda edm: b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f" + b"x",
        "announces .* bytes, but only 1 are left",
    ),
    "text beyond the file": (lambda edm: b"\x80\x04X\xff\xff\xff\x7f" + b"x", "announces 2,147,483,647 bytes"),
    "a number beyond the file": (lambda edm: b"\x80\x02\x8b\xff\xff\xff\x7f" + b"x", "announces 2,147,483,647 bytes"),
    "a number of 100,000 digits": (lambda edm: b"\x80\x02L" + b"9" * 100_000 + b"L\n.", "is not a network as EDM"),
    "a number of 400,000 bits": (
        lambda edm: b"\x80\x02}\x8c\x03ema\x8b\x50\xc3\x00\x00" + b"\x7f" * 50_000 + b"s.",
        "holds 'ema'",
    ),
    "nested lists": (lambda edm: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds list"),
    "nested tuples": (lambda edm: b"\x80\x02)" + b"\x85" * 100_000 + b".", "holds tuple"),
    "a key whose hash has no end": (lambda edm: b"\x80\x02)q\x00" + SHARED + b"}h\x3cNs.", "a tuple is a key"),
    "a text that has no end": (lambda edm: with_stand_in(edm, Call(np.dtype, *[nested(60)])), "NumPy scalar of type a list"),
    "more opcodes than any network": (lambda edm: b"\x80\x02" + b"N0" * 400_000 + b"N.", "more than 500,000 opcodes"),
    "a state for a number": (lambda edm: b"\x80\x02K\x01}b.", "sets the state of a int"),
    "a call of data": (lambda edm: b"\x80\x02}q\x00)R.", "calls a dict"),
    "a stack that is empty": (lambda edm: b"\x80\x02a.", "is not a network"),
    "modules in 30 layers of two": (lambda edm: modules(edm, 30, 2), "nested more than 20 deep"),
    "modules in 15 layers of four": (lambda edm: modules(edm, 15, 4), "more than 20,000 modules"),
    "a module within itself": (cyclic, "nested more than 20 deep"),
    "stride 0": (lambda edm: with_stand_in(edm, tensor(1, (64, 16), (0, 0))), r"tensor of \[64, 16\] over 1 elements"),
    "stride 0 of 10^12 elements": (lambda edm: with_stand_in(edm, tensor(4, (10**6, 10**6), (0, 0))), "a tensor of"),
    "a storage that is smaller than the shape": (
        lambda edm: with_stand_in(edm, tensor(1023, (64, 16), (16, 1))),
        "over 1023 elements",
    ),
    "an offset beyond the storage": (lambda edm: with_stand_in(edm, tensor(1024, (64, 16), (16, 1), 1)), "over 1024 elements"),
    "a negative stride": (lambda edm: with_stand_in(edm, tensor(1024, (64, 16), (16, -1))), "over 1024 elements"),
    "a shape of 1,000 axes": (lambda edm: with_stand_in(edm, tensor(1, (1,) * 1000, (1,) * 1000)), "a tensor of a tuple"),
}


def nested(depth: int) -> list[Any]:
    """Nest lists, each containing the previous one twice: the text has length 2^depth."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_take_neither_memory_nor_time(edm: Any, tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    data = make(edm)
    (tmp_path / "file.pkl").write_bytes(data)
    errors = []

    def read(_: bytes) -> None:
        try:
            convert(tmp_path / "file.pkl")
        except BeelineError as error:
            errors.append(str(error))
            raise

    assert outcomes(read, [data]) == {"BeelineError": 1}
    assert re.search(message, errors[0]), errors


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_dim": 10**8}, {"num_blocks": 10**5}, {"channel_mult": [1] * 10**6}, {"channel_mult": [1] * 60},
        {"model_channels": 10**6}, {"augment_dim": 10**12}, {"channel_mult_emb": 2**70}, {"img_resolution": 10**9},
        {"attn_resolutions": nested(60)}, {"num_blocks": "4"}, {"model_channels": 16.5}, {"label_dim": -1},
        {"channel_mult": []},
    ],
    ids=lambda arguments: next(iter(arguments)),
)  # fmt: skip
def test_networks_beyond_the_files_size_are_never_built(edm: Any, tmp_path: Path, arguments: dict[str, Any]) -> None:
    data = released(edm, "ddpmpp", **arguments)[0]
    (tmp_path / "file.pkl").write_bytes(data)
    assert outcomes(lambda _: convert(tmp_path / "file.pkl"), [data]) == {"BeelineError": 1}


def test_tensors_that_share_their_bytes_are_refused(edm: Any, tmp_path: Path) -> None:
    """A thousand tensors share one storage: a small file would become a large model."""
    blob = tensor(10_000, (10_000,), (1,))
    buffers = {str(k): blob for k in range(1000)}
    inner = Persistent(edm, "SongUNet", {"_buffers": buffers, "_init_kwargs": KWARGS})
    state = {"_modules": {"model": inner}, "_init_kwargs": {"img_resolution": 8, "img_channels": 3}}
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"ema": Persistent(edm, "EDMPrecond", state)}))
    with pytest.raises(BeelineError, match="tensors have 40,000,000 bytes, more than the file"):
        convert(tmp_path / "file.pkl")
