"""Progress on stderr: one line that is written over on a terminal, a line per step elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Progress", "bar"]


def bar(done: int, of: int, width: int = 16) -> str:
    """How far along: ``[####............] 4/16``."""
    filled = width * done // max(of, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}] {done}/{of}"


class Progress:
    """``with progress("compiling"): ...`` says so, and while it lasts, for how long it has lasted."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._begin = time.monotonic()
        self._every = 1.0 if self._tty else 5.0
        self._due = self._begin + self._every
        try:  # a descriptor of its own: timing.memory() silences descriptor 2 for a while
            self._descriptor: int | None = os.dup(sys.stderr.fileno())
        except (OSError, ValueError):
            self._descriptor = None

    def _write(self, text: str, *, last: bool = False) -> None:
        if last and not self._tty:
            return
        line = f"\r\x1b[K{'' if last else text[:110]}" if self._tty else f"{text}\n"
        if self._descriptor is not None:
            os.write(self._descriptor, line.encode(errors="replace"))
        else:
            sys.stderr.write(line)
            sys.stderr.flush()

    @contextlib.contextmanager
    def __call__(self, text: str) -> Iterator[None]:
        """Show ``text`` now, and every few seconds again with the time that it has taken."""
        done = threading.Event()
        begin = time.monotonic()
        stamp = f"[{begin - self._begin:4.0f} s] "

        def beat() -> None:
            while not done.wait(self._every):
                self._write(f"{stamp}{text}: {time.monotonic() - begin:.0f} s")

        self._write(stamp + text)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._write("", last=True)

    def tick(self, text: Callable[[], str]) -> None:
        """Show what ``text`` returns, if the last such line was long enough ago; to be called often."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._every
            self._write(f"[{now - self._begin:4.0f} s] {text()}")

    def clear(self) -> None:
        """Remove the line that is written over, before another is printed."""
        self._write("", last=True)

    def warn(self, text: str) -> None:
        """A line that stays."""
        if self._tty:
            sys.stderr.write("\r\x1b[K")
        print(f"warning: {text}", file=sys.stderr, flush=True)
