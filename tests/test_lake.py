"""The run log of several machines on DuckLake: a real PostgreSQL and object storage, DuckDB's own extensions, processes killed."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb
import object_storage
import pytest
from log_files import run, write
from postgres import new_database, not_here, on_disk
from servers import stop
from test_runlog import record

from agentkit.callers import Caller
from agentkit.errors import UsageError
from agentkit.records import RunRecord, Step
from agentkit_tracking import keys
from agentkit_tracking.runlog import RunLog
from agentkit_tracking.runlog.lake import Lake
from agentkit_tracking.runlog.migrations import NEWEST
from agentkit_tracking.runlog.segments import Segment

PYTHON = Path(sys.prefix) / "lake" / "bin" / "python"
JOB = Path(__file__).with_name("lake_job.py")
STEPS = [Step("model", "m", "PLANNING", 0.1, 0.2, model="m", tokens_in=3, usd=0.5)]
ANNA, BOB = Caller("anna").user_hash, Caller("bob").user_hash


class Process:
    """A process of a machine, with the Python that has DuckDB's extensions for a lake."""

    def __init__(self, address: Path, asked: dict[str, Any]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(200)
        self._socket.connect(str(address))
        self._stream = self._socket.makefile("rw")
        self._stream.write(json.dumps(asked) + "\n")
        self._stream.flush()
        self.pid = self.answer()

    def answer(self) -> Any:
        """What came of it; None if it was killed before."""
        line = self._stream.readline()
        return json.loads(line) if line else None

    def is_ready(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def kill(self) -> None:
        assert not self.is_ready(), self.answer()  # it has ended by itself
        os.kill(self.pid, signal.SIGKILL)
        assert self.answer() is None

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


class Machine:
    """A machine: a folder with segments. What is asked of it is done in a process of its own."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name, self.log = place, name, RunLog(place.tmp_path / name / "log")

    def write(self, *records: RunRecord, days: float = 0) -> None:
        """Runs of another process of the machine, which goes on writing."""
        with mock.patch("socket.gethostname", return_value=self.name):
            write(self.log, *records, days=days)

    def start(self, *instruction: object, die: tuple[str, str] | None = None) -> Process:
        return self.place.start({"folder": str(self.log.folder), "do": instruction, "die": die})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self.do(name, *arguments)

    def do(self, *instruction: object) -> Any:
        """Do what it is told, and wait for it."""
        answer = self.start(*instruction).answer()
        if isinstance(answer, dict) and answer.get("error") == "crash":
            pytest.fail(answer["said"])
        return answer

    def dies(self, place: str, word: str, *instruction: object) -> None:
        """Be killed before that function is called with that word."""
        assert self.start(*instruction, die=(place, word)).answer() is None


class Place:
    """A lake, and the machines that have it."""

    def __init__(
        self, jobs: Path, catalogue: str, data: str, stack: ExitStack, tmp_path: Path, storage: dict[str, str]
    ) -> None:
        self.jobs, self.stack, self.tmp_path, self.storage = jobs, stack, tmp_path, storage
        self.catalogue, self.data = catalogue, data

    def start(self, asked: dict[str, Any]) -> Process:
        home = {name: value for name, value in os.environ.items() if name.startswith("AGENTKIT_")}
        lake = {"AGENTKIT_LOG_URL": f"ducklake:{self.catalogue}?data_path={self.data}"}
        process = Process(self.jobs, {**asked, "environment": {**home, **self.storage, **lake}})
        self.stack.callback(process.close)
        return process

    def machine(self, name: str) -> Machine:
        machine = Machine(self, name)
        self.stack.callback(machine.log.close)
        return machine

    def files(self) -> dict[str, bytes]:
        """The files of the lake."""
        if self.data.startswith("s3://"):
            bucket = self.data.split("/")[2]
            return object_storage.objects(self.storage["AWS_ENDPOINT_URL_S3"], bucket)
        return {str(p): p.read_bytes() for p in Path(self.data).rglob("*") if p.is_file()}

    def found(self, *words: str) -> set[str]:
        """Which words stand anywhere in the lake: its Parquet files, read, and the files of the catalogue's tables."""
        contents = [path.read_bytes() for path in on_disk(self.catalogue)]
        file = self.tmp_path / "one.parquet"
        for content in self.files().values():
            contents.append(content)
            file.write_bytes(content)
            contents.append(str(duckdb.sql(f"SELECT COLUMNS(*)::VARCHAR FROM '{file}'").fetchall()).encode())
        return {word for word in words for content in contents if word.encode() in content}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where machines are asked for; what their processes print goes to a file beside."""
    if not PYTHON.exists():
        not_here(f"needs DuckDB 1.5 with its extensions: `make lake` installs them into {PYTHON.parents[1]}")
    address = tmp_path_factory.mktemp("jobs") / "socket"
    process = subprocess.Popen([str(PYTHON), str(JOB), str(address)], start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not address.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield address
    finally:
        stop(process)


@pytest.fixture(scope="module")
def storage(jobs: Path) -> Iterator[dict[str, str]]:
    with object_storage.object_storage(PYTHON) as environment:
        yield environment


@pytest.fixture(params=["folder"])
def lake(request: pytest.FixtureRequest, cluster: str, jobs: Path, tmp_path: Path) -> Iterator[Place]:
    """A lake of the test's own, in a folder or in a bucket; a key to sign with is at hand."""
    keys.create("Ada")
    catalogue = new_database(cluster)
    data, storage = str(tmp_path / "lake"), {}
    if request.param == "bucket":
        storage = request.getfixturevalue("storage")
        bucket = catalogue.rpartition("/")[2]
        object_storage.make_bucket(storage["AWS_ENDPOINT_URL_S3"], bucket)
        data = f"s3://{bucket}/agent kit"
    with ExitStack() as stack:
        yield Place(jobs, catalogue, data, stack, tmp_path, storage)


COUNT = "SELECT count(*) FROM outcomes"


def test_machines_fold_into_one_lake_and_see_each_other(lake: Place) -> None:
    a, b = machines = lake.machine("a"), lake.machine("b")
    for machine in machines:
        for i in range(20):
            machine.log.append(record(f"{machine.log.folder.parent.name}{i}", steps=STEPS))
    assert a.ask(COUNT) == [[20]]  # its own, fresh
    folding = [machine.start("fold") for machine in machines]  # both at once
    assert [process.answer() for process in folding] == [[61, None], [61, None]]
    a.log.append(record("fresh"))
    assert a.ask(COUNT) == [[41]]
    assert b.ask(COUNT) == [[40]]  # not folded yet
    assert a.fold() == [2, None]
    assert b.ask(COUNT) == [[41]]
    assert b.ask("SELECT count(*), sum(usd) FROM steps") == [[40, 20.0]]
    assert a.fold() == [0, None]


# ---- erasure


@pytest.mark.parametrize("lake", ["bucket"], indirect=True)
def test_everything_of_one_user_goes_from_the_lake_and_every_machine(lake: Place) -> None:
    a, b = lake.machine("a"), lake.machine("b")
    effects = [{"tool": "mail", "arguments": {"to": "address of anna"}}]
    a.write(run("top", BOB, effects=effects), run("anna-a", ANNA, parent="top"), run("child", parent="anna-a"))
    a.log.close()
    b.write(run("anna-b", ANNA), run("bob-b", BOB))  # its process goes on writing
    for machine in (a, b):
        machine.fold()
    b.write(run("anna-late", ANNA))
    words = ("secret of anna", "secret of child", "address of anna", str(ANNA), "secret of bob-b")
    assert lake.found(*words) == set(words)
    figures = a.ask("SELECT * EXCLUDE (user_hash, session) FROM outcomes ORDER BY run_id")

    done = a.erase("anna")
    assert (done["runs"], done["callers"]) == (["anna-a", "anna-b", "child"], ["top"])
    assert done["events"] == 3 * 3 + 1
    assert [other.split()[0] for other in done["others"]] == ["b"]
    assert lake.found(*words) == {"secret of bob-b"}
    assert a.ask("SELECT * EXCLUDE (user_hash, session) FROM outcomes ORDER BY run_id") == figures
    assert a.verify()["faults"] == []
    [file] = b.log.segments.glob("*.jsonl")
    assert b"secret of anna-b" in file.read_bytes()
    b.fold()
    assert b"secret of anna-b" not in file.read_bytes()
    assert b"secret of bob-b" in file.read_bytes()
    for machine in (a, b):
        assert machine.verify()["faults"] == []

    assert lake.found("secret of anna-late") != set()  # it was folded after the erasure
    code, said = b.command("log", "erase", "anna", "--why", "asked for it", "--yes")
    assert (code, "private parts of 3 events of 1 runs, and 0 traces, are gone" in said) == (0, True)
    assert "not reached: what other machines had not folded yet" in said
    assert "They folded last (UTC): a (20" in said
    assert lake.found(*words) == {"secret of bob-b"}
    assert b"secret of anna" not in file.read_bytes()
    assert b.verify()["faults"] == []
    assert b.ask("SELECT count(*) FROM events WHERE private->>'user_hash' IS NOT NULL") == [[3]]

    b.change("UPDATE log.events SET event = replace(event, '\"usd\":0.5', '\"usd\":0.1') WHERE run_id = 'bob-b'")
    assert any("it was changed" in fault for fault in a.verify()["faults"])


def test_what_another_machine_had_read_before_an_erasure_is_not_stored_after_it(lake: Place) -> None:
    a, b = lake.machine("a"), lake.machine("b")
    b.write(run("early", ANNA))
    b.fold()
    log = b.log  # the run's caller is known to the lake already: what comes now is of the same run
    with mock.patch("socket.gethostname", return_value="b"):
        log.write([({"type": "outcome", "run_id": "early", "system": "s"}, {"output": "the secret of late"})])
    folding = b.start("fold_slowly")
    assert folding.answer() == "read"
    a.erase("anna")
    (log.folder / "go").touch()
    events, busy = folding.answer()
    assert (events, busy) == (1, None)
    assert a.ask("SELECT count(*) FROM events WHERE run_id = 'early' AND type = 'outcome'") == [[2]]
    assert lake.found("secret of early", "secret of late") == set()
    log.close()
    b.fold()
    assert a.verify()["faults"] == []


def test_what_was_blanked_without_an_erasure_is_found(lake: Place) -> None:
    a = lake.machine("a")
    a.write(run("r1", ANNA))
    a.fold()
    a.change("UPDATE log.events SET private = NULL, user_hash = NULL WHERE run_id = 'r1' AND type = 'outcome'")
    [fault] = a.verify()["faults"]
    assert "no erasure says so" in fault


def test_upkeep_that_is_killed_is_finished_by_the_next(lake: Place) -> None:
    a, b = lake.machine("a"), lake.machine("b")
    a.write(run("old", ANNA), days=9)
    a.write(run("anna", ANNA), run("bob", BOB))
    a.dies("folding._sign", "", "fold")  # rows are in a file already, and no table knows it
    assert "secret of anna" in lake.found("secret of anna")
    Path(lake.data, "main", "events", "ducklake-half.parquet").write_bytes(b"PAR1 the secret of anna")
    assert b.ask(COUNT) == [[0]]
    a.fold()
    a.log.close()
    a.fold()
    for place, word in (
        ("erasure._erase_in_database", ""),
        ("lake_upkeep._do", "cleanup"),
        ("lake_upkeep._do", "VACUUM"),
    ):
        b.dies(place, word, "erase", "anna")
    assert a.ask(COUNT) == [[3]]
    b.erase("nobody")
    assert lake.found("secret of anna", "secret of old", str(ANNA), "secret of bob") == {"secret of bob"}
    assert b.verify()["faults"] == []
    b.dies("lake_upkeep._do", "expire", "prune", 5)
    assert b.prune(5)["files"] == len(lake.files())
    assert a.ask(COUNT) == [[2]]
    assert lake.found("secret of bob") == {"secret of bob"}
    assert b.verify()["faults"] == []


# ---- retention


@pytest.mark.parametrize("lake", ["bucket"], indirect=True)
def test_past_days_go_for_good_and_many_files_become_one(lake: Place) -> None:
    a, b = lake.machine("a"), lake.machine("b")
    for i in range(4):
        a.write(*(run(f"old-{i}-{k}", ANNA) for k in range(5)), days=9)
        a.fold()
    for i in range(4):
        b.write(*(run(f"new-{i}-{k}", BOB) for k in range(5)))
        b.fold()
    before = len(lake.files())
    code, said = b.command("log", "compact")
    assert (code, "the lake has 4 Parquet files now" in said) == (0, True)  # one a table
    assert len(lake.files()) == 4 < before
    assert a.ask(COUNT) == [[40]]
    kept = b.prune(5)
    assert (kept["days"], kept["events"]) == (1, 4 * 5 * 4)
    assert lake.found("secret of old", str(ANNA), "secret of new") == {"secret of new"}
    assert a.ask(COUNT) == [[20]]
    [file] = a.log.segments.glob("*.jsonl")
    assert b"secret of old" in file.read_bytes()
    a.fold()
    assert b"secret of old" not in file.read_bytes()
    for machine in (a, b):
        report = machine.verify()
        assert report["faults"] == []
        assert "80 events were pruned for good, signed (1 stretches)" in report["remarks"]
    a.write(run("later"))
    a.fold()
    assert a.verify()["faults"] == []


def test_files_stay_while_somebody_reads_them(lake: Place) -> None:
    a, b = lake.machine("a"), lake.machine("b")
    for i in range(3):
        a.write(*(run(f"{i}-{k}") for k in range(5)))
        a.fold()
    before = lake.files()
    reading = a.start("hold", 1.5)
    assert reading.answer() == "reading"
    compacting = b.start("compact")
    while True:
        there = lake.files()
        if reading.is_ready():  # and may have ended before the files were looked at
            break
        assert before.keys() <= there.keys()
        time.sleep(0.05)
    assert compacting.answer()["files"] == len(lake.files())
    assert not before.keys() <= lake.files().keys()


@pytest.mark.slow
def test_folders_that_are_killed_amid_upkeep_lose_and_double_nothing(lake: Place) -> None:
    kills = 60 if os.environ.get("AGENTKIT_SOAK") else 6
    chance = random.Random(5)
    machines = [lake.machine(f"m{i}") for i in range(3)]
    writers = [Segment(machine.log.segments, roll_bytes=200_000) for machine in machines]
    # Two processes a machine: one of them has the lease.
    folders = [(machine, machine.start("fold_for_ever")) for machine in machines for _ in range(2)]
    upkeep = lake.machine("upkeep")
    upkeep.write(run("anna", ANNA))
    chores = [["compact"], ["prune", 5], ["erase", "anna"]]
    chore, chores_done, written = upkeep.start(*chores[0]), 0, 0
    until = time.monotonic() + 240
    while (kills > 0 or chores_done < 3) and time.monotonic() < until:
        for writer in writers:
            writer.append([({"type": "kill", "name": f"{written + i}"}, {}) for i in range(100)])
            written += 100
        time.sleep(0.05)
        if chore.is_ready():
            assert "error" not in chore.answer()
            chores_done += 1
            chore = upkeep.start(*chores[chores_done % 3])
        if kills > 0 and chance.random() < 0.15:
            place = chance.randrange(len(folders))
            machine, process = folders[place]
            process.kill()
            folders[place] = (machine, machine.start("fold_for_ever"))
            kills -= 1
    assert (kills, chores_done >= 3) == (0, True)
    assert "error" not in chore.answer()
    for writer in writers:
        writer.close()
    for _, process in folders:
        process.kill()
    for machine in machines:
        assert machine.fold()[1] is None
        assert list(machine.log.segments.glob("*.jsonl")) == []
    query = "SELECT count(*), count(DISTINCT name) FROM events WHERE type = 'kill'"
    assert upkeep.ask(query) == [[written, written]]
    upkeep.compact()
    assert upkeep.ask(query) == [[written, written]]
    assert upkeep.verify()["faults"] == []


# ---- what may be asked


@pytest.mark.parametrize("lake", ["bucket"], indirect=True)
def test_a_query_reaches_nothing_but_the_views(lake: Place) -> None:
    a = lake.machine("a")
    a.write(run("r1"))
    a.fold()
    allowed = (
        "SELECT run_id FROM outcomes",
        "WITH r AS (SELECT run_id FROM runs) SELECT * FROM r, unnest([1]) u",
        "DESCRIBE runs",
        "EXPLAIN (ANALYZE) SELECT * FROM runs",
        "PIVOT outcomes ON route IN ('billing') USING count(*) GROUP BY state",
        "SELECT r.run_id FROM runs r, json_each(r.inputs) j",
        "WITH runs AS (SELECT * FROM runs), b AS (FROM runs) SELECT (WITH c AS (FROM b) SELECT count(*) FROM c) FROM b",
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT * FROM r",
        "SUMMARIZE outcomes",
        "VALUES (1) UNION ALL VALUES (2)",
    )
    assert a.try_each(*allowed) == [None] * len(allowed)
    bucket, meta = lake.data, "__ducklake_metadata_log"
    attacks = (
        "SELECT * FROM read_text('/etc/passwd')",
        f"SELECT * FROM glob('{bucket}/**')",
        f"COPY runs TO '{lake.tmp_path}/x.csv'",
        f"EXPLAIN ANALYZE COPY runs TO '{lake.tmp_path}/x.csv'",
        f"ATTACH '{lake.catalogue}' AS pg (TYPE postgres)",
        "INSTALL httpfs",
        f"SELECT * FROM postgres_query('{meta}', 'SELECT usename FROM pg_user')",
        f"SELECT * FROM POSTGRES_EXECUTE('{meta}', 'CREATE TABLE evil (i int)')",
        f"SELECT (SELECT count(*) FROM \"postgres_query\"('{meta}', 'SELECT 1'))",
        f"EXPLAIN ANALYZE SELECT * FROM postgres_query('{meta}', 'SELECT 1')",
        f"SELECT * FROM postgres_scan('{lake.catalogue}', 'pg_catalog', 'pg_user')",
        f"SELECT * FROM {meta}.pg_catalog.pg_user",
        f'WITH "{meta}.ducklake_metadata" AS (SELECT 1) SELECT * FROM {meta}.ducklake_metadata',
        f"SELECT * FROM query('FROM {meta}.ducklake_metadata')",
        f"PIVOT {meta}.ducklake_metadata ON key USING count(*)",
        f"FROM runs SEMI JOIN {meta}.ducklake_metadata m ON m.key = runs.run_id",
        "SELECT * FROM duckdb_secrets()",
        "SELECT path FROM duckdb_databases()",
        "SELECT * FROM ducklake_expire_snapshots('log', older_than => now())",
        "SELECT * FROM log.events",
        "SELECT * FROM information_schema.tables",
        "SELECT * FROM pragma_database_list WHERE EXISTS (WITH pragma_database_list AS (SELECT 1) SELECT 1)",
        "WITH Pragma_Database_List AS (SELECT * FROM pragma_database_list) SELECT * FROM pragma_database_list",
        "WITH RECURSIVE duckdb_views AS (FROM duckdb_views UNION ALL FROM duckdb_views) FROM duckdb_views",
        "WITH duckdb_databases AS (SELECT 1) FROM (SUMMARIZE duckdb_databases)",
        "FROM sqlite_master WHERE EXISTS (WITH sqlite_master AS (SELECT 1) FROM sqlite_master)",
        "FROM every_event WHERE EXISTS (WITH every_event AS (SELECT 1) FROM every_event)",
        f"FROM '{bucket}/**' WHERE EXISTS (WITH \"{bucket}/**\" AS (SELECT 1) SELECT 1)",
        "FROM (SHOW ALL TABLES)",
        "SHOW DATABASES",
        f"SHOW TABLES FROM {meta}",
        f"DESCRIBE {meta}.ducklake_metadata",
        "FROM json_execute_serialized_sql(json_serialize_sql('FROM pragma_database_list'))",
    )
    for attack, said in zip(attacks, a.try_each(*attacks), strict=True):
        assert "only a query that reads the views" in str(said), attack
    assert object_storage.SECRET not in str(a.ask("SELECT current_setting('s3_secret_access_key')"))
    assert not (lake.tmp_path / "x.csv").exists()
    assert a.ask(COUNT) == [[1]]


# ---- older lakes, and what is wrong


def test_a_lake_of_each_older_schema_is_brought_up_to_date(cluster: str, lake: Place) -> None:
    event = "INSERT INTO log.events (segment, n, logged_at, type, run_id, usd) VALUES ('s1', 0, now(), 'outcome', 'old', 0.5)"
    for version in range(1, NEWEST):
        lake.catalogue, lake.data = new_database(cluster), str(lake.tmp_path / f"lake{version}")
        machine = lake.machine(f"m{version}")
        machine.make_old(version, event)
        machine.write(run("new"))
        machine.fold()
        if version == 1:
            machine.compact()
        assert machine.ask("SELECT run_id, usd FROM outcomes ORDER BY 1") == [["new", 0.5], ["old", 0.5]]


@pytest.mark.parametrize("lake", ["bucket"], indirect=True)
def test_a_bucket_that_cannot_be_reached_is_said_without_its_secret(lake: Place) -> None:
    good, data = dict(lake.storage), lake.data
    for name, wrong, said in (
        ("AWS_SECRET_ACCESS_KEY", "", "needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("AWS_ENDPOINT_URL_S3", "ftp://u:p@h", "AWS_ENDPOINT_URL: expected http"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9", "cannot be reached"),
        ("data", "s3://no-such-bucket/x", "cannot be reached"),
    ):
        lake.storage = {**good, "AWS_SESSION_TOKEN": "token-of-tests", name: wrong}
        if name == "data":
            lake.data, lake.catalogue = wrong, new_database(lake.catalogue)
        machine = lake.machine(f"m-{name}-{len(wrong)}")
        machine.write(*(run(f"r{i}") for i in range(20)))
        answer = machine.fold()
        assert answer["error"] == "UsageError"
        assert said in answer["said"]
        assert object_storage.SECRET not in answer["said"]
        assert "token-of-tests" not in answer["said"]
        assert len(list(machine.log.segments.glob("*.jsonl"))) == 1
    lake.storage, lake.data = good, data


def test_the_password_of_the_catalogue_is_in_no_message(lake: Place) -> None:
    lake.catalogue = "postgresql://ann:sesame-of-pg@127.0.0.1:9/db"
    answer = lake.machine("a").ask(COUNT)
    assert "the lake in 127.0.0.1/db cannot be opened" in answer["said"]
    assert "sesame" not in answer["said"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ducklake:postgresql://u@h/db", "without data_path"),
        ("ducklake:sqlite.db?data_path=/x", "found no address"),
        ("ducklake:mysql://u@h/db?data_path=/x", "found mysql address"),
    ],
)
def test_a_wrong_address_is_said(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Lake(tmp_path, url)


def test_without_the_extensions_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_LOG_URL", "ducklake:postgresql://ann:secret@h/db?data_path=/x")
    log = RunLog(tmp_path / "log")
    log.append(record("r1"))  # a writer needs no lake
    with pytest.raises(UsageError, match=r"install duckdb==1\.5\.5 duckdb-extension-ducklake==1\.5\.5"):
        log.runs()
    assert "secret" not in str(log.database)
