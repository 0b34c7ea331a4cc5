"""Progress lines: done, share, rate and remaining time of a long step.

On a terminal one line redraws itself. Otherwise each line is a log record of ``udrl.progress`` (see :mod:`udrl.logs`).
"""

import logging
import sys
import time

log = logging.getLogger(__name__)
TERMINAL_INTERVAL, LOG_INTERVAL = 0.5, 10.0  # seconds between lines
_CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Report ``done`` of ``total`` units of one step, of which ``start`` were done before."""

    def __init__(self, label: str, total: int, unit: str, start: int = 0) -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self._started_at = time.monotonic()
        self._last_line_at = -1e9
        self._terminal = sys.stderr.isatty()

    def update(self, done: int, note: str = "", force: bool = False) -> None:
        """Write a line if the last one is old enough, or if ``force`` is set."""
        now = time.monotonic()
        if not force and now - self._last_line_at < (TERMINAL_INTERVAL if self._terminal else LOG_INTERVAL):
            return
        self._last_line_at = now
        rate = self._rate(done, now)
        left = f"{duration((self.total - done) / rate)} left" if rate > 0 else "starting"
        share = 100 * done / self.total if self.total else 100
        line = f"{done:,}/{self.total:,} {self.unit} ({share:.0f}%), {rate:,.1f} {self.unit}/s, {left}"
        self._write(line, note, end="")

    def finish(self, done: int, note: str = "") -> None:
        """Write the last line."""
        now = time.monotonic()
        line = f"{done:,} {self.unit} in {duration(now - self._started_at)} ({self._rate(done, now):,.1f} {self.unit}/s)"
        self._write(line, note, end="\n")

    def _rate(self, done: int, now: float) -> float:
        seconds = now - self._started_at
        return (done - self.start) / seconds if seconds > 0 else 0

    def _write(self, line: str, note: str, end: str) -> None:
        text = f"{self.label}: {line}{'; ' + note if note else ''}"
        if self._terminal:
            sys.stderr.write(f"{_CLEAR_LINE}{text}{end}")
            sys.stderr.flush()
        else:
            log.info(text)


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
