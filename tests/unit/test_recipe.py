"""A recipe is typed; every mistake in it is one line that names the dotted key, what was given and what is allowed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import udrl.recipe
from scripts import recipe_reference
from udrl import command_line
from udrl.errors import UserError, exit_code
from udrl.recipe import Recipe, Section

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = {"name": "small", "storage": "runs/small", "tasks": ["text_to_image"], "intents": {"limit": 10}}


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return str(file)


def refusal(path: str, *overrides: str) -> list[str]:
    """The lines that a user reads when this recipe is refused."""
    with pytest.raises(UserError) as error:
        command_line.load(path, overrides)
    return str(error.value).splitlines()


# The shipped recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_validates(recipe: Path) -> None:
    assert command_line.load(str(recipe)).name == recipe.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_opens_with_how_to_run_it(recipe: Path) -> None:
    opening = recipe.read_text().split("\n\n")[0]
    assert opening.startswith("#")
    assert f"recipes/{recipe.name}" in opening or f"make {recipe.stem}" in opening


def test_the_recipes_of_the_readme_are_there() -> None:
    assert {"smoke.yaml", "quickstart.yaml", "llama3-8b.yaml"} <= {recipe.name for recipe in RECIPES}


# Reading and overriding


def test_what_is_not_given_has_its_default(path: str) -> None:
    recipe = command_line.load(path)
    assert recipe.intents.limit == 10
    assert recipe.teacher == udrl.recipe.Teacher()


def test_an_override_reaches_a_nested_key_and_leaves_its_neighbours(path: str) -> None:
    recipe = command_line.load(path, ["teacher.placement.replicas=4", "intents.limit=100"])
    assert (recipe.teacher.placement.replicas, recipe.intents.limit) == (4, 100)
    assert recipe.teacher.placement.cpus == udrl.recipe.Placement().cpus


def test_override_values_are_yaml(path: str) -> None:
    recipe = command_line.load(
        path, ["tasks=[a, b]", "train.lr=1e-3", "teacher.revision=null", "teacher.engine.kwargs={seed: 1}"]
    )
    assert (recipe.tasks, recipe.train.lr, recipe.teacher.revision) == (["a", "b"], 0.001, None)
    assert recipe.teacher.engine.kwargs == {"seed": 1}


def test_the_last_override_of_a_key_wins(path: str) -> None:
    assert command_line.load(path, ["seed=1", "seed=2"]).seed == 2


def test_a_section_given_in_part_keeps_the_defaults_of_its_place(path: str) -> None:
    # serve.engine's default length is a student's, not the teacher's; another key beside it must not reset that.
    recipe = command_line.load(path, ["serve.engine.eager=false", "evaluate.sampling.min_p=0.1"])
    assert recipe.serve.engine == udrl.recipe.Serve().engine.model_copy(update={"eager": False})
    assert recipe.evaluate.sampling.temperature == udrl.recipe.Evaluate().sampling.temperature


def test_an_override_fills_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: r\nstorage: runs/r\ntasks: [a]\nintents:\n")
    assert command_line.load(str(file), ["intents.limit=5"]).intents.limit == 5


def test_the_resolved_recipe_reads_back_as_itself(path: str, tmp_path: Path) -> None:
    recipe = command_line.load(path, ["train.lr=0.002", "tasks=[größe]"])
    (tmp_path / "resolved.yaml").write_text(udrl.recipe.dump(recipe), encoding="utf-8")
    assert command_line.load(str(tmp_path / "resolved.yaml")) == recipe


def test_a_key_by_its_former_name_still_works_and_is_reported(path: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = command_line.load(path, ["evaluate.yardsticks=[echo]"])
    assert recipe.evaluate.trivial_baselines == ["echo"]
    assert "yardsticks is now called trivial_baselines" in caplog.text


def test_judges_and_keys_that_only_earlier_versions_had_are_ignored_with_a_warning(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    some = command_line.load(path, ["evaluate.judges=[{kind: pairwise, name: duel}, {kind: rubric}]", "evaluate.pairs=9"])
    assert [judge.kind for judge in some.evaluate.judges] == ["rubric"]
    assert "evaluate.judges: a pairwise judge is ignored: it had no scale, so it could never decide; remove it" in caplog.text
    assert "pairs is ignored: there is no pairwise judge; remove the key" in caplog.text
    none = command_line.load(path, ["evaluate.judges=[{kind: likelihood}, {kind: embedding}]"])
    assert [judge.kind for judge in none.evaluate.judges] == ["gated", "coverage"]


# Documentation


def leaf_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Every key that holds a value, with its description."""
    for name, field in section.model_fields.items():
        inner = recipe_reference.section_type(field)
        if inner:
            yield from leaf_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description


def test_every_key_has_a_description() -> None:
    assert [key for key, description in leaf_keys() if not description] == []


def test_the_key_reference_is_current() -> None:
    assert (ROOT / "docs/recipe.md").read_text(encoding="utf-8") == recipe_reference.render(), "run: make docs"


# Mistakes


def test_an_unknown_key_is_named_with_what_is_allowed_there(path: str) -> None:
    (line,) = refusal(path, "teacher.replicas=4")
    assert path in line
    assert "teacher.replicas: unknown key" in line
    assert "placement" in line
    assert "batch_tokens" not in line, "only the keys of that section"


def test_an_unknown_key_at_the_top_is_told_the_sections(path: str) -> None:
    (line,) = refusal(path, "techer.model=x")
    assert "techer: unknown key" in line
    assert "teacher" in line


