"""Exceptions for users, and the boundary that turns any failure to read a file into one of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

MAX_MESSAGE = 4000  # characters
MAX_REASON = 300  # characters quoted from another library's message


class BeelineError(Exception):
    """An error that the user can fix. The message says what was found, what was expected and the fix.

    Commands print only the message, without a traceback, and exit with status 1. It is always one line, whatever it quotes.
    """

    def __str__(self) -> str:
        return one_line(super().__str__(), MAX_MESSAGE)


class StorageError(BeelineError):
    """A file or listing that could not be read or written, after all retries. It may be transient, so restarted training
    retries it."""


class SettingError(BeelineError):
    """A setting outside its allowed values. The message begins with its name: a config's field, like PairsConfig.count, or an
    option."""


def one_line(text: str, limit: int) -> str:
    """Return `text` on one line of at most `limit` characters: unprintable characters are escaped, longer text is cut."""
    text = text[: limit - 3] + "..." if len(text) > limit else text
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """Describe an exception of another library on one line, with the exception's name."""
    try:
        text = str(error)
    except Exception:  # str() fails on too deeply nested values and on too long numbers
        text = ""
    text = " ".join(text.split())
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__, MAX_REASON)


@contextlib.contextmanager
def reading(what: str, fix: str) -> Iterator[None]:
    """Turn every exception of a reader of untrusted files into one BeelineError; BeelineErrors pass unchanged.

    Damaged data can raise anything, depending on the damage and the library, so no list of exceptions would be complete.
    """
    try:
        yield
    except BeelineError:
        raise
    except Exception as error:
        raise BeelineError(f"{what} ({reason(error)}); {fix}") from error


def plain(error: BaseException) -> str:
    """Return an error's text on one line, for a message that names the file itself."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    return re.sub(r"^\[Errno -?\d+\] ", "", text)
