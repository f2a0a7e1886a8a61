"""The run log: nothing that finished is lost, nothing half-written is read, and SQL sees it all at once."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nobody import open_to_all, unprivileged
from releases import python

import agentkit as ak
from agentkit.current import current_run
from agentkit.errors import UsageError
from agentkit.records import RunRecord, Step
from agentkit_tracking.runlog import LogUnwritable, RunLog, feedback
from agentkit_tracking.runlog.erasure import erase_user

# A writer that imports neither dspy nor mlflow.
WRITER = """
import os, sys, time
from pathlib import Path
from test_runlog import record
from agentkit_tracking.runlog import RunLog
log = RunLog(Path(sys.argv[1]))
"""


def record(run_id: str = "r", **values: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "run_id": run_id, "system": "s", "release": None, "kind": "run", "started_at": "2026-11-20T10:00:00+00:00",
        "seconds": 1.5, "state": "DONE", "route": "billing", "inputs": {}, "output": {}, "error": None, "effects": [],
        "phases": {"planning": 0.5, "execution": 0.75, "reflection": 0.25}, "waited_s": 0.0, "model_calls": 1,
        "tool_calls": 0, "tokens_in": 10, "tokens_out": 2, "usd": 0.01,
    }  # fmt: skip
    return RunRecord(**{**fields, **values})


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path / "log")


def ids(log: RunLog) -> list[str]:
    return log.sql("SELECT run_id FROM runs ORDER BY run_id")["run_id"].to_list()


def finished(log: RunLog) -> list[str]:
    return log.sql("SELECT run_id FROM outcomes ORDER BY run_id")["run_id"].to_list()


def write_in_process(log: RunLog, script: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER + script, str(log.folder)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})


# ---- writing


def test_records_of_several_processes_and_threads_are_read_together(log: RunLog) -> None:
    script = "for i in range(200): log.append(record(f'{os.getpid()}-{i:03}'))"
    writers = [write_in_process(log, script) for _ in range(3)]
    threads = [
        threading.Thread(target=lambda n=n: [log.append(record(f"t{n}-{i}")) for i in range(50)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.communicate()
    found = ids(log)
    assert (len(found), len(set(found))) == (800, 800)
    assert len(list(log.segments.iterdir())) == 4  # a segment per process


def test_a_killed_writer_loses_at_most_its_last_line(log: RunLog) -> None:
    script = "i = 0\nwhile True:\n    log.append(record(f'{i:06}', inputs={'text': 'x' * 20_000}))\n    print(i, flush=True)\n    i += 1"
    writer = write_in_process(log, script)
    assert writer.stdout is not None
    seen = [writer.stdout.readline() for _ in range(50)]
    writer.send_signal(signal.SIGKILL)
    seen += writer.stdout.readlines()
    writer.wait()
    writer.stdout.close()
    assert ids(log)[: len(seen)] == [f"{int(line):06}" for line in seen]  # every append that returned


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_passed_over(log: RunLog, cut: int) -> None:
    for i in range(3):
        log.append(record(f"r{i}"))
    log.close()
    [segment] = log.segments.iterdir()
    whole, last, _closed = segment.read_bytes().rstrip(b"\n").rsplit(b"\n", 2)
    segment.write_bytes(whole + b"\n" + last[:cut])
    log.append(record("later"))
    assert finished(log) == ["later", "r0", "r1"]


def test_a_forked_child_gets_a_segment_of_its_own(log: RunLog) -> None:
    script = (
        "log.append(record('parent-1'))\n"
        "if (child := os.fork()) == 0:\n    log.append(record('child'))\n    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\nlog.append(record('parent-2'))\n"
    )
    write_in_process(log, script).communicate()
    events = [[json.loads(line)["event"] for line in p.read_bytes().splitlines()] for p in log.segments.iterdir()]
    outcomes = sorted([e["run_id"] for e in segment if e["type"] == "outcome"] for segment in events)
    assert outcomes == [["child"], ["parent-1", "parent-2"]]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where the folder should be")
    with pytest.raises(
        LogUnwritable, match=f"the run log in {tmp_path}/log/segments cannot be written: .*; free space"
    ):
        RunLog(tmp_path / "log").append(record("r7"))


def test_a_read_only_folder_is_a_clear_error(log: RunLog) -> None:
    log.append(record())  # imports what it needs; nobody may not read where that lies
    with open_to_all() as place:
        place.chmod(0o555)
        with unprivileged(), pytest.raises(LogUnwritable, match="Permission denied"):
            RunLog(place / "log").append(record())


def test_a_full_disk_is_a_clear_error_and_costs_one_record(log: RunLog) -> None:
    script = """
