"""Promotion and rollback: only the gate moves `production`, whole or not at all, and every step can be proven later."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from evidence import without_kernel
from releases import CASES, COLOURS, THRESHOLDS, furnish, judged, python

from agentkit.errors import ReleaseError, UsageError
from agentkit.examples import Example, sha256_of, write_examples
from agentkit_pipelines import cli, comparison, evidence, promotion, recording
from agentkit_pipelines.doctor import examine
from agentkit_pipelines.evidence import Plan
from agentkit_pipelines.recording import Evaluation
from agentkit_tracking import home as homes
from agentkit_tracking import loading, mirrors, registry
from agentkit_tracking.home import connect
from agentkit_tracking.keys import signing_key
from agentkit_tracking.production import current, evaluation_of, find_production, history_of

pytestmark = pytest.mark.slow  # real kernels, in the fixture `road`

# A version with other prompts: two of them, where the first has one.
PAIR = COLOURS.replace(
    "\n\ndef system",
    """

class Pair(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(Colour)
        self.second = dspy.Predict(Colour.with_instructions("Say it again."))

    def forward(self, text):
        return self.first(text=text)


def system""",
).replace("dspy.Predict(Colour), name", "Pair(), name")
SOURCES = {
    "good": COLOURS,
    "bad": COLOURS.replace(
        "- warm: red, orange, sun, fire, desert, lava\n    - cold: blue, ice, sea, snow, winter, frost", ""
    ),
    "few": COLOURS + "\n# another release of the same\n",
    "broken": COLOURS.replace("    return prediction", "    __import__('os')._exit(3)\n    return prediction"),
    "pair": PAIR,
}


@dataclass
class Said:
    """What a command ended with, and the aliases of `colours` after it."""

    code: int
    out: str
    err: str
    aliases: dict[str, str]


@dataclass
class Road:
    """A store in which versions have gone their way: 1 promoted and 4 died in real kernels, 2 failed, 3 undecided."""

    home: Path
    project: Path
    versions: dict[str, registry.Version] = field(default_factory=dict)
    said: dict[str, Said] = field(default_factory=dict)
    pair: Evaluation | None = None  # of version 5, which passed and is not promoted yet


def agentkit(*arguments: str) -> Said:
    """The command line, as its entry point runs it."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["agentkit", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return Said(int(ended.value.code or 0), out.getvalue(), err.getvalue(), aliases())


def aliases(model: str = "colours") -> dict[str, str]:
    return {alias: str(number) for alias, number in connect().get_registered_model(model).aliases.items()}


def prompts_in_production() -> dict[str, int]:
    """Every prompt of the system whose alias `production` is set."""
    names = ("colours.program", "colours.first", "colours.second")
    found = {name: mirrors.prompt_in_production(name) for name in names}
    return {name: number for name, number in found.items() if number is not None}


FIRST, SECOND = {"colours.program": 1}, {"colours.first": 1, "colours.second": 1}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    folder = tmp_path_factory.mktemp("road")
    project, home = folder / "project", furnish(folder / "home")
    (project / "data" / "colours").mkdir(parents=True)
    (project / "thresholds").mkdir()
    (project / "pyproject.toml").write_text("")
    (project / "thresholds" / "colours.yaml").write_text(THRESHOLDS)
    cases = [
        Example(id=f"{i:02}", inputs={"text": t}, expected={"label": a}, task_type="t")
        for i, (t, a) in enumerate(CASES)
    ]
    write_examples(project / "data" / "colours" / "golden.jsonl", cases)
    write_examples(project / "few.jsonl", [*cases[:2], *cases[-2:]])
    made = Road(home, project)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(project):
        patch.setenv("AGENTKIT_HOME", str(home))
        patch.setenv("AGENTKIT_TRACES", "off")
        patch.setenv("AGENTKIT_AUTHOR", "Ada")
        for name, text in SOURCES.items():
            (project / "colours.py").write_text(text)
            made.versions[name] = registry.register_file("colours.py")
        connect().set_registered_model_alias("colours", "candidate", "1")
        made.said["good"] = agentkit("promote", "--candidates", "--repeats", "1")
        with without_kernel():
            made.said["bad"] = agentkit("promote", "colours/2", "--repeats", "1")
            made.said["few"] = agentkit("promote", "colours/3", "--repeats", "1", "--golden", "few.jsonl")
        made.said["broken"] = agentkit("promote", "colours/4", "--repeats", "1")
        with without_kernel():
            made.pair = evidence.evaluate(plan(made, "pair"))
        yield made


def plan(road: Road, name: str) -> Plan:
    golden, bar = road.project / "data" / "colours" / "golden.jsonl", road.project / "thresholds" / "colours.yaml"
    return Plan(registry.resolve(str(road.versions[name])), golden, bar, repeats=1)


@pytest.fixture
def here(road: Road, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    """A copy of that store for this test alone: version 1 in production, 5 evaluated; nothing else has happened."""
    own_home.mkdir()
    for name in ("mlflow.db", "trust.json", "signing_key.pem"):
        shutil.copy(road.home / name, own_home)
    monkeypatch.chdir(road.project)
    monkeypatch.setenv("AGENTKIT_AUTHOR", "Ada")
    assert road.pair is not None
    return road.pair


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a kernel would be started."""
    monkeypatch.setattr(evidence, "run_notebook", lambda *_, **__: pytest.fail("a kernel was started"))


def evidence_of(version: registry.Version) -> Path:
    return recording.download(proof_of(version).run)


def proof_of(version: registry.Version) -> Any:
    """What was signed of a version's evidence."""
    signed = evaluation_of(registry.resolve(str(version)))
    assert signed is not None
    return signed.statement.evidence


def commit(done: Evaluation) -> list[str]:
    said: list[str] = []
    promotion.commit(done, signing_key(), say=said.append)
    return said


def last() -> Any:
    """The last entry of the history of `colours`."""
    head = history_of("colours").head
    assert head is not None
    return head.move


# ---- the verdicts


def test_on_pass_the_alias_moves_and_the_candidate_is_cleared(road: Road, here: Evaluation) -> None:
    said = road.said["good"]
    assert (said.code, said.aliases) == (0, {"production": "1"})
    assert "colours/1 is now colours@production" in said.out
    assert "PASS" in said.out
    assert prompts_in_production() == FIRST
    assert (registry.resolve("colours/1").tags or {})["agentkit.last_verdict"] == "pass"
    move = last()
    assert (move.event, move.version, move.left_version, move.evidence) == (
        "promoted",
        1,
        None,
        proof_of(road.versions["good"]),
    )
    assert (move.signer.owner, move.signer.local) == ("Ada", True)
    shown = connect().get_registered_model("colours").description
    assert "### History" in shown
    assert f"promoted version 1 by Ada (local key) · evidence {move.evidence.sha256[:12]} · the gate passed" in shown


@pytest.mark.parametrize(
    ("name", "code", "word"), [("bad", 3, "FAIL: nothing moved"), ("few", 4, "INCONCLUSIVE: nothing moved")]
)
def test_on_fail_and_inconclusive_nothing_moves_and_the_evidence_is_kept(
    road: Road, here: Evaluation, name: str, code: int, word: str
) -> None:
    said = road.said[name]
    assert (said.code, said.aliases) == (code, {"production": "1"})
    assert word in said.out
    assert prompts_in_production() == FIRST
    verdict = json.loads((evidence_of(road.versions[name]) / "verdict.json").read_text())["verdict"]
    assert verdict == {"bad": "fail", "few": "inconclusive"}[name]
    assert last().version == 1


def test_a_notebook_that_crashes_is_a_crash_and_is_kept(road: Road, here: Evaluation) -> None:
    said = road.said["broken"]
    assert (said.code, said.aliases) == (1, {"production": "1"})
    assert "evaluate: its kernel died (see " in said.err
    [run] = connect().search_runs(
        [connect().get_experiment_by_name("colours").experiment_id], "tags.`agentkit.verdict` = 'crash'"
    )
    kept = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="evidence"))
    assert "44 cases × 1 repeats" in (kept / "evaluate.ipynb").read_text()  # up to the cell in which it died
    assert run.info.status == "FAILED"


