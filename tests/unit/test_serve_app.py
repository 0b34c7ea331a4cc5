"""The serve command line and its builder, up to the point that needs Ray."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.fake_engine import make_vocabulary

from serve import app
from serve.request_errors import RequestError
from udrl.commands import CommandVocabulary
from udrl.errors import UserError, exit_code
from udrl.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vocabulary() -> CommandVocabulary:
    return make_vocabulary()


def _recipe(folder: Path, **changes: Any) -> Recipe:
    return Recipe(name="r", storage=str(folder), tasks=["text_to_image"], intents={"limit": 9}, **changes)  # type: ignore[arg-type]


def _export(folder: Path, vocabulary: CommandVocabulary, positions: int) -> str:
    folder.mkdir()
    vocabulary.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"n_positions": positions}))
    return str(folder)


def test_the_engines_context_is_limited_by_the_students_positions(tmp_path: Path, vocabulary: CommandVocabulary) -> None:
    student = _export(tmp_path / "student", vocabulary, 128)
    assert app.check_student(_recipe(tmp_path), student) == (128, vocabulary)
    with pytest.raises(UserError, match=r"serve.sampling.max_tokens: 128 leaves no room"):
        app.check_student(_recipe(tmp_path, serve={"sampling": {"max_tokens": 128}}), student)


def test_a_broken_export_is_reported_in_one_line(tmp_path: Path, vocabulary: CommandVocabulary) -> None:
    student = _export(tmp_path / "student", vocabulary, 128)
    Path(student, "commands.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*; export it again") as caught:
        app.check_student(_recipe(tmp_path), student)
    assert len(str(caught.value).splitlines()) == 1


def _recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: r\nstorage: {tmp_path}/run\ntasks: [text_to_image]\nintents: {{limit: 9}}\n")
    return str(path)


def test_serving_before_training_exits_2_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(app.main, [_recipe_file(tmp_path)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: student: no exported model in {tmp_path}/run/student")
    assert "\n" not in line


def test_a_busy_port_exits_2_with_one_line(
    tmp_path: Path, vocabulary: CommandVocabulary, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    _export(tmp_path / "run" / "student", vocabulary, 256)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert exit_code(app.main, [_recipe_file(tmp_path), f"serve.port={port}"]) == 2
    assert capsys.readouterr().err.strip() == f"error: serve.port: 127.0.0.1:{port} is in use; set serve.port=<a free port>"


def test_an_unknown_key_of_a_serve_config_is_named() -> None:
    with pytest.raises(UserError, match="serve config: args: modle: unknown key"):
        app.build({"recipe": "r.yaml", "modle": "x"})


def test_ray_and_the_builder_accept_the_shipped_serve_config() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "serve.app:build"
    app.ApplicationArguments.model_validate(application.args)


def test_the_playground_loads_nothing_from_other_hosts_and_never_parses_text_as_html() -> None:
    page = (ROOT / "serve" / "playground" / "index.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert not any(sink in page for sink in ("innerHTML", "insertAdjacentHTML", "document.write", "eval("))


@pytest.mark.parametrize("error", [RuntimeError("in /srv/models"), OSError("a socket was reset"), KeyError("in Ray")])
def test_any_exception_of_an_engine_call_becomes_a_retryable_503(error: Exception) -> None:
    from serve.ingress import engine_errors_as_503

    with pytest.raises(RequestError) as caught, engine_errors_as_503():
        raise error
    assert (caught.value.status, caught.value.kind, caught.value.retry_after) == (503, "engine_lost", 1)
    assert str(error) not in caught.value.message  # it may contain paths


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", None])
def test_without_keys_the_ingress_does_not_start_if_serve_listens_to_other_machines(
    host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve import context

    from serve.ingress import require_loopback_host

    def client(http_host: str | None) -> SimpleNamespace:
        return SimpleNamespace(http_config=SimpleNamespace(host=http_host))

    monkeypatch.setattr(context, "_get_global_client", lambda: client("127.0.0.1"))
    require_loopback_host()
    monkeypatch.setattr(context, "_get_global_client", lambda: client(host))
    with pytest.raises(UserError, match=r"http_options\.host"):
        require_loopback_host()
