"""The monitor: what was planted is found, told once and told of; what is only noise, rehearsal or somebody else's is not."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from releases import SHOUT, put_in_production
from releases import store as store
from test_control import receiving, to_webhook
from typer.testing import CliRunner

from agentkit.errors import UsageError
from agentkit.records import RunRecord
from agentkit_pipelines import monitor, monitor_alerts, monitor_report, monitor_window
from agentkit_pipelines.cli import app
from agentkit_pipelines.gate_cli import WRONG_USE, exit_code
from agentkit_pipelines.monitor import Limits, Report
from agentkit_pipelines.notebook_runner import NOTEBOOKS
from agentkit_tracking import keys
from agentkit_tracking.runlog import RunLog, events
from agentkit_tracking.runlog.retention import prune

START = datetime(2026, 11, 1, tzinfo=UTC)
OLD, NEW = "0" * 64, "1" * 64
LIVE = 200  # hours after the start
FAILURES = ["failure"]


def hour(number: float) -> str:
    return (START + timedelta(hours=number)).isoformat()


class Traffic:
    """Writes finished runs of a made-up service to the log, hour by hour; `changes` say what is different."""

    def __init__(self, log: RunLog, seed: int = 0) -> None:
        self.log, self.rng, self.number = log, np.random.default_rng(seed), 0

    def runs(self, release: str | None, first: int, hours: int, per_hour: int = 20, **changes: Any) -> None:
        self.log.write(
            [
                event
                for at in range(first, first + hours)
                for minute in np.sort(self.rng.random(per_hour))
                for event in self._run(release, at + float(minute), changes)
            ],
            sync=False,
        )

    def _run(self, release: str | None, at: float, changes: dict[str, Any]) -> list[Any]:
        def happens(name: str, chance: float) -> bool:
            return bool(self.rng.random() < changes.get(name, chance))

        self.number += 1
        failed, refused = happens("failure", 0.05), happens("refusal", 0.01)
        waited = 400.0 if happens("escalation", 0.06) else 0.0
        dearer = changes.get("cost", 1.0)
        seconds = float(self.rng.lognormal(0, 0.5)) * changes.get("latency", 1.0) + waited
        route = "billing" if happens("route", 0.4) else "general"
        made = RunRecord(
            f"{self.number:08}", changes.get("system", "shop"), release, changes.get("kind", "run"), hour(at), seconds,
            "FAILED" if failed or refused else "DONE", route, {}, {}, "PolicyRefused: no" if refused else "ToolFailed: no" if failed else None,
            [], {}, waited, 1 + int(self.rng.poisson(changes.get("model_calls", 1.0))), 0, 10, 10,
            float(self.rng.lognormal(0, 1)) * dearer if dearer is not None else None, parent=changes.get("parent"),
            user_hash=f"u{self.rng.integers(5_000)}", stage=changes.get("stage", "production"),
            degraded="ToolFailed" if happens("lesser_result", 0.02) else None,
        )  # fmt: skip
        event, private = events.ended(made, lambda kept: kept)
        event["approvals"] = int(waited > 0)
        told = [({**event, "logged_at": hour(at)}, private)]
        if self.rng.random() < changes.get("feedback", 0.25):
            label = "corrected" if happens("not_accepted", 0.1) else "accepted"
            base = {k: event[k] for k in ("run_id", "system", "release", "stage") if k in event}
            told.append(({**base, "type": "feedback", "result": label, "logged_at": hour(at + 2)}, {}))
        return told


@pytest.fixture
def log() -> RunLog:
    return RunLog()


@pytest.fixture
def traffic(log: RunLog) -> Traffic:
    return Traffic(log)


def looked(log: RunLog, until: float, limits: Limits | None = None, only: Sequence[str] = (), **words: Any) -> Report:
    window = monitor_window.choose(log, "shop", until=hour(until), **words)
    return monitor.examine(log, window, limits, monitor.measures(only))


def degraded(report: Report) -> list[str]:
    return [f.measure for f in report.degraded]


# ---- what is found

PLANTED = {
    "failure": 0.2, "escalation": 0.2, "refusal": 0.1, "lesser_result": 0.15, "not_accepted": 0.6, "cost": 2.0, "latency": 1.6,
    "model_calls": 2.5, "route": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(("measure", "size"), PLANTED.items())
def test_what_is_planted_is_found_and_nothing_else(traffic: Traffic, log: RunLog, measure: str, size: float) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 30)
    traffic.runs(NEW, LIVE + 30, 60, **{measure: size})
    report = looked(log, LIVE + 90)
    also = {"refusal": ["failure"]}.get(measure, [])
    assert sorted(degraded(report)) == sorted([measure, *also])
    finding = next(f for f in report.degraded if f.measure == measure)
    assert abs(datetime.fromisoformat(finding.alarms[0].onset) - datetime.fromisoformat(hour(LIVE + 30))) <= timedelta(
        hours=8
    )
    assert finding.low is not None
    assert finding.effect is not None
    assert finding.high is None or finding.low <= finding.effect <= finding.high
    assert finding.low > (1 if finding.kind == "amount" else 0)
    assert measure in monitor_report.sentence(finding)
    assert monitor.read(report.to_json()) == Report(report.window, report.limits, report.findings)


def test_what_goes_on_as_before_is_no_alarm(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 200)
    report = looked(log, LIVE + 200)
    assert {f.state for f in report.findings} == {"ok"}
    assert {f.measure for f in report.findings} == {m.name for m in monitor.MEASURES}
    assert len(monitor_report.plot(report).axes) == 18


def test_rehearsals_parts_of_runs_drafts_and_other_systems_do_not_count(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 60)
    for other in (
        {"kind": "evaluation"},
        {"kind": "chaos"},
        {"parent": "00000001"},
        {"stage": "draft"},
        {"system": "x"},
    ):
        traffic.runs(NEW, LIVE, 60, per_hour=5, failure=1.0, **other)
    report = looked(log, LIVE + 60)
    assert degraded(report) == []
    assert report.findings[0].runs == 60 * 20


def test_within_what_is_allowed_it_is_no_alarm(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 100, cost=1.5, failure=0.1)
    assert degraded(looked(log, LIVE + 100, Limits(rate=0.06, ratio=1.6))) == []
    assert degraded(looked(log, LIVE + 100)) == ["failure", "cost"]


def test_a_measure_of_which_nothing_is_known_any_more_says_so(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 40, cost=None, feedback=0.0)
    findings = {f.measure: f for f in looked(log, LIVE + 40).findings}
    assert [f.measure for f in findings.values() if f.is_lost] == ["not_accepted", "cost"]
    assert findings["cost"].what == "800 runs, none with a known cost; add the price of its models to agentkit.toml"
    assert findings["not_accepted"].what == "800 runs, none with a label yet"


# ---- which runs


def test_labels_are_those_of_the_runs_that_are_compared(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(NEW, 0, 50, not_accepted=1.0)  # before it was rolled back
    traffic.runs(OLD, 50, LIVE - 50)
    traffic.runs(NEW, LIVE, 40)
    for other in ({"kind": "evaluation"}, {"parent": "00000001"}):
        traffic.runs(NEW, LIVE, 40, per_hour=10, not_accepted=1.0, feedback=1.0, **other)
    traffic.runs(NEW, LIVE - 1, 1, per_hour=50, not_accepted=1.0, feedback=1.0)  # labels that come when it is live
    (finding,) = looked(log, LIVE + 40, only=["not_accepted"], release=NEW, since=hour(LIVE)).findings
    assert finding.state == "ok"
    assert finding.now is not None
    assert finding.now < 0.2
    assert finding.runs < 0.3 * 800


def test_the_hour_under_way_is_left_for_the_next_look(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 20)
    traffic.runs(NEW, LIVE + 20, 1, per_hour=60, failure=1.0)
    assert degraded(looked(log, LIVE + 20.9)) == []
    assert degraded(looked(log, LIVE + 21)) == ["failure"]
    assert degraded(looked(log, LIVE + 20.9, block_minutes=10)) == ["failure"]


def test_without_runs_before_it_is_held_against_its_own_first(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(NEW, 0, 60)
    traffic.runs(NEW, 60, 40, failure=0.3)
    report = looked(log, 100)
    assert report.window.first_runs == 1_000
    assert (report.findings[0].baseline_runs, report.findings[0].runs) == (1_000, 1_000)
    assert degraded(report) == ["failure"]
    assert degraded(looked(log, 100, baseline="1400")) == []  # the bad ones are in it
    assert "first 1,400 runs" in str(looked(log, 100, baseline="1400").window)


def test_too_few_runs_are_no_verdict(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(NEW, 0, 9)
    assert looked(log, 9).too_little == "the baseline has 180 runs, 200 are needed"
    traffic.runs(NEW, 9, 41)
    assert looked(log, 50).too_little == "no whole block of 60 minutes with runs lies after the baseline"


def test_a_release_and_a_baseline_can_be_named(traffic: Traffic, log: RunLog) -> None:
    traffic.runs("2" * 64, 0, 100, failure=0.3)
    traffic.runs(OLD, 100, 100)
    traffic.runs(NEW, 200, 50, failure=0.3)
    traffic.runs(None, 200, 60, stage="draft", failure=0.6)
    assert degraded(looked(log, 250)) == []  # both before it, together
    assert degraded(looked(log, 250, baseline_release="000000")) == ["failure"]
    assert degraded(looked(log, 250, baseline="3d")) == ["failure"]
    assert degraded(looked(log, 260, release="draft", baseline_release="000000")) == ["failure"]
    assert degraded(looked(log, 200, release="000000", baseline_release="222222")) == []


@pytest.mark.usefixtures("store")
def test_a_release_rolled_back_to_is_held_against_itself_earlier(project: Path, log: RunLog) -> None:
    from agentkit_pipelines import promotion
    from agentkit_tracking import registry

    numbers = []
    for text in (SHOUT, SHOUT.replace("Upper case.", "Upper case, better.")):
        (project / "shout.py").write_text(text)
        numbers.append(registry.register_file("shout.py"))
        put_in_production(numbers[-1])
    first, second = (v.release_id for v in numbers)
    window = monitor_window.choose(log, "shout")
    assert (window.release, window.before, window.stage) == (second, (first,), "production")
    promotion.rollback("shout", why="worse")
    window = monitor_window.choose(log, "shout")
    assert (window.release, window.before) == (first, (first,))
    assert monitor_window.choose(log, "shout", release="2").release == second
    promotion.withdraw("shout", why="worse")
    with pytest.raises(UsageError, match="nothing of shout is in production; name a --release"):
        monitor_window.choose(log, "shout")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"release": "99"}, "'99' of shop is not in the run log"),
        ({"release": "0"}, "'0' of shop is too short"),
        ({"since": "yesterday"}, "--since takes a time as 2026-11-20"),
        ({"since": "0001-01-05"}, "--since 0001-01-05 lies before there was any run log; give a time from 2000 on"),
        ({"since": "0001-01-01T00:00+05:00"}, "--since takes a time as 2026-11-20"),
        ({"until": "9999-12-31T23:59-05:00"}, "--until takes a time as 2026-11-20"),
        ({"until": "2026-10-01"}, "until 2026-10-01 lies before"),
        ({"baseline": "4000000d"}, r"'4000000d' is no baseline; give days as 28d \(3,650 at most\)"),
        ({"baseline": "9" * 30}, "is no baseline; give days as 28d"),
        ({"baseline": "a while"}, "'a while' is no baseline"),
        ({"baseline": "0d"}, "'0d' is no baseline"),
        ({"block_minutes": 0}, "from 1 to 1440 minutes, not 0"),
        ({"kinds": ["evaluation"]}, "'evaluation' is no kind of run that is watched"),
    ],
)
def test_a_wrong_word_is_said(traffic: Traffic, log: RunLog, words: dict[str, Any], said: str) -> None:
    traffic.runs(OLD, 0, 1)
    with pytest.raises(UsageError, match=said):
        monitor_window.choose(log, "shop", **{"until": hour(10), **words})


@pytest.mark.parametrize(
    "limits", [{"alpha": 0.0}, {"alpha": 1.0}, {"rate": -0.1}, {"ratio": 0.5}, {"mix": float("nan")}]
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must lie between"):
        Limits(**limits)


# ---- what was pruned


@pytest.fixture
def pruned(own_home: Path, monkeypatch: pytest.MonkeyPatch, traffic: Traffic, log: RunLog) -> RunLog:
    """Twenty days: ten of the old release, then ten of a new one that fails; the first six are gone."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    monkeypatch.setattr(sys.modules[__name__], "START", today - timedelta(days=20))
    traffic.runs(OLD, 0, 240, per_hour=5)
    traffic.runs(NEW, 240, 240, per_hour=5, failure=0.3)
    log.close()
    keys.create("Ada")
    assert prune(log, 14).days == 6
    return log


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"baseline": "5d"},
        {"baseline_release": "000000"},
        {"baseline": "500"},  # when it went live only the log says
        {"baseline": "500", "since": "5"},
        {"release": "000000", "since": "8"},
    ],
)
def test_where_days_of_it_were_pruned_there_is_no_verdict(pruned: RunLog, words: dict[str, str]) -> None:
    given = {**words, **({"since": hour(24 * int(words["since"]))} if "since" in words else {})}
    report = looked(pruned, 480, **given)
    assert report.findings[0].state == "not watched"
    whole = START + timedelta(days=6)
    assert f"days were pruned, the run log is whole only from {whole:%Y-%m-%d} on" in report.too_little
    assert "another --baseline-release, or --since " in report.too_little
    assert monitor.read(report.to_json()) == report


