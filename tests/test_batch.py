"""Batch: every row once, whatever happens in between, by one release."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from releases import put_in_production, store  # noqa: F401  (a fixture)

from agentkit.errors import BudgetExceeded, DataError, TrustError, UsageError
from agentkit_pipelines import cli, promotion
from agentkit_pipelines.batch import run_batch
from agentkit_tracking import registry
from agentkit_tracking.keys import Trust
from agentkit_tracking.runlog import RunLog

# Fails on request, and can be made to wait for a file.
MEASURE = """
import time
from pathlib import Path

def measure(text: str, wait_for: str = "") -> dict:
    while wait_for and not Path(wait_for).exists():
        time.sleep(0.01)
    if text == "bad":
        raise ValueError("a bad row")
    return {"length": len(text), "words": text.split()}
"""


@pytest.fixture
def measure(project: Path, store: Path) -> registry.Version:  # noqa: F811
    """A release in production."""
    (project / "measure.py").write_text(MEASURE)
    version = registry.register_file("measure.py:measure")
    put_in_production(version)
    return version


def rows(count: int, **columns: Any) -> pl.DataFrame:
    return pl.DataFrame(
        {"id": [f"{i:03}" for i in range(count)], "text": [f"row {i}" for i in range(count)], **columns}
    )


def batch(source: str, target: str = "out.parquet", **options: Any) -> pl.DataFrame:
    return run_batch("measure@production", Path(source), Path(target), **options)


def runs() -> pl.DataFrame:
    return RunLog().sql(
        "SELECT inputs->>'text' AS text, release FROM runs WHERE kind = 'batch' AND state = 'DONE' ORDER BY started_at"
    )


class Stopped(Exception):
    pass


def stop_at(row: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == row:
            raise Stopped

    return progress


# ---- in and out

WRITERS: dict[str, Callable[[pl.DataFrame, str], Any]] = {
    "in.csv": pl.DataFrame.write_csv,
    "in.parquet": pl.DataFrame.write_parquet,
    "in.jsonl": pl.DataFrame.write_ndjson,
}


@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)
def test_every_format_in_and_parquet_out_in_the_order_of_the_source(
    measure: registry.Version, name: str, write: Callable[[pl.DataFrame, str], Any]
) -> None:
    write(rows(5).reverse(), name)
    given = batch(name)
    assert pl.read_parquet("out.parquet").equals(given)
    assert given.columns == [
        "id", "text", "release", "length", "words", "route", "state", "error", "cost_usd", "latency_s", "run_id",
    ]  # fmt: skip
    assert given.select("id", "length", "state").rows()[0] == ("004", 5, "DONE")  # ids keep their zeros
    assert given["id"].is_sorted(descending=True)
    assert given["release"].unique().to_list() == [measure.release_id]
    assert sorted(given["run_id"]) == RunLog().sql("SELECT run_id FROM runs ORDER BY 1")["run_id"].to_list()
    assert not Path("out.parquet.parts").exists()


@pytest.mark.usefixtures("measure")
def test_failures_are_rows_with_their_error() -> None:
    rows(3).with_columns(text=pl.Series(["good", "bad", "good"])).write_csv("in.csv")
    given = batch("in.csv")
    assert given.select("state", "error", "length").rows() == [
        ("DONE", None, 4),
        ("FAILED", "ValueError: a bad row", None),
        ("DONE", None, 4),
    ]


@pytest.mark.usefixtures("measure")
def test_a_batch_in_which_every_row_fails_is_a_result_too() -> None:
    rows(2).with_columns(text=pl.lit("bad")).write_csv("in.csv")
    assert batch("in.csv")["state"].to_list() == ["FAILED", "FAILED"]


@pytest.mark.usefixtures("measure")
def test_columns_of_the_source_are_carried_along_and_none_is_lost() -> None:
    rows(2, release=["mine", "mine"], state=["new", "old"], length=[1, 2]).write_csv("in.csv")
    given = batch("in.csv")
    assert given.select("input_release", "input_state", "length", "output_length").row(0) == ("mine", "new", "1", 5)
    assert given["state"].to_list() == ["DONE", "DONE"]


@pytest.mark.usefixtures("measure")
def test_several_workers_give_the_same_rows() -> None:
    rows(40).write_csv("in.csv")
    alone, together = batch("in.csv", "a.parquet"), batch("in.csv", "b.parquet", workers=4)
    assert alone.drop("latency_s", "run_id").equals(together.drop("latency_s", "run_id"))


@pytest.mark.usefixtures("measure")
def test_progress_counts_rows() -> None:
    rows(3).write_csv("in.csv")
    seen: list[tuple[int, int]] = []
    batch("in.csv", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ---- wrong use


@pytest.mark.usefixtures("measure")
@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (
            rows(3).with_columns(id=pl.Series(["a", "b", "a"])),
            {},
            r"must be present and unique; 0 missing, e.g. twice: \['a'\]",
        ),
        (rows(3).with_columns(id=pl.Series(["a", None, None])), {}, "must be present and unique; 2 missing"),
        (rows(3), {"id_column": "key"}, r"has no column 'key' \(it has id, text\); name the id column"),
        (rows(0), {}, "in.csv has no rows"),
        (rows(3).rename({"text": "words"}), {}, r"measure needs the columns \['text'\]; missing: \['text'\]"),
        (rows(3), {"target": "out.csv"}, "the target must end in .parquet"),
    ],
    ids=["duplicate ids", "missing ids", "no id column", "no rows", "no input column", "target"],
)
def test_wrong_use_is_said_before_anything_runs(frame: pl.DataFrame, options: dict[str, Any], message: str) -> None:
    frame.write_csv("in.csv")
    with pytest.raises(UsageError, match=message):
        batch("in.csv", **options)
    assert len(runs()) == 0


@pytest.mark.usefixtures("measure")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.xlsx", b"", r"in\.xlsx: expected a file ending in \.csv, \.parquet, \.jsonl"),
        ("in.parquet", b"not parquet", r"in\.parquet cannot be read"),
        ("in.jsonl", b"{", r"in\.jsonl cannot be read"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        batch(name)
    with pytest.raises(DataError, match=r"missing\.csv cannot be read"):
        batch("missing.csv")


# ---- cut off and started again


def test_a_batch_killed_in_the_middle_goes_on_and_runs_no_row_twice(measure: registry.Version) -> None:
    """SIGKILL while a row is under way, which a second start beside it finds occupied."""
    rows(30, wait_for=["go" if i == 20 else "" for i in range(30)]).write_csv("in.csv")
    script = (
        "from pathlib import Path; from agentkit_pipelines.batch import run_batch;"
        "run_batch('measure@production', Path('in.csv'), Path('out.parquet'))"
    )
    journal = Path("out.parquet.parts/rows.jsonl")
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        try:
            while not journal.exists() or journal.read_bytes().count(b'"run_id"') < 20:
                assert process.poll() is None, "the batch ended"
                time.sleep(0.02)
            with pytest.raises(UsageError, match="another process is at this batch"):
                batch("in.csv")
        finally:
            process.send_signal(signal.SIGKILL)
    assert not Path("out.parquet").exists()
    Path("go").touch()
    given = batch("in.csv")
    assert given["id"].to_list() == [f"{i:03}" for i in range(30)]
    assert runs()["text"].to_list() == [f"row {i}" for i in range(30)]
    assert runs()["release"].unique().to_list() == [measure.release_id]


@pytest.mark.usefixtures("measure")
def test_a_line_torn_by_the_kill_is_run_again() -> None:
    rows(5).write_csv("in.csv")
    with pytest.raises(Stopped):
        batch("in.csv", progress=stop_at(3))
    journal = Path("out.parquet.parts/rows.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])
    with pytest.raises(Stopped):
        batch("in.csv", progress=stop_at(4))
    given = batch("in.csv")
    assert given["length"].to_list() == [5] * 5
    assert runs()["text"].to_list() == ["row 0", "row 1", "row 2", "row 2", "row 3", "row 4"]


@pytest.mark.usefixtures("measure")
def test_a_result_is_the_same_with_and_without_a_restart() -> None:
    rows(6).with_columns(text=pl.Series(["a b", "bad", "c", "bad", "", "é 🙂"])).write_csv("in.csv")
    with pytest.raises(Stopped):
        batch("in.csv", progress=stop_at(2))
    with pytest.raises(Stopped):
        batch("in.csv", progress=stop_at(4))
    given, whole = batch("in.csv"), batch("in.csv", "whole.parquet")
    assert given.schema == whole.schema
    assert given.drop("latency_s", "run_id").equals(whole.drop("latency_s", "run_id"))


@pytest.mark.parametrize("gone", [False, True], ids=["moved", "taken away"])
def test_the_release_it_began_with_is_the_one_it_ends_with(measure: registry.Version, gone: bool) -> None:
    rows(4).write_csv("in.csv")
    with pytest.raises(Stopped):
        batch("in.csv", progress=stop_at(2))
    Path("measure.py").write_text(MEASURE.replace("len(text)", "-len(text)"))
    after = registry.register_file("measure.py:measure")
    if gone:
        promotion.withdraw("measure", why="a test")
    else:
        put_in_production(after)
    given = batch("in.csv")
    assert (given["length"].to_list(), given["release"].unique().to_list()) == ([5] * 4, [measure.release_id])


def test_a_started_batch_does_not_say_what_is_trusted(
    measure: registry.Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can write beside the target, and register, decides nothing about what is run as production."""
    rows(4).write_csv("in.csv")
    with pytest.raises(Stopped):
        batch("in.csv", progress=stop_at(2))
    Path("measure.py").write_text(MEASURE.replace("len(text)", "-len(text)"))
    other = registry.register_file("measure.py:measure")
    pin = Path("out.parquet.parts") / "batch.json"
    pin.write_text(pin.read_text().replace(measure.release_id, other.release_id))
    monkeypatch.setattr("agentkit_tracking.loading.is_local_store", lambda: False)  # as if it were somebody else's
    monkeypatch.setattr("agentkit_tracking.loading.load_trust", lambda: Trust())
    with pytest.raises(TrustError, match="nobody trusted here vouches for it"):
        batch("in.csv")


