"""The exceptions that are meant for the user's eyes, and the boundary at which reading a file becomes one of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

MAX_MESSAGE = 4000  # characters
MAX_REASON = 300  # characters of another library's message


class BeelineError(Exception):
    """Something the user can fix. The message says what was found, what was expected and the fix; commands print it
    alone, without a traceback, and exit with status 1. It is one line, whatever it quotes from files."""

    def __str__(self) -> str:
        return one_line(super().__str__(), MAX_MESSAGE)


class StorageError(BeelineError):
    """A file or listing that could not be had, retries included: it may pass, so training that is restarted tries again."""


class SettingError(BeelineError):
    """A setting that cannot be. The message begins with its name: of a config's field, as PairsConfig.count, or an option."""


def one_line(text: str, limit: int) -> str:
    """`text` on one line of at most `limit` characters: what cannot be printed is escaped, what is too long is cut."""
    text = text[: limit - 3] + "..." if len(text) > limit else text
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """What another library says is wrong, with the exception's name, on one line."""
    try:
        text = str(error)
    except Exception:  # it quotes what cannot be written down: deeper than Python recurses, or too long a number
        text = ""
    text = " ".join(text.split())
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__, MAX_REASON)


@contextlib.contextmanager
def reading(what: str, fix: str) -> Iterator[None]:
    """The boundary of a reader of files that anyone may have written: BeelineErrors pass, everything else becomes one.

    What damaged data raises depends on the damage and on the library, so no list of exceptions would be complete.
    """
    try:
        yield
    except BeelineError:
        raise
    except Exception as error:
        raise BeelineError(f"{what} ({reason(error)}); {fix}") from error


def plain(error: BaseException) -> str:
    """An error's text on one line, for use within a message that names the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    return re.sub(r"^\[Errno -?\d+\] ", "", text)
