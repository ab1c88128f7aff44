"""Check a whole store of pairs, every checksum of it, by a pool of actors; draw a contact sheet.

    python pipeline/verify_pairs.py digits
    python pipeline/verify_pairs.py digits --verify.resample 4 --verify.remove

Of each shard: its CRC-32 against the manifest, every page's checksum, the plan, the count, indices, labels, finite values. Of
some: that the noise can be made again, and that the teacher makes the same images of it. Exit status 0 for a sound and
complete store; otherwise each damaged shard is named.
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

from beeline import noise
from beeline.config import PairsConfig, VerifyConfig, from_dict
from beeline.errors import BeelineError, reading
from beeline.files.names import PAIRS
from beeline.labels import pair_labels
from beeline.noise import stream
from beeline.pixels import to_float
from pipeline.command import run_command
from pipeline.gen_pairs import CONTACT, load_sampler, make_pairs, stored
from pipeline.manifest import read_manifest
from pipeline.pool import run_pool
from pipeline.progress import Progress
from pipeline.records import LAYOUTS, PLAN, SUCCESS, plan_in, success_in
from pipeline.shards import Columns, decode, shard_count, shard_name, shard_rows
from pipeline.sheet import sheet_png
from pipeline.stage import fingerprint
from pipeline.storage import Folder

NAMED = 20  # troubles that the error names
NOT_SAMPLED = -1.0  # in the place of a distance
OTHER_DEVICE = 0.05  # RMS by which another kind of device, or library, may differ; another teacher is far beyond


class CheckShards:
    """Checks shard k; remakes its noise or one of its batches where `remake` or `resample` (batch by shard) say so."""

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
        self.folder, self.plan, self.crcs, self.shown = workspace / PAIRS, plan, crcs, shown
        self.remake, self.resample = remake, resample
        self.config = from_dict(PairsConfig, plan["pairs"])
        self.teacher = load_sampler(workspace, recipe, plan, self.config) if resample else None

    def work(self, k: int) -> dict[str, Any]:
        """The row: what is wrong with the shard ("" for nothing), how far re-sampled pairs are (RMS, -1 for none) and
        rows for the contact sheet."""
        row: dict[str, Any] = {"shard": k, "trouble": "", "read": 0, "distance": NOT_SAMPLED, "picked": b""}
        try:
            data = self.folder.read(shard_name(k))
            row["read"] = len(data)
            rows, metadata = decode(data)
        except FileNotFoundError:
            return row | {"trouble": "missing"}
        except BeelineError:
            raise
        except Exception as error:  # what a damaged file raises depends on the damage
            return row | {"trouble": f"unreadable ({str(error) or type(error).__name__})"}
        row["trouble"] = self._trouble(k, data, rows, metadata)
        if not row["trouble"] and k in self.resample:
            row["distance"] = self._distance(k, rows)
            if not row["distance"] <= OTHER_DEVICE:  # NaN, too, is another image
                row["trouble"] = f"its teacher makes other images of the same noise, RMS {row['distance']:.3f} away"
        if not row["trouble"] and k in self.shown:
            row["picked"] = np.ascontiguousarray(_float(rows.images[self.shown[k]])).tobytes()
        return row

    def _trouble(self, k: int, data: bytes, rows: Columns, metadata: Mapping[str, Any]) -> str:
        expected = shard_rows(k, self.config.shard_size, self.config.count)
        if metadata["plan_fingerprint"] != fingerprint(self.plan):
            return "made by another plan"
        if len(rows.indices) != len(expected) or not np.array_equal(rows.indices, expected):
            return f"{len(rows.indices)} rows from index {rows.indices[:1]} where {expected} were expected"
        if not np.array_equal(rows.labels, pair_labels(expected, self.plan["num_classes"])):
            return "labels other than index mod classes"
        if k in self.crcs and zlib.crc32(data) != self.crcs[k]:
            return "another CRC-32 than its manifest row"
        if not np.isfinite(rows.images).all():
            return "values that are not finite"
        if k in self.remake:
            x0 = noise.x0(self.config.seed, expected, metadata["shape"])
            if noise.crc32(x0) != metadata["x0_crc32"]:
                return f"x0 that NumPy {np.__version__} draws otherwise: its CRC-32 differs"
        return ""

    def _distance(self, k: int, rows: Columns) -> float:
        """RMS between the pairs of one batch and the teacher's, made again in the same batch: 0 on the same device."""
        assert self.teacher is not None
        start = self.resample[k] * self.config.batch_size
        part = slice(start, start + self.config.batch_size)
        x0 = noise.x0(self.config.seed, rows.indices[part], self.teacher.image_shape)
        again = stored(make_pairs(self.teacher, x0, rows.labels[part].copy(), self.config), self.config.dtype)
        return float(np.sqrt(np.mean((_float(again) - _float(rows.images[part])) ** 2)))


