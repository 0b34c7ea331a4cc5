"""Train on two hosts, simulated by network namespaces with addresses of their own, a Ray node and a worker in each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fakes.fake_episodes import fill_with_episodes

from udrl.run import Run, TrainingSummary

pytestmark = pytest.mark.study  # run by hand: it needs root and two more Ray nodes
RAY = os.path.join(os.path.dirname(sys.executable), "ray")
BRIDGE, HOSTS = "udrl0", {"udrl-a": "10.213.7.1", "udrl-b": "10.213.7.2"}


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def hosts() -> Iterator[None]:
    if not (shutil.which("ip") and ip("link", "add", BRIDGE, "type", "bridge")):
        pytest.skip("this machine does not allow network namespaces")
    try:
        assert ip("link", "set", BRIDGE, "up")
        for i, (name, address) in enumerate(HOSTS.items()):
            assert ip("netns", "add", name)
            assert ip("link", "add", f"udrl-v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            assert ip("link", "set", f"udrl-v{i}", "master", BRIDGE, "up")
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            assert ip("-n", name, "link", "set", "eth0", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "del", name)
        ip("link", "del", BRIDGE)


def test_two_workers_on_two_hosts(hosts: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fill_with_episodes(str(run))
    (head, head_address), (other, other_address) = HOSTS.items()
    recipe = {
        "name": "hosts",
        "storage": str(run),
        "tasks": ["text_to_image", "image_search"],
        "intents": {"limit": 10},
        "student": {"depth": 1, "width": 128, "vocab_size": 500, "context": 64},
        "train": {"workers": 2, "placement_strategy": "STRICT_SPREAD", "epochs": 1, "batch_tokens": 512},
    }
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(recipe))
    env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "RAY_AUTH_MODE": "disabled"}
    start = ["--num-cpus=2", "--disable-usage-stats", "--block"]
    nodes = [
        subprocess.Popen(["ip", "netns", "exec", name, RAY, "start", *words, *start], env=env, stdout=subprocess.DEVNULL)
        for name, words in (
            (head, ["--head", f"--node-ip-address={head_address}", "--port=6399", "--include-dashboard=false"]),
            (other, [f"--address={head_address}:6399", f"--node-ip-address={other_address}"]),
        )
    ]
    try:
        job = ["ip", "netns", "exec", head, sys.executable, "-m", "jobs.train", str(tmp_path / "hosts.yaml")]
        process = subprocess.run(
            job, env=env | {"RAY_ADDRESS": f"{head_address}:6399"}, capture_output=True, text=True, timeout=400
        )
        assert process.returncode == 0, process.stderr[-3000:]
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(60)
    summary = TrainingSummary.load(Run(str(run)).student.training)
    assert summary.workers == 2
    assert {worker.address for worker in summary.memory} == set(HOSTS.values())
