"""Check every checksum of a store of pairs with an actor pool, and draw a contact sheet.

    python pipeline/verify_pairs.py digits
    python pipeline/verify_pairs.py digits --verify.resample 4 --verify.remove
    python pipeline/verify_pairs.py digits --verify.model students/rf             # the pairs of another model

Checks in each shard: its CRC-32 against the manifest, every page's checksum, the plan, the count, indices, labels and finite
values. Checks in some shards: the noise can be drawn again, and the model makes the same images from it. Exit status 0 for an
intact and complete store; otherwise each damaged shard is named.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import tyro

from beeline.config import PairsConfig, VerifyConfig, from_dict
from beeline.errors import BeelineError, reading
from beeline.files.names import PAIRS, pairs_folder
from beeline.labels import pair_labels
from beeline.noise import crc32, stream, unit_noise
from beeline.pixels import to_float
from pipeline.command import run_command
from pipeline.gen_pairs import CONTACT, load_sampler, make_pairs, maker, stored
from pipeline.manifest import read_manifest
from pipeline.pool import run_pool
from pipeline.progress import Progress
from pipeline.records import LAYOUTS, PLAN, SUCCESS, plan_in, success_in
from pipeline.shards import Columns, decode, shard_count, shard_name, shard_rows
from pipeline.sheet import sheet_png
from pipeline.stage import command_for, fingerprint
from pipeline.storage import Folder

NAMED = 20  # problems named in the error
NOT_SAMPLED = -1.0  # placeholder for a distance
OTHER_DEVICE = 0.05  # maximum RMS between devices or library versions; another teacher differs far more


class CheckShards:
    """Checks shard k. Draws its noise again if k is in `remake`; samples one of its batches again if `resample` names one."""

    def __init__(
        self,
        workspace: Folder,
        recipe: str,
        plan: dict[str, Any],
        crcs: Mapping[int, int],
        remake: frozenset[int],
        resample: Mapping[int, int],
        shown: Mapping[int, list[int]],
    ) -> None:
        self.config = from_dict(PairsConfig, plan["pairs"])
        self.folder, self.plan, self.crcs, self.shown = workspace / pairs_folder(self.config.model), plan, crcs, shown
        self.remake, self.resample = remake, resample
        self.model = load_sampler(workspace, recipe, plan, self.config) if resample else None

    def work(self, k: int) -> dict[str, Any]:
        """Return a row: the shard's problem ("" for none), the distance of re-sampled pairs (RMS, -1 for none) and images for
        the contact sheet."""
        row: dict[str, Any] = {"shard": k, "trouble": "", "read": 0, "distance": NOT_SAMPLED, "picked": b""}
        try:
            data = self.folder.read(shard_name(k))
            row["read"] = len(data)
            rows, metadata = decode(data)
        except FileNotFoundError:
            return row | {"trouble": "missing"}
        except BeelineError:
            raise
        except Exception as error:  # a damaged file can raise anything
            return row | {"trouble": f"unreadable ({str(error) or type(error).__name__})"}
        row["trouble"] = self._trouble(k, data, rows, metadata)
        if not row["trouble"] and k in self.resample:
            row["distance"] = self._distance(k, rows)
            if not row["distance"] <= OTHER_DEVICE:  # also true for NaN
                row["trouble"] = (
                    f"{maker(self.config)} makes other images from the same noise; RMS difference {row['distance']:.3f}"
                )
        if not row["trouble"] and k in self.shown:
            row["picked"] = np.ascontiguousarray(_float(rows.images[self.shown[k]])).tobytes()
        return row

    def _trouble(self, k: int, data: bytes, rows: Columns, metadata: Mapping[str, Any]) -> str:
        expected = shard_rows(k, self.config.shard_size, self.config.count)
        if metadata["plan_fingerprint"] != fingerprint(self.plan):
            return "made by another plan"
        if len(rows.indices) != len(expected) or not np.array_equal(rows.indices, expected):
            return f"{len(rows.indices)} rows from index {rows.indices[:1]}; expected {expected}"
        if not np.array_equal(rows.labels, pair_labels(expected, self.plan["num_classes"])):
            return "labels that differ from index mod classes"
        if k in self.crcs and zlib.crc32(data) != self.crcs[k]:
            return "its CRC-32 does not match the manifest"
        if not np.isfinite(rows.images).all():
            return "values that are not finite"
        if k in self.remake:
            noise = unit_noise(self.config.seed, expected, metadata["shape"])
            if crc32(noise) != metadata["x0_crc32"]:
                return f"NumPy {np.__version__} draws other noise here: its CRC-32 differs"
        return ""

    def _distance(self, k: int, rows: Columns) -> float:
        """Return the RMS between the stored pairs of one batch and the model's new samples of it: 0 on the same device."""
        assert self.model is not None
        start = self.resample[k] * self.config.batch_size
        part = slice(start, start + self.config.batch_size)
        noise = unit_noise(self.config.seed, rows.indices[part], self.model.image_shape)
        again = stored(make_pairs(self.model, noise, rows.labels[part].copy(), self.config), self.config.dtype)
        return float(np.sqrt(np.mean((_float(again) - _float(rows.images[part])) ** 2)))