@pytest.mark.parametrize("words", [{"baseline": "3d"}, {"baseline": "3d", "baseline_release": "000000"}])
def test_what_is_left_can_be_compared(pruned: RunLog, words: dict[str, str]) -> None:
    assert "failure" in degraded(looked(pruned, 480, **words))


def test_what_is_said_to_do_about_it_can_be_done(pruned: RunLog) -> None:
    said = looked(pruned, 480).too_little
    days, since = re.search(r"--baseline (\d+d)", said), re.search(r"--since (\S+) or later", said)
    assert days is not None
    assert since is not None
    assert "failure" in degraded(looked(pruned, 480, baseline=days[1]))
    assert looked(pruned, 480, since=since[1], baseline="1000").findings[0].state == "ok"


def test_a_predecessor_of_which_no_run_is_left_is_not_passed_over(pruned: RunLog) -> None:
    Traffic(pruned, seed=1).runs(OLD, 480, 1)
    prune(pruned, 9)
    given = {"release": NEW, "since": hour(24 * 15), "baseline": "1d", "baseline_release": OLD}
    assert "are those of release 000000000000, of which none is left" in looked(pruned, 480, **given).too_little


# ---- alerts


def alerts(log: RunLog) -> list[tuple[Any, ...]]:
    query = (
        "SELECT name, result, release, private->>'text' AS text FROM events WHERE type = 'alert' ORDER BY started_at"
    )
    return log.sql(query).rows()


