from __future__ import annotations

import datetime
import hashlib
import json
import os
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agentkit.errors import DataError, UsageError
from agentkit.example_checks import check_examples
from agentkit.example_tables import import_examples, keep_cases
from agentkit.examples import Example, read_examples, sha256_of, write_examples


def case(id: str = "a", text: str = "My card is lost", **fields: Any) -> Example:
    return Example(**{"id": id, "inputs": {"text": text}, "expected": {}, "task_type": "card"} | fields)


def line(**fields: Any) -> str:
    """A valid line, but for `fields`; a field given as `...` is left out."""
    record = {"id": "a", "inputs": {"text": "hello"}, "expected": {"queue": "billing"}, "task_type": "card"} | fields
    return json.dumps({key: value for key, value in record.items() if value is not ...})


def refusal(path: Path, content: str | bytes) -> list[str]:
    """The problems `read_examples` finds in a file of that content; each message names the file."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(path) in str(caught.value)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "dev.jsonl"


# One example


def test_an_example_is_one_dspy_example_with_its_inputs_marked() -> None:
    example = case(expected={"queue": "billing"}, tags=["hard"]).for_dspy()
    assert example.inputs().toDict() == {"text": "My card is lost"}
    assert example.labels().toDict() == {"queue": "billing", "case_id": "a", "task_type": "card", "tags": ["hard"]}


def test_an_example_is_frozen_and_strict() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        case().id = "b"
    with pytest.raises(ValidationError, match="Extra inputs"):
        case(note="x")


@pytest.mark.parametrize("value", [{"when": datetime.date(2026, 1, 1)}, {"n": float("nan")}, {"t": "\ud800"}, {}])
def test_an_example_that_could_not_be_written_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        case(inputs=value)


# Reading


def test_byte_order_mark_blank_lines_and_crlf_are_read(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf\r\n" + line().encode() + b"\r\n\r\n  \r\n" + line(id="b", tags=["x"]).encode())
    assert [(e.id, e.tags) for e in read_examples(file)] == [("a", []), ("b", ["x"])]


def test_line_separators_inside_a_text_do_not_end_the_line(file: Path) -> None:
    examples = [case(text="one\u2028two\u0085three\rfour\nfive")]
    write_examples(file, examples)
    assert read_examples(file) == examples


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (line(id=""), "line 1: key 'id': expected a non-empty string, found ''"),
        (line(id=7), "line 1: key 'id': expected a non-empty string, found 7"),
        (line(inputs={}), "line 1: key 'inputs': expected a non-empty object of JSON values, found {}"),
        (line(inputs="hi"), "line 1: key 'inputs': expected a non-empty object of JSON values, found 'hi'"),
        (
            line(expected=None),
            "line 1: key 'expected': expected an object of JSON values ({} = still to be labelled), found None",
        ),
        (
            line(expected=...),
            "line 1: key 'expected': expected an object of JSON values ({} = still to be labelled), "
            "found only the keys id, inputs, task_type",
        ),
        (line(task_type=None), "line 1: key 'task_type': expected a non-empty string, found None"),
        (line(tags="x,y"), "line 1: key 'tags': expected a list of strings, found 'x,y'"),
        (line(tags=["x", 3]), "line 1: key 'tags.1': expected a list of strings, found 3"),
        (
            line(input={}),
            "line 1: key 'input': expected only id, inputs, expected, task_type, tags, found this one too; "
            "did you mean 'inputs'?",
        ),
        (
            line(note="x"),
            "line 1: key 'note': expected only id, inputs, expected, task_type, tags, found this one too; "
            "put what describes a case into tags",
        ),
        (
            line(expected={"text": "x"}),
            "line 1: key 'expected': expected other names than in inputs, found ['text'] in both; rename one",
        ),
        (
            line(expected={"tags": "x"}),
            "line 1: keys 'inputs', 'expected': the names ['tags'] are taken by the case itself; rename them",
        ),
        ("[1]", "line 1: expected an object with the keys id, inputs, expected, task_type, tags, found [1]"),
        (line() + "\n\n" + line(), "line 3: key 'id': expected a new id, found 'a' of line 1"),
        ('{"id": "a", "id": "b"}', "key 'id' stands twice in one object)"),
        ('{"id": NaN}', "NaN is not JSON; use null)"),
        ('{"id": "a",}\n', 'line 1: expected one JSON object, found \'{"id": "a",}\' ('),
        (line(inputs={"text": 1e400}), "Infinity is not JSON; use null)"),
        (line().replace("hello", "\\ud83d"), "line 1: expected an object that UTF-8 JSON can hold, found"),
        ("[" * 100_000, "line 1: expected one JSON object, found "),
        (line() + "\n" + line(id="b")[:-30], "(the file ends inside this line; complete or delete it)"),
        (line() + "\n" + line(id="b")[:-1], "(the file ends inside this line; complete or delete it)"),
        (line() + '\n{"id": "b", "inputs": {"text": "x"}', "(the file ends inside this line; complete or delete it)"),
    ],
)
def test_a_problem_names_line_key_expected_and_found(file: Path, content: str, problem: str) -> None:
    (found,) = refusal(file, content)
    assert problem in found
    assert found.startswith("line ")


def test_a_file_that_is_not_utf8_is_refused_with_its_line(file: Path) -> None:
    latin = line().encode() + b"\n" + line(id="b").encode().replace(b"hello", b"caf\xe9") + b"\n"
    assert refusal(file, latin) == ["line 2: found b'\\xe9' (invalid continuation byte); save the file as UTF-8"]
    (problem,) = refusal(file, line().encode("utf-16"))
    assert problem.startswith("line 1: found b'\\xff'")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"dev\.jsonl is empty: expected at least one example, one JSON object a line"):
        read_examples(file)


def test_a_missing_file_is_refused(file: Path) -> None:
    for read in (read_examples, check_examples, sha256_of):
        with pytest.raises(DataError, match=r"dev\.jsonl cannot be read: No such file.*; check the path"):
            read(file)


def test_all_problems_are_found_and_twenty_listed(file: Path) -> None:
    assert len(refusal(file, "\n".join(["{}"] * 5))) == 20
    problems = refusal(file, "\n".join(line(id=i) for i in range(50)))
    assert problems[19] == "line 20: key 'id': expected a non-empty string, found 19"
    assert problems[20:] == ["and 30 more"]


# Writing

NAMES = st.text(max_size=8).filter(lambda name: name not in {"case_id", "task_type", "tags"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
EXAMPLES = st.builds(
    lambda id, inputs, expected, **rest: Example(
        id=id, inputs=inputs, expected={k: v for k, v in expected.items() if k not in inputs}, **rest
    ),
    id=st.text(min_size=1, max_size=8),
    inputs=st.dictionaries(NAMES, VALUES, min_size=1, max_size=3),
    expected=st.dictionaries(NAMES, VALUES, max_size=3),
    task_type=st.text(min_size=1, max_size=8),
    tags=st.lists(st.text(max_size=5), max_size=3),
)


@given(st.lists(EXAMPLES, min_size=1, max_size=4, unique_by=lambda e: e.id))
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(examples: list[Example]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.jsonl"
        write_examples(file, examples)
        assert read_examples(file) == examples
        before = file.read_bytes()
        write_examples(file, read_examples(file))
        assert file.read_bytes() == before
        assert os.listdir(folder) == ["cases.jsonl"]


def test_keys_stand_in_one_order_and_text_is_readable(file: Path) -> None:
    write_examples(
        file, [Example(tags=["t"], task_type="card", expected={"b": 1, "a": 2}, inputs={"x": "Zoë"}, id="1")]
    )
    assert file.read_text("utf-8") == (
        '{"id": "1", "inputs": {"x": "Zoë"}, "expected": {"b": 1, "a": 2}, "task_type": "card", "tags": ["t"]}\n'
    )


def test_a_failed_write_leaves_the_old_file_and_no_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(file, [case()])
    before = file.read_bytes()

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(DataError, match=r"dev\.jsonl cannot be written: No space left on device; check its folder"):
            write_examples(file, [case("b")])
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_write_goes_through_links_and_keeps_the_mode(file: Path, tmp_path: Path) -> None:
    write_examples(file, [case()])
    file.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    write_examples(link, [case("b")])
    assert link.is_symlink()
    assert [e.id for e in read_examples(file)] == ["b"]
    assert file.stat().st_mode & 0o777 == 0o640


def test_what_could_not_be_read_is_not_written(file: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to write to .*: an example file holds at least one"):
        write_examples(file, [])
    with pytest.raises(DataError, match=r"ids must be unique\n  id 'a' occurs more than once$"):
        write_examples(file, [case(), case("b"), case()])
    with pytest.raises(DataError, match="cannot be written: No such file or directory; check its folder"):
        write_examples(file.parent / "nowhere" / "x.jsonl", [case()])
    assert not file.exists()


# Checking


def test_the_report_counts_types_tags_and_classes(file: Path) -> None:
    examples = [
        case("1", "first text", task_type="b", expected={"ok": True, "n": 1, "q": "x", "many": "1"}, tags=["t", "t"]),
        case("2", "another one", task_type="b", expected={"ok": False, "n": 2, "q": "y", "many": "2"}, tags=["t", "u"]),
        case("3", "something else", task_type="a", expected={"ok": False, "n": 3, "q": None}),
        *(case(f"m{i}", f"{i * 7919:x}", expected={"many": str(i)}) for i in range(30)),
        case("4", "not labelled"),
    ]
    write_examples(file, examples)
    report = check_examples(file)
    assert (report.path, report.count, report.unlabelled) == (file, 34, 1)
    assert report.sha256 == hashlib.sha256(file.read_bytes()).hexdigest() == sha256_of(file)
    assert list(report.by_task_type.items()) == [("card", 31), ("b", 2), ("a", 1)]
    assert report.by_tag == {"t": 2, "u": 1}
    assert report.balance == {"ok": {False: 2, True: 1}, "q": {"x": 1, "y": 1, None: 1}}


NEAR = "My invoice of last month was charged to the wrong credit card, please correct it"


def test_near_duplicates_are_found_within_the_file_and_against_others(file: Path, tmp_path: Path) -> None:
    write_examples(file, [case("a", NEAR), case("b", "The app closes when I open it"), case("c", NEAR + " soon")])
    train, dev = tmp_path / "train.jsonl", tmp_path / "train2.jsonl"
    write_examples(train, [case("a", "The app closes when I open it"), case("t", "App the closes! when I open it now")])
    write_examples(dev, [case("z", "No such text stands anywhere else")])

    report = check_examples(file, against=[train, dev, file])
    pairs = {(pair.id, pair.other): pair.similarity for pair in report.near_duplicates}
    assert set(pairs) == {("c", "a"), ("b", "train.jsonl:a")}
    assert pairs["b", "train.jsonl:a"] == 1.0
    assert 0.8 <= pairs["c", "a"] < 1
    assert [pair[:2] for pair in check_examples(file).near_duplicates] == [("c", "a")]
    assert check_examples(file, threshold=1).near_duplicates == []


def test_many_copies_give_a_short_list_that_removes_them_all(file: Path) -> None:
    write_examples(file, [case(str(i), NEAR) for i in range(600)])
    assert [(p.id, p.other, p.similarity) for p in check_examples(file).near_duplicates] == [
        (str(i), "0", 1.0) for i in range(1, 600)
    ]


def test_the_sparse_search_finds_what_the_full_comparison_finds(file: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = ["card", "lost", "app", "slow", "pay", "refund", "order", "late", "login", "code", "bill", "wrong"]
    texts = [" ".join(words[(i * k) % 12] for k in range(1, 8)) for i in range(300)]
    write_examples(file, [case(str(i), text) for i, text in enumerate(texts)])
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(texts)
    full = (vectors @ vectors.T).toarray()
    for threshold in (0.5, 0.83):
        found = {int(p.id): p.similarity for p in check_examples(file, threshold=threshold).near_duplicates}
        best = {i: float(full[i, :i].max()) for i in range(1, 300)}
        assert found == pytest.approx({i: s for i, s in best.items() if s >= threshold}, abs=1e-4)


def test_cases_without_text_have_no_near_duplicates(file: Path) -> None:
    write_examples(file, [case("a", inputs={"n": 1}), case("b", inputs={"n": 1}), case("c", " "), case("d", "")])
    assert check_examples(file).near_duplicates == []


def test_a_threshold_outside_its_range_is_refused(file: Path) -> None:
    write_examples(file, [case()])
    for threshold in (0, 1.01):
        with pytest.raises(UsageError, match=f"threshold must be above 0 and at most 1, got {threshold}"):
            check_examples(file, threshold=threshold)


def test_the_files_compared_with_are_checked_too(file: Path, tmp_path: Path) -> None:
    write_examples(file, [case()])
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"train\.jsonl is not a valid"):
        check_examples(file, against=[tmp_path / "train.jsonl"])


# Importing


def test_csv_cells_stay_text_and_lists_are_read(tmp_path: Path) -> None:
    source = tmp_path / "tickets.csv"
    source.write_text(
        "\ufeffnr,text,queue,amount,forbidden,labels\n"
        '00123,"[urgent] He said ""no"", twice",billing,12.50,"[""refund"", 1]","hard, angry,"\n'
        "\n"
        "1e5,true,,,,\n"
    )
    assert import_examples(
        source, id="nr", inputs=["text"], expected=["queue", "amount", "forbidden"], task_type="=refund", tags="labels"
    ) == [
        Example(
            id="00123",
            inputs={"text": '[urgent] He said "no", twice'},
            expected={"queue": "billing", "amount": "12.50", "forbidden": ["refund", 1]},
            task_type="refund",
            tags=["hard", "angry"],
        ),
        Example(id="1e5", inputs={"text": "true"}, expected={}, task_type="refund"),
    ]


def test_without_an_id_column_the_rows_are_numbered(tmp_path: Path) -> None:
    source = tmp_path / "tickets.csv"
    source.write_text("text,kind\none,a\ntwo,b\n")
    examples = import_examples(source, inputs=["text"], task_type="kind")
    assert [(e.id, e.task_type) for e in examples] == [("tickets-0001", "a"), ("tickets-0002", "b")]


def test_parquet_values_become_json_values(tmp_path: Path) -> None:
    source = tmp_path / "t.parquet"
    row = {
        "id": 7,
        "text": "hello",
        "day": datetime.date(2026, 1, 2),
        "usd": Decimal("49.99"),
        "x": float("nan"),
        "items": [{"at": datetime.datetime(2026, 1, 2, 3, 4)}],
        "ok": True,
        "tags": ["a", "b"],
    }
    pl.DataFrame([row]).write_parquet(source)
    (example,) = import_examples(
        source, id="id", inputs=["text", "day"], expected=["usd", "x", "items", "ok"], task_type="=t", tags="tags"
    )
    assert example.id == "7"
    assert example.inputs == {"text": "hello", "day": "2026-01-02"}
    assert example.expected == {"usd": "49.99", "x": None, "items": [{"at": "2026-01-02T03:04:00"}], "ok": True}
    assert example.tags == ["a", "b"]


def test_jsonl_values_keep_their_own_types(tmp_path: Path) -> None:
    source = tmp_path / "t.jsonl"
    source.write_text('{"id": "007", "t": "x", "y": 1}\n\n{"id": 8, "t": {"a": [1, "b"]}, "y": "one", "more": 1}\n')
    examples = import_examples(source, id="id", inputs=["t"], expected=["y"], task_type="=t")
    assert [(e.id, e.inputs["t"], e.expected["y"]) for e in examples] == [
        ("007", "x", 1),
        ("8", {"a": [1, "b"]}, "one"),
    ]


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5, unique_by=lambda row: row[0]))
@settings(max_examples=60, deadline=None)
def test_a_table_of_text_comes_back_from_every_format(rows: list[tuple[str, str, str]]) -> None:
    rows = [(a, b, f"({c}" if c[0] == "[" else c) for a, b, c in rows]  # a leading [ begins a JSON list
    frame = pl.DataFrame(rows, schema=["nr", "text", "answer"], orient="row")
    expected = [Example(id=a, inputs={"text": b}, expected={"answer": c}, task_type="t", tags=[]) for a, b, c in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        frame.write_csv(path / "t.csv", quote_style="always")
        frame.write_parquet(path / "t.parquet")
        frame.write_ndjson(path / "t.jsonl")
        for source in sorted(path.iterdir()):
            assert import_examples(source, id="nr", inputs=["text"], expected=["answer"], task_type="=t") == expected


def import_refusal(source: Path, content: str | bytes, **columns: Any) -> str:
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        import_examples(source, **{"id": "id", "inputs": ["text"], "expected": ["q"], "task_type": "=t"} | columns)
    assert str(source) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (
            "a;b\n1;2\n",
            {},
            "missing columns ['id', 'text', 'q']; found 'a;b' (a task type for all rows is written '=refund')",
        ),
        (
            "id,text,q\n1,a,b\n",
            {"task_type": "refund", "tags": "tag"},
            "missing columns ['refund', 'tag']; found 'id', 'text', 'q'",
        ),
        (
            "id,text,q\n1,a,b\n2,,b\n3,,c\n",
            {},
            "rows 2, 3: column 'text': expected a value, found none; fill it or delete the row",
        ),
        ("id,text,q\n" + ",a,b\n" * 23, {}, "19, 20 and 3 more: column 'id': expected a value, found none"),
        ("id,text,q\n1,a,\n2,b,\n1,c,\n", {}, "row 3: key 'id': expected a new id, found '1' of row 1"),
        ("id,text,q\n1,a,[oops\n", {}, "row 1: expected a JSON list after '[', found '[oops'"),
        ("id,text,q\n1,a,b\n", {"expected": ["text"]}, "row 1: key 'expected': expected other names than in inputs"),
        ("id,text,q\n1,a,b\n", {"task_type": "="}, "row 1: key 'task_type': expected a non-empty string, found ''"),
        ("id,text,q\n", {}, "is empty: expected at least one row below the column names"),
        ("", {}, "is empty: expected a line of column names and at least one row"),
        (
            "id,text,q\n1,a,b\n2,well, no,b\n",
            {},
            "row 2: expected 3 cells, found 4; put quotes around a text with commas",
        ),
        ('id,text,q\n1,"a,b\n', {}, "expected comma-separated rows with every quote closed"),
        (b"id,text,q\n1,caf\xe9,b\n", {}, "line 2: found b'\\xe9' (invalid continuation byte); save"),
    ],
)
def test_an_import_problem_names_row_column_and_remedy(
    tmp_path: Path, content: str | bytes, columns: dict[str, Any], message: str
) -> None:
    assert message in import_refusal(tmp_path / "t.csv", content, **columns)


def test_import_problems_of_other_formats_name_file_and_line(tmp_path: Path) -> None:
    assert "expected an intact Parquet file" in import_refusal(tmp_path / "t.parquet", "no parquet")
    assert "t.jsonl is not a table in JSONL:\n  line 2: expected one JSON object, found 3" in import_refusal(
        tmp_path / "t.jsonl", '{"id": 1}\n3\n'
    )
    assert "line 1: expected one JSON object, found 'no json'" in import_refusal(tmp_path / "t.ndjson", "no json\n")
    assert "expected a .csv, .parquet, .jsonl or .ndjson file, found the suffix '.xlsx'" in import_refusal(
        tmp_path / "t.xlsx", "x"
    )
    for name in ("gone.csv", "gone.parquet", "gone.jsonl"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            import_examples(tmp_path / name, inputs=["text"], task_type="=t")


# Keeping cases


def results(*rows: tuple[str | None, str | None], **columns: list[Any]) -> pl.DataFrame:
    """A frame as `map` returns it, cut down: (run id, text) and what else is given."""
    return pl.DataFrame({"text": [t for _, t in rows], **columns, "run_id": [r for r, _ in rows]})


def test_kept_cases_are_unlabelled_tagged_and_not_added_twice(file: Path) -> None:
    frame = results(("r1", "one"), ("r2", None), ("r1", "one"), day=[datetime.date(2026, 1, 2)] * 3)
    assert keep_cases(frame, file, inputs=["text", "day"], task_type="=card", tags=["bad", "to-label"]) == 2
    assert read_examples(file) == [
        Example(
            id=f"run-{run}",
            inputs={"text": text, "day": "2026-01-02"},
            expected={},
            task_type="card",
            tags=["to-label", "bad"],
        )
        for run, text in (("r1", "one"), ("r2", None))
    ]
    before = file.read_bytes()
    assert keep_cases(frame, file, inputs=["text"], task_type="=card") == 0
    assert file.read_bytes() == before


def test_kept_cases_follow_lines_that_stay_as_they_are(file: Path) -> None:
    old = b"\xef\xbb\xbf" + line().encode() + b"\r\n\r\n" + line(id="b").encode()
    file.write_bytes(old)
    assert keep_cases(results(("r", "x"), route=["card"]), file, inputs=["text"], task_type="route") == 1
    assert file.read_bytes().startswith(old + b"\n{")
    assert [(e.id, e.task_type) for e in read_examples(file)] == [("a", "card"), ("b", "card"), ("run-r", "card")]


def test_nothing_to_keep_makes_no_file_and_an_empty_file_is_filled(file: Path) -> None:
    assert keep_cases(results(("r", "x")).clear(), file, inputs=["text"], task_type="=t") == 0
    assert not file.exists()
    file.touch()
    assert keep_cases(results(("r", "x")), file, inputs=["text"], task_type="=t") == 1


def test_cases_that_cannot_be_kept_leave_the_file_as_it_was(file: Path) -> None:
    write_examples(file, [case()])
    before = file.read_bytes()
    frame = results(("r1", "a"), ("r2", "b"), (None, "c"), route=["x", None, "y"])
    with pytest.raises(DataError, match=r"nothing added to .*dev\.jsonl") as caught:
        keep_cases(frame, file, inputs=["text"], task_type="route")
    assert caught.value.problems == [
        "row 2: key 'task_type': expected a non-empty string, found None",
        "row 3: column 'run_id': expected the id of a run, found null",
    ]
    with pytest.raises(
        DataError, match=r"the frame: missing columns \['txt', 'card'\]; found 'text', 'route', 'run_id'"
    ):
        keep_cases(frame, file, inputs=["txt"], task_type="card")
    assert file.read_bytes() == before

    file.write_text("{}")
    with pytest.raises(DataError, match="not a valid example file"):
        keep_cases(results(("r", "x")), file, inputs=["text"], task_type="=t")
    assert file.read_text() == "{}"
