"""The watchdog passes items and errors on, and gives up a source that is silent for too long."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from udrl.errors import StalledError
from udrl.watchdog import iterate_with_watchdog


def test_a_source_that_yields_is_read_to_its_end() -> None:
    assert list(iterate_with_watchdog(iter(range(5)), 1, "test")) == [0, 1, 2, 3, 4]


def test_an_error_of_the_source_is_raised_in_the_reader() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("x")

    items = iterate_with_watchdog(source(), 1, "test")
    assert next(items) == 1
    with pytest.raises(KeyError):
        next(items)


def test_a_silent_source_is_given_up_and_the_state_of_the_cluster_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    never = threading.Event()
    idle_calls: list[int] = []

    def source() -> Iterator[int]:
        yield 1
        never.wait()

    items = iterate_with_watchdog(source(), 1.5 / 60, "test", idle=lambda: idle_calls.append(1))
    assert next(items) == 1
    with pytest.raises(StalledError, match=r"test: no progress for .*run the same command again"):
        next(items)
    assert idle_calls
    assert "state of the cluster" in capsys.readouterr().err
    never.set()


def test_a_reader_that_leaves_ends_the_source() -> None:
    ended = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            ended.set()

    items = iterate_with_watchdog(source(), 1, "test")
    assert next(items) == 0
    items.close()
    assert ended.wait(20)
