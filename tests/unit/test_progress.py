"""Progress lines redraw on a terminal and are log records elsewhere."""

import io
import json
import re
import sys

import pytest

from udrl import logs
from udrl.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report() -> None:
    progress = Progress("score: filter", 200, "shards", start=100)
    progress.update(100)
    progress.update(150)  # too soon after the first line
    progress.update(150, "half of it", force=True)
    progress.finish(200, "1,234 prompts")


LINES = [
    r"score: filter: 100/200 shards \(50%\), 0\.0 shards/s, starting",
    r"score: filter: 150/200 shards \(75%\), [\d,.]+ shards/s, 0s left; half of it",
    r"score: filter: 200 shards in 0s \([\d,.]+ shards/s\); 1,234 prompts",
]


def test_on_a_terminal_one_line_redraws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report()
    assert re.fullmatch("".join("\r\x1b\\[2K" + line for line in LINES) + "\n", terminal.getvalue())


def test_elsewhere_each_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report()
    assert re.fullmatch("".join(line + "\n" for line in LINES), capsys.readouterr().err)


def test_elsewhere_each_line_is_a_json_record_if_the_log_format_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    logs.configure()
    try:
        report()
    finally:
        monkeypatch.undo()
        logs.configure()
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {(record["level"], record["logger"]) for record in records} == {("INFO", "udrl.progress")}
    for record, line in zip(records, LINES, strict=True):
        assert re.fullmatch(line, record["message"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (75, "1m15s"), (3599.6, "1h00m"), (3660, "1h01m"), (100_000, "27h46m")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
