"""Real judges on twenty hand-written pairs: bundled models, Ray Data, vLLM."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from udrl import storage
from udrl.evaluate.judges.answers import load_embedder
from udrl.evaluate.judges.controls import Pair, make_controls, shuffle_intents
from udrl.evaluate.judges.judging import JudgedOutputs, ask_judges, compare_pairs, score_pairs
from udrl.evaluate.judges.validation import areas_by_task, is_validated
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
FEW = 6  # pairs for the judges with an engine: each comes with a dozen controls
JUDGES = [
    Judge(kind="likelihood"),
    Judge(kind="embedding", model="bundled:minilm"),
    Judge(kind="rubric", style="chat", engine={"max_num_seqs": 32}),  # type: ignore[arg-type]
    Judge(kind="pairwise", style="completion", engine={"max_num_seqs": 32}),  # type: ignore[arg-type]
]


def row(policy: str, number: int, prompt: str) -> dict[str, Any]:
    blank: dict[str, Any] = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    keys = {"policy": policy, "intent_id": number, "intent": PAIRS[number][0], "task": TASKS[0].name}
    return {f.name: blank[str(f.type)] for f in OUTPUTS} | keys | {"probe": "default", "prompt": prompt}


def recipe_with(judges: list[Judge], storage_uri: str) -> Recipe:
    values: dict[str, Any] = {"name": "judges", "storage": storage_uri, "tasks": ["text_to_image"]}
    values |= {"intents": {"limit": 9}, "evaluate": {"judges": [judge.model_dump() for judge in judges]}}
    # A judge may not be the embedder that made the reward; nothing is trained here.
    return Recipe.model_validate({**values, "rewards": {"embedder": "bundled:smollm2-135m-instruct"}})


@pytest.fixture(scope="module")
def outputs() -> pa.Table:
    """A teacher that kept to the intents, and a student that wrote every second prompt for another intent."""
    others = shuffle_intents([intent for intent, _ in PAIRS], ["t"] * len(PAIRS))
    shuffled = dict(zip(others, [prompt for _, prompt in PAIRS], strict=True))
    rows = [row("teacher", n, prompt) for n, (_, prompt) in enumerate(PAIRS)]
    rows += [row("student", n, shuffled[intent] if n % 2 else prompt + " Bright.") for n, (intent, prompt) in enumerate(PAIRS)]
    return pa.Table.from_pylist(rows, schema=OUTPUTS)


@dataclass(frozen=True)
class Judging:
    """Some judges of one recipe, what they judged, and their answers."""

    recipe: Recipe
    outputs: pa.Table
    evaluation: EvaluationPaths
    judged: JudgedOutputs

    @classmethod
    def of(cls, recipe: Recipe, outputs: pa.Table) -> "Judging":
        evaluation = Run(recipe.storage).evaluation("evaluation")
        return cls(recipe, outputs, evaluation, ask_judges(recipe, TASKS, outputs, evaluation))


@pytest.fixture(scope="module")
def by_models(tmp_path_factory: pytest.TempPathFactory, outputs: pa.Table) -> Judging:
    """The likelihood and the embedding judge."""
    return Judging.of(recipe_with(JUDGES[:2], str(tmp_path_factory.mktemp("models"))), outputs)


@pytest.fixture(scope="module")
def by_engines(tmp_path_factory: pytest.TempPathFactory, outputs: pa.Table) -> Judging:
    """The rubric and the pairwise judge, on the first pairs."""
    few = outputs.filter(pc.less(outputs["intent_id"], FEW))
    return Judging.of(recipe_with(JUDGES[2:], str(tmp_path_factory.mktemp("engines"))), few)


def scores_of(judged: JudgedOutputs, policy: str, judge: str) -> np.ndarray:
    rows = columns(judged.outputs)
    return select(rows, rows["policy"] == policy)["judge_" + judge]


@pytest.mark.parametrize("name", ["likelihood", "embedding"])
def test_the_mean_score_rises_as_better_prompts_are_mixed_in(by_models: Judging, name: str) -> None:
    true, student = (scores_of(by_models.judged, policy, name) for policy in ("teacher", "student"))
    assert not np.isnan([*true, *student]).any()
    unrelated = student[1::2]
    means = [np.mean([*unrelated, *true[:n]]) for n in (0, 5, 10, 20)]
    assert means == sorted(means)
    assert means[-1] > means[0]


def test_every_judge_is_validated_on_true_pairs_and_controls(by_models: Judging, by_engines: Judging) -> None:
    profiles = by_models.judged.judges | by_engines.judged.judges
    relations = {"likelihood": "scorer", "embedding": "independent", "rubric": "scorer", "pairwise": "scorer"}
    assert {name: profile.relation for name, profile in profiles.items()} == relations  # one model made the reward here
    n_pairs = {"likelihood": len(PAIRS), "embedding": len(PAIRS), "rubric": FEW, "pairwise": FEW}
    assert {name: profile.pairs for name, profile in profiles.items()} == n_pairs
    for profile in profiles.values():
        assert set(profile.tasks) == {TASKS[0].name}
        assert all(0 <= area.value <= 1 for area in profile.auc.values())
    for name in ("likelihood", "embedding"):
        profile = profiles[name]
        assert profile.auc["shuffled"].low > 0.8
        assert profile.auc["echo"].value < 0.5, "neither sees that an echo adds nothing"
        assert (profile.validated, profile.ratio_scale) == (False, False)
        mean = scores_of(by_models.judged, "teacher", name).mean()
        assert 0 < profile.unrelated_score < mean / 2, "it is low, but nothing makes it 0"
    scores = np.concatenate([scores_of(by_engines.judged, policy, "rubric") for policy in ("teacher", "student")])
    assert ((scores > 0) & (scores < 1)).all(), "expectations, not sampled answers"
    assert profiles["rubric"].parse_failures < 0.1
    assert profiles["pairwise"].parse_failures < 0.1


def test_a_small_pairwise_judge_answers_in_both_orders(by_engines: Judging) -> None:
    table = by_engines.judged.comparisons
    assert table.num_rows == FEW
    assert set(table["other"].to_pylist()) == {"teacher"}
    orders = np.array([table["first"].to_pylist(), table["second"].to_pylist()])
    assert ((orders > 0) & (orders < 1)).all(), "probabilities, not sampled answers"
    bias = float(np.mean(orders[0] - orders[1]))
    assert by_engines.judged.judges["pairwise"].position_bias == pytest.approx(bias, abs=1e-6)


def test_a_second_evaluation_starts_no_pass_and_gives_the_same_results(
    by_models: Judging, by_engines: Judging, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a pass was started")

    for name in ("range", "from_items", "from_arrow"):
        monkeypatch.setattr(ray.data, name, fail)
    for first in (by_models, by_engines):
        again = ask_judges(first.recipe, TASKS, first.outputs, first.evaluation)
        assert again.outputs.equals(first.judged.outputs)
        assert again.comparisons.equals(first.judged.comparisons)
        assert again.judges == first.judged.judges
    # With the prompts swapped, the same answers give the other's preference.
    prompt_of = {(r["policy"], r["intent_id"]): r["prompt"] for r in by_engines.outputs.to_pylist()}
    rows = by_engines.judged.comparisons.to_pylist()
    swapped_pairs = [
        {"intent_id": n, "intent": PAIRS[n][0], "task": TASKS[0].name}
        | {"prompt": prompt_of["teacher", n], "other_prompt": prompt_of["student", n]}
        for n in (r["intent_id"] for r in rows)
    ]
    swapped, _ = compare_pairs(JUDGES[3], swapped_pairs, by_engines.recipe, TASKS, by_engines.evaluation)
    assert [c.first for c in swapped] == pytest.approx([1 - r["second"] for r in rows], abs=1e-6)
    assert [c.second for c in swapped] == pytest.approx([1 - r["first"] for r in rows], abs=1e-6)


def test_a_killed_pass_asks_only_what_is_missing(by_models: Judging) -> None:
    work = by_models.evaluation.work
    [folder] = [name for name in storage.list_folders(work) if "embedding" in name]
    paths = JudgePaths(storage.join(work, folder))
    [part] = [storage.join(paths.scores, name) for name in storage.list_files(paths.scores)]
    before = storage.read_table(part)
    storage.remove(part)
    pairs = [{"intent_id": 0, "intent": PAIRS[0][0], "task": TASKS[0].name, "prompt": PAIRS[0][1]}]
    scores, _ = score_pairs(JUDGES[1], pairs, by_models.recipe, TASKS, by_models.evaluation)
    after = storage.read_table(part)
    assert after["episode_id"].equals(before["episode_id"])
    assert after["score"].to_numpy() == pytest.approx(before["score"].to_numpy(), abs=1e-5)
    assert scores[0] == pytest.approx(by_models.judged.outputs["judge_embedding"][0].as_py(), abs=1e-5)


def test_cosines_of_a_language_model_s_mean_states_do_not_validate() -> None:
    intents, prompts = [i for i, _ in PAIRS], [p for _, p in PAIRS]
    controls = make_controls([Pair(intent, "t", prompt) for intent, prompt in PAIRS], 0)
    embedder = load_embedder("bundled:smollm2-135m-instruct", 32)
    true = embedder.relevance(intents, prompts).astype(float)
    scores = embedder.relevance(controls["intent"].to_pylist(), controls["prompt"].to_pylist()).astype(float)
    assert min(np.median(true), np.median(scores)) > 0.85, "all cosines are high"
    areas = areas_by_task(true, scores, controls, ["t"] * len(PAIRS))[None]
    assert areas["shuffled"].value < 0.9
    assert not is_validated(areas)
