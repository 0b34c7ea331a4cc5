"""The serving contract without Ray: what is refused and how, what a left-out command means, what the engine is sent."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError

from serve import api, app
from udrl.commands import ANY, Command, TaskCommands, Vocabulary
from udrl.errors import UserError, exit_code
from udrl.recipe import Recipe, Sampling

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {"intent": "a birthday card", "task": "text_to_image"}


def _learnt(words: int) -> TaskCommands:
    return TaskCommands(
        edges=[0.3, 0.6],
        achieved_reward=[0.1, 0.4, 0.8],
        achieved_relevance=[0.1, 0.4, 0.8],
        counts=[5, 5, 5],
        words=[4, words, 20],
        default_words=words,
        default_reward=2,
    )


@pytest.fixture
def vocabulary() -> Vocabulary:
    tasks = {"text_to_image": _learnt(12), "image_search": _learnt(5)}
    return Vocabulary(max_words=24, reward_bins=3, rank_within="task", tasks=tasks)


@pytest.fixture
def client(vocabulary: Vocabulary) -> TestClient:
    """The real validation and error handlers; the route stops where the engine would begin."""
    web = FastAPI()
    api.install_error_handlers(web)

    @web.post("/v1/prompts")
    async def prompts(request: api.PromptsRequest) -> Command:
        if request.intent == "fail":
            raise RuntimeError("secret detail")
        return api.resolve(request, vocabulary)

    return TestClient(web, raise_server_exceptions=False)


def _error(response: Any) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "field", "type"}
    return error


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"intent": ""}, "intent"),
        ({"intent": "  \n"}, "intent"),
        ({"intent": "x" * 2001}, "intent"),
        ({"intent": 7}, "intent"),
        ({"intent": None}, "intent"),
        ({"intent": "\ud800"}, "intent"),
        ({"task": "sculpture"}, "task"),
        ({"task": None}, "task"),
        ({"length": 0}, "length"),
        ({"length": 25}, "length"),
        ({"length": ANY}, "length"),
        ({"length": "12"}, "length"),
        ({"length": 12.5}, "length"),
        ({"reward": 3}, "reward"),
        ({"reward": ANY}, "reward"),
        ({"reward": True}, "reward"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": None}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_bad_value_is_422_and_names_its_field(client: TestClient, change: dict[str, Any], field: str) -> None:
    response = client.post("/v1/prompts", content=json.dumps({**GOOD, **change}), headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    error = _error(response)
    assert error["field"] == field
    assert error["message"].startswith(f"{field}: ")
    assert "\n" not in error["message"]


@pytest.mark.parametrize("field", ["intent", "task"])
def test_a_missing_key_is_named(client: TestClient, field: str) -> None:
    response = client.post("/v1/prompts", json={key: value for key, value in GOOD.items() if key != field})
    assert response.status_code == 422
    assert _error(response) == {"message": f"{field}: must be given", "field": field, "type": "invalid_request"}


def test_a_body_that_is_not_json_is_400(client: TestClient) -> None:
    response = client.post("/v1/prompts", content=b'{"intent": ', headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert _error(response)["type"] == "invalid_json"


def test_a_body_that_is_not_an_object_says_what_is_expected(client: TestClient) -> None:
    for kwargs in ({"json": ["a"]}, {"json": None}, {"data": {"intent": "x"}}, {}):
        response = client.post("/v1/prompts", **kwargs)
        assert response.status_code == 422
        assert "JSON object" in _error(response)["message"]


def test_unknown_paths_and_methods_have_the_same_error_shape(client: TestClient) -> None:
    assert client.get("/nowhere").status_code == 404
    assert _error(client.get("/nowhere"))["type"] == "not_found"
    assert client.get("/v1/prompts").status_code == 405
    _error(client.get("/v1/prompts"))


def test_a_fault_of_ours_shows_no_detail(client: TestClient) -> None:
    response = client.post("/v1/prompts", json={**GOOD, "intent": "fail"})
    assert response.status_code == 500
    assert _error(response)["type"] == "internal_error"
    assert "secret" not in response.text


def test_what_is_left_out_becomes_the_tasks_default_command(vocabulary: Vocabulary) -> None:
    def command(**given: Any) -> Command:
        return api.resolve(api.PromptsRequest(**{**GOOD, **given}), vocabulary)

    assert command() == Command(task="text_to_image", words=12, reward=2)
    assert command(task="image_search") == Command(task="image_search", words=5, reward=2)
    assert command(length=24, reward=0) == Command(task="text_to_image", words=24, reward=0)


def test_the_engine_is_sent_token_ids_and_draws_as_the_recipe_says() -> None:
    request = api.PromptsRequest(**GOOD, n=3, seed=5)
    sampling = Sampling(temperature=0.7, min_p=0.1, max_tokens=20)
    body = api.engine_request([7, 8, 9], request, sampling, context=64, end=0)
    assert body["prompt"] == [7, 8, 9]
    assert body["stop_token_ids"] == [0]
    assert (body["n"], body["seed"], body["temperature"], body["min_p"], body["max_tokens"]) == (3, 5, 0.7, 0.1, 20)
    assert not {"top_p", "top_k"} & set(body)
    narrowed = sampling.model_copy(update={"top_k": 4, "top_p": 0.9})
    body = api.engine_request([7], request, narrowed, context=64, end=0)
    assert (body["top_k"], body["top_p"]) == (4, 0.9)


def test_an_intent_that_leaves_no_room_for_a_prompt_is_refused() -> None:
    request, sampling = api.PromptsRequest(**GOOD), Sampling(max_tokens=20)
    api.engine_request([1] * 44, request, sampling, context=64, end=0)
    with pytest.raises(api.RequestError, match=r"45 tokens .* at most 44") as caught:
        api.engine_request([1] * 45, request, sampling, context=64, end=0)
    assert caught.value.field == "intent"


def test_several_prompts_at_temperature_zero_are_refused() -> None:
    request = api.PromptsRequest(**GOOD, n=2, temperature=0)
    with pytest.raises(api.RequestError) as caught:
        api.engine_request([1], request, Sampling(), context=256, end=0)
    assert caught.value.field == "n"


def test_the_answer_says_what_each_prompt_achieved() -> None:
    completion = {
        "choices": [{"text": " two  words", "finish_reason": "stop"}, {"text": " one", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4},
    }
    request = api.PromptsRequest(**GOOD, n=2)
    answer = api.answer("m", request, Command(task="text_to_image", words=2, reward=1), completion)
    assert [(p.text, p.words, p.on_length, p.finish_reason) for p in answer.prompts] == [
        ("two  words", 2, True, "stop"),
        ("one", 1, False, "length"),
    ]
    assert answer.command.model_dump() == {"words": 2, "reward": 1}
    free = api.answer("m", request, Command(task="text_to_image"), completion)
    assert free.command.model_dump() == {"words": None, "reward": None}
    assert [p.on_length for p in free.prompts] == [None, None]


def _recipe(folder: Path, **changes: Any) -> Recipe:
    return Recipe(name="r", storage=str(folder), tasks=["text_to_image"], intents={"limit": 9}, **changes)  # type: ignore[arg-type]


def _export(folder: Path, vocabulary: Vocabulary, positions: int) -> str:
    folder.mkdir()
    vocabulary.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"n_positions": positions}))
    return str(folder)


def test_the_engine_holds_no_more_than_the_student_has_positions(tmp_path: Path, vocabulary: Vocabulary) -> None:
    student = _export(tmp_path / "student", vocabulary, 128)
    assert app.inspect_student(_recipe(tmp_path), student) == (128, vocabulary)
    with pytest.raises(UserError, match=r"serve.sampling.max_tokens: 128 leaves no room"):
        app.inspect_student(_recipe(tmp_path, serve={"sampling": {"max_tokens": 128}}), student)


def test_a_broken_export_is_one_clear_line(tmp_path: Path, vocabulary: Vocabulary) -> None:
    student = _export(tmp_path / "student", vocabulary, 128)
    Path(student, "commands.json").write_text("{")
    with pytest.raises(UserError, match="unreadable") as caught:
        app.inspect_student(_recipe(tmp_path), student)
    assert len(str(caught.value).splitlines()) == 1


def _recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: r\nstorage: {tmp_path}/run\ntasks: [text_to_image]\nintents: {{limit: 9}}\n")
    return str(path)


def test_serving_before_training_exits_2_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(app.main, [_recipe_file(tmp_path)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: student {tmp_path}/run/student: no exported model here")
    assert "\n" not in line


def test_a_busy_port_exits_2_with_one_line(tmp_path: Path, vocabulary: Vocabulary, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    _export(tmp_path / "run" / "student", vocabulary, 256)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert exit_code(app.main, [_recipe_file(tmp_path), f"serve.port={port}"]) == 2
    assert capsys.readouterr().err.strip() == f"error: serve.port: 127.0.0.1:{port} is in use; set serve.port=<a free port>"


def test_a_wrong_key_in_a_serve_config_is_named() -> None:
    with pytest.raises(UserError, match="serve config: args: modle: unknown key"):
        app.build({"recipe": "r.yaml", "modle": "x"})


def test_the_shipped_serve_config_is_what_ray_and_the_builder_take() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "serve.app:build"
    app.Arguments.model_validate(application.args)


def test_a_request_model_refuses_unknown_keys() -> None:
    with pytest.raises(ValidationError):
        api.PromptsRequest(**GOOD, stream=True)


def test_the_playground_loads_nothing_from_other_hosts_and_never_parses_text_as_html() -> None:
    page = (ROOT / "serve" / "playground" / "index.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert not any(sink in page for sink in ("innerHTML", "insertAdjacentHTML", "document.write", "eval("))
