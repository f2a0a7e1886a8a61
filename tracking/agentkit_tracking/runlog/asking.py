"""What may be asked of the run log in SQL, and answers as polars frames."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agentkit.errors import UsageError
from agentkit_tracking.runlog.database import Database, one, quoted
from agentkit_tracking.runlog.lake import Lake

if TYPE_CHECKING:
    import duckdb
    import polars as pl

ONLY_READING = (
    "only a query that reads the views runs, outcomes, steps, feedback and events is taken, one at a time (for anything else: "
    "RunLog().connection() in Python, or DuckDB on a file of `agentkit log export`)"
)
# What a statement may be made of, as DuckDB's parser has it: DuckDB 2 takes COPY, INSERT, UPDATE and DELETE in WITH.
_READS = (
    *("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "EMPTY", "BASE_TABLE", "SUBQUERY", "JOIN"),
    *("TABLE_FUNCTION", "EXPRESSION_LIST", "PIVOT", "SHOW_REF"),
)
# DuckDB's own confinement does not hold functions that run SQL or checkpoint, nor those of its extensions for a lake.
_FUNCTIONS = ("unnest", "range", "generate_series", "json_each", "json_tree")
_VIEWS = ("runs", "outcomes", "steps", "feedback", "events")  # and nothing else in a lake
_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(?:ANALYZE\s+|\([^()]*\)\s*)?", re.IGNORECASE)
_DAYS = (-719_162, 2_932_896)  # that Python has dates for, from 1970 on
_UNITS = {"ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}  # in a day


def check(connection: duckdb.DuckDBPyConnection, query: str, database: Database) -> None:
    """Refuse what is not one statement that reads.

    Raises:
        UsageError: it is none.
        duckdb.Error: it is no SQL.
    """
    import duckdb

    found = _kinds(connection, query)
    if not found:
        raise UsageError("the query is empty; ask e.g. SELECT route, count(*) FROM runs GROUP BY route")
    if found == ["EXPLAIN"]:  # with ANALYZE it does what it explains
        start = _EXPLAIN.match(query)
        with suppress(duckdb.Error):  # a comment in between, or the like
            explained = query[start.end() :] if start else query
            found = _kinds(connection, explained)
            query = explained
    if found != ["SELECT"]:
        raise _refusal(query)
    nodes = _nodes(connection, query)
    for node in nodes:
        # Queries have a `cte_map`, what they read from has a `sample`; expressions have neither.
        if ("cte_map" in node or "sample" in node) and node["type"] not in _READS:
            raise UsageError(ONLY_READING)
        if (
            node.get("type") == "TABLE_FUNCTION"
            and (name := node["function"]["function_name"]).lower() not in _FUNCTIONS
        ):
            raise UsageError(f"{ONLY_READING}; this one names {name!r}")
    if isinstance(database, Lake):
        _check_names(connection, nodes)


def _kinds(connection: duckdb.DuckDBPyConnection, query: str) -> list[str]:
    return [statement.type.name for statement in connection.extract_statements(query)]


def _refusal(query: str) -> UsageError:
    hint = "; a PIVOT needs its values: ON column IN ('a', 'b')" if "pivot" in query.lower() else ""
    return UsageError(ONLY_READING + hint)


def _nodes(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    """The parts of a statement, as DuckDB's own parser has it.

    Raises:
        UsageError: they cannot be told.
    """
    try:
        tree = json.loads(one(connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [query])))
    except RecursionError as e:
        raise UsageError("the query is nested too deeply") from e
    if tree["error"]:
        raise _refusal(query)
    nodes, left = [], [tree]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            nodes.append(part)
            left += part.values()
        elif isinstance(part, list):
            left += part
    return nodes


def _check_names(connection: duckdb.DuckDBPyConnection, nodes: list[dict[str, Any]]) -> None:
    """Refuse what names any table but the views: those of the catalogue show its password.

    Raises:
        UsageError: it does.
    """
    own = {entry["key"].lower() for node in nodes for entry in node.get("cte_map", {}).get("map", [])} - {*_VIEWS}
    # Beyond its WITH, such a name is another thing's.
    names = "SELECT view_name FROM duckdb_views() UNION SELECT table_name FROM duckdb_tables()"
    others = {name.lower() for (name,) in connection.execute(names).fetchall()} if own else set()
    own = {name for name in own - others if not re.search("[./:]", name)}  # nor a file's
    for node in nodes:
        if node.get("type") == "BASE_TABLE":
            name, place = node["table_name"], node["catalog_name"] or node["schema_name"]
            is_known = not place and name.lower() in (*_VIEWS, *own)
        elif node.get("type") == "SHOW_REF":  # DESCRIBE has a query; SHOW TABLES names what it lists
            name, is_known = node["table_name"], node["query"] is not None
        else:
            continue
        if not is_known:
            raise UsageError(f"{ONLY_READING}; this one names {name!r}")


def confine(connection: duckdb.DuckDBPyConnection, database: Database) -> None:
    """Keep a connection to the run log's own files from here on."""
    place = f"{database.data_path.rstrip('/')}/" if isinstance(database, Lake) else database.folder / "archive"
    connection.execute("SET temp_directory = ''")  # ./.tmp would be allowed, too
    connection.execute(f"SET allowed_directories = [{quoted(place)}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def frame(answer: duckdb.DuckDBPyRelation) -> pl.DataFrame:
    """An answer as a frame whose every value Python can have.

    Raises:
        UsageError: a column is of a kind that polars has not, or holds a date that Python has not.
    """
    import polars as pl

    for name, kind in zip(answer.columns, answer.types, strict=True):
        if _is_foreign(kind):
            raise UsageError(
                f"column {name!r} is of type {kind}, which is not handed over; cast it, e.g. {name}::VARCHAR"
            )
    try:
        found: pl.DataFrame = answer.pl()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError) as e:
        raise UsageError(f"a column is of a type that polars does not take; cast it to VARCHAR: {e}") from e
    for column in found:
        if _is_out_of_range(column):
            raise UsageError(
                f"column {column.name!r} has dates beyond the years 1 to 9999, or infinity; cast it to VARCHAR"
            )
    return found


def _is_foreign(kind: Any) -> bool:
    if kind.id in ("list", "array", "struct", "map"):
        return any(_is_foreign(part) for _, part in kind.children if hasattr(part, "id"))
    return kind.id in ("interval", "union")


def _is_out_of_range(column: pl.Series) -> bool:
    import polars as pl

    if isinstance(column.dtype, pl.Datetime):
        a_day = _UNITS[column.dtype.time_unit]
    elif column.dtype == pl.Date:
        a_day = 1
    else:
        return False
    low, high = column.to_physical().min(), column.to_physical().max()
    return isinstance(low, int) and isinstance(high, int) and (low < _DAYS[0] * a_day or high >= (_DAYS[1] + 1) * a_day)
