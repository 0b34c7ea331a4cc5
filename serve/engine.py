"""The engine deployment: ray.serve.llm's vLLM server, made to load an exported student.

Importing this module imports vLLM (seconds, most of a gigabyte): only the builder and the engine's replicas do.
"""

import asyncio
import tempfile
from typing import Any

from ray.serve import Application
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment

from udrl import storage
from udrl.policies.settings import bundles, engine_kwargs, environment
from udrl.recipe import Recipe, Serve
from udrl.student.policy import fit


class StudentServer(LLMServer):
    """Ray's LLM server for a student under any URI that pyarrow opens, with a plain-data method for the ingress.

    Ray's own mirror takes s3, gs, abfss and azure alone, caches by model id (a retrained student of the same name would be
    mixed with the old files) and only logs a failed download (CloudModelDownloader.get_model in
    ray/llm/_internal/common/utils/download_utils.py).
    """

    async def __init__(self, llm_config: LLMConfig, student: str) -> None:  # type: ignore[misc]  # Serve awaits constructors
        # hf_model_id is where Ray itself puts a downloaded model's folder (initialize_node in
        # ray/llm/_internal/serve/utils/node_initialization_utils.py); the engine then loads it as a local path.
        engine_config: Any = llm_config.get_engine_config()
        engine_config.hf_model_id = await asyncio.to_thread(local_folder, student)
        await super().__init__(llm_config)

    async def write(self, body: dict[str, Any]) -> dict[str, Any]:
        """Complete token ids: the body of an OpenAI completion request in, ``choices`` and ``usage`` out.

        Plain data on both sides, so that the ingress need not import vLLM.

        Raises:
            RuntimeError: the engine refused the request. The ingress has validated it, so that is a fault of ours.
        """
        from ray.serve.llm.openai_api_models import CompletionRequest, ErrorResponse

        request = CompletionRequest(model=self._llm_config.model_id, **body)
        # A request that does not stream yields once.
        answers = [answer async for answer in await self.completions(request)]
        completion: Any = answers[0]
        if isinstance(completion, ErrorResponse):
            raise RuntimeError(f"the engine refused a request: {completion.error.message}")
        usage = completion.usage
        return {
            "choices": [{"text": choice.text, "finish_reason": choice.finish_reason} for choice in completion.choices],
            "usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens or 0},
        }


def local_folder(student: str) -> str:
    """The student as a local folder: itself where it is local, else a fresh copy, so that no older one is mixed in."""
    return storage.download_folder(student, "" if storage.is_local(student) else tempfile.mkdtemp(prefix="udrl-student-"))


def deployment(recipe: Recipe, student: str, context: int) -> Application:
    """The engine deployment of ``student`` (path or URI), placed and scaled as the recipe's serve section says.

    Ray must be initialised: Ray's builder asks for the driver's runtime environment.
    """
    wanted = recipe.serve
    config = LLMConfig(
        model_loading_config={"model_id": recipe.name},
        accelerator_type=wanted.placement.accelerator,
        placement_group_config={"bundles": _bundles(wanted)},
        runtime_env={"env_vars": environment(wanted.placement)},
        engine_kwargs=engine_kwargs(fit(wanted.engine, context), wanted.placement),
        deployment_config={
            # Ray adds the replica actor's CPUs (1 unless said) to the first bundle: on two cores that would take both.
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": max(wanted.target_ongoing_requests, wanted.engine.max_num_seqs),
            "autoscaling_config": {
                "min_replicas": wanted.min_replicas,
                "max_replicas": wanted.max_replicas,
                "target_ongoing_requests": wanted.target_ongoing_requests,
            },
        },
    )
    return build_llm_deployment(config, deployment_cls=StudentServer, bind_kwargs={"student": student})


def _bundles(wanted: Serve) -> list[dict[str, float]]:
    # A bundle without GPU is what tells Ray that this is a CPU engine (infer_hardware_kind_from_bundles).
    return [{k: v for k, v in bundle.items() if v or k == "CPU"} for bundle in bundles(wanted.engine, wanted.placement)]
