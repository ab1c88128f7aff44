"""A real S3 server for the tests, OpenStack Swift with its S3 interface, behind a proxy that injects faults.

Swift is installed from PyPI once, into a separate environment, because the project must not depend on its dependencies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import http.client
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import s3fs
from harness import ROOT, S3_KEYS, free_port, wait_for

from pipeline import storage

ENVIRONMENT = ROOT / ".venv" / "swift"
KEY, SECRET = S3_KEYS.values()

SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = a
swift_hash_path_suffix = b
[storage-policy:0]
name = p0
default = yes
"""
STORAGE_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {etc}
devices = {data}
mount_check = false
workers = 0
log_level = ERROR
log_address = {etc}/nolog
fallocate_reserve = 0
disable_fallocate = true
[pipeline:main]
pipeline = {role}-server
[app:{role}-server]
use = egg:swift#{role}
"""
PROXY_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {etc}
workers = 0
log_level = ERROR
log_address = {etc}/nolog
[pipeline:main]
pipeline = catch_errors cache listing_formats s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:9
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
dns_compliant_bucket_names = true
check_bucket_owner = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
"""


def swift_environment() -> Path:
    """Return the folder of Swift's programs; one of the tests' processes installs them first if needed (a minute)."""
    with open(ENVIRONMENT.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (ENVIRONMENT / "done").exists():
            pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["swift"]
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
            subprocess.run([str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", *pins], check=True)
            (ENVIRONMENT / "done").touch()
    return ENVIRONMENT / "bin"


@dataclasses.dataclass(frozen=True)
class S3:
    """Location of a server."""

    port: int

    @property
    def url(self) -> str:
        """Return its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def variables(self, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
        """Return the standard environment variables of a client."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> s3fs.S3FileSystem:
        """Return a client other than the project's, to inspect and damage the content."""
        return s3fs.S3FileSystem(
            key=KEY, secret=SECRET, endpoint_url=self.url, client_kwargs={"region_name": "us-east-1"}, use_listings_cache=False,
            skip_instance_cache=True,
        )  # fmt: skip


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[S3]:
    """Run Swift's four servers on free ports of loopback, with their data in `folder`."""
    programs, etc = swift_environment(), folder / "etc"
    etc.mkdir(parents=True)
    (folder / "data" / "d1").mkdir(parents=True)
    (etc / "swift.conf").write_text(SWIFT_CONF)
    ports = {role: free_port() for role in ("account", "container", "object", "proxy")}

    def builder(role: str, *arguments: str) -> None:
        command = [programs / "swift-ring-builder", etc / f"{role}.builder", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr  # 1 is a warning

    for role, port in ports.items():
        conf = PROXY_CONF if role == "proxy" else STORAGE_CONF
        (etc / f"{role}-server.conf").write_text(conf.format(port=port, etc=etc, data=folder / "data", role=role))
        if role != "proxy":
            builder(role, "create", "4", "1", "1")
            builder(role, "add", f"r1z1-127.0.0.1:{port}/d1", "1")
            builder(role, "rebalance")
    servers = []
    try:
        for role in ports:
            with open(folder / f"{role}.log", "wb") as log:
                command = [str(programs / f"swift-{role}-server"), str(etc / f"{role}-server.conf")]
                environment = os.environ | {"PYTHONWARNINGS": "ignore"}
                servers.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
                )
        for role, port in ports.items():
            wait_for(lambda p=port: listens(p), 60, f"swift's {role} server")
        yield S3(ports["proxy"])
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def listens(port: int) -> bool:
    """Return whether a server accepts connections on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests (-1: all) that match, each with probability `chance`.

    "storm" answers 503; "reset" breaks the connection before the request arrives; "lost_ack" after it was done;
    "truncate" after half of the answer; "hang" never answers; "flip" changes one bit of the answer's body; "forbid" is 403.
    """

    kind: str
    method: str = ".*"
    path: str = ".*"
    times: int = 1
    chance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.random, self.hits = random.Random(self.seed), 0

    def strikes(self, method: str, path: str) -> bool:
        """Return whether this request is affected, and count it."""
        if self.times == 0 or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        if self.random.random() >= self.chance:
            return False
        self.times -= 1
        self.hits += 1
        return True


class FaultProxy(ThreadingHTTPServer):
    """Stands before an S3 server. It passes Host and path on unchanged, so that signatures stay valid."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behind: S3) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.behind, self.faults, self.lock, self.log = behind, list[Fault](), threading.Lock(), list[tuple[str, str, str]]()
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.s3 = S3(self.server_address[1])
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fault(self, method: str, path: str) -> str:
        """Return the kind of fault for this request, or ""."""
        with self.lock:
            kind = next((fault.kind for fault in self.faults if fault.strikes(method, path)), "")
            self.log.append((method, path, kind))
        return kind

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore broken connections, which this proxy causes on purpose."""


class _Relay(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def relay(self) -> None:
        kind = self.server.fault(self.command, self.path)
        if kind == "reset":
            return self._reset()
        body = self._body()
        if kind == "hang":
            time.sleep(600)
            return self._reset()
        if kind in ("storm", "forbid"):
            status, code = (503, "SlowDown") if kind == "storm" else (403, "AccessDenied")
            return self._answer(status, {}, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.behind.port, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "transfer-encoding", "connection", "content-length"):
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        response = upstream.getresponse()
        answer = bytearray(response.read())
        upstream.close()
        if kind == "lost_ack":
            return self._reset()
        if kind == "flip" and answer:
            answer[len(answer) // 2] ^= 1
        headers = {
            name: value for name, value in response.getheaders() if name.lower() not in ("connection", "transfer-encoding")
        }
        self._answer(response.status, headers, bytes(answer), cut=kind == "truncate")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        elif not headers:
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            time.sleep(0.02)
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def forget() -> None:
    """Drop the clients cached in this process, so that the variables are read again."""
    storage._s3_reader.cache_clear()
    storage._count_retries.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
