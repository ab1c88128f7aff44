"""An S3 server, a proxy before it and a bucket, for the tests that are about object storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import s3fs
from s3 import S3, FaultProxy, swift

from pipeline import storage
from pipeline.storage import Folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with swift(tmp_path_factory.mktemp("swift")) as server:
        client = server.client()
        client.mkdir("bucket")
        yield server


@pytest.fixture(scope="session")
def proxy(server: S3) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def bucket(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Folder]:
    """A prefix of its own for each test, as this process sees it through the proxy."""
    for name, value in proxy.s3.variables().items():
        monkeypatch.setenv(name, value)
    forget()
    proxy.faults, proxy.log = [], []
    yield Folder(f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}")
    proxy.faults = []
    forget()


def forget() -> None:
    """Drop the clients that this process keeps, so that the variables are read again."""
    storage._s3_reader.cache_clear()
    storage._count_retries.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