def test_an_onset_is_told_once_however_often_somebody_looks(
    traffic: Traffic, log: RunLog, caplog: pytest.LogCaptureFixture
) -> None:
    traffic.runs(OLD, 0, LIVE)
    for first, hours, failures in ((0, 20, 0.05), (20, 20, 0.4), (40, 60, 0.05), (100, 20, 0.4)):
        traffic.runs(NEW, LIVE + first, hours, failure=failures)
    told: dict[int, list[str]] = {}
    for look in range(10, 121, 10):
        if news := monitor_alerts.tell(log, looked(log, LIVE + look, only=FAILURES)):
            told[look] = news
    assert [len(news) for news in told.values()] == [1, 1]
    first, second = told
    assert (first, second) == (30, 110)
    assert [row[:3] for row in alerts(log)] == [("failure", "degraded", NEW)] * 2
    assert "failure: share of runs" in alerts(log)[0][3]
    assert "points" in alerts(log)[0][3]
    assert (
        monitor_alerts.tell(log, looked(log, LIVE + 120, Limits(alpha=0.05), FAILURES)) == []
    )  # other settings, the same onsets
    once = looked(log, LIVE + 120, only=FAILURES).findings[0]
    assert len(once.alarms) == 2
    assert "had recovered by" in monitor_report.sentence(once, once.alarms[0])
    assert sum("degraded shop" in r.message for r in caplog.records) == 2


