"""Released checkpoints come in as data: right weights for every layout, and nothing of the file is ever run."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import beeline
from beeline.checkpoint import build
from beeline.config import NetworkConfig
from beeline.edm_import import convert
from beeline.errors import BeelineError
from beeline.networks.songunet import SongUNet

SOURCE = "raise SystemExit('the embedded source was run')"
SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NETWORKS = {
    "ddpmpp": ("SongUNet", {"augment_dim": 9}),
    "ncsnpp": (
        "SongUNet",
        {
            "embedding_type": "fourier",
            "channel_mult_noise": 2,
            "encoder_type": "residual",
            "decoder_type": "standard",
            "resample_filter": [1, 3, 3, 1],
            "augment_dim": 9,
        },
    ),
    "adm": ("DhariwalUNet", {"model_channels": 64}),
}


@pytest.fixture
def edm() -> Iterator[types.SimpleNamespace]:
    """The names that a released pickle refers to, importable while a test writes one."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    exec("def _reconstruct_persistent_obj(meta): raise SystemExit('the hook was run')", persistence.__dict__)
    exec("class EasyDict(dict): pass", util.__dict__)
    made = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    made |= {"torch_utils.persistence": persistence, "dnnlib.util": util}
    sys.modules.update(made)
    yield types.SimpleNamespace(hook=persistence._reconstruct_persistent_obj, EasyDict=util.EasyDict)
    for name in made:
        del sys.modules[name]


class Persistent:
    """An object as the persistence hook pickles it."""

    def __init__(self, edm: Any, class_name: str, state: dict[str, Any]) -> None:
        self.edm, self.class_name, self.state = edm, class_name, state

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name, "state": self.state}
        return self.edm.hook, (self.edm.EasyDict(meta),)


def persistent(edm: Any, module: nn.Module, class_name: str, **attributes: Any) -> Any:
    """A module in released layout; nn.ModuleDict stays what it is."""
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = OrderedDict(
            (name, persistent(edm, child, type(child).__name__)) for name, child in module.items()
        )
        return plain
    state = {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict({"absent": None, **module._buffers}),
        "_modules": OrderedDict(
            (name, None if child is None else persistent(edm, child, type(child).__name__))
            for name, child in module._modules.items()
        ),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        **attributes,
    }
    return Persistent(edm, class_name, state)


def network(kind: str, label_dim: int) -> tuple[Any, Any]:
    """A denoiser with random weights and the keyword arguments that EDM would record for its network."""
    _, extra = NETWORKS[kind]
    recorded = {**SMALL, **extra}
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recorded.items()
        if key in NetworkConfig.__dataclass_fields__
    }
    config = NetworkConfig(kind=kind, img_resolution=8, img_channels=3, label_dim=label_dim, **arguments)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    return model.eval(), recorded


def released(edm: Any, kind: str, label_dim: int = 10, half: bool = False, **changes: Any) -> tuple[bytes, Any]:
    """The bytes of a file in released layout, and the model whose weights it holds."""
    model, recorded = network(kind, label_dim)
    sizes = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": label_dim}
    if half:
        model.half().float()  # what survives in half precision
    recorded = {**sizes, **recorded, **changes}
    source = model.model.half() if half else model.model
    inner = persistent(edm, source, NETWORKS[kind][0], _init_args=(), _init_kwargs=recorded)
    state = {
        "_parameters": OrderedDict(),
        "_buffers": OrderedDict(),
        "_modules": OrderedDict(model=inner),
        "_init_args": (),
        "_init_kwargs": {"img_resolution": 8, "img_channels": 3, "label_dim": label_dim, "model_type": NETWORKS[kind][0]},
        "sigma_data": np.float64(0.5),
    }
    loss = Persistent(edm, "EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": np.float32(0.5)})
    content = {
        "ema": Persistent(edm, "EDMPrecond", state),
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": edm.EasyDict(class_name="training.dataset.ImageFolderDataset", use_labels=True),
    }
    data = pickle.dumps(content)
    model.model.float()
    return data, model


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
    assert "left alone" in again.stderr


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
    """Runs a command when it is unpickled."""

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
    with pytest.raises(BeelineError, match=f"asks for ({name}).*nothing was run"):
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
        (data[: len(data) // 2], "not a whole pickle"),
        (b"\x89PNG\r\n", "not a whole pickle"),
        (b"", "not a whole pickle"),
        (pickle.dumps([1, 2]), "expected a dict whose 'ema' is a network"),
        (pickle.dumps({"state": 1}), "holds state; expected a dict whose 'ema'"),
        (pickle.dumps({"ema": Persistent(edm, "VPPrecond", {})}), "is a VPPrecond; expected EDMPrecond"),
        (released(edm, "ncsnpp", resample_filter=[1, 2, 1])[0], "neither DDPM"),
        (released(edm, "ddpmpp", num_blocks=2)[0], "do not fit the architecture"),
        (released(edm, "ddpmpp", magic=2)[0], "arguments unknown to EDM's release: magic"),
        (released(edm, "ddpmpp", out_channels=6)[0], "different input and output channels"),
    ]:
        file.write_bytes(content)
        with pytest.raises(BeelineError, match=message):
            convert(file)
    with pytest.raises(BeelineError, match="cannot be read"):
        convert(tmp_path / "absent.pkl")
