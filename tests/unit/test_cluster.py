"""``cluster.yaml`` passes the validator of ``ray up``, fits the recipes and contains no secret. Needs no AWS account."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import udrl.command_line
from udrl import internals

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


def test_rays_validator_accepts_the_file_as_ray_up_prepares_it(cluster: dict[str, Any]) -> None:
    prepared = internals.prepare_cluster_config(cluster)  # AWS defaults, merged commands, docker, worker counts
    assert prepared["head_setup_commands"][: len(cluster["setup_commands"])] == cluster["setup_commands"]


def test_the_validator_refuses_a_misspelled_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_workerz"):
        internals.prepare_cluster_config({**cluster, "max_workerz": 1})


def test_the_head_has_no_gpu_and_runs_no_tasks(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["node_config"]["InstanceType"].startswith("m")
    assert cluster["docker"]["head_image"].endswith("-cpu")


def test_teacher_trainer_and_server_have_gpus_and_cost_nothing_until_they_are_needed(cluster: dict[str, Any]) -> None:
    for name in ("teacher", "trainer", "server"):
        node = cluster["available_node_types"][name]
        assert node["node_config"]["InstanceType"][0] in "gp"
        assert node["min_workers"] == 0
        assert 1 <= node["max_workers"] <= cluster["max_workers"]
        assert node["node_config"]["IamInstanceProfile"], "without a profile a worker can't reach the bucket"


def test_only_the_teacher_is_spot(cluster: dict[str, Any]) -> None:
    spot = {name for name, node in cluster["available_node_types"].items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"teacher"}


def test_the_llama_recipe_fits_the_node_types(cluster: dict[str, Any]) -> None:
    accelerators = {"teacher": ("L40S", 4), "trainer": ("A100", 8), "server": ("A10G", 1)}
    recipe = udrl.command_line.load(str(ROOT / "recipes/llama3-8b.yaml"))
    gpus_needed = {
        "teacher": (recipe.teacher.placement.accelerator, recipe.teacher.placement.replicas * recipe.teacher.placement.gpus),
        "trainer": (recipe.train.accelerator, recipe.train.workers * recipe.train.gpus_per_worker),
        "server": (recipe.serve.placement.accelerator, recipe.serve.max_replicas * recipe.serve.placement.gpus),
    }
    for name, (accelerator, gpus) in gpus_needed.items():
        kind, per_node = accelerators[name]
        assert accelerator == kind
        assert 1 <= gpus <= per_node * cluster["available_node_types"][name]["max_workers"]


def test_every_process_of_a_node_uses_the_token_file_that_is_copied_there(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = (option.partition("RAY_AUTH_TOKEN_PATH=")[2] for option in options if "RAY_AUTH_TOKEN_PATH=" in option)
    assert any(path.startswith(remote + "/") for remote in cluster["file_mounts"])


def test_the_nodes_install_the_locked_gpu_packages_on_an_image_with_the_same_ray(cluster: dict[str, Any]) -> None:
    (target,) = [remote for remote, local in cluster["file_mounts"].items() if local == "requirements/gpu.txt"]
    assert any(f"--no-deps -r {target}" in command for command in cluster["setup_commands"])
    ray = re.search(r"ray\[[^\]]*\]==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert ray
    for image in ("head_image", "worker_image"):
        assert f":{ray[1]}-py311" in cluster["docker"][image]


def test_the_file_contains_no_secret() -> None:
    text = CLUSTER.read_text()
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{12,}|hf_[A-Za-z0-9]{20,}|-----BEGIN", text)
    assert not re.search(r"(?i)(secret|access)[_ -]?(access[_ -]?)?key(_id)?\s*[:=]", text)
    assert not re.search(r"RAY_AUTH_TOKEN\s*=", text), "the file may contain the path of the token, not the token"
    assert not re.search(r"\b[A-Za-z0-9+]{40,}\b", text), "looks like a key"


def test_validation_does_not_change_the_file(cluster: dict[str, Any]) -> None:
    before = copy.deepcopy(cluster)
    internals.prepare_cluster_config(cluster)
    assert cluster["available_node_types"].keys() == before["available_node_types"].keys()
