"""Intents: the composer, the readers, the split by subject, and the files that a run starts from."""

import csv
import gzip
import io
import itertools
import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl import intents, recipe
from udrl.errors import UserError
from udrl.intents import Intent, IntentSplit, compose, composer, is_heldout, read, split_intents
from udrl.intents.readers import MAX_LINE, REJECT_CHARACTERS, RejectedRow
from udrl.run import IntentPaths

MANY = 20_000


@pytest.fixture(scope="module")
def composed() -> list[Intent]:
    return list(compose(MANY, seed=7))


def texts(uri: Path | str, column: str = "intent", limit: int | None = None) -> list[str]:
    return [intent.text for intent in read(str(uri), column, limit)]


def read_with_rejects(uri: Path) -> tuple[list[str], list[tuple[int, str, str]]]:
    """Return the intents of a file, and its rejects as (row, text, reason)."""
    rejects: list[RejectedRow] = []
    accepted = [intent.text for intent in read(str(uri), "intent", None, rejects.append)]
    return accepted, [(r.row, r.text, str(r.reason)) for r in rejects]


def split(folder: Path, seed: int = 0, **config: Any) -> IntentSplit:
    return split_intents(recipe.Intents(**config), seed, IntentPaths(str(folder)))


def one_line(problem: pytest.ExceptionInfo[UserError]) -> str:
    message = str(problem.value)
    assert "\n" not in message
    return message


class TestComposer:
    def test_gives_twenty_thousand_distinct_intents(self, composed: list[Intent]) -> None:
        assert len({intent.text.casefold() for intent in composed}) == MANY

    def test_has_millions_of_intents(self) -> None:
        assert intents.capacity() > 5_000_000

    def test_the_same_seed_gives_the_same_intents_and_a_smaller_limit_a_prefix(self, composed: list[Intent]) -> None:
        assert list(compose(500, seed=7)) == composed[:500]

    def test_another_seed_gives_other_intents(self, composed: list[Intent]) -> None:
        assert len({i.text for i in compose(1000, seed=8)} - {i.text for i in composed}) > 900

    def test_intents_are_short_clean_single_lines(self, composed: list[Intent]) -> None:
        for intent in composed:
            assert 1 <= len(intent.text.split()) <= 40, intent
            assert intent.text == " ".join(intent.text.split())
            assert not re.search(r"[{}()\[\]|+!*]| ,|,,|,$", intent.text), intent

    def test_lengths_and_manners_are_those_of_people(self, composed: list[Intent]) -> None:
        n_words = [len(intent.text.split()) for intent in composed]
        assert {1, 2, 5, 10, 20, 25} <= set(n_words)
        for manner in (
            r"^a \S+ \S+ and a \S+ \S+$",
            r"\?",
            r"\. \w",
            r"^(?:two|many) ",
            r"pls|plz|desing|luvs",
            r"^[A-Z].*\.$",
        ):
            share = sum(bool(re.search(manner, intent.text)) for intent in composed) / MANY
            assert share > 0.003, manner

    def test_articles_agree_with_the_sound_that_follows(self, composed: list[Intent]) -> None:
        for intent in composed:
            assert not re.search(r"\ban [bcdfgjklmnpqrstvwxyz]|\ba (?:[ai]|o(?!ne)|e(?!u)|hourglass|heirloom)", intent.text), (
                intent
            )
            assert not re.search(r"\ban (?:uni|ukulele)", intent.text), intent

    @pytest.mark.parametrize(
        ("term", "forms"),
        [
            ("fox", ("fox", "foxes")),
            ("puppy", ("puppy", "puppies")),
            ("donkey", ("donkey", "donkeys")),
            ("mouse|mice", ("mouse", "mice")),
            ("ship in a bottle", ("ship in a bottle", "ships in a bottle")),
            ("pair of sneakers", ("pair of sneakers", "pairs of sneakers")),
        ],
    )
    def test_plurals(self, term: str, forms: tuple[str, str]) -> None:
        assert composer.inflect(term) == forms

    def test_every_intent_names_its_subject(self, composed: list[Intent]) -> None:
        plurals = composer.subject_plurals()
        for intent in composed:
            assert intent.subject in intent.text or plurals[intent.subject] in intent.text, intent

    def test_subjects_are_many_and_evenly_used(self, composed: list[Intent]) -> None:
        counts = Counter(intent.subject for intent in composed)
        assert len(intents.subjects()) >= 400
        assert set(counts) == set(intents.subjects())
        assert counts.most_common(1)[0][1] < MANY / 200

    def test_every_template_has_exactly_one_subject(self) -> None:
        tables = composer.grammar()
        kinds = tables["subjects"].keys() | tables["groups"].keys()
        for template in itertools.chain.from_iterable(tables["templates"].values()):
            for text in composer.expand_template(template):
                slots = [slot[1] for slot in composer.SLOT.finditer(text)]
                assert sum(slot in kinds for slot in slots) == 1, template
                assert set(slots) <= kinds | tables["lists"].keys(), template

    def test_a_limit_above_the_capacity_names_the_key(self) -> None:
        with pytest.raises(UserError, match=r"intents\.limit: ") as problem:
            compose(intents.capacity() + 1, seed=0)
        one_line(problem)

    @given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
    @settings(max_examples=30, deadline=None)
    def test_the_visiting_order_is_a_permutation(self, size: int, key: int) -> None:
        assert sorted(composer.permute(i, size, key) for i in range(size)) == list(range(size))


