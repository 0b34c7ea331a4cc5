"""Faults for the kill tests, in every process that finds this folder on PYTHONPATH.

A fault is a file in $UDRL_FAULTS, named ``<when>-<action>-<n>``: before or after the n-th file of a ledger appears, or the
note that completes the checkpoint of step n, ``kill`` the process that writes it, or ``hold`` it until the fault is removed.
The first process that reaches a fault claims it by renaming it, so that it strikes once; ``block`` holds every process that
reaches it.
"""

import os
import signal
import time

_replace = os.replace
_folder = os.environ.get("UDRL_FAULTS", "")


def _strike(when: str, target: str) -> None:
    folder, name = os.path.split(target)
    if name.startswith("part-") and "/completions/" in f"{folder}/":
        number = sum(n.startswith("part-") for n in os.listdir(folder)) + (when == "before")
    elif name.startswith("complete-"):
        number = int(os.path.basename(folder).removeprefix("step-"))
    else:
        return
    for fault in sorted(os.listdir(_folder)):
        if fault.endswith(".struck") or not fault.startswith(when):
            continue
        _, action, at = fault.split("-")
        if number < int(at):
            continue
        if action == "block":
            while os.path.exists(os.path.join(_folder, fault)):
                time.sleep(0.05)
            continue
        struck = os.path.join(_folder, f"{fault}.struck")
        try:
            os.rename(os.path.join(_folder, fault), struck)
        except FileNotFoundError:  # another process reached it first
            continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while os.path.exists(struck):
            time.sleep(0.05)


if _folder:

    def replace(source: str, target: str) -> None:
        _strike("before", str(target))
        _replace(source, target)
        _strike("after", str(target))

    os.replace = replace  # type: ignore[assignment]