def test_a_version_is_compared_with_production_on_the_results_that_promoted_it(road: Road, here: Evaluation) -> None:
    said = json.loads((evidence_of(road.versions["bad"]) / "evidence.json").read_text())
    assert said["compared_with"] == road.versions["good"].release_id
    parameters = json.loads((evidence_of(road.versions["bad"]) / "evaluate.ipynb").read_text())["metadata"][
        "papermill"
    ]["parameters"]
    assert parameters["production_results"].endswith("results.parquet")
    rules = json.loads((evidence_of(road.versions["bad"]) / "verdict.json").read_text())["rules"]
    assert {r["id"]: r["status"] for r in rules} == {"success/at_least/0.75": "fail", "success/margin/0.1": "fail"}


def test_the_evidence_hashes_what_it_says_and_the_version_hashes_the_evidence(road: Road, here: Evaluation) -> None:
    version = registry.resolve("colours/1")
    folder, signed = evidence_of(version), proof_of(version)
    said = json.loads((folder / "evidence.json").read_text())
    files = {
        "results_sha256": folder / "results.parquet",
        "notebook_sha256": folder / "evaluate.ipynb",
        "thresholds_sha256": folder / "thresholds.yaml",
        "golden_sha256": road.project / "data" / "colours" / "golden.jsonl",
    }
    assert {name: said[name] for name in files} == {name: sha256_of(file) for name, file in files.items()}
    hashes = (signed.results, signed.notebook, signed.thresholds, signed.golden)
    assert hashes == tuple(said[name] for name in files)
    assert signed.sha256 == sha256_of(folder / "evidence.json")
    assert (said["release"], said["verdict"], said["cases"]) == (version.release_id, "pass", len(CASES))
    assert sha256_of(folder / "manifest.json") == version.release_id