@pytest.mark.usefixtures("measure")
def test_a_source_or_id_column_changed_since_the_start_is_refused() -> None:
    rows(4, other=list("abcd")).write_csv("in.csv")
    with pytest.raises(Stopped):
        batch("in.csv", progress=stop_at(2))
    with pytest.raises(UsageError, match="holds a started batch over another file; delete it to begin anew"):
        batch("in.csv", id_column="other")
    rows(5).write_csv("in.csv")
    with pytest.raises(UsageError, match="holds a started batch over another file"):
        batch("in.csv")
    assert len(runs()) == 2


# ---- money

# Each call costs 0.1 cent, and 10 cents are set aside for it until it has answered.
PAID = """
import dspy
from dspy.lm15 import Message, Response, TextPart, Usage
from agentkit.models import MeteredLM, Price

class Engine:
    def complete(self, request):
        return Response(
            id=None, model="paid/model", message=Message.assistant([TextPart("[[ ## answer ## ]]\\nyes\\n\\n[[ ## completed ## ]]")]),
            finish_reason="stop", usage=Usage(input_tokens=100, output_tokens=10, total_tokens=110),
        )

    def close(self):
        pass

    def dump_state(self):
        return {}

    @classmethod
    def load_state(cls, state):
        return cls()

def system() -> dspy.Module:
    program = dspy.Predict("text -> answer")
    program.lm = MeteredLM("paid/model", engine=Engine(), cache=False, max_tokens=1000)
    program.lm.price = Price(input=0, output=100)
    return program
"""


