"""Folders on local disks or object stores, with the one guarantee that everything else depends on: a file appears whole,
under its final name, or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
import uuid
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError

from beeline.errors import BeelineError, StorageError, plain, reading
from beeline.files.places import resolve

JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entrypoint of a submitted job
READ_ATTEMPTS = 10  # waits double from 25 ms: half a minute in total
WRITE_ATTEMPTS = 12  # waits double up to 20 s: about three minutes in total
LEFT_OVER_SECONDS = 24 * 3600  # longer than any write
FAILURES = (OSError, BotoCoreError, ClientError)


class Folder:
    """A folder for files: "runs/digits", "/data/x" or "s3://bucket/prefix" (places.py lists all forms). Picklable; `folder /
    "name"` is a sub-folder.

    Reads use pyarrow.fs, writes use fsspec: s3fs reads from S3 at a third of pyarrow's speed, and pyarrow would write large
    files in parts. Both accept the standard AWS_* variables, including AWS_ENDPOINT_URL, and instance profiles.
    """

    def __init__(self, uri: str) -> None:
        self.uri = resolve(uri)
        self.is_local = "://" not in self.uri
        if self.is_local and JOB_MARK in os.environ and not uri.startswith(("/", "~", "file:")):
            raise BeelineError(
                f"the workspace {uri!r} is relative, but a submitted job runs in a temporary copy of the working directory, "
                "so its results would be lost. Set --workspace to an absolute path that all machines share, or to "
                "s3://bucket/prefix"
            )

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return Arrow's file system of this folder and the folder's path in it."""
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.uri
        if self.uri.startswith("s3://"):
            environment = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"))
            return _s3_reader(*environment), self.uri.removeprefix("s3://")
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(_writer(self.uri)[0])), _writer(self.uri)[1]

    def write(self, name: str, data: bytes) -> None:
        """Publish `data` as file `name`: one PUT, or a temporary file and a rename. Raises StorageError on failure."""
        try:
            if self.is_local:
                path = os.path.join(self.uri, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                temporary = os.path.join(os.path.dirname(path), _temporary_name())
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
                fs, path = _writer(self.uri)
                fs.pipe_file(f"{path}/{name}", data, **_one_put(self.uri, data))
        except FAILURES as error:
            raise StorageError(
                f"{self}/{name} cannot be written: {plain(error)}. Check the workspace's path, permissions, credentials and "
                "free space, then run the command again: existing files are kept"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Publish `value` as indented JSON."""
        self.write(name, json.dumps(value, indent=2).encode())

    def open(self, name: str) -> pa.NativeFile:
        """Open the file for random access. Raises like `read`."""
        fs, path = self.arrow()
        try:
            return fs.open_input_file(f"{path}/{name}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{self}/{name}") from error
        except FAILURES as error:
            raise StorageError(
                f"{self}/{name} cannot be read: {plain(error)}. Check the bucket's name, permissions and credentials"
            ) from error

    def read(self, name: str) -> bytes:
        """Read the file's bytes. Raises FileNotFoundError, or StorageError if it exists and cannot be read."""
        with self.open(name) as file:
            try:
                return file.read()
            except FAILURES as error:
                raise StorageError(f"{self}/{name} cannot be read: {plain(error)}") from error

    def read_json(self, name: str) -> Any:
        """Read the file as JSON, or return None if it does not exist. Raises BeelineError if it is damaged."""
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None
        with reading(f"{self}/{name} is not valid JSON", "remove it and run the command again"):
            return json.loads(data)

    def sizes(self) -> dict[str, int]:
        """Return names and sizes in bytes of the files directly in this folder, sorted by name, without temporary files."""
        entries = self._list(pyarrow.fs.FileType.File)
        files = {entry.base_name: int(entry.size) for entry in entries if not entry.base_name.endswith(".tmp")}
        return dict(sorted(files.items()))

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one, sorted."""
        return sorted(entry.base_name for entry in self._list(pyarrow.fs.FileType.Directory))

    def _list(self, kind: pyarrow.fs.FileType) -> list[pyarrow.fs.FileInfo]:
        fs, path = self.arrow()
        try:
            entries = fs.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
        except NotADirectoryError:
            return []
        except FAILURES as error:
            raise StorageError(
                f"{self} cannot be listed: {plain(error)}. Check the bucket's name, permissions and credentials"
            ) from error
        return [entry for entry in entries if entry.type == kind and entry.base_name]

    def remove(self, name: str) -> None:
        """Remove one file. No error if it is already gone: others may work on the folder. Raises StorageError on failure."""
        try:
            fs, path = _writer(self.uri)
            fs.rm_file(f"{path}/{name}")
        except FileNotFoundError:
            return
        except FAILURES as error:
            raise StorageError(f"{self}/{name} cannot be removed: {plain(error)}. Check permissions and credentials") from error

    def remove_all(self) -> None:
        """Remove the files directly in this folder, and the folder."""
        for name in self.sizes():
            self.remove(name)
        if self.is_local:
            self.clean()
            with contextlib.suppress(OSError):  # another process removed it, or is writing a file in it
                os.rmdir(self.uri)

    def clean(self) -> None:
        """Remove temporary files of killed writers; those of live writers stay."""
        if not self.is_local or not os.path.isdir(self.uri):
            return
        for name in os.listdir(self.uri):
            path = os.path.join(self.uri, name)
            with contextlib.suppress(OSError):  # its writer or another cleaner removed it first
                if name.endswith(".tmp") and _is_left_over(path):
                    os.unlink(path)


def _temporary_name() -> str:
    return f".{uuid.uuid4().hex}.{_machine()}.{os.getpid()}.tmp"


def _machine() -> str:
    """Identify where process ids are comparable: the host's name and, because containers may share it, the PID namespace."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _is_left_over(path: str) -> bool:
    """Return whether the writer of a temporary file is gone: by its process on this machine, else by the file's age."""
    host, _, process = os.path.basename(path).removesuffix(".tmp").split(".", 2)[-1].rpartition(".")
    if host == _machine() and process.isdecimal():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - os.stat(path).st_mtime > LEFT_OVER_SECONDS


@functools.cache
def _s3_reader(endpoint_s3: str | None, endpoint: str | None, region: str | None) -> pyarrow.fs.S3FileSystem:
    return pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint_s3 or endpoint,
        region=region,
        connect_timeout=10,
        retry_strategy=pyarrow.fs.AwsDefaultS3RetryStrategy(max_attempts=READ_ATTEMPTS),
    )


def _writer(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write here too
    if uri.startswith("s3://"):
        options["config_kwargs"] = {
            "retries": {"mode": "standard", "max_attempts": WRITE_ATTEMPTS},
            "connect_timeout": 10,
            "read_timeout": 30,
        }
    fs, path = fsspec.core.url_to_fs(uri, **options)
    if uri.startswith("s3://"):
        _count_retries(fs)
    return fs, str(path)


def _one_put(uri: str, data: bytes) -> dict[str, Any]:
    return {"chunksize": len(data) + 1} if uri.startswith("s3://") else {}  # s3fs would write larger files in parts


_retried: list[int] = []


@functools.cache  # once per fsspec instance; fsspec caches them for the life of the process
def _count_retries(fs: Any) -> None:
    def count(attempts: int, **_: Any) -> None:
        if attempts > 1:
            _retried.append(1)

    fs.s3.meta.events.register("needs-retry.s3", count)


def retries() -> int:
    """Return how often this process has repeated a request of a write to S3."""
    return len(_retried)