def test_attempts_on_one_golden_set_are_counted(road: Road, here: Evaluation) -> None:
    assert "attempt 1 on this golden set" in road.said["good"].out
    assert "attempt 2 on this golden set" in road.said["bad"].out
    assert "attempt 1 on this golden set" in road.said["few"].out  # another set
    assert here.attempts == 4  # one that broke is one, too


def test_the_verdict_and_the_figures_are_in_the_mlflow_run(road: Road, here: Evaluation) -> None:
    run = connect().get_run(proof_of(registry.resolve("colours/2")).run)
    assert run.data.tags["mlflow.note.content"].startswith("### Gate: fail\n\nAttempt 2 of this system")
    assert run.data.metrics["success"] < 0.75
    assert run.data.params["cases"] == str(len(CASES))
    assert {f.path for f in connect().list_artifacts(run.info.run_id)} == {"cases.json", "evidence"}
    assert mlflow.search_traces(locations=[run.info.experiment_id], return_type="list") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("promote",),
        ("promote", "colours/1", "--candidates"),
        ("promote", "colours/9"),
        ("promote", "colours/1", "--golden", "nowhere.jsonl"),
        ("promote", "colours/1", "--thresholds", "nowhere.yaml"),
        ("promote", "colours/1", "--thresholds", "other.yaml"),
        ("promote", "colours/1", "--repeats", "0"),
    ],
)
@pytest.mark.usefixtures("no_kernel")
def test_wrong_use_ends_with_2_before_a_kernel_starts(road: Road, here: Evaluation, arguments: tuple[str, ...]) -> None:
    (road.project / "other.yaml").write_text(THRESHOLDS.replace("colours", "flowers"))
    said = agentkit(*arguments)
    assert (said.code, said.aliases) == (2, {"production": "1"})
    assert said.err


@pytest.mark.usefixtures("no_kernel", "here")
def test_a_candidate_that_was_refused_is_not_given_another_chance_each_night() -> None:
    connect().set_registered_model_alias("colours", "candidate", "2")
    said = agentkit("promote", "--candidates", "--repeats", "1")
    assert (said.code, "colours/2: already judged (fail)" in said.out) == (0, True)


def test_a_schedule_with_nothing_to_promote_ends_well(here: Evaluation) -> None:
    said = agentkit("promote", "--candidates")
    assert (said.code, said.out) == (0, "no version carries the alias `candidate`\n")