def _float(images: np.ndarray) -> np.ndarray:
    return to_float(images) if images.dtype == np.uint8 else images.astype(np.float32)


def verify_pairs(workspace: str, recipe: tyro.conf.Suppress[str], verify: VerifyConfig = VerifyConfig()) -> None:
    """Check <workspace>/pairs, or the pairs of `verify.model`, and draw contact.png there.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    name = pairs_folder(verify.model)
    folder, command = place / name, command_for(place, name, recipe)
    plan = plan_in(folder, LAYOUTS[PAIRS])
    if plan is None:
        raise BeelineError(f"{folder} holds no pairs; make them with: {command}")
    with reading(
        f"{folder}/{PLAN} is not as its stage writes it", f"move {folder} away and make it again, or restore the file"
    ):
        config = from_dict(PairsConfig, plan["pairs"])
    shards = range(shard_count(config.count, config.shard_size))
    arguments = {
        "workspace": place,
        "recipe": recipe,
        "plan": plan,
        "crcs": {row["shard"]: row["crc32"] for row in read_manifest(folder) if row["crc32"] is not None},
        **_drawn(config, verify, shards),
    }
    rows: dict[int, dict[str, Any]] = {}
    with Progress("verify", len(shards), "shards") as progress:
        for row in run_pool(CheckShards, arguments, shards, verify, name="verify"):
            rows[row["shard"]] = row
            progress.add(1)
    troubles = {shard_name(k): rows[k]["trouble"] for k in shards if rows[k]["trouble"]}
    names = {shard_name(k) for k in shards}
    strangers = [name for name in folder.sizes() if name.startswith("part-") and name not in names]
    _draw(folder, [rows[k]["picked"] for k in shards], plan)
    again = [rows[k]["distance"] for k in arguments["resample"] if rows[k]["distance"] != NOT_SAMPLED]
    print(
        f"verify: {config.count:,} pairs in {len(shards):,} shards, {sum(row['read'] for row in rows.values()) / 1e9:.2f} GB; "
        f"{len(shards) - len(troubles):,} shards are intact, {len(arguments['remake'])} with their noise drawn again"
        + (f"; {len(again)} batches sampled again, maximum RMS difference {max(again):.2g}" if again else "")
        + f"; {folder}/{CONTACT}",
        flush=True,
    )
    if verify.remove:
        for name, trouble in troubles.items():
            if trouble != "missing":
                folder.remove(name)
                print(f"{folder}/{name}: removed ({trouble})", flush=True)
    command += f" with the settings of {PLAN}"
    named = [f"{name}: {trouble}" for name, trouble in troubles.items()]
    named += [f"{name}: not of this plan" for name in strangers]
    if named:
        shown_names = "; ".join([*named[:NAMED], *(["..."] if len(named) > NAMED else [])])
        raise BeelineError(
            f"{len(named)} shards of {folder} are damaged: {shown_names}. "
            f"{'Now' if verify.remove else 'Remove them (--verify.remove), then'} run: {command}"
        )
    if success_in(folder) is None:
        raise BeelineError(f"every shard of {folder} is intact, but {SUCCESS} is missing; finish it with: {command}")


def _drawn(config: PairsConfig, verify: VerifyConfig, shards: range) -> dict[str, Any]:
    """Draw the shards whose noise is made again, a batch to sample again of others, and the pairs to show of each shard."""
    chance = stream(verify.seed, "verify")

    def some(count: int) -> list[int]:
        return sorted(chance.choice(len(shards), min(count, len(shards)), replace=False).tolist())

    def batch_of(k: int) -> int:
        return int(chance.integers(-(-len(shard_rows(k, config.shard_size, config.count)) // config.batch_size)))

    shown = sorted(chance.choice(config.count, min(verify.shown, config.count), replace=False).tolist())
    return {
        "remake": frozenset(some(verify.remake)),
        "resample": {k: batch_of(k) for k in some(verify.resample)},
        "shown": {k: [i % config.shard_size for i in shown if i // config.shard_size == k] for k in shards},
    }


def _draw(folder: Folder, parts: list[bytes], plan: Mapping[str, Any]) -> None:
    """Draw the contact sheet from the intact shards, in order of their indices."""
    images = np.frombuffer(b"".join(parts), np.float32)
    if images.size:
        images = images.reshape(-1, *plan["shape"])
        folder.write(
            CONTACT, sheet_png(torch.from_numpy(images.copy()).clamp(-1, 1), columns=max(1, round(len(images) ** 0.5)))
        )


if __name__ == "__main__":
    run_command(verify_pairs)
