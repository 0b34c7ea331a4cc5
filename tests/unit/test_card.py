"""The dataset card agrees with the run's files, and ``datasets`` loads the configurations that it describes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from udrl import models, recipe, storage
from udrl.episodes import COMPONENTS, EPISODES, REJECTS, Reason
from udrl.generate.dataset_card import COLUMNS, REASONS, size_category, write_card
from udrl.generate.histograms import BINS, CAPTIONS, collect_statistics, median_of_bins
from udrl.run import GenerateSummary, ScoringPaths

TASKS = ["text_to_image", "image_search"]


def a_recipe(folder: str, **values: Any) -> recipe.Recipe:
    base = {"name": "made-up", "storage": folder, "tasks": TASKS, "intents": {"limit": 10}}
    return recipe.from_values({**base, **values}, "test")


def rows(schema: pa.Schema, n: int, **values: Any) -> pa.Table:
    blank = {"string": "", "int64": 0, "int32": 0, "float": 0.5}
    table = []
    for i in range(n):
        row = {f.name: blank[str(f.type)] for f in schema} | {"task": TASKS[i % 2], "policy": "teacher", "model": "m"}
        row |= {name: value(i) if callable(value) else value for name, value in values.items()}
        table.append(row)
    return pa.Table.from_pylist(table, schema=schema)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return a run's storage with three files of 40 episodes, two of 9 rejects, and other files."""
    rng = np.random.default_rng(0)
    for part in range(3):
        random = {c: lambda _: float(rng.random()) for c in (*COMPONENTS, "reward")}
        table = rows(EPISODES, 40, n_words=lambda i: 3 + i // 4, prompt="a fox", intent='fox "card" | été', **random)
        storage.write_table(str(tmp_path / f"episodes/part-{part:08d}.parquet"), table)
    for part in range(2):
        table = rows(REJECTS, 9, reason=lambda i: str([Reason.ECHO, Reason.EMPTY, Reason.ECHO][i % 3]), completion="a fox")
        storage.write_table(str(tmp_path / f"rejects/part-{part:08d}.parquet"), table)
    storage.write_json(str(tmp_path / "episodes/about.json"), {})
    storage.write_table(str(tmp_path / "intents/abc/train.parquet"), pa.table({"intent_id": range(30)}))
    storage.write_table(str(tmp_path / "intents/abc/heldout.parquet"), pa.table({"intent_id": range(4)}))
    storage.write_table(str(tmp_path / "intents/abc/rejects.parquet"), pa.table({"reason": ["blank", "blank", "too long"]}))
    storage.write_table(str(tmp_path / "completions/x/part-0.parquet"), pa.table({"other": ["x"]}))
    return str(tmp_path)


def card_of(folder: str, **values: Any) -> str:
    write_card(a_recipe(folder, **values), GenerateSummary(accepted=120, intents="abc", ledger="x", scoring="x"))
    return (Path(folder) / "README.md").read_text()


def test_datasets_loads_episodes_by_default_and_rejects_by_name(folder: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    card_of(folder)
    cache = str(tmp_path_factory.mktemp("cache"))
    episodes = datasets.load_dataset(folder, split="train", cache_dir=cache)
    rejects = datasets.load_dataset(folder, "rejects", split="train", cache_dir=cache)
    assert (episodes.num_rows, episodes.column_names) == (120, EPISODES.names)
    assert (rejects.num_rows, rejects.column_names) == (18, REJECTS.names)
    assert episodes[0]["intent"] == 'fox "card" | été'


def test_datasets_loads_a_run_without_rejects(folder: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    storage.remove(f"{folder}/rejects")
    assert "rejects/*.parquet" not in card_of(folder)
    assert datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path_factory.mktemp("cache"))).num_rows == 120


def test_the_counts_agree_with_the_files(folder: str) -> None:
    text = card_of(folder)
    assert "138 prompts were requested: 120 accepted (87.0%), 18 rejected." in text
    assert "| `echo` | 12 | 8.7% |" in text
    assert "| `empty` | 6 | 4.3% |" in text
    assert "| `image_search` | 60 | 8 |" in text
    assert "| teacher | `m` |" in text
    assert "30 intents are for training, 4 are held out" in text
    assert "2 blank, 1 too long" in text


def test_the_front_matter_follows_the_hub_s_conventions(folder: str) -> None:
    front = yaml.safe_load(card_of(folder).split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["language"] == ["en"]
    assert front["size_categories"] == ["n<1K"]
    assert [c["config_name"] for c in front["configs"]] == ["episodes", "rejects"]
    assert front["configs"][0]["default"] is True


@pytest.mark.parametrize(
    ("n", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (52_000_000, "10M<n<100M"), (10**9, "1B<n<10B"), (10**12, "n>1T")]
)
def test_size_categories(n: int, name: str) -> None:
    assert size_category(n) == name


def test_every_column_and_every_reason_is_explained() -> None:
    assert list(COLUMNS) == EPISODES.names
    assert set(REASONS) == set(Reason)


def test_histograms_of_single_files_add_up_to_those_of_all_rows(folder: str) -> None:
    statistics = collect_statistics(ScoringPaths(folder))
    table = pa.concat_tables([storage.read_table(f"{folder}/episodes/part-{p:08d}.parquet") for p in range(3)]).to_pylist()
    for task in TASKS:
        of_task = [row for row in table if row["task"] == task]
        for name in ("reward", *COMPONENTS):
            expected, _ = np.histogram(np.array([row[name] for row in of_task], np.float32), BINS, (0, 1))
            assert statistics.values[task, name].tolist() == expected.tolist()
        assert statistics.words[task][:13].tolist() == np.bincount([row["n_words"] for row in of_task], minlength=13).tolist()
        assert median_of_bins(statistics.words[task]) == pytest.approx(np.median([row["n_words"] for row in of_task]), abs=1)


def test_the_plots_are_png_files_that_the_text_shows_and_explains(folder: str) -> None:
    from PIL import Image

    text = card_of(folder)
    for name, caption in CAPTIONS.items():
        assert f"(card/{name})" in text
        assert caption in text
        image = Image.open(io.BytesIO((Path(folder) / "card" / name).read_bytes()))
        image.load()
        assert image.format == "PNG"
        assert image.size[0] >= 480
        assert len(image.convert("L").resize((64, 64)).getcolors()) > 10  # the plot is not blank


def test_a_run_without_accepted_prompts_has_a_card(folder: str) -> None:
    storage.remove(f"{folder}/episodes")
    storage.write_table(f"{folder}/episodes/part-00000000.parquet", rows(EPISODES, 0))
    text = card_of(folder)
    assert "18 prompts were requested: 0 accepted (0.0%), 18 rejected." in text
    assert "card/" not in text


def test_a_llama_teacher_brings_its_notice_name_and_license(folder: str) -> None:
    text = card_of(folder, teacher={"model": "meta-llama/Meta-Llama-3.1-8B-Instruct"})
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "llama3.1"
    assert "**Built with Llama**" in text
    assert 'a name that begins with "Llama"' in text
    assert "https://www.llama.com/llama3_1/license/" in text


def test_an_unknown_license_says_so_and_points_to_the_model(folder: str) -> None:
    text = card_of(folder, teacher={"model": "somebody/model-7b"})
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["license_link"]) == ("other", "https://huggingface.co/somebody/model-7b")
    assert "is not known to this project" in text


def test_keys_in_a_source_uri_do_not_reach_the_card(folder: str) -> None:
    text = card_of(folder, intents={"source": "s3://KEY:SECRET@bucket/intents.parquet?region=x", "limit": 10})
    assert "SECRET" not in text
    assert "`s3://bucket/intents.parquet`" in text


@pytest.mark.parametrize(
    ("model", "license"),
    [
        ("bundled:smollm2-135m-instruct", "apache-2.0"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3.1"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama4"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "apache-2.0"),
        ("Qwen/Qwen3-8B", "apache-2.0"),
        ("Qwen/Qwen2.5-3B", "other"),
        ("s3://bucket/llama", "other"),
    ],
)
def test_licenses_by_name(model: str, license: str) -> None:
    assert models.license_of(model).id == license


def test_llama_3_forbids_what_llama_3_1_allows() -> None:
    assert "may not be used to improve" in models.describe_license("meta-llama/Meta-Llama-3-8B")
    assert "may not be used to improve" not in models.describe_license("meta-llama/Meta-Llama-3.1-8B")


def test_the_summary_of_an_older_version_keeps_its_license() -> None:
    summary = GenerateSummary.model_validate({"accepted": 1, "ledger": "x", "scoring": "x", "licence": "Apache-2.0"})
    assert summary.license == "Apache-2.0"
