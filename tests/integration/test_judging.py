"""All judges for real on twenty hand-written pairs: bundled models, Ray Data, vLLM."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from udrl import storage
from udrl.evaluate.judges import ask, embedding, judge_pairwise, judge_pointwise
from udrl.evaluate.judges.validation import controls, shuffled, validate
from udrl.evaluate.outputs import OUTPUTS, columns, select
from udrl.recipe import Judge, Recipe
from udrl.tasks import load_tasks

pytestmark = pytest.mark.usefixtures("local_ray")

TASKS = load_tasks(["text_to_image"])
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
    Judge(kind="likelihood"),
    Judge(kind="embedding", model="bundled:minilm"),
    Judge(kind="rubric", style="completion", engine={"max_num_seqs": 32}),  # type: ignore[arg-type]
    Judge(kind="pairwise", style="completion", engine={"max_num_seqs": 32}),  # type: ignore[arg-type]
]


def row(policy: str, number: int, prompt: str) -> dict[str, Any]:
    blank: dict[str, Any] = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    given = {"policy": policy, "intent_id": number, "intent": PAIRS[number][0], "task": TASKS[0].name}
    return {f.name: blank[str(f.type)] for f in OUTPUTS} | given | {"probe": "default", "prompt": prompt}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    values: dict[str, Any] = {"name": "judges", "storage": str(tmp_path_factory.mktemp("judges")), "tasks": ["text_to_image"]}
    values |= {"intents": {"limit": 9}, "evaluate": {"judges": [judge.model_dump() for judge in JUDGES]}}
    # Nothing is trained here; a recipe lets no judge use the embedder that made the reward.
    return Recipe.model_validate({**values, "rewards": {"embedder": "bundled:smollm2-135m-instruct"}})


@pytest.fixture(scope="module")
def outputs() -> pa.Table:
    """A teacher that wrote what was asked for, and a student that wrote half of it for other intents."""
    others = dict(zip(shuffled([i for i, _ in PAIRS], ["t"] * len(PAIRS)), [p for _, p in PAIRS], strict=True))
    rows = [row("teacher", n, prompt) for n, (_, prompt) in enumerate(PAIRS)]
    rows += [row("student", n, others[intent] if n % 2 else prompt + " Bright.") for n, (intent, prompt) in enumerate(PAIRS)]
    return pa.Table.from_pylist(rows, schema=OUTPUTS)


Asked = tuple[pa.Table, pa.Table, dict[str, Any]]


@pytest.fixture(scope="module")
def asked(recipe: Recipe, outputs: pa.Table) -> Asked:
    return ask(recipe, TASKS, outputs, storage.join(recipe.storage, "work"))


@pytest.mark.parametrize("name", ["likelihood", "embedding"])
def test_the_mean_of_a_judge_rises_as_better_prompts_are_mixed_in(asked: Asked, name: str) -> None:
    rows = columns(asked[0])
    true = select(rows, rows["policy"] == "teacher")["judge_" + name]
    student = select(rows, rows["policy"] == "student")["judge_" + name]
    assert not np.isnan([*true, *student]).any()
    wrong = student[1::2]
    means = [np.mean([*wrong, *true[:n]]) for n in (0, 5, 10, 20)]
    assert means == sorted(means)
    assert means[-1] > means[0]


def test_every_judge_says_how_well_it_tells_true_pairs_from_controls(asked: Asked) -> None:
    facts = asked[2]
    assert set(facts) == {"likelihood", "embedding", "rubric", "pairwise"}
    for found in facts.values():
        assert found["pairs"] == len(PAIRS)
        assert set(found["tasks"]) == {"text_to_image"}
        assert all(0 <= area <= 1 for area in found["auc"].values())
    assert [found["of_teacher"] for found in facts.values()] == [True, False, True, True]
    for name in ("likelihood", "embedding"):
        assert facts[name]["auc"]["shuffled"] > 0.95
        assert facts[name]["believable"]
        assert facts[name]["auc"]["echo"] < 0.5, "neither sees that an echo adds nothing"
        assert facts[name]["ratio"]
        scores = select(rows := columns(asked[0]), rows["policy"] == "teacher")["judge_" + name]
        assert 0 < facts[name]["unrelated"] < scores.mean() / 2, "it lies low, but nothing says that it lies at 0"
    assert facts["rubric"]["parse_failures"] < 0.1
    assert facts["pairwise"]["parse_failures"] < 0.1


def test_a_small_judge_that_compares_answers_in_both_orders(asked: Asked) -> None:
    table = asked[1]
    assert table.num_rows == len(PAIRS)
    assert set(table["other"].to_pylist()) == {"teacher"}
    both = np.array([table["first"].to_pylist(), table["second"].to_pylist()])
    assert ((both > 0) & (both < 1)).all(), "probabilities, not drawn answers"
    assert asked[2]["pairwise"]["position_bias"] == pytest.approx(float(np.mean(both[0] - both[1])), abs=1e-6)


def test_a_second_evaluation_starts_no_pass_and_finds_the_same(
    asked: Asked, recipe: Recipe, outputs: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def no_pass(*_: object, **__: object) -> None:
        raise AssertionError("a pass was started")

    for name in ("range", "from_items", "from_arrow"):
        monkeypatch.setattr(ray.data, name, no_pass)
    work = storage.join(recipe.storage, "work")
    filled, compared, facts = ask(recipe, TASKS, outputs, work)
    assert filled.equals(asked[0])
    assert compared.equals(asked[1])
    assert facts == asked[2]
    # Sides swapped: the other's preference, from the same answers.
    wrote = {(r["policy"], r["intent_id"]): r["prompt"] for r in outputs.to_pylist()}
    rows = compared.to_pylist()
    sides = [
        {"pair_id": n, "intent_id": n, "intent": PAIRS[n][0], "task": TASKS[0].name}
        | {"prompt": wrote["teacher", n], "other_prompt": wrote["student", n]}
        for n in (r["intent_id"] for r in rows)
    ]
    table = pa.Table.from_pylist(sides)
    swapped, _ = judge_pairwise(JUDGES[3], table, work, TASKS, recipe)
    assert swapped["first"].to_pylist() == pytest.approx([1 - r["second"] for r in rows], abs=1e-6)
    assert swapped["second"].to_pylist() == pytest.approx([1 - r["first"] for r in rows], abs=1e-6)


def test_a_killed_pass_asks_what_is_missing_alone(asked: Asked, recipe: Recipe) -> None:
    work = storage.join(recipe.storage, "work")
    [folder] = [storage.join(work, name) for name in storage.list_folders(work) if "embedding" in name]
    [part] = storage.list_files(storage.join(folder, "scores"))
    before = storage.read_table(storage.join(folder, "scores", part))
    storage.remove(storage.join(folder, "scores", part))
    pairs = pa.Table.from_pylist(
        [{"pair_id": 0, "intent_id": 0, "intent": PAIRS[0][0], "task": TASKS[0].name, "prompt": PAIRS[0][1]}]
    )
    scores, _ = judge_pointwise(JUDGES[1], pairs, work, TASKS, recipe)
    after = storage.read_table(storage.join(folder, "scores", part))
    assert after["episode_id"].equals(before["episode_id"])
    assert after["score"].to_numpy() == pytest.approx(before["score"].to_numpy(), abs=1e-5)
    assert scores[0] == pytest.approx(asked[0]["judge_embedding"][0].as_py(), abs=1e-5)


def test_the_mean_states_of_a_language_model_make_cosines_that_validation_does_not_believe() -> None:
    intents, prompts, tasks = [i for i, _ in PAIRS], [p for _, p in PAIRS], ["t"] * len(PAIRS)
    made = controls(intents, prompts, tasks, 0)
    embedder = embedding.load("bundled:smollm2-135m-instruct", 32)
    true = embedder.relevance(intents, prompts).astype(float)
    scores = embedder.relevance(made["intent"].to_pylist(), made["prompt"].to_pylist()).astype(float)
    assert min(np.median(true), np.median(scores)) > 0.85, "all alike, whatever they are of"
    found = validate(true, scores, made, tasks)
    assert (found["believable"], found["ratio"]) == (False, False)
