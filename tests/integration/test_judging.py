"""Real judges on twenty hand-written pairs: bundled models, Ray Data, vLLM."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from udrl import storage
from udrl.evaluate.judges.controls import shuffle_intents
from udrl.evaluate.judges.judging import JudgedOutputs, ask_judges, score_pairs
from udrl.evaluate.outputs import OUTPUTS, columns, select
from udrl.recipe import Judge, Recipe
from udrl.run import EvaluationPaths, JudgePaths, Run
from udrl.tasks import load_tasks

pytestmark = pytest.mark.usefixtures("local_ray")

# Without gold: the pairs below validate.
TASKS = [load_tasks(["text_to_image"])[0].model_copy(update={"name": "own_images"})]
PAIRS = [
    ("a lighthouse in a storm", "Lighthouse on black rocks, huge waves, beam of light through rain, oil painting."),
    ("birthday card with a hedgehog", "Smiling hedgehog with a party hat and a cupcake, pastel balloons, soft watercolor."),
    ("two robots playing chess", "Two rusty robots bent over a chess board, workshop lamp above, dust in the air, film still."),
    ("picture of a snow leopard", "Snow leopard crouching on a grey cliff, falling snow, pale eyes, telephoto close-up."),
    ("logo for a bakery", "Round bakery logo with a wheat ear and a loaf, brown on cream, flat vector."),
    ("an old train station at night", "Empty train station at night, old steam engine waiting, yellow lamps, mist."),
    ("a bowl of ramen", "Steaming bowl of ramen with egg and spring onions, wooden table, warm light from the side."),
    ("desert caravan at sunset", "Caravan of camels crossing orange dunes at sunset, long shadows, wide shot."),
    ("portrait of a violinist", "Portrait of a violinist with closed eyes, dark stage, one spotlight, grainy black and white."),
    ("underwater city", "Underwater city of glass domes, shoals of silver fish between the towers, green light from above."),
    ("poster for a jazz festival", "Jazz festival poster, saxophone player in cut paper shapes, retro print."),
    ("a cat in a library", "Ginger cat asleep on a pile of books in an old library, dust and sunbeams, cosy."),
    ("mountain lake in autumn", "Still mountain lake in autumn, golden larches mirrored in the water, crisp morning."),
    ("astronaut on a beach", "Astronaut sitting on an empty beach, helmet in the sand, two moons over the sea, pink dusk."),
    ("vegetable market in the morning", "Crowded vegetable market in the morning, crates of tomatoes, awnings, warm photo."),
    ("a dragon made of paper", "Folded paper dragon coiled on a desk, sharp creases, red and gold paper, soft shadow, macro."),
    ("kids flying kites", "Children flying bright kites on a green hill, big clouds, wind in the grass, storybook drawing."),
    ("vintage motorcycle", "Vintage motorcycle leaning against a brick wall, chrome and cracked leather, late sun."),
    ("tea ceremony", "Hands whisking green tea in a clay bowl, tatami room, paper screens, quiet light."),
    ("wolf in a forest", "Grey wolf stepping out of a dark pine forest, snow on its back, breath in the cold air."),
]  # fmt: skip
JUDGES = [
    Judge(kind="gated"),
    Judge(kind="coverage"),
    Judge(kind="rubric", style="completion", engine={"max_num_seqs": 32}),  # type: ignore[arg-type]
]


def row(policy: str, number: int, prompt: str) -> dict[str, Any]:
    blank: dict[str, Any] = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    keys = {"policy": policy, "intent_id": number, "intent": PAIRS[number][0], "task": TASKS[0].name}
    return {f.name: blank[str(f.type)] for f in OUTPUTS} | keys | {"probe": "default", "prompt": prompt}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    values: dict[str, Any] = {"name": "judges", "storage": str(tmp_path_factory.mktemp("judges")), "tasks": ["text_to_image"]}
    values |= {"intents": {"limit": 9}, "evaluate": {"judges": [judge.model_dump() for judge in JUDGES]}}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def outputs() -> pa.Table:
    """A teacher that kept to the intents, and a student that wrote every second prompt for another intent."""
    others = shuffle_intents([intent for intent, _ in PAIRS], ["t"] * len(PAIRS))
    shuffled = dict(zip(others, [prompt for _, prompt in PAIRS], strict=True))
    rows = [row("teacher", n, prompt) for n, (_, prompt) in enumerate(PAIRS)]
    rows += [row("student", n, shuffled[intent] if n % 2 else prompt + " Bright.") for n, (intent, prompt) in enumerate(PAIRS)]
    return pa.Table.from_pylist(rows, schema=OUTPUTS)


@pytest.fixture(scope="module")
def evaluation(recipe: Recipe) -> EvaluationPaths:
    return Run(recipe.storage).evaluation("evaluation")


@pytest.fixture(scope="module")
def judged(recipe: Recipe, outputs: pa.Table, evaluation: EvaluationPaths) -> JudgedOutputs:
    return ask_judges(recipe, TASKS, outputs, evaluation)


def scores_of(judged: JudgedOutputs, policy: str, judge: str) -> np.ndarray:
    rows = columns(judged.outputs)
    return select(rows, rows["policy"] == policy)["judge_" + judge]


@pytest.mark.parametrize("name", ["gated", "coverage"])
def test_the_mean_score_rises_as_better_prompts_are_mixed_in(judged: JudgedOutputs, name: str) -> None:
    true, student = scores_of(judged, "teacher", name), scores_of(judged, "student", name)
    assert not np.isnan([*true, *student]).any()
    unrelated = student[1::2]
    means = [np.mean([*unrelated, *true[:n]]) for n in (0, 5, 10, 20)]
    assert means == sorted(means)
    assert means[-1] > means[0]


def test_every_judge_is_validated_on_true_pairs_and_controls(judged: JudgedOutputs) -> None:
    profiles = judged.judges
    relations = {"gated": "independent", "coverage": "independent", "rubric": "teacher"}
    assert {name: profile.relation for name, profile in profiles.items()} == relations
    for profile in profiles.values():
        assert profile.pairs == len(PAIRS)
        assert set(profile.tasks) == {TASKS[0].name}
        assert all(0 <= area.value <= 1 for area in profile.auc.values())
    for name in ("gated", "coverage"):
        assert profiles[name].auc["shuffled"].low > 0.7
        assert profiles[name].auc["echo"].low > 0.7
        mean = scores_of(judged, "teacher", name).mean()
        assert 0 <= profiles[name].unrelated_score < mean / 2
    rubric = profiles["rubric"]
    assert rubric.parse_failures < 0.1
    assert (rubric.validated, rubric.ratio_scale) == (False, False), "a model of 135M parameters can't grade"


def test_a_second_evaluation_starts_no_pass_and_gives_the_same_results(
    judged: JudgedOutputs, recipe: Recipe, outputs: pa.Table, evaluation: EvaluationPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a pass was started")

    for name in ("range", "from_items", "from_arrow"):
        monkeypatch.setattr(ray.data, name, fail)
    again = ask_judges(recipe, TASKS, outputs, evaluation)
    assert again.outputs.equals(judged.outputs)
    assert again.judges == judged.judges


def test_a_killed_pass_asks_only_what_is_missing(judged: JudgedOutputs, recipe: Recipe, evaluation: EvaluationPaths) -> None:
    [folder] = [name for name in storage.list_folders(evaluation.work) if "rubric" in name]
    paths = JudgePaths(storage.join(evaluation.work, folder))
    [part] = [storage.join(paths.scores, name) for name in storage.list_files(paths.scores)]
    before = storage.read_table(part)
    storage.remove(part)
    pairs = [{"intent_id": 0, "intent": PAIRS[0][0], "task": TASKS[0].name, "prompt": PAIRS[0][1]}]
    scores, _ = score_pairs(JUDGES[2], pairs, recipe, TASKS, evaluation)
    after = storage.read_table(part)
    assert after["episode_id"].equals(before["episode_id"])
    assert after["score"].to_numpy() == pytest.approx(before["score"].to_numpy(), abs=1e-5)
    assert scores[0] == pytest.approx(judged.outputs["judge_rubric"][0].as_py(), abs=1e-5)
