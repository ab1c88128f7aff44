"""Places for files that a user may give: a local path, file:///path, s3://bucket/prefix. Anything else is refused with one
line, before anything is read or written."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from beeline.errors import BeelineError

EXPECTED = "expected a local folder, file:///folder or s3://bucket/prefix"
CREDENTIALS = re.compile(r"://(?:[^/\s@]*@|[^/\s@:]*:(?!\d+(?:/|$))[^\s@]+@)")  # user@host, user:pass/word@host
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=/)")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Other stores that fsspec supports: the module that it imports and the package that provides it.
STORES = {"gs": ("gcsfs", "gcsfs"), "az": ("adlfs", "adlfs"), "abfs": ("adlfs", "adlfs")}
UNFIT = {
    "memory": "each process would have its own memory",
    "hf": "every written file would be a commit",
}


def holds_credentials(text: str) -> bool:
    """Return whether a URL in `text` holds a password or key."""
    return CREDENTIALS.search(text) is not None


def resolve(place: str, what: str = "the workspace") -> str:
    """Return an absolute local path, or the URI of an object store without a trailing slash. Raises BeelineError, naming
    `what`, for a place that cannot hold files."""
    if not place.strip():
        raise BeelineError(f"{what} is empty; {EXPECTED}")
    if holds_credentials(place):
        raise BeelineError(
            f"the URI of {what} holds credentials, which would end up in logs and plans; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or use a profile or role, and give s3://bucket/prefix alone"
        )
    if re.match(r"\w+::", place):
        raise BeelineError(f"{what} is {place!r}, a chain of file systems; {EXPECTED}")
    match = SCHEME.match(place)
    if match is None:
        return _absolute(place, what)
    scheme, rest = match[1], place[match.end() :]
    if scheme == "file":
        url = urlsplit(place)
        if url.netloc not in ("", "localhost"):
            raise BeelineError(f"{what} is {place!r}, a path on the machine {url.netloc!r}; write file:///folder")
        return _absolute(unquote(url.path), what)
    if scheme.lower() in ("s3", *STORES):
        bucket = rest.removeprefix("//").partition("/")[0]
        if scheme != scheme.lower() or not rest.startswith("//") or BUCKET.fullmatch(bucket) is None:
            raise BeelineError(f"{what} is {place!r}; expected {scheme.lower()}://bucket/prefix, in lower case")
        if scheme in STORES and importlib.util.find_spec(STORES[scheme][0]) is None:
            package = STORES[scheme][1]
            raise BeelineError(f"{what} is {place!r}, which needs {package} on every machine: pip install {package}")
        return place.rstrip("/")
    why = f" ({UNFIT[scheme]})" if scheme in UNFIT else ""
    raise BeelineError(f"{what} is {place!r}: {scheme}: cannot hold files{why}; {EXPECTED}")


def _absolute(path: str, what: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise BeelineError(f"{what} is {path!r}, but there is no such user; for a folder of that name write ./{path}")
    return os.path.abspath(expanded)


def local_path(text: str) -> Path:
    """Parse the path given to a command's option, for files on this machine only. Raises BeelineError."""
    place = resolve(text, "the path")
    if "://" in place:
        raise BeelineError(
            f"the path is {text!r}, in an object store; give a local path, and copy the files to or from the store"
        )
    return Path(place)
