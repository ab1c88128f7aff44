"""The exceptions that are meant for the user's eyes."""

from __future__ import annotations

import re


class BeelineError(Exception):
    """Something the user can mend. The message says what was found, what was expected and the fix; commands print it
    alone, without a traceback, and exit with status 1."""


class StorageError(BeelineError):
    """A file or listing that could not be had, retries included: it may pass, so training that is restarted tries again."""


def plain(error: BaseException) -> str:
    """An error's text on one line, for use within a message that names the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    return re.sub(r"^\[Errno -?\d+\] ", "", text)
