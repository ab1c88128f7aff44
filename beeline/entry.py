"""Start and end of every command: an error or a signal prints one line, never a traceback.

A script calls `guard` before its slow imports and `run_main` at its end. This module imports only the standard library, so that
it loads before anything slow.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from beeline.errors import BeelineError

SIGNALS = {
    signal.SIGINT: "interrupted; run the same command again to continue",
    signal.SIGTERM: "terminated by SIGTERM; run the same command again to continue",
}
BROKEN_PIPE = 128 + signal.SIGPIPE


def guard() -> None:
    """Make SIGINT and SIGTERM end this process at once with one line, until `run_main` takes over. For the seconds in which a
    script imports its modules and has started nothing yet."""
    _handle(lambda number, frame: _exit_now(number, say=True))


def run_main(call: Callable[[], Any], cleanup: Callable[[], Any] = lambda: None) -> NoReturn:
    """Call `call`, then `cleanup`, and exit.

    The status is 0, 1 for a BeelineError, 130 after Ctrl-C, or 143 after SIGTERM, each with one line on stderr; 141 if the
    reader of stdout is gone. A second signal ends the process without waiting for `cleanup`. Other exceptions are bugs and keep
    their traceback.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt  # also for SIGTERM: libraries expect it, and Ray's blocking calls pass on no other exception

    _handle(interrupt)
    status: Any = 0
    try:
        try:
            call()
            print(end="", flush=True)  # an error here is still handled
        finally:
            _handle(lambda number, frame: _exit_now(received[0] if received else number, say=not received))
    except BaseException as error:
        if received:  # whatever exception it has turned into
            status = 128 + received[0]
            _say(SIGNALS[signal.Signals(received[0])])
        elif isinstance(error, SystemExit):
            status = error.code
        elif isinstance(error, BeelineError):
            status = 1
            _say(str(error))
        elif isinstance(error, BrokenPipeError) and _reader_has_gone():
            status = BROKEN_PIPE
        else:
            raise
    finally:
        cleanup()
    _drop_unwritten()
    sys.exit(status)


def _handle(handler: Callable[[int, FrameType | None], Any]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background jobs ignore SIGINT
            signal.signal(number, handler)


def _exit_now(number: int, say: bool) -> NoReturn:
    if say:
        _say(SIGNALS[signal.Signals(number)])
    os._exit(128 + number)


def _say(message: str) -> None:
    line = " ".join(part.strip() for part in message.splitlines())
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, f"error: {line}\n".encode())  # not sys.stderr: the signal may have interrupted a write to it


def _reader_has_gone() -> bool:
    """Return whether stdout is a pipe without a reader."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_unwritten() -> None:
    """Write the rest of stdout, or drop it if it has no reader; otherwise Python would complain at exit."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