import resource
log.append(record("before"))
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
try:
    log.append(record("too long", inputs={"text": "x" * 5_000}))
except Exception as e:
    print(type(e).__name__, e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append(record("after"))
log.append(record("last"))
"""
    writer = write_in_process(log, script)
    said, _ = writer.communicate()
    assert said.startswith("LogUnwritable the run log in")
    assert ids(log) == ["after", "before", "last"]


def test_every_run_is_written_by_the_installed_sink(own_home: Path) -> None:
    system = ak.adopt(lambda text: text.upper(), name="shout")
    done, failed = system.run(text="hello"), system.run(text=3)
    rows = RunLog().sql("SELECT run_id, system, state, output->>'value' AS said, error FROM runs ORDER BY started_at")
    assert rows.rows() == [
        (done.run_id, "shout", "DONE", "HELLO", None),
        (failed.run_id, "shout", "FAILED", None, "AttributeError: 'int' object has no attribute 'upper'"),
    ]


# ---- content

AWKWARD = [
    "lone \ud800 surrogate",
    "line\nbreak\r\n and tab\t",
    "emoji 🙂 é 中",
    'quote " \\ slash',
    "\x00\x1b\u2028",
    "x" * 1_000_000,
]


@pytest.mark.parametrize("text", AWKWARD, ids=["surrogate", "newline", "emoji", "quote", "control", "megabyte"])
def test_any_text_is_one_record_and_comes_back(log: RunLog, text: str) -> None:
    log.append(
        record("r1", inputs={"text": text}, error=text, steps=[Step("model", "m", "PLANNING", 0.0, outputs=[text])])
    )
    log.append(record("r2"))
    inputs, error = log.sql("SELECT inputs, error FROM runs WHERE run_id = 'r1'").row(0)
    outputs = log.steps("r1")["outputs"].item()
    expected = text.encode("utf-8", "replace").decode()
    assert (json.loads(inputs), error, json.loads(outputs)) == ({"text": expected}, expected, [expected])
    assert ids(log) == ["r1", "r2"]


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=20))
def test_no_text_breaks_a_line(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTKIT_PAYLOADS", "full")
        log = RunLog(Path(folder))
        for i, text in enumerate(texts):
            log.append(record(f"{i:02}", error=text, inputs={text: text}))
        assert log.sql("SELECT error FROM runs ORDER BY run_id")["error"].to_list() == texts


def test_an_unknown_cost_is_null_and_a_number_past_64_bits_is_kept_as_text(log: RunLog) -> None:
    log.append(record(usd=float("nan"), inputs={"n": 2**80}))
    assert log.sql("SELECT usd, inputs->>'n' AS n FROM runs").rows() == [(None, str(2**80))]


# ---- reading


def test_an_empty_log_answers_with_no_rows(log: RunLog) -> None:
    assert log.sql("SELECT count(*) AS n FROM runs").item() == 0
    assert (len(log.runs()), len(log.steps("r"))) == (0, 0)
    log.append(record())
    assert log.runs().columns == RunLog(log.folder.parent / "empty").runs().columns


def test_the_steps_view_has_one_row_per_step_in_order(log: RunLog) -> None:
    steps = [
        Step("transition", "PLANNING", "IDLE", 0.0),
        Step(
            "model", "embedded/default", "PLANNING", 0.1, 0.2, "billing", model="embedded/default", tokens_in=7, usd=0.5
        ),
        Step("tool", "pay", "EXECUTING", 0.3, inputs={"amount": 3}, error="UsageError: no"),
    ]
    log.append(record("r1", release="abc", steps=steps))
    log.append(record("r2", steps=steps[:1]))
    rows = log.steps("r1")
    assert rows["step"].to_list() == [1, 2, 3]
    assert rows.select("release", "kind", "name", "agent", "tokens_in", "error").rows() == [
        ("abc", "transition", "PLANNING", None, 0, None),
        ("abc", "model", "embedded/default", "billing", 7, None),
        ("abc", "tool", "pay", None, 0, "UsageError: no"),
    ]
    assert log.sql("SELECT inputs->>'amount' AS a FROM steps WHERE kind = 'tool'").item() == "3"


def test_a_run_is_escalated_if_a_person_was_asked_or_it_hands_over(log: RunLog) -> None:
    log.append(record("asked", steps=[Step("approval", "pay", "AWAITING_HUMAN", 0.1)]))
    log.append(record("hands over", output={"action": "escalate", "reply": "A colleague will call."}))
    log.append(record("hidden", user_hash="a" * 16, output={"action": "escalate"}))
    log.append(record("answers", output={"action": "answer", "reply": "please do not escalate"}))
    log.append(record("fails", state="FAILED", output=None, error="ModelError: escalate"))
    erase_user(log, user_hash="a" * 16, why="asked for it", by="Ada")  # what it said is gone, what it came to stays
    expected = [("answers", False), ("asked", True), ("fails", False), ("hands over", True), ("hidden", True)]
    for view in ("outcomes", "runs"):
        assert log.sql(f"SELECT run_id, is_escalated FROM {view} ORDER BY 1").rows() == expected


def test_runs_come_newest_first_and_limited(log: RunLog) -> None:
    for hour in (3, 1, 2):
        log.append(record(f"r{hour}", started_at=f"2026-11-20T0{hour}:00:00+00:00"))
    assert log.runs(2)["run_id"].to_list() == ["r3", "r2"]
    assert log.runs(1)["started_at"].item() == datetime(2026, 11, 20, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT nothing FROM runs", 'Referenced column "nothing" not found'),
        ("SELEKT 1", "syntax error"),
        ("SELECT * FROM elsewhere", "elsewhere does not exist"),
        ("-- nothing", "the query is empty"),
    ],
)
def test_a_wrong_query_is_wrong_use_with_the_databases_own_words(log: RunLog, query: str, said: str) -> None:
    log.append(record())
    with pytest.raises(UsageError, match=f"(?s){said}"):
        log.sql(query)


def test_values_are_handed_over_as_parameters(log: RunLog) -> None:
    log.append(record("it's"))
    assert log.sql("SELECT run_id FROM runs WHERE run_id = ?", ["it's"]).item() == "it's"


@pytest.mark.parametrize("name", ["it's", "[prod] *", "what?", "a b"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    log = RunLog(tmp_path / name)
    log.append(record("r1"))
    assert ids(log) == ["r1"]


def test_reading_does_not_need_dspy_or_mlflow(log: RunLog) -> None:
    log.append(record())
    script = (
        "import sys; from pathlib import Path; from agentkit_tracking.runlog import RunLog;"
        "print(len(RunLog(Path(sys.argv[1])).runs()), {'dspy', 'mlflow', 'sklearn'} & sys.modules.keys())"
    )
    assert python(script, log.folder) == "1 set()\n"


# ---- as it happens


def test_a_run_is_kept_as_it_happens_and_its_end_seen(own_home: Path) -> None:
    seen: list[tuple[str, int]] = []

    @ak.tool(permission="write", idempotent=True)
    def pay(amount: int) -> str:
        """Pay a sum of money back."""
        frame = RunLog().sql("SELECT state, (SELECT count(*) FROM steps s WHERE s.run_id = r.run_id) FROM runs r")
        seen.append(frame.row(0))
        return "paid"

    def work(amount: int) -> str:
        return str(current_run().call(pay, amount=amount))

    record = ak.adopt(work, name="refunds", tools=[pay]).run(amount=3)
    assert record.state == "DONE"
    [(state, steps)] = seen
    assert state == "RUNNING"
    assert steps >= 3  # two transitions, the tier
    assert RunLog().sql("SELECT state, run_id FROM runs").rows() == [("DONE", record.run_id)]
    numbers = RunLog().steps(record.run_id)["step"].to_list()
    assert numbers == list(range(1, len(record.steps) + 1))


def test_a_run_whose_process_is_killed_is_there_and_broken_off(log: RunLog) -> None:
    script = """
import agentkit as ak
def work(text): os.kill(os.getpid(), 9)
ak.adopt(work, name="dies").run(text="hello")
"""
    writer = write_in_process(log, "os.environ['AGENTKIT_HOME'] = str(log.folder.parent)" + script)
    writer.communicate()
    row = log.sql("SELECT system, state, inputs->>'text' FROM runs").row(0)
    assert row == ("dies", "INTERRUPTED", "hello")
    assert log.fold() is not None
    assert log.sql("SELECT state FROM runs").item() == "INTERRUPTED"
    assert not list(log.segments.iterdir())  # it has ended and is folded
    assert log.find("").state == "INTERRUPTED"


def test_steps_of_a_run_that_was_called_are_kept_once(own_home: Path) -> None:
    inner = ak.adopt(lambda text: text.upper(), name="inner")
    outer = ak.adopt(lambda text: inner.run(text=text).output["value"], name="outer").run(text="a")
    log = RunLog()
    assert log.sql(
        "SELECT system, count(*) FROM steps WHERE kind = 'decision' OR kind = 'handoff' GROUP BY 1"
    ).rows() == [("outer", 1)]
    found = log.find(outer.run_id)
    assert [(s.kind, s.name, s.run) for s in found.steps] == [(s.kind, s.name, s.run) for s in outer.steps]


# ---- what is kept of what people wrote


@pytest.mark.parametrize(
    ("payloads", "kept"),
    [
        (None, "write to [e-mail], my key is [key]"),
        ("full", "write to jane@example.com, my key is [key]"),
        ("none", None),
    ],
)
def test_personal_data_and_secrets_are_taken_out(
    log: RunLog, payloads: str | None, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if payloads:
        monkeypatch.setenv("AGENTKIT_PAYLOADS", payloads)
    text = "write to jane@example.com, my key is sk-abcdefghijklmnop"
    log.append(record(inputs={"text": text}, steps=[Step("tool", "t", "EXECUTING", 0.0, inputs={"text": text})]))
    assert log.sql("SELECT inputs->>'text' FROM runs").item() == kept
    assert log.sql("SELECT inputs->>'text' FROM steps").item() == kept
    content = b"".join(p.read_bytes() for p in log.segments.iterdir())
    assert b"sk-abc" not in content
    assert (b"jane@" in content) == (payloads == "full")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("AGENTKIT_PAYLOADS", "some", "use redacted, full, none"), ("AGENTKIT_LOG_SYNC", "x", "use run, step, off")],
)
def test_a_wrong_setting_is_said(
    log: RunLog, name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        log.append(record())


def test_feedback_stands_beside_the_run(log: RunLog) -> None:
    log.append(record("r1", release="abc"))
    assert feedback.give(log, "r", "corrected", rating=2, comment="ask jane@example.com", by="ann") == "r1"
    [row] = log.feedback().to_dicts()
    assert {**row, "given_at": None} == {
        "run_id": "r1", "given_at": None, "source": "user", "label": "corrected", "rating": 2.0,
        "comment": "ask [e-mail]", "by": "ann", "system": "s", "release": "abc", "stage": "draft",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "says nothing"),
        ({"label": "fine"}, "no label"),
        ({"rating": 7}, "from 1 to 5"),
        ({"run_id": "x", "rating": 1}, "no run"),
    ],
)
def test_feedback_that_cannot_be_is_refused(log: RunLog, given: dict[str, Any], said: str) -> None:
    log.append(record("r1"))
    with pytest.raises(UsageError, match=said):
        feedback.give(log, **{"run_id": "r1", **given})
    assert log.feedback().is_empty()


# ---- rare cases


def test_calls_that_are_over_are_kept_while_one_beside_them_goes_on(own_home: Path) -> None:
    seen: list[int] = []

    @ak.tool
    def slow(n: int) -> str:
        """Read for a while."""
        while not seen:
            threading.Event().wait(0.01)
        return "read"

    @ak.tool(permission="write", idempotent=True)
    def pay(amount: int) -> str:
        """Pay a sum of money back."""
        return "paid"

    def work(amount: int) -> str:
        run = current_run()
        beside = threading.Thread(target=contextvars.copy_context().run, args=(lambda: run.call(slow, n=1),))
        beside.start()
        for n in range(3):
            run.call(pay, amount=n)
        seen.append(RunLog().sql("SELECT count(*) FROM steps WHERE kind = 'tool' AND name = 'pay'").item())
        beside.join()
        return "done"

    record = ak.adopt(work, name="beside", tools=[slow, pay]).run(amount=1)
    assert (record.state, seen) == ("DONE", [3])
    numbers = RunLog().steps(record.run_id)["step"].to_list()
    assert numbers == sorted(set(numbers)) == list(range(1, len(record.steps) + 1))


def test_a_run_goes_on_in_the_log_it_began_in(own_home: Path, tmp_path: Path) -> None:
    before = Path.cwd()

    def work(text: str) -> str:
        os.chdir(tmp_path)
        return text

    try:
        ak.adopt(work, name="walks").run(text="a")
    finally:
        os.chdir(before)
    assert RunLog().sql(
        "SELECT type, count(*) FROM events WHERE type IN ('run', 'outcome') GROUP BY 1 ORDER BY 1"
    ).rows() == [
        ("outcome", 1),
        ("run", 1),
    ]
    assert RunLog().sql("SELECT max(n) FROM (SELECT count(*) AS n FROM steps GROUP BY run_id, step)").item() == 1


def test_names_that_may_be_a_persons_words_are_private(log: RunLog) -> None:
    named = "refund for Alice Miller, now"
    log.append(record("r1", route="Kunde Anna Müller", steps=[Step("decision", named, "PLANNING", 0.0, outputs=1)]))
    content = [json.loads(line)["event"] for p in log.segments.iterdir() for line in p.read_bytes().splitlines()]
    assert "Alice" not in str(content)
    assert "Anna" not in str(content)
    assert log.steps("r1")["name"].item() == named
    assert log.find("r1").route == "Kunde Anna Müller"
    assert log.sql("SELECT route FROM outcomes").item() == "other"


def test_threads_that_share_a_rolling_segment_meet_no_error(tmp_path: Path) -> None:
    log, faults = RunLog(tmp_path / "log"), []
    log._own().roll_bytes = 20_000

    def write(n: int) -> None:
        try:
            for i in range(60):
                log.append(record(f"{n}-{i}"))
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(finished(log)) == 480


@pytest.mark.parametrize("depth", [200, 252, 253, 254, 255, 400])
def test_any_depth_of_nesting_is_kept(log: RunLog, depth: int) -> None:
    value: Any = "deep"
    for _ in range(depth):
        value = [value]
    log.append(record("r1", output={"value": value}))
    assert log.sql("SELECT count(*) FROM runs WHERE output IS NOT NULL").item() == 1


def test_more_segments_than_files_may_be_open_can_be_read(log: RunLog) -> None:
    for i in range(120):
        log.append(record(f"{i:03}"))
        log.close()
    script = (
        "import resource, sys; from pathlib import Path; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "from agentkit_tracking.runlog import RunLog; print(len(RunLog(Path(sys.argv[1])).runs()))"
    )
    assert python(script, log.folder) == "120\n"
