"""What may be asked of the run log, and how answers and followed events come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from log_files import as_made_once, run, write
from releases import python
from typer.testing import CliRunner

from agentkit.errors import UsageError
from agentkit_pipelines.cli import app
from agentkit_tracking.runlog import RunLog, feedback, retention
from agentkit_tracking.runlog.following import Follower


@pytest.fixture
def log(own_home: Path) -> RunLog:
    """A log with an archived run, a folded one, and a fresh one."""
    log = RunLog()

    def older() -> None:
        write(log, run("old"), days=9)
        log.fold()
        retention.compact(log, 3)
        write(log, run("folded"))
        log.close()
        log.fold()

    as_made_once(own_home, "asked", older)
    write(log, run("fresh"))
    return log


@pytest.mark.parametrize(
    "query",
    [
        "SELECT run_id FROM outcomes",
        "-- all\nFROM runs;",
        "WITH r AS (SELECT run_id FROM runs) SELECT * FROM r",
        "DESCRIBE runs",
        "SUMMARIZE outcomes",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM runs",
        "EXPLAIN (ANALYZE) SELECT * FROM runs",
        "explain analyze FROM runs",
        "PIVOT outcomes ON state IN ('DONE', 'FAILED') USING count(*) GROUP BY route",
        "UNPIVOT (SELECT run_id, tokens_in, tokens_out FROM outcomes) ON tokens_in, tokens_out INTO NAME n VALUE v",
        "VALUES (1)",
        "SELECT 1 UNION ALL SELECT 2 EXCEPT SELECT 3",
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT * FROM r",
        "SELECT run_id, row_number() OVER (PARTITION BY state ORDER BY started_at) AS n FROM runs QUALIFY n = 1",
        "SELECT r.run_id, x.key FROM runs r, LATERAL (SELECT r.state) s, json_each(r.inputs) x, range(2)",
        "SELECT route, count(*) FROM outcomes o JOIN steps s USING (run_id) GROUP BY ROLLUP (route)",
        "SELECT (SELECT count(*) FROM steps) FROM (VALUES (1)) t(a) WHERE EXISTS (FROM runs)",
        "SELECT * FROM runs WHERE " + " OR ".join(f"run_id <> 'r{i}'" for i in range(400)),
    ],
)
def test_what_reads_is_answered_also_of_archives(log: RunLog, query: str) -> None:
    assert not log.sql(query).is_empty()
    assert sorted(log.sql("SELECT run_id FROM runs")["run_id"]) == ["folded", "fresh", "old"]


@pytest.mark.parametrize(
    "query",
    [
        "COPY runs TO '{file}'",
        "COPY runs TO '{archive}/x.csv'",
        "EXPLAIN ANALYZE COPY runs TO '{archive}/x.csv'",
        "EXPLAIN /* */ ANALYZE COPY runs TO '{archive}/x.csv'",
        "-- x\nEXPLAIN ANALYZE COPY runs TO '{archive}/x.csv'",
        "EXPLAIN (ANALYZE, FORMAT json) COPY runs TO '{archive}/x.csv'",
        "EXPORT DATABASE '{file}'",
        "ATTACH '{file}'",
        "DETACH log",
        "USE log",
        "INSTALL httpfs",
        "LOAD json",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY runs TO '{file}'",
        "PIVOT runs ON state USING count(*); COPY runs TO '{file}'",
        "SET memory_limit = '1GB'",
        "CREATE TABLE t AS SELECT 1",
        "CREATE TABLE t AS SELECT 1; SELECT 2",
        "CALL duckdb_functions()",
        "PRAGMA database_list",
        "WITH x AS (PIVOT outcomes ON route USING count(*)) FROM x",
        "FROM query('SELECT 1')",
        "FROM query_table('runs')",
        "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
        "SELECT * FROM \"Force_Checkpoint\"('log')",
        "SELECT (SELECT count(*) FROM pragma_table_info('runs'))",
        "FROM read_parquet('{archive}/*/*.parquet')",
        "FROM enable_logging()",
    ],
)
def test_what_does_anything_else_is_refused(log: RunLog, tmp_path: Path, query: str) -> None:
    file, archive = tmp_path / "out", log.folder / "archive"
    with pytest.raises(UsageError, match="only a query that reads the views"):
        log.sql(query.format(file=file, archive=archive))
    assert not file.exists()
    assert not (archive / "x.csv").exists()


@pytest.mark.parametrize(
    "query",
    [
        "WITH x AS ({does}) FROM x",
        "WITH x AS (WITH y AS ({does}) FROM y) FROM x",
        "SELECT (WITH x AS ({does}) SELECT count(*) FROM x)",
        "FROM runs WHERE run_id IN (WITH x AS ({does}) SELECT 'a' FROM x)",
        "EXPLAIN ANALYZE WITH x AS ({does}) FROM x",
        "SUMMARIZE WITH x AS ({does}) FROM x",
        "PIVOT (WITH x AS ({does}) FROM x) t ON gone USING count(*)",
        "WITH x AS ({does}) PIVOT runs ON state USING count(*)",
    ],
)
def test_what_a_query_has_within_it_reads_too(
    log: RunLog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, query: str
) -> None:
    (tmp_path / ".tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    wal = log.folder / "log.duckdb.wal"
    targets = [log.folder / "log.duckdb", *log.folder.rglob("*.parquet"), wal, tmp_path / ".tmp" / "out.csv"]
    assert len(targets) == 4
    before = [path.read_bytes() if path.exists() else None for path in targets]
    does = [f"COPY (SELECT 1 AS gone) TO '{path}' (FORMAT csv, USE_TMP_FILE false)" for path in targets]
    does += ["INSERT INTO fresh (n) VALUES (1) RETURNING n", "DELETE FROM log.events", "UPDATE fresh SET n = 1"]
    for change in does:
        # DuckDB 1.5 knows no such thing.
        with pytest.raises(
            UsageError, match=r"only a query that reads the views|cannot answer this query: Parser Error"
        ):
            log.sql(query.format(does=change))
    assert [path.read_bytes() if path.exists() else None for path in targets] == before


def test_a_pivot_without_its_values_is_told_what_it_needs(log: RunLog) -> None:
    with pytest.raises(UsageError, match=r"a PIVOT needs its values: ON column IN"):
        log.sql("PIVOT outcomes ON route USING count(*) GROUP BY state")


def test_a_query_nested_too_deeply_is_refused(log: RunLog) -> None:
    with pytest.raises(UsageError, match=r"nested too deeply|cannot answer this query"):
        log.sql(f"SELECT {'+'.join('1' * 5000)}")


@pytest.mark.parametrize("name", [".tmp/secret.csv", "secret.csv", "{cwd}/.tmp/secret.csv", ".tmp/../secret.csv"])
def test_no_file_of_the_working_directory_is_read(
    log: RunLog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / ".tmp").mkdir()
    for file in (tmp_path / "secret.csv", tmp_path / ".tmp" / "secret.csv"):
        file.write_text("a,b\n1,SECRET\n")
    monkeypatch.chdir(tmp_path)
    name = name.format(cwd=tmp_path)
    for query in (f"FROM '{name}'", f"FROM read_text('{name}')"):
        with pytest.raises(UsageError, match="only a query that reads the views"):
            log.sql(query)


def test_a_connection_of_ones_own_has_no_limits(log: RunLog, tmp_path: Path) -> None:
    with log.connection() as connection:
        connection.execute(f"COPY (FROM runs) TO '{tmp_path / 'out.csv'}'")
    assert (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "value",
    ["INTERVAL 1 DAY", "[INTERVAL 1 DAY]", "union_value(a := 1)", "'infinity'::TIMESTAMP", "'-infinity'::TIMESTAMPTZ", "'infinity'::DATE"],
)  # fmt: skip
def test_a_column_that_cannot_be_handed_over_is_named(log: RunLog, value: str) -> None:
    with pytest.raises(UsageError, match=r"column 'odd' .*cast it"):
        log.sql(f"SELECT 1 AS n, {value} AS odd")
    assert log.sql(f"SELECT ({value})::VARCHAR AS odd, now() AS t, 'INTERVAL'::ENUM('INTERVAL') AS e").height == 1


def test_a_run_with_two_outcomes_is_one_run(log: RunLog) -> None:
    write(log, run("forked"), run("forked"))
    with pytest.raises(UsageError, match="'f' begins several runs, among them folded, forked, fresh; give more"):
        log.find("f")
    with pytest.raises(UsageError, match="has no run 'x'"):
        log.find("x")
    assert log.find("forked").run_id == "forked"


def test_comments_are_left_out_where_payloads_are(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_PAYLOADS", "none")
    feedback.give(log, "fresh", "accepted", comment="SECRET")
    assert log.sql("SELECT label, comment FROM feedback").rows() == [("accepted", None)]
    assert not any(b"SECRET" in file.read_bytes() for file in log.segments.iterdir())


def test_feedback_that_says_nothing_or_no_number_is_refused(log: RunLog) -> None:
    with pytest.raises(UsageError, match="says nothing"):
        feedback.give(log, "fresh", comment=" \n")
    for rating in (True, float("nan"), 0, 6):
        with pytest.raises(UsageError, match="from 1 to 5"):
            feedback.give(log, "fresh", rating=rating)


# ---- as it is typed


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["log", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_sums_are_numbers(log: RunLog) -> None:
    query = "SELECT sum(tokens_in) AS n, 1.5::DECIMAL(9, 2) AS d, 12345678 AS big, true AS b FROM outcomes"
    assert json.loads(said("query", query, "--json")) == {"n": 15, "d": 1.5, "big": 12345678, "b": True}
    assert [cell.strip() for cell in said("query", query).splitlines()[3].split("│")[1:-1]] == ["15", "1.5", "12345678", "true"]  # fmt: skip


def cells(*arguments: str) -> list[str]:
    """The first row of the table that the command prints."""
    return [cell.strip() for cell in said(*arguments).splitlines()[3].split("│")[1:-1]]


def test_figures_are_shown_with_all_their_digits(log: RunLog) -> None:
    query = (
        "SELECT 1234567.89::DOUBLE AS a, 9000001.107::DOUBLE AS b, 0.1::DOUBLE + 0.2::DOUBLE AS c, 500.0::DOUBLE AS d, "
        "0.000003::DOUBLE AS e, 123456789012345678901234567.8900::DECIMAL(38, 4) AS f, 1200::DECIMAL(9, 2) AS g"
    )
    assert cells("query", query) == ["1234567.89", "9000001.107", "0.3", "500", "3e-06", "123456789012345678901234567.89", "1200"]  # fmt: skip
    assert cells("query", f"SELECT {2**127 - 1}::HUGEINT AS h, NULL::HUGEINT AS n") == [str(2**127 - 1), "null"]


def test_json_lines_are_json(log: RunLog) -> None:
    query = (
        "SELECT 'nan'::DOUBLE AS nan, ['inf'::DOUBLE, 1.5] AS list, {'low': '-inf'::DOUBLE, 'sum': 2::DECIMAL(9, 2)} AS struct, "
        f"{2**127 - 1}::HUGEINT AS huge, NULL::HUGEINT AS none, TIMESTAMPTZ '2026-11-20 10:00:00+00' AS time, DATE '2026-11-20' AS day"
    )

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads(said("query", query, "--json"), parse_constant=refused) == {
        "nan": None, "list": [None, 1.5], "struct": {"low": None, "sum": 2}, "huge": 2**127 - 1, "none": None,
        "time": "2026-11-20T10:00:00+00:00", "day": "2026-11-20",
    }  # fmt: skip


def test_of_many_rows_the_first_are_shown_and_how_to_get_the_others(log: RunLog) -> None:
    many = "SELECT range AS number FROM range(1_001)"
    *_, last_row, _, end = said("query", many).splitlines()
    assert last_row.split() == ["│", "999", "│"]
    assert end.startswith("the first 1,000 of 1,001 rows; --json gives all")
    assert "rows;" not in said("query", f"{many} LIMIT 1_000")
    assert len(said("query", many, "--json").splitlines()) == 1_001


def test_rows_wider_than_the_terminal_are_blocks(log: RunLog) -> None:
    shown = said("query", "SELECT * FROM runs ORDER BY run_id")
    assert [line.strip() for line in shown.splitlines() if line.startswith("row ")] == ["row 1", "row 2", "row 3"]
    lines = [line.split() for line in shown.splitlines()]
    assert [["run_id", name] in lines for name in ("folded", "fresh", "old")] == [True] * 3
    assert "┃" in said("query", "SELECT run_id, state FROM runs")


def test_markup_in_names_of_columns_is_text(log: RunLog) -> None:
    assert "[/red]" in said("query", 'SELECT 1 AS "[/red]"')


@pytest.mark.parametrize("arguments", [["compact"], ["prune", "--yes"]])
def test_days_that_no_calendar_has_are_wrong_use(log: RunLog, arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["log", *arguments, "--older-than", "9" * 12]).exit_code == 2


# ---- followed


def test_what_is_folded_between_two_looks_is_followed(log: RunLog) -> None:
    with Follower(log) as follower:
        assert follower.new() == []
        write(log, run("a"))
        seen = follower.new()
        write(log, run("b"))
        log.close()
        log.fold()
        assert not list(log.segments.iterdir())
        seen += follower.new()
        assert follower.new() == []
    assert [event["run_id"] for event in seen if event["type"] == "outcome"] == ["a", "b"]
    assert {event["private"]["inputs"]["text"] for event in seen if event["type"] == "outcome"} == {"secret of a", "secret of b"}  # fmt: skip
    assert len({event["id"] for event in seen}) == len(seen)
    assert "private_sha256" not in seen[-2]


def test_more_segments_than_files_may_be_open_are_followed(log: RunLog) -> None:
    for _ in range(120):
        write(log, run("old"))
        log.close()
    script = """
import resource, sys
from pathlib import Path
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.following import Follower
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
log = RunLog(Path(sys.argv[1]))
with Follower(log) as follower:
    log.write([({"type": "outcome", "run_id": "new"}, {})])
    print([event["run_id"] for event in follower.new() if event["type"] == "outcome"])
"""
    assert python(script, log.folder) == "['new']\n"