def test_looking_every_hour_or_once_comes_to_the_same(traffic: Traffic, log: RunLog) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 15)
    traffic.runs(NEW, LIVE + 15, 20, failure=0.25)
    once = looked(log, LIVE + 35, only=FAILURES).findings[0].alarms
    seen = [looked(log, LIVE + look, only=FAILURES).findings[0].alarms for look in range(12, 36)]
    first = next(i for i, alarms in enumerate(seen) if alarms)
    assert all(alarms == once for alarms in seen[first:])
    assert once[0].at == hour(LIVE + 12 + first)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"kinds": ["run"]}, {"kinds": ["batch"]}),
        ({}, {"release": NEW}),
        ({}, {"baseline_release": "222222"}),
        ({"baseline": "28d"}, {"baseline": "200"}),
    ],
    ids=["kinds", "stage", "release before", "first runs"],
)
def test_an_alarm_of_another_comparison_is_told_too(
    traffic: Traffic, log: RunLog, first: dict[str, Any], then: dict[str, Any]
) -> None:
    traffic.runs("2" * 64, 0, LIVE - 100)
    for kind in ("run", "batch"):
        traffic.runs(OLD, LIVE - 100, 100, kind=kind)
        traffic.runs(NEW, LIVE, 20, kind=kind)
        traffic.runs(NEW, LIVE + 20, 40, kind=kind, failure=0.4)
    news = [
        len(monitor_alerts.tell(log, looked(log, LIVE + look, only=FAILURES, **words)))
        for look in (59, 60)
        for words in (first, then)
    ]
    assert news == [1, 1, 0, 0]


