"""`agentkit log …` and `agentkit feedback` as they are typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from forwarded import Kept
from log_files import ago, change, in_process, run, write
from typer.testing import CliRunner

from agentkit.callers import Caller
from agentkit.errors import UsageError
from agentkit_pipelines.cli import app
from agentkit_tracking import keys
from agentkit_tracking.forwarding.consumer import Consumer
from agentkit_tracking.runlog import RunLog, retention
from agentkit_tracking.runlog.exporting import export
from agentkit_tracking.runlog.following import Follower
from agentkit_tracking.runlog.reading import LogUnreadable


@pytest.fixture
def log(own_home: Path) -> RunLog:
    keys.create("Ada")
    log = RunLog()
    write(log, run("old", route="technical"), days=9)
    write(
        log, run("r1", Caller("anna").user_hash), run("r2", state="FAILED", error="ToolFailed: [red]late[/red]\x1b[2J")
    )
    return log


def said(*arguments: str, code: int = 0) -> str:
    """What the command prints; stderr, where bars are drawn, is not part of it."""
    done = CliRunner().invoke(app, ["log", *arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def refusal(*arguments: str) -> str:
    """What a user reads who asks for what cannot be done."""
    command = [sys.executable, "-m", "agentkit_pipelines.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    return done.stderr


def test_without_a_command_the_last_runs_are_listed(log: RunLog) -> None:
    listed = said()
    assert [name in listed for name in ("old", "r1", "r2")] == [True] * 3
    assert len(said("--limit", "1").splitlines()) == 5


def test_sql_is_answered_as_a_table_or_as_json_lines(log: RunLog) -> None:
    question = "SELECT route, count(*) AS n, sum(usd) AS usd FROM outcomes GROUP BY route ORDER BY route"
    assert "technical" in said("query", question)
    rows = [json.loads(line) for line in said("query", question, "--json").splitlines()]
    assert rows == [{"route": "billing", "n": 2, "usd": 1.0}, {"route": "technical", "n": 1, "usd": 0.5}]


def test_a_wrong_query_is_one_line_and_exit_code_2(log: RunLog) -> None:
    assert refusal("log", "query", "SELECT nothing FROM runs").startswith(
        "agentkit: the run log cannot answer this query"
    )


def test_the_last_events_are_shown_and_nothing_in_them_acts_on_the_terminal(log: RunLog) -> None:
    shown = said("tail", "-n", "3")
    assert len(shown.splitlines()) == 3
    assert "outcome     s  FAILED  ToolFailed  1.500 s  USD 0.500000  ToolFailed: [red]late[/red]\\u{1b}[2J" in shown
    assert "\x1b" not in shown
    events = [json.loads(line) for line in said("tail", "-n", "2", "--json").splitlines()]
    assert [(e["type"], e["run_id"]) for e in events] == [("transition", "r2"), ("outcome", "r2")]
    assert events[1]["private"]["error"].startswith("ToolFailed: [red]")


def test_times_of_shown_and_of_followed_events_are_of_one_form(log: RunLog) -> None:
    with Follower(log) as follower:
        write(log, run("new"))
        followed = follower.new()[-1]
    shown = json.loads(said("tail", "-n", "1", "--json"))
    names = ("id", "logged_at", "started_at")
    assert [shown[name] for name in names] == [followed[name] for name in names]


def test_new_events_of_other_processes_are_followed_each_once(log: RunLog) -> None:
    command = [sys.executable, "-m", "agentkit_pipelines.cli", "log", "tail", "-n", "1", "--follow", "--json"]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    first = json.loads(follower.stdout.readline())
    assert first["run_id"] == "r2"
    writer = in_process(
        "from log_files import *; log = RunLog()\n"
        "for i in range(5):\n    write(log, run(f'w{i}')); log.close(); log.fold()\n"  # gone before one can look twice
        "write(log, run('last'))"
    )
    writer.communicate()
    timer = threading.Timer(60, follower.kill)
    timer.start()
    seen = []
    for line in follower.stdout:
        seen.append(json.loads(line))
        if (seen[-1]["type"], seen[-1].get("run_id")) == ("outcome", "last"):
            break
    follower.send_signal(signal.SIGINT)
    follower.communicate()
    timer.cancel()
    ids = [event["id"] for event in seen]
    assert len(ids) == len(set(ids))
    assert {e["run_id"] for e in seen if e["type"] == "outcome"} >= {"last"}


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_view_is_exported_whole(log: RunLog, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"steps.{ending}"
    assert "6 steps written to" in said("export", str(file), "--view", "steps")
    read = {"parquet": pl.read_parquet, "csv": pl.read_csv, "jsonl": pl.read_ndjson}[ending]
    frame = read(file)
    assert frame.columns == log.sql("SELECT * FROM steps").columns
    assert sorted(frame["run_id"].to_list()) == ["old", "old", "r1", "r1", "r2", "r2"]
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == [file.name]


def test_an_export_replaces_nothing_unless_it_is_told_to(log: RunLog, tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text("precious")
    assert "is there already; --force replaces it" in refusal("log", "export", str(file))
    assert file.read_text() == "precious"
    said("export", str(file), "--force")
    assert len(pl.read_csv(file)) == 3
    assert "the ending says how it is written; use .parquet, .csv, .jsonl" in refusal("log", "export", "runs.xlsx")
    assert "there is no folder" in refusal("log", "export", str(tmp_path / "nowhere" / "runs.csv"))


def test_an_export_that_fails_leaves_nothing(log: RunLog, tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from log_files import *\n"
        "from agentkit_tracking.runlog.exporting import export\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = RunLog()\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try:\n    export(log, 'events', Path(sys.argv[1]))\nexcept Exception as e:\n    print(type(e).__name__, e)"
    )
    told, _ = in_process(script, tmp_path / "events.csv").communicate()
    assert told.startswith("UsageError")
    assert "cannot be written" in told
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == []


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(30, "Read-only file system")])
def test_why_an_export_fails_is_said_also_if_what_it_began_cannot_be_removed(
    log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    for name in ("link", "unlink"):  # as on a disk that became read-only
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(UsageError, match=f"runs.csv cannot be written: .*{error.strerror}"):
        export(log, "runs", tmp_path / "runs.csv")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite(file: Path) -> None:
    file.write_bytes(b"PAR1 nothing PAR1")


def spoil(file: Path) -> None:
    """Its figures can be read, and its texts cannot: that shows when a query comes upon them."""
    group = pq.ParquetFile(file).metadata.row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "private")
    start, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    content = file.read_bytes()
    file.write_bytes(content[:start] + b"\xff" * size + content[start + size :])


def rename_column(file: Path) -> None:
    """The footer names another column: DuckDB finds no `salt`."""
    content = file.read_bytes()
    file.write_bytes(content.replace(b"salt", b"sold"))


@pytest.mark.parametrize("damage", [Path.unlink, cut, overwrite, spoil, rename_column])
def test_a_damaged_archive_is_named_by_whatever_comes_upon_it(
    log: RunLog, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    log.close()
    said("compact", "--older-than", "3")
    [file] = log.folder.glob("archive/*/*.parquet")
    damage(file)
    for command in (
        ["log", "query", "SELECT * FROM events"],
        ["log", "tail"], ["log", "export", str(tmp_path / "events.parquet"), "--view", "events"],
        ["log", "erase", "anna", "--why", "asked", "--yes"],
    ):  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, LogUnreadable), (command, done.output, done.exception)
        told = str(done.exception)
        assert f"archives in {log.folder} are not as they were written: {file.relative_to(log.folder)}: its " in told
        assert "Run `agentkit log verify`, and restore them from a backup" in told
        assert told.isprintable()
    with pytest.raises(LogUnreadable):
        Consumer(log, Kept()).forward()
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


def test_a_damaged_archive_is_not_pruned(log: RunLog) -> None:
    log.close()
    said("compact", "--older-than", "3")
    [file] = log.folder.glob("archive/*/*.parquet")
    cut(file)
    done = CliRunner().invoke(app, ["log", "prune", "--older-than", "3", "--yes"])
    assert isinstance(done.exception, LogUnreadable), done.output
    assert file.exists()


def test_of_many_damaged_archives_three_are_named_and_the_others_counted(own_home: Path) -> None:
    log = RunLog()
    for days in range(9, 3, -1):
        write(log, run(f"r{days}"), days=days)
    log.close()
    retention.compact(log, 2)
    whole, *damaged = sorted(log.folder.glob("archive/*/*.parquet"))
    for file in damaged:
        file.unlink()
    with pytest.raises(LogUnreadable) as caught:
        log.runs()
    assert [str(file.relative_to(log.folder)) in str(caught.value) for file in (whole, *damaged)] == [False, True, True, True, False, False]  # fmt: skip
    assert "; and 2 more. Run" in str(caught.value)


def test_what_a_damaged_archive_does_not_touch_is_answered(log: RunLog) -> None:
    said("compact", "--older-than", "3")
    spoil(*log.folder.glob("archive/*/*.parquet"))
    for wrong in ("SELECT nothing FROM runs", "SELECT * FROM nothing", "SELEC"):
        with pytest.raises(UsageError, match="the run log cannot answer this query"):
            log.sql(wrong)
    assert log.sql("SELECT sum(usd) FROM outcomes").item() == 1.5


def test_status_says_what_is_folded_and_who_has_the_database(log: RunLog) -> None:
    assert "1 being written, 0 ended" in said("status")
    assert "0 events; 0 B; last fold never" in said("status")
    assert "13 events folded" in said("fold")
    told = said("status")
    assert "13 events" in told
    assert "all that is folded" in told
    assert "no other process" in told
    holder = in_process(
        "import duckdb, sys, time; c = duckdb.connect(sys.argv[1], read_only=True); print('open', flush=True); time.sleep(60)",
        log.database.path,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert f"({holder.pid})" in said("status")
    holder.kill()
    holder.communicate()


def test_fold_goes_on_every_so_many_seconds(log: RunLog) -> None:
    # What is started in the background by a shell, and all that it starts, ignores SIGINT.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from agentkit_pipelines.cli import main; main()"
    command = [sys.executable, "-c", heeding, "log", "fold", "--every", "0.2"]
    folder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert folder.stdout is not None
    assert folder.stdout.readline() == "13 events folded\n"
    write(log, run("more"))
    assert folder.stdout.readline() == "4 events folded\n"
    folder.send_signal(signal.SIGINT)
    folder.communicate()
    assert folder.returncode == 130


def test_verify_says_what_is_wrong_and_exits_with_3(log: RunLog) -> None:
    log.close()
    said("fold")
    told = said("verify")
    assert "as it was written: 14 events in 1 segments, 14 of them under a signed head" in told
    checkpoint = told.split("checkpoint ")[1].split()[0]
    said("verify", "--strict", "--checkpoint", checkpoint)
    change(log, "UPDATE events SET usd = 0 WHERE run_id = 'r1' AND type = 'outcome'")
    told = said("verify", code=3)
    assert "of run r1 (database): its column usd says 0.0, the event 0.5" in told
    assert "not as it was written" in told


def test_days_are_archived_and_pruned(log: RunLog) -> None:
    assert "4 events of 1 day archived" in said("compact", "--older-than", "3")
    assert "4 events of 1 days" in said("status")
    done = CliRunner().invoke(app, ["log", "prune", "--older-than", "3"], input="n\n")
    assert done.exit_code == 1
    assert f"Remove everything logged before {ago(3):%Y-%m-%d}" in done.stderr
    assert "4 events of 1 day are gone" in said("prune", "--older-than", "3", "--yes")
    assert "1 events were pruned" not in said("verify")
    assert log.sql("SELECT run_id FROM outcomes ORDER BY 1")["run_id"].to_list() == ["r1", "r2"]


def test_a_user_is_erased(log: RunLog) -> None:
    assert "private parts of 3 events of 1 runs, and 0 traces, are gone" in said(
        "erase", "anna", "--why", "asked", "--yes"
    )
    assert log.sql("SELECT run_id FROM runs WHERE inputs IS NULL")["run_id"].to_list() == ["r1"]
    assert "were erased on request" in said("fold") + said("verify")
    assert "is no pseudonym" in refusal("log", "erase", "anna", "--hash", "--why", "asked", "--yes")


def test_feedback_is_kept_beside_the_run(log: RunLog) -> None:
    done = CliRunner().invoke(
        app, ["feedback", "r1", "--label", "corrected", "--rating", "2", "--comment", "wrong amount"]
    )
    assert (done.exit_code, done.stdout) == (0, "kept for run r1\n")
    rows = log.sql("SELECT run_id, source, label, rating, comment FROM feedback").rows()
    assert rows == [("r1", "user", "corrected", 2.0, "wrong amount")]
    assert "give a label, a rating or a comment" in refusal("feedback", "r1")
    assert "has no run 'zzz'" in refusal("feedback", "zzz", "--rating", "3")


def test_a_database_that_is_locked_by_somebody_else_is_said(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentkit_tracking.runlog import database

    said("fold")
    holder = in_process(
        "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print('open', flush=True); time.sleep(60)",
        log.database.path,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    monkeypatch.setattr(database, "_PATIENCE_S", 0.2)
    began = time.monotonic()
    done = CliRunner().invoke(app, ["log", "status"])
    assert "another program has" in str(done.exception)
    assert time.monotonic() - began < 10
    holder.kill()
    holder.communicate()
