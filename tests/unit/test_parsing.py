"""A completion gives one result per requested prompt: an accepted prompt, or a reject with its reason."""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from udrl.episodes import KEYS, Reason
from udrl.hashing import stable_id
from udrl.scoring.filtering import filter_row
from udrl.scoring.parsing import clean, extract_strings, foreign_script, parse, parse_row, reject_reasons, scripts
from udrl.tasks import LANGUAGES, Example, Format, Task

TASK = Task(
    name="paint",
    title="Paint",
    instruction="Write a prompt.",
    examples=[Example(intent=f"thing {i}", prompt=f"a thing number {i} in light") for i in range(3)],
    format=Format(min_words=3, max_words=12, reject=["https?://"]),
)
ENGLISH = TASK.model_copy(update={"format": Format(min_words=3, max_words=30, languages=["en"])})
INTENT = "a red fox in the snow"
TEXT = st.text(max_size=300)
FINISH = st.sampled_from(["stop", "length", "error"])


def reason(completion: str, finish: str = "stop", error: str = "", intent: str = INTENT, task: Task = TASK) -> Reason | None:
    return parse(task, intent, completion, finish, error)[1]


def row(completion: str | None, prompts: int | None = 1, finish: str = "stop", error: str = "") -> dict[str, object]:
    return {"intent": INTENT, "completion": completion, "finish_reason": finish, "error": error, "prompts": prompts}


def good(n: int) -> str:
    return f"fox number {n} at dusk in soft light"


def test_a_prompt_is_the_first_line_without_surrounding_quotes() -> None:
    assert clean('  "A fox,  soft light"\nIntent: next') == "A fox, soft light"
    assert parse(TASK, INTENT, ' "Fox at dusk,  soft light"\n', "stop", "") == ("Fox at dusk, soft light", None, "")


@pytest.mark.parametrize(
    ("completion", "finish", "error", "expected"),
    [
        ("", "stop", "", Reason.EMPTY),
        ("  \n ", "stop", "", Reason.EMPTY),
        ("fox at dusk in soft", "length", "", Reason.TRUNCATED),
        ("fox dusk", "stop", "", Reason.MALFORMED),
        ("fox dusk " * 9, "stop", "", Reason.MALFORMED),
        ("fox at dusk http://example.org", "stop", "", Reason.MALFORMED),
        ("A thing number 1 in light", "stop", "", Reason.FEW_SHOT_LEAK),
        ("A red fox in the snow", "stop", "", Reason.ECHO),
        ("soft light, soft light, soft light, soft light", "stop", "", Reason.REPETITIVE),
        ("anything", "error", "EngineDead", Reason.ENGINE_ERROR),
        ("fox at dusk \x07 in light", "stop", "", Reason.GARBLED),
        ("fox at dusk in so\ufffd light", "stop", "", Reason.GARBLED),
        ("fox at dusk\x1cin soft light", "stop", "", Reason.GARBLED),
        ("fox at dusk in \ud83d light", "stop", "", Reason.GARBLED),
        ("лиса в снегу на закате солнца", "stop", "", Reason.WRONG_SCRIPT),
        ("赤い狐が雪の中を歩いている夕暮れ", "stop", "", Reason.WRONG_SCRIPT),
        ("x" * 100_000, "stop", "", Reason.MALFORMED),
    ],
)
def test_a_bad_completion_is_rejected_with_its_reason(completion: str, finish: str, error: str, expected: Reason) -> None:
    assert reason(completion, finish, error) == expected


@pytest.mark.parametrize(
    "refusal",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry. This goes against my rules",
        "Sorry, I cannot do this",
        "I cannot create content of this kind",
        "I can't assist with that request",
        "As an AI language model, I have no eyes",
        "Unfortunately, I am unable to generate images of people",
        '"I apologize, but this is not something to draw"',
    ],
)
def test_a_refusal_is_recognized_even_if_it_was_cut(refusal: str) -> None:
    assert reason(refusal) == reason(refusal, "length") == Reason.REFUSAL


