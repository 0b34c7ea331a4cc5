"""A job that a test starts and kills."""

import abc
import contextlib
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

HERE = Path(__file__).parent
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "python")
WAIT = 240  # seconds; a trigger that has not come by then fails the test
# Ray's documented settings of a node's health checks. With the defaults, a lost node is noticed after a quarter of a minute.
NOTICE_LOST_NODES_AT_ONCE = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}


class Killable(abc.ABC):
    """A driver in a process of its own, started by :meth:`command`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults = folder, folder / "faults"
        self.faults.mkdir(parents=True)
        self.driver: subprocess.Popen[bytes] | None = None

    @abc.abstractmethod
    def command(self) -> list[str]:
        """Return the command line."""

    def environment(self) -> dict[str, str]:
        paths = [str(HERE / "faults"), str(HERE.parents[1])]
        return {"PYTHONPATH": os.pathsep.join(paths), "UDRL_FAULTS": str(self.faults)}

    def fault(self, name: str) -> None:
        """Add a fault (see ``faults/sitecustomize.py``)."""
        (self.faults / name).touch()

    def struck(self, name: str) -> bool:
        return (self.faults / f"{name}.struck").exists()

    def release(self) -> None:
        """Let all held and blocked processes continue."""
        for fault in [*self.faults.glob("*-hold-*.struck"), *self.faults.glob("*-block-*")]:
            fault.unlink()

    def start(self) -> None:
        self.driver = subprocess.Popen(
            self.command(),
            env=os.environ | self.environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "driver.log").open("ab"),
        )

    def until(self, met: Callable[[], bool]) -> None:
        assert self.driver
        assert wait(lambda: met() or self.driver.poll() is not None), self.log_tail()  # type: ignore[union-attr]
        assert self.driver.poll() is None, f"the job ended before it was killed\n{self.log_tail()}"

    def kill(self) -> None:
        """SIGKILL the driver, and wait until the processes of its cluster have ended."""
        assert self.driver
        family = psutil.Process(self.driver.pid).children(recursive=True)
        self.driver.kill()
        self.driver.wait()
        # Ray's agents notice after half a minute; they have no engine and write no file.
        assert wait(lambda: all(gone(process) or process.name() in RAY_AGENTS for process in family))
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.release()

    def end(self) -> None:
        """Kill the driver if it still runs."""
        if self.driver and self.driver.poll() is None:
            self.kill()

    def finish(self) -> None:
        if not self.driver or self.driver.poll() is not None:
            self.start()
        assert self.driver
        assert self.driver.wait(WAIT) == 0, self.log_tail()

    def log_tail(self) -> str:
        return (self.folder / "driver.log").read_text(errors="replace")[-20_000:]


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or not process.cmdline()
    except psutil.Error:  # a zombie does nothing, and its parent may never wait for it
        return True


def wait(met: Callable[[], bool]) -> bool:
    """Return whether ``met`` became true; the time limit only ends a test that has failed."""
    pause = threading.Event()
    for _ in range(WAIT * 20):
        if met():
            return True
        pause.wait(0.05)
    return False