@pytest.mark.usefixtures("no_kernel")
def test_an_altered_release_is_refused_before_a_kernel_starts(road: Road, here: Evaluation) -> None:
    with (
        altered_in_the_store(road, "pair"),
        pytest.raises(ReleaseError, match=r"is not intact: altered: source/colours"),
    ):
        promotion.promote(plan(road, "pair"))


def test_a_golden_set_edited_while_a_version_is_evaluated_is_noticed(
    road: Road, here: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = shutil.copy(road.project / "few.jsonl", road.project / "edited.jsonl")

    def edited_meanwhile(*_: Any, **__: Any) -> Path:
        golden.write_text(golden.read_text().replace("warm", "cold"))
        return golden

    monkeypatch.setattr(evidence, "run_notebook", edited_meanwhile)
    with pytest.raises(UsageError, match=r"edited\.jsonl changed while colours/5 was evaluated on it; evaluate again"):
        evidence.evaluate(replace(plan(road, "pair"), golden=golden))


# ---- the commit


def test_a_promotion_remembers_the_previous_production_and_mirrors_its_prompts(here: Evaluation) -> None:
    assert commit(here)[-1] == "colours/5 is now colours@production"
    assert aliases() == {"production": "5"}
    assert (last().version, last().left_version) == (5, 1)
    assert prompts_in_production() == SECOND  # and the prompt that it has no more is in production no more


def test_production_that_changed_while_the_version_was_evaluated_is_left_alone(here: Evaluation) -> None:
    commit(judged(registry.resolve("colours/3")))
    with pytest.raises(
        ReleaseError, match="production of colours changed while colours/5 was evaluated; promote it again"
    ):
        commit(here)
    assert aliases() == {"production": "3"}


def test_a_wish_made_meanwhile_for_another_version_is_not_taken_away(here: Evaluation) -> None:
    connect().set_registered_model_alias("colours", "candidate", "5")
    done = replace(here, version=registry.resolve("colours@candidate"))
    connect().set_registered_model_alias("colours", "candidate", "3")
    commit(done)
    assert aliases() == {"production": "5", "candidate": "3"}


def test_a_candidate_that_is_in_production_already_is_granted(here: Evaluation) -> None:
    commit(here)
    connect().set_registered_model_alias("colours", "candidate", "5")
    assert commit(here) == ["colours/5 is in production already"]
    assert aliases() == {"production": "5"}


def test_what_others_would_fetch_is_checked_before_it_is_promoted(road: Road, here: Evaluation) -> None:
    with (
        altered_in_the_store(road, "pair"),
        pytest.raises(ReleaseError, match="store's copy of colours/5 is not intact"),
    ):
        commit(here)
    assert aliases() == {"production": "1"}


def test_mirrors_that_cannot_be_set_are_said_and_undo_nothing(
    here: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: Any) -> None:
        raise mlflow.exceptions.MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "update_registered_model", down)
        said = commit(here)
    assert "run agentkit doctor --repair" in said[0]
    assert aliases() == {"production": "5"}
    assert agentkit("doctor", "--repair").code in (0, 1)  # 1 if this machine lacks something else
    assert prompts_in_production() == SECOND
    assert "promoted version 5" in connect().get_registered_model("colours").description


@contextlib.contextmanager
def altered_in_the_store(road: Road, name: str) -> Iterator[None]:
    model = connect().get_logged_model(str(registry.resolve(str(road.versions[name])).model_id))
    file = Path(model.artifact_location.removeprefix("file://")) / "source" / "colours.py"
    text = file.read_text()
    file.write_text(text + "# altered\n")
    try:
        yield
    finally:
        file.write_text(text)


# ---- back


def test_a_rollback_restores_the_previous_release_whole(here: Evaluation, record_property: Callable[..., None]) -> None:
    commit(here)
    began = time.perf_counter()
    left, now = promotion.rollback("colours", why="it was rude")
    record_property("rollback_s", round(time.perf_counter() - began, 3))
    assert (str(left), str(now), aliases()) == ("colours/5", "colours/1", {"production": "1"})
    assert prompts_in_production() == FIRST
    assert loading.load("colours@production").run(text="lava").output["label"] == "warm"
    assert (last().event, last().version, last().left_version, last().why) == ("rolled_back", 1, 5, "it was rude")
    assert last().evidence == proof_of(registry.resolve("colours/1"))
    shown = connect().get_registered_model("colours").description
    assert "rolled back to version 1 (before: version 5) by Ada (local key)" in shown


