"""Folders that are local paths or object-store prefixes, with the one guarantee that everything above rests on: a file
appears whole, under its final name, or not at all."""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

import fsspec

from beeline.errors import BeelineError

JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entrypoint of a submitted job


class Folder:
    """A place for files: "runs/digits", "/data/x" or "s3://bucket/prefix". Picklable; `folder / "name"` is a sub-folder."""

    def __init__(self, uri: str) -> None:
        if "://" not in uri and not os.path.isabs(uri) and JOB_MARK in os.environ:
            raise BeelineError(
                f"the workspace {uri!r} is relative, and a submitted job runs in a temporary copy of the working directory: "
                "what is made there would be lost. Give --workspace an absolute path that all machines share, or s3://bucket/prefix"
            )
        self.uri = uri.rstrip("/") if "://" in uri else os.path.abspath(uri)
        self.is_local = "://" not in self.uri

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    def _at(self, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
        # Without a cache of listings: other processes write here too, and s3fs believes its cache even when it reads.
        options = {} if self.is_local else {"use_listings_cache": False}
        fs, path = fsspec.core.url_to_fs(f"{self.uri}/{name}" if name else self.uri, **options)
        return fs, str(path)

    def write(self, name: str, data: bytes) -> None:
        """Publish `data` as file `name`: one PUT, or a temporary file and a rename. Raises BeelineError if it cannot."""
        try:
            if self.is_local:
                path = os.path.join(self.uri, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                temporary = f"{path}.{uuid.uuid4().hex}.tmp"
                try:
                    with open(temporary, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
                finally:
                    if os.path.exists(temporary):
                        os.unlink(temporary)
            else:
                fs, path = self._at(name)
                fs.pipe_file(path, data)
        except OSError as error:
            raise BeelineError(
                f"{self}/{name} cannot be written: {error}. Check the workspace's path, permissions and free space"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Publish `value` as indented JSON."""
        self.write(name, json.dumps(value, indent=2).encode())

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises FileNotFoundError, or BeelineError if it is there and cannot be read."""
        fs, path = self._at(name)
        try:
            return bytes(fs.cat_file(path))  # pyright: ignore[reportArgumentType]
        except NotADirectoryError as error:
            raise FileNotFoundError(path) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BeelineError(f"{self}/{name} cannot be read: {error}. Check permissions and credentials") from error

    def read_json(self, name: str) -> Any:
        """The file's JSON, or None where it does not exist. Raises BeelineError where it is damaged."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise BeelineError(f"{self}/{name} is not valid JSON ({error}); remove it and run the command again") from error

    def sizes(self) -> dict[str, int]:
        """Names and sizes in bytes of the files directly in this folder, sorted by name; leftovers of writes excluded."""
        fs, path = self._at("")
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise BeelineError(f"{self} cannot be listed: {error}. Check permissions and credentials") from error
        files = {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
        return dict(sorted((name, size) for name, size in files.items() if name and not name.endswith(".tmp")))

    def clean(self) -> None:
        """Remove the temporary files that killed writers left. Only for a folder that nobody is writing to."""
        if self.is_local and os.path.isdir(self.uri):
            for name in os.listdir(self.uri):
                if name.endswith(".tmp"):
                    os.unlink(os.path.join(self.uri, name))