@pytest.mark.usefixtures("store")
def test_max_usd_stops_before_it_is_passed_and_a_higher_one_goes_on(project: Path) -> None:
    (project / "paid.py").write_text(PAID)
    registry.register_file("paid.py")
    rows(8).write_csv("in.csv")
    with pytest.raises(BudgetExceeded, match=r"budget of 0\.1045 usd"):
        run_batch("paid", Path("in.csv"), Path("out.parquet"), workers=1, max_usd=0.1045)
    done = (
        RunLog()
        .sql("SELECT inputs->>'text' AS text FROM runs WHERE state = 'DONE' ORDER BY started_at")["text"]
        .to_list()
    )
    assert done == [f"row {i}" for i in range(5)]
    given = run_batch("paid", Path("in.csv"), Path("out.parquet"), max_usd=1.0)
    assert given.select(pl.col("answer").unique(), pl.col("cost_usd").sum().round(4)).rows() == [("yes", 0.008)]
    assert RunLog().sql("SELECT count(*) FROM runs WHERE state = 'DONE'").item() == 8


# ---- the notebook


@pytest.mark.slow
@pytest.mark.usefixtures("measure")
def test_the_batch_command_runs_the_notebook_and_says_where_results_and_report_are(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(6).with_columns(text=pl.Series(["bad", *"abcde"])).write_csv("in.csv")
    monkeypatch.setattr(sys, "argv", ["agentkit", "batch", "measure@production", "in.csv", "out.parquet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, len(pl.read_parquet("out.parquet"))) == (0, 6)
    assert "results: out.parquet; report:" in capsys.readouterr().out
    [report] = own_home.glob("batches/**/batch.ipynb")
    assert "ValueError: a bad row" in report.read_text()
