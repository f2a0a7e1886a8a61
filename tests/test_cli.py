"""The command line: what it prints, what it says when asked for the wrong thing, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from releases import furnish

from agentkit.examples import Example, read_examples, write_examples
from agentkit_pipelines import cli

SOURCE = '''
import agentkit as ak


def shout(text: str, times: str = "1") -> dict:
    """Upper case."""
    if not text.strip():
        raise ValueError("nothing to shout")
    return {"text": text.upper() * int(times)}


def success(example, prediction, trace=None) -> bool:
    return prediction.text == example.expected_text


system = ak.adopt(shout, name="shout", success=success)
'''


class Shell:
    """Calls the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self._monkeypatch.setattr(sys, "argv", ["agentkit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(stopped.value.code or 0), out, err


@pytest.fixture
def sh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], project: Path, own_home: Path) -> Shell:
    furnish(own_home)
    (project / "shout.py").write_text(SOURCE)
    return Shell(monkeypatch, capsys)


def test_help_names_every_command_and_the_exit_codes(sh):
    code, out, _ = sh("--help")
    assert code == 0
    for word in ("register", "evaluate", "promote", "rollback", "run", "batch", "list", "show", "diff", "log", "data"):
        assert f" {word} " in out
    assert "Exit codes" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["promot"], "No such command 'promot'"),
        (["register", "nowhere.py"], "there is no file nowhere.py"),
        (["register", "shout.py:shot"], "did you mean shout.py:shout?"),
        (["register", "shout.py", "--prepare", "tuned"], "defines no function 'tuned'"),
        (["promote"], "give a reference or --candidates"),
        (["promote", "shout", "--candidates"], "give a reference or --candidates"),
        (["evaluate", "shout", "--repeats", "0"], "greater than or equal to 1"),
        (["list"], "nothing is registered"),
        (["run", "shout.py", "hello", "-i", "times"], "--input takes name=value"),
        (["run", "shout.py", "hello", "-i", "loud=1"], "it has no input 'loud'"),
        (["log", "query", "SELECT nothing FROM nowhere"], "cannot answer this query"),
        (["data", "check", "nowhere.jsonl"], "nowhere.jsonl"),
        (["batch", "shout@production", "in.csv", "out.parquet"], "no system 'shout' is registered"),
    ],
)
def test_wrong_use_is_said_in_a_line_and_changes_nothing(sh, project, arguments, said):
    before = sorted(project.iterdir())
    code, out, err = sh(*arguments)
    assert code in (1, 2)
    assert said in err, err
    assert "Traceback" not in out + err
    assert sorted(p for p in project.iterdir() if p.name != "__pycache__") == before


def test_unknown_release_is_wrong_use_that_lists_what_there_is(sh):
    sh("register", "shout.py")
    code, _, err = sh("show", "shout/7")
    assert (code, "shout has no version 7; its versions are 1" in err) == (2, True)


def test_register_list_show_and_diff_tell_a_version_apart(sh, project):
    assert "registered shout/1" in sh("register", "shout.py", "--candidate")[1]
    assert "already registered as shout/1" in sh("register", "shout.py")[1]
    (project / "shout.py").write_text(SOURCE.replace("text.upper()", "text.upper().strip()"))
    assert "registered shout/2" in sh("register", "shout.py")[1]
    _, listed, _ = sh("list")
    assert "candidate" in listed
    assert "shout/2" in listed
    assert "embedded/default" in sh("show", "shout/1")[1]
    _, found, _ = sh("diff", "shout/1", "shout/2")
    assert '+    return {"text": text.upper().strip() * int(times)}' in found
    assert "the same release" in sh("diff", "shout/1", "shout/1")[1]


def test_run_shows_route_decision_cost_latency_and_trace(sh, monkeypatch):
    monkeypatch.setenv("AGENTKIT_TRACES", "on")
    code, out, _ = sh("run", "shout.py", "hello", "-i", "times=2")
    assert code == 0
    assert "text: HELLOHELLO" in out
    assert "route shout" in out
    for word in ("DONE", "USD 0.000000", "planning", "traces?selectedEvaluationId=tr-"):
        assert word in out


def test_run_that_fails_exits_with_1_and_says_why(sh):
    code, out, _ = sh("run", "shout.py", " ")
    assert code == 1
    assert "FAILED: ValueError: nothing to shout" in out


def test_run_as_json_is_the_whole_record(sh):
    code, out, _ = sh("run", "shout.py", "hello", "--json")
    record = json.loads(out)
    assert (code, record["state"], record["output"], record["release"]) == (0, "DONE", {"text": "HELLO"}, None)


def test_log_shows_runs_and_answers_sql(sh):
    sh("run", "shout.py", "hello", "--json")
    assert "shout" in sh("log")[1]
    assert "1" in sh("log", "query", "SELECT count(*) AS runs FROM runs WHERE state = 'DONE'")[1]


def test_data_import_and_check(sh, project):
    (project / "t.csv").write_text("id,text,expected_text,kind\n007,a,A,x\n008,b,B,y\n")
    columns = ["--inputs", "text", "--expected", "expected_text", "--task-type", "kind", "--id-column", "id"]
    assert sh("data", "import", "t.csv", "cases.jsonl", *columns)[0] == 0
    assert [e.id for e in read_examples(project / "cases.jsonl")] == ["007", "008"]
    code, out, _ = sh("data", "check", "cases.jsonl")
    assert (code, "2 examples" in out) == (0, True)
    assert "exists" in sh("data", "import", "t.csv", "cases.jsonl", *columns)[2]


def test_data_check_exits_with_2_on_near_duplicates(sh, project):
    text = "My camera has been offline since this morning and I cannot see the garden"
    cases = [Example(id=str(i), inputs={"text": text + "!" * i}, expected={}, task_type="t") for i in range(2)]
    write_examples(project / "cases.jsonl", cases)
    code, out, _ = sh("data", "check", "cases.jsonl")
    assert (code, "near-duplicates" in out) == (2, True)


def test_estimate_spends_nothing_and_moves_nothing(sh, project):
    sh("register", "shout.py")
    cases = [Example(id="a", inputs={"text": "a"}, expected={"expected_text": "A"}, task_type="t")]
    write_examples(project / "golden.jsonl", cases)
    code, out, _ = sh("evaluate", "shout", "--golden", "golden.jsonl", "--estimate")
    assert code == 0
    assert out.startswith("8 runs (8 repeats)")


def test_doctor_names_what_is_wrong_and_what_to_do(sh, monkeypatch):
    monkeypatch.setenv("AGENTKIT_LM", "openai/gpt-4.1")
    code, out, _ = sh("doctor")
    assert code == 1
    assert "OPENAI_API_KEY is not set" in out
    assert "export OPENAI_API_KEY=" in out
    monkeypatch.delenv("AGENTKIT_LM")
    code, out, _ = sh("doctor")
    assert (code, "enforced by the store (for agentkit" in " ".join(out.split())) == (0, True)
