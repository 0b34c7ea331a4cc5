"""After any kill the same command makes every episode exactly once, and only in-flight requests are generated twice."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from fakes.killable_job import HERE, NOTICE_LOST_NODES_AT_ONCE, WAIT, Killable, gone, wait

from udrl import storage
from udrl.command_line import load
from udrl.generate.stage import prepare_generation
from udrl.policies.ledger import list_parts, read_shard
from udrl.policies.stage import UNWRITTEN_BLOCKS, tasks_in_flight
from udrl.run import Run

SHARD, SEQS, INTENTS, SAMPLES = 8, 8, 40, 4
REQUESTS = INTENTS * SAMPLES


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a Llama of two small layers with the bundled teacher's tokenizer: it writes nonsense, and starts in seconds."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from udrl import models

    folder = str(tmp_path_factory.mktemp("tiny") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("bundled:smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Job(Killable):
    """A generate stage in a process of its own; its engines log each request."""

    def __init__(self, folder: Path, teacher: str, engine: str) -> None:
        super().__init__(folder)
        self.engine, self.part, self.log = engine, "", folder / "requests.log"
        self.log.touch()
        values = {
            "name": "kill",
            "storage": str(folder / "run"),
            "watchdog_minutes": 0.1 if engine == "stuck" else 30,
            "tasks": ["image_search"],
            "intents": {"source": "builtin:composer", "limit": INTENTS, "heldout": 0},
            "teacher": {
                "model": teacher,
                "samples": SAMPLES,
                "shard_size": SHARD,
                "max_rejects": 1,
                "sampling": {"max_tokens": 16},
                "engine": {"max_num_seqs": SEQS, "batch_size": 8, "max_model_len": 512},
            },
        }
        self.path = folder / "kill.yaml"
        self.path.write_text(yaml.safe_dump(values))
        self.recipe = load(str(self.path))

    def command(self) -> list[str]:
        return [sys.executable, str(HERE / "faults" / "driver.py"), str(self.path), self.engine, self.part]

    def environment(self) -> dict[str, str]:
        return super().environment() | {"UDRL_REQUEST_LOG": str(self.log)}

    def requests(self) -> list[tuple[int, int, str]]:
        """Return (id, process, node) of every request that an engine took."""
        lines = self.log.read_text().splitlines()
        return [(int(i), int(pid), node) for i, pid, node in (line.split() for line in lines)]

    def engines(self) -> set[int]:
        """Return the processes of the engines that took a request."""
        return {pid for _, pid, _ in self.requests()}

    def files(self) -> int:
        return len(list((self.folder / "run" / "completions").glob("*/part-*.parquet")))

    def assert_exactly_once(self, kills: int) -> None:
        out = prepare_generation(self.recipe).ledger
        tables = [read_shard(out, names) for names in list_parts(out).values()]
        ids = [i for table in tables for i in table["episode_id"].to_pylist()]
        assert {error for table in tables for error in table["error"].to_pylist()} == {""}
        assert len(ids) == len(set(ids)) == REQUESTS
        taken_ids = [i for i, _, _ in self.requests()]
        assert set(taken_ids) == set(ids)
        # The shards in the engine, and those that wait for their file.
        bound = kills * SHARD * (tasks_in_flight(prepare_generation(self.recipe).policy, SHARD) + UNWRITTEN_BLOCKS)
        print(f"{self.engine}: {kills} kills, {len(taken_ids) - len(ids)} of {REQUESTS} requests taken twice; at most {bound}")
        assert len(taken_ids) - len(ids) <= bound


@pytest.fixture
def job(tmp_path: Path, tiny_teacher: str) -> Iterator[Callable[[str], Job]]:
    jobs: list[Job] = []

    def make(engine: str) -> Job:
        jobs.append(Job(tmp_path / f"job{len(jobs)}", tiny_teacher, engine))
        return jobs[-1]

    yield make
    for each in jobs:
        each.end()


def test_engines_that_die_are_replaced_and_a_killed_driver_resumes_from_its_completed_shards(job: Callable[[str], Job]) -> None:
    """Kill the core process of an engine, whose actor survives, then the actor that replaces it, then the driver.

    The job that resumes has a dummy engine: which engine answers makes no difference to what is resumed.
    """
    killed = job("vllm")
    killed.part = "all"
    killed.start()
    for engines, fault, victim in ((1, "after-hold-2", "core"), (2, "after-hold-6", "actor")):
        killed.fault(fault)
        killed.until(lambda n=engines, fault=fault: killed.struck(fault) and len(killed.engines()) == n)  # type: ignore[misc]
        actor = psutil.Process(killed.requests()[-1][1])
        cores = [child for child in actor.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
        (cores[0] if victim == "core" else actor).kill()
        (killed.faults / f"{fault}.struck").unlink()  # now the actor gets a request again, by which it notices a dead core
        # Wait for the core too: it has the model, and on a GPU its successor would lack the memory.
        assert wait(lambda processes=[actor, *cores]: all(map(gone, processes)))  # type: ignore[misc]
    killed.fault("before-hold-12")
    killed.until(lambda: killed.struck("before-hold-12") and len(killed.engines()) == 3)
    killed.kill()
    assert 11 <= killed.files() < REQUESTS / SHARD  # one writer waits, others may still finish
    killed.engine = "dummy"
    killed.finish()
    killed.assert_exactly_once(kills=3)
    scoring = Run(killed.recipe.storage).scoring
    sides = [scoring.episodes, scoring.rejects]
    ids = [i for side in sides for table in storage.iter_tables(side, ["episode_id"]) for i in table["episode_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == REQUESTS


def test_a_driver_can_be_killed_after_a_file_appears_and_a_writer_before_and_after(job: Callable[[str], Job]) -> None:
    """The test above kills the driver before a file appears."""
    killed = job("dummy")
    for fault in ("after-hold-3", "before-block-6"):
        killed.fault(fault)
    killed.start()
    killed.until(lambda: killed.struck("after-hold-3"))
    killed.kill()
    assert killed.files() < REQUESTS / SHARD
    faults = ("before-kill-8", "after-kill-9")
    for fault in faults:
        killed.fault(fault)
    killed.finish()
    assert all(map(killed.struck, faults))
    killed.assert_exactly_once(kills=1)


def test_an_engine_that_hangs_ends_the_job_with_the_cluster_s_state(job: Callable[[str], Job]) -> None:
    """Runs in a process of its own, because only its end frees a read of Ray that never returns."""
    stuck = job("stuck")
    stuck.start()
    assert stuck.driver
    assert stuck.driver.wait(WAIT) == 3, stuck.log_tail()
    log = stuck.log_tail()
    for part in (
        "state of the cluster",
        "alive",
        "MapBatches(Stuck)",
        "generate: no progress for",
        "run the same command again",
    ):
        assert part in log


def test_a_lost_node_loses_only_its_engine(job: Callable[[str], Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run three nodes on one machine: the driver's, which has no CPU for an engine, and two others.

    The engine is a dummy: how Ray replaces its actor does not depend on what the actor holds, and the tests above kill a real
    one. No file is written after the second, so the engine has no more than a few shards when its node is lost.
    """
    import ray
    from ray.cluster_utils import Cluster

    killed = job("dummy")
    for fault in ("after-hold-2", "before-block-3"):
        killed.fault(fault)
    for name, value in (killed.environment() | NOTICE_LOST_NODES_AT_ONCE).items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2))}
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        killed.start()
        killed.until(lambda: killed.struck("after-hold-2"))
        _, _, lost = killed.requests()[0]
        cluster.remove_node(nodes[lost], allow_graceful=False)
        killed.release()
        killed.finish()
        assert {node for _, _, node in killed.requests()} == set(nodes)
        killed.assert_exactly_once(kills=1)
    finally:
        ray.shutdown()
        cluster.shutdown()