class TestSplit:
    def test_an_intent_names_no_subject_except_its_own(self, composed: list[Intent]) -> None:
        # Otherwise a held-out subject could be trained on as the setting, the audience or the medium of another intent.
        owner = {}
        for singular, plural in composer.subject_plurals().items():
            owner[singular.casefold()] = owner[plural.casefold()] = singular
        for intent in composed:
            words = re.sub(r"'s\b|,", "", intent.text.casefold()).split()
            runs = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + 6, len(words) + 1)))
            assert {owner[run] for run in runs if run in owner} <= {intent.subject}, intent

    def test_no_heldout_subject_is_ever_trained_on(self, composed: list[Intent]) -> None:
        train = {intent.subject for intent in composed if not is_heldout(intent.subject, 0.1)}
        heldout = {intent.subject for intent in composed if is_heldout(intent.subject, 0.1)}
        assert len(heldout) > 60
        assert not train & heldout

    def test_the_share_is_a_share_of_subjects(self) -> None:
        heldout = [s for s in intents.subjects() if is_heldout(s, 0.1)]
        assert 0.07 < len(heldout) / len(intents.subjects()) < 0.13

    def test_the_decision_never_changes_between_releases(self) -> None:
        # A student trained by an older release must not meet its evaluation subjects in a newer one.
        assert [s for s in ("owl", "fox", "bear", "llama", "yak", "swan", "toad", "emu") if is_heldout(s, 0.3)] == [
            "owl",
            "fox",
            "llama",
            "swan",
        ]

    @given(st.text(), st.floats(0, 0.99), st.floats(0, 0.99))
    def test_a_larger_share_only_adds_subjects(self, subject: str, one: float, other: float) -> None:
        assert is_heldout(subject, min(one, other)) <= is_heldout(subject, max(one, other))
        assert not is_heldout(subject, 0.0)

    @given(st.text(st.characters(max_codepoint=127)))
    def test_letter_case_does_not_change_a_subject_s_split(self, subject: str) -> None:
        assert is_heldout(subject.upper(), 0.5) == is_heldout(subject.lower(), 0.5)


ROWS = ["a red kite over dunes", "  menu\tfor   a cafe ", "", "A RED kite over dunes", "x" * 2001, "poster, with a comma"]
USABLE = ["a red kite over dunes", "menu for a cafe", "poster, with a comma"]