def _float(images: np.ndarray) -> np.ndarray:
    return to_float(images) if images.dtype == np.uint8 else images.astype(np.float32)


def verify_pairs(workspace: str, recipe: tyro.conf.Suppress[str], verify: VerifyConfig = VerifyConfig()) -> None:
    """Check <workspace>/pairs and draw <workspace>/pairs/contact.png.

    Args:
        workspace: Local folder or s3://bucket/prefix.
    """
    place = Folder(workspace)
    folder = place / PAIRS
    plan = plan_in(folder, LAYOUTS["pairs"])
    if plan is None:
        raise BeelineError(
            f"{folder} holds no pairs; make them with: python pipeline/gen_pairs.py {recipe} --workspace {place}"
        )
    with reading(
        f"{folder}/{PLAN} is not as its stage writes it", f"move {folder} away and make it again, or restore the file"
    ):
        config = from_dict(PairsConfig, plan["pairs"])
    shards = range(shard_count(config.count, config.shard_size))
    chance = stream(verify.seed, "verify")

    def some(count: int) -> list[int]:
        return sorted(chance.choice(len(shards), min(count, len(shards)), replace=False).tolist())

    def batch_of(k: int) -> int:
        return int(chance.integers(-(-len(shard_rows(k, config.shard_size, config.count)) // config.batch_size)))

    shown = sorted(chance.choice(config.count, min(verify.shown, config.count), replace=False).tolist())
    arguments = {
        "workspace": place,
        "recipe": recipe,
        "plan": plan,
        "crcs": {row["shard"]: row["crc32"] for row in read_manifest(folder) if row["crc32"] is not None},
        "remake": frozenset(some(verify.remake)),
        "resample": {k: batch_of(k) for k in some(verify.resample)},
        "shown": {k: [i % config.shard_size for i in shown if i // config.shard_size == k] for k in shards},
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
        f"{len(shards) - len(troubles):,} shards are sound, {len(arguments['remake'])} with their noise made again"
        + (f"; {len(again)} batches sampled again, RMS {max(again):.2g} away at most" if again else "")
        + f"; {folder}/{CONTACT}",
        flush=True,
    )
    if verify.remove:
        for name, trouble in troubles.items():
            if trouble != "missing":
                folder.remove(name)
                print(f"{folder}/{name}: removed ({trouble})", flush=True)
    if troubles or strangers:
        named = [f"{name}: {trouble}" for name, trouble in troubles.items()] + [
            f"{name}: not of this plan" for name in strangers
        ]
        shown_names = "; ".join([*named[:NAMED], *(["..."] if len(named) > NAMED else [])])
        raise BeelineError(
            f"{len(named)} shards of {folder} are not sound: {shown_names}. "
            f"{'Now' if verify.remove else 'Remove them (--verify.remove), then'} run: "
            f"python pipeline/gen_pairs.py {recipe} --workspace {place} with the settings of {PLAN}"
        )
    if success_in(folder) is None:
        raise BeelineError(
            f"every shard of {folder} is sound, but {SUCCESS} is missing; finish it with: "
            f"python pipeline/gen_pairs.py {recipe} --workspace {place} with the settings of {PLAN}"
        )


def _draw(folder: Folder, parts: list[bytes], plan: Mapping[str, Any]) -> None:
    """The contact sheet, of the shards that are sound, in order of their indices."""
    images = np.frombuffer(b"".join(parts), np.float32)
    if images.size:
        images = images.reshape(-1, *plan["shape"])
        folder.write(
            CONTACT, sheet_png(torch.from_numpy(images.copy()).clamp(-1, 1), columns=max(1, round(len(images) ** 0.5)))
        )


if __name__ == "__main__":
    run_command(verify_pairs)