# ---- the command


def ask(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["monitor", *arguments])


def words(output: str) -> str:
    return " ".join(output.split())


@pytest.mark.slow
def test_the_command_finds_it_tells_of_it_once_and_says_so_with_its_exit_code(
    traffic: Traffic, log: RunLog, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 40)
    traffic.runs(NEW, LIVE + 40, 20, failure=0.3, cost=3.0)
    with receiving() as (url, receiver):
        to_webhook(monkeypatch, url)
        quiet = ask("shop", "--until", hour(LIVE + 40), "--output", str(project / "quiet"))
        assert (quiet.exit_code, receiver.seen) == (0, []), quiet.output
        assert "nothing degraded" in quiet.output
        found = ask("shop", "--until", hour(LIVE + 60))
        assert found.exit_code == 3, found.output
        again = ask("shop", "--until", hour(LIVE + 60))
        assert again.exit_code == 3
    assert "✗ failure: share of runs" in found.output
    assert (receiver.bad, len(receiver.seen)) == ([], 2)
    first, second = sorted(receiver.seen, key=lambda notice: notice["data"]["details"]["measure"])
    assert (first["type"], first["data"]["system"]) == ("agentkit.degraded", "shop")
    assert (first["data"]["details"]["measure"], second["data"]["details"]["measure"]) == ("cost", "failure")
    examples = second["data"]["details"]["runs"]
    assert {log.find(run).state for run in examples} == {"FAILED"}
    assert {row[0] for row in alerts(log)} == {"failure", "cost"}
    report = json.loads((project / "quiet" / "report.json").read_text())
    assert {f["state"] for f in report["findings"]} == {"ok"}
    assert {"monitor.ipynb", "monitor.png"} <= {p.name for p in (project / "quiet").iterdir()}


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's cells run here."""

    def run(name: str, parameters: dict[str, Any], folder: Path) -> Path:
        given = "\n".join(f"{word} = {value!r}" for word, value in {**parameters, "output": str(folder)}.items())
        code = [c for c in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        script = folder / f"{name}.py"
        script.write_text("\n".join(["".join(code[0]["source"]), given, *("".join(c["source"]) for c in code[1:])]))
        runpy.run_path(str(script))
        return folder / f"{name}.ipynb"

    monkeypatch.setattr("agentkit_pipelines.notebook_runner.run_notebook", run)


@pytest.mark.slow
def test_what_the_webhook_did_not_take_is_said_and_sent_by_the_next_look(
    traffic: Traffic, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 20, failure=0.4)
    look = ("shop", "--until", hour(LIVE + 20), "--measure", "failure")
    to_webhook(monkeypatch, "http://127.0.0.1:9/hook")  # nobody is there
    lost = ask(*look)
    assert lost.exit_code == 3, lost.output
    assert "1 notice is undelivered: the receiver that AGENTKIT_WEBHOOK_URL names did not answer 2xx" in words(
        lost.output
    )
    with receiving() as (url, receiver):
        to_webhook(monkeypatch, url)
        assert ask(*look, "--no-alert").exit_code == 3
        assert receiver.seen == []
        found = ask(*look)
        assert (found.exit_code, len(receiver.seen)) == (3, 1), found.output
        assert ask(*look).exit_code == 3
    assert "undelivered" not in found.output
    assert (receiver.bad, len(receiver.seen)) == ([], 1)


@pytest.mark.usefixtures("no_kernel")
def test_a_webhook_that_cannot_be_one_is_said(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 20)
    to_webhook(monkeypatch, "http://example.com/hook")
    quiet = ask("shop", "--until", hour(LIVE + 20))
    assert quiet.exit_code == 0, quiet.output
    assert "! AGENTKIT_WEBHOOK_URL must be https, or http on loopback" in words(quiet.output)
    assert "WEBHOOK" not in ask("shop", "--until", hour(LIVE + 20), "--no-alert").output


@pytest.mark.usefixtures("no_kernel")
def test_the_command_says_what_it_can_no_longer_watch(traffic: Traffic) -> None:
    traffic.runs(OLD, 0, LIVE)
    traffic.runs(NEW, LIVE, 40, cost=None)
    found = ask("shop", "--until", hour(LIVE + 40))
    assert found.exit_code == 0, found.output
    assert (
        "! cost is not watched: 800 runs, none with a known cost; add the price of its models to agentkit.toml"
        in words(found.output)
    )


@pytest.mark.usefixtures("no_kernel")
def test_the_command_refuses_to_judge_by_what_a_prune_left(pruned: RunLog) -> None:
    found = ask("shop", "--until", hour(480))
    assert found.exit_code == 4, found.output
    assert "days were pruned" in words(found.output)


@pytest.mark.slow
def test_the_command_has_its_own_exit_code_for_too_little(traffic: Traffic, project: Path) -> None:
    traffic.runs(NEW, 0, 5)
    found = ask("shop", "--until", hour(5), "--output", str(project / "few"))
    assert found.exit_code == 4, found.output
    assert "too little to go by: the baseline has 100 runs, 200 are needed" in words(found.output)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "the run log has no run of shop in production; name a --release, or `draft`"),
        (("--release", "draft"), "no run of shop by draft is in the run log yet"),
        (("--alpha", "2"), "alpha must lie between 0.0001 and 0.2, not 2"),
        (("--measure", "joy"), "there is no measure 'joy'; there are failure, "),
        (("--kind", "chaos"), "'chaos' is no kind of run that is watched"),
    ],
)
def test_wrong_use_is_said_before_a_kernel_starts(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Callable[..., Any]:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr("agentkit_pipelines.notebook_runner.run_notebook", never)
    refused(said, "shop", *arguments)


def refused(said: str, *arguments: str) -> None:
    done = ask(*arguments)
    assert isinstance(done.exception, UsageError), done.output
    assert said in str(done.exception)
    assert exit_code(done.exception) == WRONG_USE


def test_a_report_that_cannot_be_written_is_wrong_use(traffic: Traffic, project: Path) -> None:
    traffic.runs(OLD, 0, 11)
    traffic.runs(NEW, 11, 2)
    (project / "file").write_text("")
    for place, why in ((project / "file", "File exists"), (project / "file" / "below", "Not a directory")):
        refused(f"cannot be written to {place}: {why}; give --output FOLDER", "shop", "--output", str(place))
    assert (project / "file").read_text() == ""