@pytest.mark.parametrize(
    "prompt",
    [
        "Sorry card with a sad puppy, watercolor",
        "I'm sorry bouquet of white roses, soft light",
        "As an airplane lands, golden light",
        "Unfortunate clown under rain, film still",
        "I love you banner, pink letters",
    ],
)
def test_a_prompt_that_only_sounds_like_a_refusal_is_accepted(prompt: str) -> None:
    assert reason(prompt) is None


@pytest.mark.parametrize(
    "error",
    [
        "ValueError: The decoder prompt (length 1300) is longer than the maximum model length of 1024. Make sure that ...",
        "The decoder prompt (length 9) plus the number of requested output tokens (at least 1) is longer than the maximum model"
        " length of 9.",
        "This model's maximum context length is 1024 tokens. However, your prompt contains 1048576 characters",
    ],
)
def test_a_request_that_exceeds_the_context_is_not_an_engine_error(error: str) -> None:
    assert reason("", "error", error) == Reason.INPUT_TOO_LONG


def test_a_script_that_the_intent_uses_is_accepted() -> None:
    assert reason("лиса в снегу на закате солнца", intent="нарисуй лису") is None
    assert reason("fox in snow with one кот in light") is None  # one word in another script is accepted
    assert foreign_script("\uff26\uff2f\uff38 \uff41\uff54", "", scripts("latin")) is None  # full-width letters are Latin
    assert scripts("雪の中のキツネ") == {"CJK"}


def test_only_a_task_with_languages_rejects_other_languages() -> None:
    german = "Ein roter Fuchs läuft durch den Schnee bei Sonnenuntergang, weiches Licht"
    assert reason(german, task=ENGLISH) == Reason.WRONG_LANGUAGE
    assert reason("Fox trotting through deep snow at sunset, soft light", task=ENGLISH) is None
    assert reason("Ein roter Fuchs läuft durch den Schnee") is None
    assert reason("Lego Arnold Schwarzenegger", task=ENGLISH) is None  # too short to identify


def test_a_task_may_name_the_languages_that_can_be_identified() -> None:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    assert set(LanguageIdentifier.from_model_file(MODEL_FILE).labels) - {"zxx"} == LANGUAGES
    with pytest.raises(ValueError, match="unknown language english"):
        Format(languages=["english"])


def test_a_line_that_ended_before_the_token_limit_is_complete() -> None:
    assert reason("fox at dusk in soft light\nIntent: more and mo", "length") is None


@given(TEXT, FINISH, st.sampled_from(["", "boom"]))
def test_any_completion_is_a_prompt_or_a_reject(completion: str, finish: str, error: str) -> None:
    prompt, reject, detail = parse(TASK, INTENT, completion, finish, error)
    assert reject is None or reject in set(Reason)
    assert reject is not None or TASK.find_violation(prompt) is None
    assert isinstance(detail, str)


@given(
    st.one_of(TEXT, TEXT.map(lambda t: '{"prompts": ["' + t), st.text('{}[]",:\\ap', max_size=60)),
    st.one_of(st.none(), st.integers(1, 9)),
    FINISH,
)
@example('{"prompts": ["\\ud800 a b c"]}', 2, "stop")
def test_any_text_gives_as_many_results_as_were_requested(text: str, prompts: int | None, finish: str) -> None:
    results = parse_row(TASK, row(text, prompts, finish))
    assert len(results) == (prompts or 1)
    for parsed in results:
        assert parsed.reason == "" or parsed.reason in set(Reason)
        for field in parsed:
            field.encode()  # can be stored as UTF-8
    assert reject_reasons(TASK, row(text, prompts, finish)) == [(p.reason, p.detail) for p in results]


