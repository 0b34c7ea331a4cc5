"""The ingress deployment: HTTP in front of the engine. It validates, encodes, asks the engine and says what was achieved.

It imports no vLLM: a replica starts in seconds and holds a tokenizer, no model.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve import api
from udrl import commands, storage
from udrl.commands import Vocabulary
from udrl.recipe import Sampling
from udrl.student import tokenizer as student_tokenizer

PLAYGROUND = Path(__file__).parent / "playground" / "index.html"
# The page carries all it needs; nothing it could be made to contain may load or send anything elsewhere.
PLAYGROUND_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
}

# FastAPI's own /docs page loads its scripts from a public host.
app = FastAPI(title="udrl", docs_url=None, redoc_url=None)
api.install_error_handlers(app)


def local_tokenizer(student: str) -> str:
    """A local folder with the student's tokenizer and command vocabulary, without its weights."""
    # Stands above the class that uses it: Serve pickles a deployment by value where it is decorated, with the module's
    # names as they are by then.
    if storage.is_local(student):
        return storage.open_filesystem(student)[1]
    folder = tempfile.mkdtemp(prefix="udrl-tokenizer-")
    for name in storage.list_files(student):
        if name.endswith(".json"):
            Path(folder, name).write_bytes(storage.read_bytes(storage.join(student, name)))
    return folder


# No whole CPU: the engine's placement group may hold every one. Serve's default of 5 ongoing requests would starve it.
@ray_serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
@ray_serve.ingress(app)
class Ingress:
    """Answers for one student.

    Args:
        engine: handle of :class:`serve.engine.StudentServer`.
        student: path or URI of the exported student.
        sampling: a recipe's sampling section, as plain values.
        context: tokens that the engine holds for intent, command and prompt together.
    """

    def __init__(self, engine: DeploymentHandle, model: str, student: str, sampling: dict[str, Any], context: int) -> None:
        folder = local_tokenizer(student)
        self.engine = engine
        self.model = model
        self.sampling = Sampling(**sampling)
        self.context = context
        self.vocabulary = Vocabulary.load(folder)
        self.tokenizer = student_tokenizer.load(folder)
        self.end = student_tokenizer.control_ids(self.tokenizer, [commands.END])[0]
        self.card = api.model_card(model, int(time.time()), self.vocabulary)

    @app.post("/v1/prompts")
    async def prompts(self, request: api.PromptsRequest) -> api.PromptsResponse:
        command = api.resolve(request, self.vocabulary)
        # Token ids, not text, go to the engine: its tokenizer would turn "<|reward:4|>" in an intent into a command.
        ids = student_tokenizer.encode_request(self.tokenizer, self.vocabulary, request.intent, command)
        body = api.engine_request(ids, request, self.sampling, context=self.context, end=self.end)
        return api.answer(self.model, request, command, await self.engine.write.remote(body))

    @app.get("/v1/models")
    async def models(self) -> api.ModelList:
        return api.ModelList(data=[self.card])

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """The ingress is up. The engine's health is Serve's to watch: it restarts a replica that fails its check."""
        return {"status": "ok", "model": self.model}

    @app.get("/", response_class=HTMLResponse)
    async def playground(self) -> HTMLResponse:
        return HTMLResponse(PLAYGROUND.read_text(encoding="utf-8"), headers=PLAYGROUND_HEADERS)
