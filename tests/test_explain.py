"""`explain` shows what runs said, and nothing of it acts on the terminal; any value can be recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hedgehogs import doing
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from agentkit import Run
from agentkit.errors import UsageError
from agentkit.jsonable import canonical, jsonable
from agentkit_pipelines.cli import app

HOSTILE = "one\x1b[2Jtwo \x1b]0;title\x07 \u202etxt.exe \x9b31m [red]x[/red]\nline"


def explained(run_id: str, *more: str) -> str:
    done = CliRunner().invoke(app, ["explain", run_id, *more])
    assert done.exit_code == 0, done.output
    return done.output


def test_what_a_run_ended_with_is_redacted_and_cut(tmp_path: Path) -> None:
    def work(run: Run) -> Any:
        raise RuntimeError("DB_PASSWORD=hunter22xyz of ann@example.com " + "x " * 5_000)

    record = doing(work, name="visitor").run(text="x")
    page = tmp_path / "page.html"
    output = explained(record.run_id, "--html", str(page))
    for text in (output, page.read_text()):
        assert "hunter22xyz" not in text
        assert "ann@example.com" not in text
    headline = output.split("input text")[0]
    assert "DB_PASSWORD=[key] of [e-mail]" in " ".join(headline.split())
    assert len(headline) < 2_000


def test_nothing_that_was_put_in_acts_on_the_terminal(tmp_path: Path) -> None:
    def work(run: Run) -> Any:
        run.decide("route", HOSTILE, HOSTILE)
        raise RuntimeError(HOSTILE)

    record = doing(work, name="visitor").run(text=HOSTILE)
    page = tmp_path / "page.html"
    output = explained(record.run_id, "--html", str(page))
    for text in (output, page.read_text()):
        assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert r"one\u{1b}[2Jtwo \u{1b}]0;title\u{7}" in " ".join(output.split())
    assert "[red]x[/red]" in output


@pytest.mark.parametrize("target", ["missing/x.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, target: str) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        CliRunner().invoke(app, ["explain", "no-such-run", "--html", str(tmp_path / target)], catch_exceptions=False)


# ---- any value as data


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Bad:
    def __str__(self) -> str:
        raise KeyError("no")


def test_what_cannot_be_printed_is_named_and_the_rest_is_kept() -> None:
    assert jsonable(Mute()) == "<unprintable Mute>"
    assert jsonable({"a": 1, "b": [Bad()]}) == {"a": 1, "b": ["<unprintable Bad>"]}
    around: list[Any] = [Mute()]
    around.append(around)
    assert jsonable(around) == "<unprintable list>"
    assert canonical(Mute()) == b'"<unprintable Mute>"'


def test_data_nested_beyond_all_reason_still_has_a_text() -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    assert canonical(deep) == canonical(deep)


def test_lone_surrogates_and_large_integers_have_a_text_of_their_own() -> None:
    values = ["\ud800", "\udfff", "?", 2**70, str(2**70), -(2**70), ["\ud800"], {"\ud800": 1}, {"a": 2**70}]
    texts = [canonical(value) for value in values]
    assert texts == [canonical(value) for value in values]
    assert len(set(texts)) == len(texts)
    assert json.loads(canonical({"b": [2**70], "a": "\ud800"})) == {"a": "\ud800", "b": [2**70]}
    assert canonical({"b": 2**70, "a": 1}) == canonical({"a": 1, "b": 2**70})


SURROGATES = st.text(st.characters(exclude_categories=()), max_size=4)
VALUES = st.recursive(
    st.none() | st.integers() | st.integers(2**63, 2**80) | st.floats() | SURROGATES | st.binary() | st.builds(Mute),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SURROGATES | st.integers(), inner, max_size=3),
)


@given(VALUES)
def test_every_value_has_a_text(value: Any) -> None:
    assert canonical(value) == canonical(value)