@given(
    st.lists(TEXT, min_size=1, max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.data(),
)
def test_every_complete_string_of_cut_json_is_extracted(
    texts: list[str], indent: int | None, escape: bool, data: st.DataObject
) -> None:
    whole = json.dumps({"prompts": texts}, indent=indent, ensure_ascii=escape)
    cut = data.draw(st.integers(0, len(whole)))
    ends = []  # positions after the closing quotes
    at = whole.index("[")
    for text in texts:
        body = json.dumps(text, ensure_ascii=escape)
        at = whole.index(body, at) + len(body)
        ends.append(at)
    assert extract_strings(whole[:cut], len(texts)) == [t for t, end in zip(texts, ends, strict=True) if end <= cut]


@pytest.mark.parametrize(
    "sloppy",
    [
        'Sure! Here are [2] prompts:\n```json\n{"prompts": ["one", "two"]}\n```',
        '["one", "two"]',
        '{"prompts": [{"prompt": "one"}, {"prompt": "two"}]}',
        '{"prompts": ["one", "two"',
        '{"prompts": ["one",, "two",]}',
        '{"prompts": ["one" "two" three]}',
        '{"prompts": [["one"], ["two"]], "more": ["no"]}',
        '{"prompts": ["one", "two"]} and "three"',
    ],
)
def test_strings_are_extracted_from_sloppy_json(sloppy: str) -> None:
    assert extract_strings(sloppy, 5) == ["one", "two"]


def test_undefined_escapes_and_raw_line_breaks_do_not_lose_a_string() -> None:
    assert extract_strings('{"prompts": ["a \\q \\" b", "c\nd"]}', 5) == ['a q " b', "c\nd"]
    assert extract_strings("no list at all", 3) == extract_strings('{"prompts": "one"}', 3) == []


def test_prompts_that_a_structured_completion_lacks_are_rejected_with_a_reason() -> None:
    whole = json.dumps({"prompts": [good(1), "", good(2)]})
    assert [p.reason for p in parse_row(TASK, row(whole, 3))] == ["", "empty", ""]
    assert [p.prompt for p in parse_row(TASK, row(whole, 2))] == [good(1), ""]  # a prompt that was not requested is dropped
    assert [p.reason for p in parse_row(TASK, row(whole, 5))] == ["", "empty", "", "missing", "missing"]
    cut = parse_row(TASK, row(whole[:60], 3, "length"))
    assert [p.reason for p in cut] == ["", "empty", "truncated"]
    assert cut[2].completion == whole[:60]  # the raw text is kept for inspection
    assert {p.reason for p in parse_row(TASK, row("I'm sorry, but no.", 3))} == {"refusal"}
    assert [p.reason for p in parse_row(TASK, row(None, 3, "error", "boom"))] == ["engine_error"] * 3
    assert [p.reason for p in parse_row(TASK, row("", 2))] == ["empty"] * 2


def test_each_prompt_of_a_structured_request_gets_its_own_id_and_variation() -> None:
    base = {name: 7 if str(kind).startswith("int") else "x" for name, kind in KEYS} | {"variation": 4, "output_tokens": 11}
    structured = base | row(json.dumps({"prompts": [good(1), good(2)]}), 3)
    rows = filter_row(TASK, structured)
    assert [r["variation"] for r in rows] == [4, 5, 6]
    assert [r["episode_id"] for r in rows] == [stable_id(7, j) for j in range(3)]
    assert sum(r["output_tokens"] for r in rows) == 11
    assert [r["n_words"] for r in rows] == [8, 8, 0]
    single = filter_row(TASK, base | row(good(1)))
    assert [(r["episode_id"], r["output_tokens"], r["reason"]) for r in single] == [(7, 11, "")]


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "a" * MEGABYTE,
        "a " * (MEGABYTE // 2),
        " " * MEGABYTE + "a",
        '{"prompts": ["' + "\\" * MEGABYTE,
        '{"prompts": ["' + '\\"' * (MEGABYTE // 2),
        '{"prompts"' * (MEGABYTE // 10),
        '{"prompts": [' + "[" * MEGABYTE,
        '["a"' + " " * MEGABYTE,
        "[" + '"a":' * (MEGABYTE // 4),
        "\ufffd" * MEGABYTE,
        "狐" * MEGABYTE,
        "i am " * (MEGABYTE // 5),
        "'" * MEGABYTE + "\n",
    ],
    ids=lambda text: f"{text[:14]!r}...",
)
def test_a_megabyte_is_parsed_in_linear_time(text: str) -> None:
    begun = time.thread_time()  # CPU time: other processes do not count
    for prompts in (1, 4):
        assert len(parse_row(TASK, row(text, prompts))) == prompts
    parse(TASK, text, good(1), "stop", "")  # a megabyte as the intent
    assert time.thread_time() - begun < 10  # seconds; a quadratic pattern takes hours