@pytest.mark.parametrize(
    ("override", "key", "given"),
    [
        ("intents.limit=many", "intents.limit", "'many'"),
        ("teacher.samples=2.5", "teacher.samples", "2.5"),
        ("teacher=7", "teacher", "7"),
        ("tasks=text_to_image", "tasks", "'text_to_image'"),
        ("teacher.engine.eager=perhaps", "teacher.engine.eager", "'perhaps'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(path: str, override: str, key: str, given: str) -> None:
    (line,) = refusal(path, override)
    assert f" {key}: Input should be" in line
    assert line.endswith(f"got {given}")


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("intents.heldout=1", "intents.heldout", "less than 1"),
        ("train.workers=0", "train.workers", "greater than or equal to 1"),
        ("commands.max_words=300", "commands.max_words", "less than or equal to 256"),
        ("train.zero_stage=4", "train.zero_stage", "0, 1, 2 or 3"),
        ("resume=sometimes", "resume", "'never', 'always' or 'if_possible'"),
        ("train.epochs=.inf", "train.epochs", "finite"),
        ("serve.port=70000", "serve.port", "65535"),
        ("name='../up'", "name", "pattern"),
        ("storage=''", "storage", "at least 1 character"),
        ("tasks=[]", "tasks", "at least 1 item"),
    ],
)
def test_a_value_out_of_range_is_told_the_range(path: str, override: str, key: str, allowed: str) -> None:
    (line,) = refusal(path, override)
    assert f" {key}: " in line
    assert allowed in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("intents.limit=null", "intents.limit: must be set"),
        ("evaluate.lengths=[6, 41]", "evaluate.lengths: [41] lie outside 1..commands.max_words=40"),
        ("train.batch_tokens=128", "train.batch_tokens: 128 is less than one row of 256 tokens"),
        ("serve.min_replicas=3", "serve.min_replicas: 3 is more than serve.max_replicas=2"),
        ("tasks=[a, a]", "tasks: a task is named twice"),
        ("student={init: gpt2, start: copying}", "student.start: copying is for a new student"),
        ("student={init: gpt2, vocabulary: teacher}", "student.vocabulary: teacher is for a new student"),
    ],
)
def test_values_that_contradict_each_other_are_named(path: str, override: str, words: str) -> None:
    (line,) = refusal(path, override)
    assert words in line


def test_every_problem_has_its_own_line(path: str) -> None:
    lines = refusal(path, "teacher.sample=1", "train.workers=0", "seed=x")
    for key in ("teacher.sample", "train.workers", "seed"):
        assert sum(line.startswith(f"{path}: {key}: ") for line in lines) == 1
    assert len(lines) == 3


def test_what_must_be_given_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("seed: 1\n")
    assert refusal(str(file)) == [f"{file}: {key}: missing; it must be given" for key in ("name", "storage", "tasks")]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("intents.limit", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("seed=[1", "the value is not YAML"),
        ("name.first=a", "name is a value, not a section"),
        ("tasks.0=a", "tasks is a value, not a section"),
    ],
)
def test_a_malformed_override_is_shown(path: str, override: str, words: str) -> None:
    (line,) = refusal(path, override)
    assert repr(override) in line
    assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected keys and values"),
        (b"# nothing yet\n", "expected keys and values"),
        (b"- a\n- b\n", "expected keys and values, found list"),
        (b"name: [a\n", "not YAML"),
        (b"name: a\n---\nname: b\n", "not YAML"),
        (b"\xff\xfe\x00name", "not YAML"),
    ],
)
def test_a_file_that_holds_no_recipe_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    (line,) = refusal(str(file))
    assert line.startswith(f"recipe {file}: ")
    assert words in line


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    assert refusal("recipes/absent.yaml") == [
        "recipe recipes/absent.yaml: No such file or directory; the shipped recipes are in recipes/"
    ]
    assert "Is a directory" in refusal(str(tmp_path))[0]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from([*Recipe.model_fields, "engine", "sampling", "nonsense"]) | st.text(max_size=8)


@given(st.dictionaries(keys, values | st.dictionaries(keys, values, max_size=3), max_size=4))
def test_whatever_is_given_is_a_recipe_or_lines_that_name_the_origin(given: dict[str, Any]) -> None:
    try:
        udrl.recipe.from_values({**MINIMAL, **given}, "r.yaml")
    except UserError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith("r.yaml: ") for line in lines)


# The command line


def test_print_shows_the_resolved_recipe_wherever_it_stands(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--print", path, "seed=3"], [path, "--print", "seed=3"], [path, "seed=3", "--print"]):
        with pytest.raises(SystemExit) as stop:
            command_line.parse_recipe(arguments, "a job")
        assert stop.value.code == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["seed"] == 3
        assert shown["train"]["zero_stage"] == 1, "defaults are shown too"


def test_local_storage_becomes_absolute_and_a_uri_stays(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def storage(*overrides: str) -> str:
        return command_line.parse_recipe([path, *overrides], "a job").storage

    assert storage() == str(tmp_path / "runs/small")
    assert storage("storage=~/runs") == str(tmp_path / "home/runs")
    assert storage("storage=s3://bucket/runs") == "s3://bucket/runs"


def test_a_refused_recipe_exits_2_with_one_line_a_problem(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = exit_code(lambda argv: print(command_line.parse_recipe(argv, "a job")), [path, "train.workers=0", "sed=1"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert [line.startswith("error: ") for line in captured.err.splitlines()] == [True, True]


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    heavy = ["torch", "ray", "vllm", "transformers", "deepspeed", "pyarrow", "numpy", "sentence_transformers"]
    code = f"import sys, udrl.command_line; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.strip() == "[]"