def test_rollbacks_walk_back_along_the_versions_that_were_in_production(here: Evaluation) -> None:
    commit(here)
    commit(judged(registry.resolve("colours/3")))
    commit(judged(registry.resolve("colours/1")))  # once more
    back = [str(promotion.rollback("colours", why="x")[1]) for _ in range(3)]
    assert back == ["colours/3", "colours/5", "colours/1"]


def test_the_command_says_how_soon_running_processes_follow(here: Evaluation) -> None:
    commit(here)
    said = agentkit("rollback", "colours", "--why", "it was rude")
    assert (said.code, said.aliases) == (0, {"production": "1"})
    assert "Processes that follow the alias change over within 10 s" in " ".join(said.out.split())


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("colours", "colours/1 was the first in production; there is nothing to go back to"),
        ("flowers", "no system 'flowers' is registered"),
    ],
)
def test_a_rollback_with_nothing_to_go_back_to_is_refused(here: Evaluation, system: str, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        promotion.rollback(system, why="x")
    assert aliases() == {"production": "1"}


def test_a_withdrawal_leaves_nothing_in_production_until_a_rollback_or_a_promotion(here: Evaluation) -> None:
    commit(here)
    said = agentkit("withdraw", "colours", "--why", "it leaks")
    assert (said.code, said.aliases) == (0, {})
    assert prompts_in_production() == {}
    with pytest.raises(ReleaseError, match=r"no version in production: .* withdrawn version 5 by Ada .* it leaks"):
        loading.load("colours@production")
    assert agentkit("withdraw", "colours").code == 2
    left, now = promotion.rollback("colours", why="the one before leaks not")
    assert (left, str(now), aliases()) == (None, "colours/1", {"production": "1"})
    assert prompts_in_production() == FIRST


@pytest.mark.parametrize("fetched_before", [False, True])
def test_a_rollback_to_a_release_that_was_tampered_with_is_refused(
    road: Road, here: Evaluation, fetched_before: bool
) -> None:
    commit(here)
    if fetched_before:
        loading.fetch("colours/1")
    with altered_in_the_store(road, "good"):
        said = agentkit("rollback", "colours")
    assert (said.code, said.aliases) == (1, {"production": "5"})
    assert "is not intact" in said.err
    assert prompts_in_production() == SECOND


def test_a_history_of_many_moves_keeps_a_readable_description(here: Evaluation) -> None:
    for i in range(20):
        commit(replace(here, production=current("colours")))
        promotion.rollback("colours", why=f"reason {i} " + "x" * 400)
    text = connect().get_registered_model("colours").description
    assert len(text) <= registry.DESCRIPTION_LIMIT
    assert text.startswith("Releases of the agent system `colours`")
    assert "reason 19" in text
    assert "older: agentkit history colours" in text
    assert len(history_of("colours").entries) == 41
    assert connect().get_model_version("colours", "5").description.startswith("### Gate: pass")


# ---- killed

# Imports everything, then lets children do the work: each is killed before its n-th write to the store.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import mlflow, mlflow.artifacts, mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
import agentkit_tracking.guard.registry_store
from agentkit_pipelines import promotion
from agentkit_tracking.keys import signing_key
from releases import finished

home, evaluated, out, action = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
if sys.argv[5] == "plain":
    agentkit_tracking.home.registry_uri = agentkit_tracking.home.tracking_uri
WRITES = ("set_model_version_tag", "update_model_version", "update_registered_model", "set_registered_model_tag", "set_registered_model_alias",
          "delete_registered_model_alias", "set_prompt_alias", "delete_prompt_alias")
seen = []

def deadly(original, name, n):
    def call(*arguments, **options):
        seen.append(name)
        if len(seen) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call

def work(n):
    for name in WRITES:
        setattr(mlflow.MlflowClient, name, deadly(getattr(mlflow.MlflowClient, name), name, n))
    if action == "promote":
        promotion.commit(finished(Path(evaluated), "colours/5"), signing_key())
    else:
        promotion.rollback("colours", why="test")
    print("writes", *seen, flush=True)

for n in range(1, 100):
    copy = out / f"{n:02}"
    copy.mkdir()
    for name in ("mlflow.db", "trust.json", "signing_key.pem"):
        shutil.copy(home / name, copy)
    os.environ["AGENTKIT_HOME"] = str(copy)
    if (child := os.fork()) == 0:
        work(n)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    print(n, ended, flush=True)
    if ended == 0:
        break
"""


def killed_everywhere(here: Evaluation, home: Path, out: Path, action: str, store: str) -> list[Path]:
    """One store per write of the action, as a SIGKILL before it left it, and a last one where it came to its end."""
    out.mkdir()
    said = python(KILLER, home, here.folder, out, action, store).splitlines()
    ends = [int(line.split()[1]) for line in said if line[0].isdigit()]
    assert ends == [signal.SIGKILL] * (len(ends) - 1) + [0]
    [writes] = [line.split()[1:] for line in said if line.startswith("writes")]
    assert len(writes) == len(ends) - 1
    assert writes[0] == "set_registered_model_tag"  # the entry
    return sorted(out.iterdir())


@pytest.mark.parametrize("store", ["guarded", "plain"])
@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_process_killed_at_any_write_leaves_one_release_in_force_whole(
    here: Evaluation, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, store: str
) -> None:
    """On a plain MLflow store, too, where alias and prompts follow the entry one by one."""
    if store == "plain":
        monkeypatch.setattr(homes, "registry_uri", homes.tracking_uri)
    connect().set_registered_model_alias("colours", "candidate", "5")
    if action == "rollback":
        commit(here)
    in_force = []
    for i, home in enumerate(killed_everywhere(here, own_home, tmp_path / "killed", action, store)):
        monkeypatch.setenv("AGENTKIT_HOME", str(home))
        production = find_production("colours")
        assert production is not None
        in_force.append(production.number)
        if production.number == 5:  # in force is only what can be proven and taken back
            assert last().evidence.sha256 == sha256_of(here.folder / "evidence.json")
        assert loading.load("colours@production").run(text="lava").output["label"] == "warm"
        if i % 2:
            examine(repair=True)
        else:  # the next promotion, which evaluates it anew against whatever is in production
            commit(replace(here, production=production))
            production = registry.resolve("colours/5")
        assert mirrors.mirror(history_of("colours")) == 0
        assert prompts_in_production() == (SECOND if production.number == 5 else FIRST)
        if production.number == 5:
            assert str(promotion.rollback("colours", why="after the kill")[1]) == "colours/1"
        with pytest.raises(ReleaseError, match="there is nothing to go back to"):
            promotion.rollback("colours", why="once more")
    old, new = (1, 5) if action == "promote" else (5, 1)
    moved = in_force.index(new)
    assert in_force == [old] * moved + [new] * (len(in_force) - moved)
    assert 0 < moved < len(in_force) - 1


# ---- what differs


def test_a_diff_shows_prompts_settings_and_source(here: Evaluation) -> None:
    lines = comparison.differences("colours/1", "colours/2")
    assert "# prompt program" in lines
    assert "-- warm: red, orange, sun, fire, desert, lava" in lines
    assert "# file colours.py" in lines
    pair = comparison.differences("colours/1", "colours/5")
    assert {"# prompt first", "# prompt program", "# spec", "- program: Predict", "+ program: Pair"} <= set(pair)
    assert comparison.differences("colours/1", "colours/1") == []


# ---- finding


def test_golden_set_and_thresholds_are_found_by_the_systems_name(road: Road, here: Evaluation) -> None:
    assert evidence.find_golden("colours") == road.project / "data" / "colours" / "golden.jsonl"
    assert evidence.find_golden("flowers") == road.project / "data" / "colours" / "golden.jsonl"  # the only one
    with pytest.raises(UsageError, match=r"no thresholds for flowers: expected .*thresholds/flowers\.yaml"):
        evidence.find_thresholds("flowers")
    (road.project / "data" / "other").mkdir(exist_ok=True)
    shutil.copy(road.project / "few.jsonl", road.project / "data" / "other" / "golden.jsonl")
    with pytest.raises(UsageError, match=r"2 golden sets: .*; name one with --golden"):
        evidence.find_golden("flowers")