def write(path: Path, rows: list[str]) -> Path:
    """Write the rows in the format that the extension names, in the column "intent" after another one."""
    table = pa.table({"id": range(len(rows)), "intent": rows})
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path, row_group_size=2)
        case ".jsonl" | ".ndjson" | ".json":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        case ".csv":
            with path.open("w", newline="") as out:
                csv.writer(out).writerows([["id", "intent"], *([n, row] for n, row in enumerate(rows))])
        case ".tsv":
            path.write_text("id\tintent\n" + "".join(f"{n}\t{row.replace(chr(9), ' ')}\n" for n, row in enumerate(rows)))
        case ".txt":
            path.write_text("".join(row + "\n" for row in rows))
    return path


class TestReaders:
    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "ndjson", "json", "csv", "tsv", "txt"])
    def test_every_format_gives_the_usable_rows_in_order(self, tmp_path: Path, kind: str) -> None:
        rejects: list[RejectedRow] = []
        accepted = list(read(str(write(tmp_path / f"rows.{kind}", ROWS)), "intent", None, rejects.append))
        assert [intent.text for intent in accepted] == USABLE
        assert [intent.subject for intent in accepted] == USABLE
        assert [(r.row, r.reason, r.text) for r in rejects] == [
            (2, "blank", ""),
            (3, "duplicate", "A RED kite over dunes"),
            (4, "too long", "x" * 500),
        ]

    def test_a_uri_with_a_scheme_and_a_compressed_file(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"intent": "one small fox"}\n'))
        assert texts(f"file://{tmp_path}/rows.jsonl.gz") == ["one small fox"]

    def test_a_folder_of_parquet_files_is_read_by_name(self, tmp_path: Path) -> None:
        write(tmp_path / "b.parquet", ["second"])
        write(tmp_path / "a.parquet", ["first"])
        assert texts(tmp_path) == ["first", "second"]

    def test_the_limit_counts_usable_intents(self, tmp_path: Path) -> None:
        assert texts(write(tmp_path / "rows.txt", ["", "one", "ONE", "two", "three"]), limit=2) == ["one", "two"]

    def test_bytes_that_are_not_utf8_reject_only_their_own_row(self, tmp_path: Path) -> None:
        bad = b"caf\xe9 poster"
        (tmp_path / "a.txt").write_bytes(bad + b"\nan owl")
        (tmp_path / "a.csv").write_bytes(b"intent\n" + bad + b"\nan owl")
        (tmp_path / "a.tsv").write_bytes(b"intent\n" + bad + b"\nan owl")
        (tmp_path / "a.jsonl").write_bytes(b'{"intent": "' + bad + b'"}\n{"intent": "an owl"}')
        flat = pa.array([bad, b"an owl"]).buffers()  # bytes that are not UTF-8, in a string column
        pq.write_table(pa.table({"intent": pa.Array.from_buffers(pa.string(), 2, flat)}), tmp_path / "a.parquet")
        for kind in ("txt", "csv", "tsv", "jsonl", "parquet"):
            accepted, rejects = read_with_rejects(tmp_path / f"a.{kind}")
            assert accepted == ["an owl"], kind
            assert rejects == [(0, "caf\ufffd poster", "not UTF-8")], kind

    def test_bad_bytes_in_another_cell_do_no_harm(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes(b"note,intent\ncaf\xe9,an owl\n")
        (tmp_path / "a.jsonl").write_bytes(b'{"note": "caf\xe9", "intent": "an owl"}\n')
        assert texts(tmp_path / "a.csv") == texts(tmp_path / "a.jsonl") == ["an owl"]

    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv", "txt"])
    def test_of_a_rejected_megabyte_the_first_characters_are_stored(self, tmp_path: Path, kind: str) -> None:
        accepted, rejects = read_with_rejects(write(tmp_path / f"a.{kind}", ["an owl", "long words " * 100_000, "a bat"]))
        assert accepted == ["an owl", "a bat"]
        ((row, text, reason),) = rejects
        assert (row, len(text), text[:10], reason) == (1, REJECT_CHARACTERS, "long words", "too long")

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
    def test_an_endless_line_is_skipped_in_bounded_memory(self, tmp_path: Path, kind: str) -> None:
        path = write(tmp_path / f"a.{kind}", ["an owl", "y" * (20 * MAX_LINE), "a bat"])
        tracemalloc.start()
        accepted, rejects = read_with_rejects(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert accepted == ["an owl", "a bat"]
        assert [(row, reason) for row, _, reason in rejects] == [(1, "too long")]
        assert peak < 8 * MAX_LINE

    def test_a_parquet_file_with_large_values_is_read_a_few_rows_at_a_time(self, tmp_path: Path) -> None:
        rows = [f"{n} " + "z" * 300_000 for n in range(40)] * 10
        pq.write_table(pa.table({"intent": pa.array(["an owl", *rows]).dictionary_encode()}), tmp_path / "a.parquet")
        del rows
        before = pa.total_allocated_bytes()
        peaks: list[int] = []
        for _ in read(str(tmp_path / "a.parquet"), "intent", None, lambda _: peaks.append(pa.total_allocated_bytes())):
            pass
        assert len(peaks) == 400
        assert max(peaks) - before < 90e6  # of 120 MB

    def test_a_byte_order_mark_is_not_part_of_the_header(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfintent\r\nan owl\r\n")
        assert texts(tmp_path / "a.csv") == ["an owl"]

    def test_quotes_follow_the_rules_of_the_format(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('intent,n\n"two\nlines, ""quoted""",1\n')
        (tmp_path / "a.tsv").write_text('intent\tn\n5" screen photo\t1\n"all ""quoted"""\t2\n')
        assert texts(tmp_path / "a.csv") == ['two lines, "quoted"']
        assert texts(tmp_path / "a.tsv") == ['5" screen photo', 'all "quoted"']

    def test_null_and_malformed_rows_are_rejected_with_their_own_reasons(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(
            '{"intent": null}\n{"intent": 3}\n{broken\n\n[1]\n{"other": "x"}\n{"intent": "\\ud800 ok"}\n{"intent": "an owl"}\n'
        )
        assert read_with_rejects(tmp_path / "a.jsonl") == (
            ["an owl"],
            [
                (0, "", "null"),
                (1, '{"intent": 3}', "malformed row"),
                (2, "{broken", "malformed row"),
                (3, "[1]", "malformed row"),
                (4, '{"other": "x"}', "malformed row"),
                (5, "\ufffd ok", "not UTF-8"),
            ],
        )

    def test_a_short_csv_row_is_malformed_and_an_empty_cell_blank(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("id,intent\n1\n2,\n3,an owl\n")
        assert read_with_rejects(tmp_path / "a.csv") == (["an owl"], [(0, "1", "malformed row"), (1, "", "blank")])

    def test_rejects_and_intents_together_are_the_rows(self, tmp_path: Path) -> None:
        rows = [["", "an owl", "an OWL", f"a bat {n}", "x" * 3000][n % 5] for n in range(500)]
        accepted, rejects = read_with_rejects(write(tmp_path / "a.parquet", rows))
        assert len(accepted) + len(rejects) == len(rows)
        assert [row for row, _, _ in rejects] == sorted({row for row, _, _ in rejects})

    def test_dictionary_encoded_and_null_parquet_values(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"intent": pa.array(["an owl", None, "a bat"]).dictionary_encode()}), tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet") == ["an owl", "a bat"]

    @given(data=st.binary(max_size=300), kind=st.sampled_from(["txt", "csv", "tsv", "jsonl", "parquet"]))
    @settings(max_examples=200, deadline=None)
    def test_arbitrary_bytes_give_valid_text_or_a_one_line_error(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str
    ) -> None:
        path = tmp_path_factory.getbasetemp() / f"odd.{kind}"
        path.write_bytes((b"intent\n" if kind in ("csv", "tsv") else b"") + data)
        message = ""
        try:
            accepted = texts(path)
        except UserError as error:
            accepted, message = [], str(error)
        assert accepted or len(message.splitlines()) == 1
        assert all(text == " ".join(text.split()) and text.encode() for text in accepted)

    @given(st.lists(st.text(min_size=1).filter(lambda s: s.strip()), min_size=1, max_size=20))
    @settings(max_examples=50, deadline=None)
    def test_jsonl_keeps_every_distinct_text(self, tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
        path = tmp_path_factory.getbasetemp() / "round.jsonl"
        path.write_text("".join(json.dumps({"intent": row}) + "\n" for row in rows))
        assert len(texts(path)) == len({" ".join(row.split()).casefold() for row in rows})


class TestReaderErrors:
    def fails(self, uri: Path | str, column: str = "intent") -> str:
        with pytest.raises(UserError) as problem:
            texts(uri, column)
        message = one_line(problem)
        assert str(uri) in message
        return message

    def test_absent_file(self, tmp_path: Path) -> None:
        assert "no such file" in self.fails(tmp_path / "none.csv")

    @pytest.mark.parametrize("name", ["a.xlsx", "a"])
    def test_unknown_file_type(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("x")
        assert "parquet, jsonl" in self.fails(tmp_path / name)

    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv"])
    def test_an_absent_column_error_names_the_existing_ones(self, tmp_path: Path, kind: str) -> None:
        message = self.fails(write(tmp_path / f"a.{kind}", ["x"]), "request")
        assert "'request'" in message
        assert "id, intent" in message
        assert "intents.column=" in message

    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "tsv", "txt"])
    def test_nothing_usable(self, tmp_path: Path, kind: str) -> None:
        assert "no usable intent" in self.fails(write(tmp_path / f"a.{kind}", ["", "  "]))

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
    def test_empty_file(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / f"a.{kind}").touch()
        assert "no usable intent (empty)" in self.fails(tmp_path / f"a.{kind}")

    def test_a_file_that_is_not_parquet_despite_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_text("hello")
        assert "can't be read" in self.fails(tmp_path / "a.parquet")

    def test_a_column_that_is_not_text(self, tmp_path: Path) -> None:
        assert "type int64, not text" in self.fails(write(tmp_path / "a.parquet", ["x"]), "id")

    def test_a_csv_that_ends_inside_a_quote_names_the_line_that_opens_it(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('intent\nan owl\n"a bat\n' + "one more\n" * 100)
        assert "inside a quote of the row that begins at line 3" in self.fails(tmp_path / "a.csv")

    def test_a_json_array(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('[{"intent": "x"}]')
        assert "one object per line" in self.fails(tmp_path / "a.json")

    def test_a_folder_without_parquet_files(self, tmp_path: Path) -> None:
        assert "no .parquet file" in self.fails(tmp_path)


class TestSplitIntents:
    def test_train_and_heldout_files_share_no_subject(self, tmp_path: Path) -> None:
        summary = split(tmp_path, seed=3, limit=9000, heldout=0.1)
        train, heldout = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("train", "heldout"))
        assert train.schema.names == ["intent_id", "intent", "subject"]
        assert train.schema.field("intent_id").type == pa.int64()
        assert (summary.n_train, summary.n_heldout, summary.reject_reasons) == (train.num_rows, heldout.num_rows, {})
        assert summary.n_train + summary.n_heldout == 9000
        train_subjects, heldout_subjects = (set(table["subject"].to_pylist()) for table in (train, heldout))
        assert not train_subjects & heldout_subjects
        assert summary.n_subjects == len(train_subjects | heldout_subjects)
        ids = train["intent_id"].to_pylist() + heldout["intent_id"].to_pylist()
        assert len(set(ids)) == 9000
        assert min(ids) >= 0
        assert pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(0).num_rows == 4096
        assert pq.read_table(tmp_path / "rejects.parquet").num_rows == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["heldout.parquet", "rejects.parquet", "train.parquet"]

    def test_a_second_run_writes_the_same_bytes(self, tmp_path: Path) -> None:
        def run() -> list[bytes]:
            split(tmp_path, limit=300)
            return [(tmp_path / name).read_bytes() for name in ("train.parquet", "heldout.parquet", "rejects.parquet")]

        assert run() == run()

    def test_a_file_of_the_user(self, tmp_path: Path) -> None:
        source = write(tmp_path / "rows.csv", ROWS)
        summary = split(tmp_path / "out", source=str(source), heldout=0)
        assert (summary.n_train, summary.n_heldout, summary.n_subjects) == (3, 0, 3)
        assert pq.read_table(tmp_path / "out/train.parquet")["intent"].to_pylist() == USABLE
        assert pq.read_table(tmp_path / "out/heldout.parquet").num_rows == 0
        rejects = pq.read_table(tmp_path / "out/rejects.parquet")
        assert [str(field.type) for field in rejects.schema] == ["int64", "string", "string"]
        assert rejects.to_pylist() == [
            {"row": 2, "text": "", "reason": "blank"},
            {"row": 3, "text": "A RED kite over dunes", "reason": "duplicate"},
            {"row": 4, "text": "x" * 500, "reason": "too long"},
        ]
        assert summary.reject_reasons == {"blank": 1, "duplicate": 1, "too long": 1}

    @pytest.mark.parametrize("source", ["none.csv", "empty.txt", "builtin:nothing"])
    def test_a_bad_source_leaves_nothing_behind(self, tmp_path: Path, source: str) -> None:
        (tmp_path / "empty.txt").touch()
        uri = source if source.startswith("builtin:") else str(tmp_path / source)
        with pytest.raises(UserError) as problem:
            split(tmp_path / "out", source=uri, limit=5)
        one_line(problem)
        assert not (tmp_path / "out").exists()

    def test_an_empty_training_split_names_the_key_and_keeps_the_old_files(self, tmp_path: Path) -> None:
        heldout = next(f"an owl number {n}" for n in range(1000) if is_heldout(f"an owl number {n}", 0.5))
        split(tmp_path / "out", limit=50)
        before = (tmp_path / "out/train.parquet").read_bytes()
        with pytest.raises(UserError, match=r"intents\.heldout: .*\(0\.5\)") as problem:
            split(tmp_path / "out", source=str(write(tmp_path / "one.txt", [heldout])), heldout=0.5)
        one_line(problem)
        assert (tmp_path / "out/train.parquet").read_bytes() == before
        assert len(list((tmp_path / "out").iterdir())) == 3

    def test_a_source_that_fails_midway_writes_no_file(self, tmp_path: Path) -> None:
        good = io.BytesIO()
        pq.write_table(pa.table({"intent": [f"request {n}" for n in range(10_000)]}), good)
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.parquet").write_bytes(good.getvalue())
        (tmp_path / "in/b.parquet").write_bytes(b"broken")
        with pytest.raises(UserError, match="can't be read"):
            split(tmp_path / "out", source=str(tmp_path / "in"))
        assert list((tmp_path / "out").iterdir()) == []

    def test_all_rejects_before_the_first_intent_are_written(self, tmp_path: Path) -> None:
        source = write(tmp_path / "rows.txt", [*[" "] * 10_000, "an owl in a museum"])
        summary = split(tmp_path / "out", source=str(source), heldout=0)
        rejects = pq.read_table(tmp_path / "out/rejects.parquet")
        assert rejects.column("row").to_pylist() == list(range(10_000))
        assert summary.reject_reasons == {"blank": 10_000}
