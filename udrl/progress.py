"""Progress lines: what, how far, how fast, what remains. One line that redraws on a terminal, plain lines in a log."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType


class Progress:
    """Report ``done`` of ``total`` for one stage.

    Call :meth:`update` with the count so far, or pass ``poll`` and use it as a context manager: a thread then asks it.
    """

    def __init__(self, label: str, total: int, unit: str, poll: Callable[[], int] | None = None, start: int = 0) -> None:
        self.label, self.total, self.unit, self.poll, self.start = label, total, unit, poll, start
        self._begun = time.monotonic()
        self._last = -1e9
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._terminal = sys.stderr.isatty()

    def update(self, done: int, note: str = "", force: bool = False) -> None:
        """Print if the last line is old enough (half a second on a terminal, ten in a log)."""
        now = time.monotonic()
        if not force and now - self._last < (0.5 if self._terminal else 10):
            return
        self._last = now
        seconds = now - self._begun
        speed = (done - self.start) / seconds if seconds > 0 else 0
        left = f"{duration((self.total - done) / speed)} left" if speed > 0 else "starting"
        share = 100 * done / self.total if self.total else 100
        rate = f"{speed:,.1f} {self.unit}/s"
        line = f"{self.label}: {done:,}/{self.total:,} {self.unit} ({share:.0f}%), {rate}, {left}{'; ' + note if note else ''}"
        sys.stderr.write(f"\r\x1b[2K{line}" if self._terminal else line + "\n")
        sys.stderr.flush()

    def finish(self, done: int, note: str = "") -> None:
        """Print the closing line."""
        seconds = time.monotonic() - self._begun
        speed = (done - self.start) / seconds if seconds > 0 else 0
        tail = f" ({speed:,.1f} {self.unit}/s){'; ' + note if note else ''}"
        line = f"{self.label}: {done:,} {self.unit} in {duration(seconds)}{tail}"
        sys.stderr.write(f"\r\x1b[2K{line}\n" if self._terminal else line + "\n")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        if self.poll:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self.poll and error is None:
            self.finish(self.poll())

    def _watch(self) -> None:
        assert self.poll
        while not self._stop.wait(1.0):
            try:
                self.update(self.poll())
            except OSError:  # storage that hiccups must not end the job for want of a progress line
                continue


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
