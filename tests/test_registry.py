"""Releases in MLflow: registered once, found under every name, rebuilt exactly, followed while they move."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import dspy
import pytest
from mlflow.exceptions import MlflowException
from releases import CASES, COLOURS, put_in_production, python, store  # noqa: F401  (a fixture)

import agentkit as ak
from agentkit.errors import ReleaseError, UsageError
from agentkit.testing import FakeClock
from agentkit_pipelines import promotion
from agentkit_tracking import loading, registry
from agentkit_tracking import manifest as manifests
from agentkit_tracking.home import connect
from agentkit_tracking.source import load_entry, parse_entry

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def colours(project: Path) -> Path:
    (project / "colours.py").write_text(COLOURS)
    return project / "colours.py"


def edit(path: Path, old: str, new: str) -> Path:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


def move(alias: str, version: registry.Version) -> None:
    connect().set_registered_model_alias(version.name, alias, str(version.number))


# ---- register


def test_unchanged_content_registers_nothing_new_whatever_git_says(colours: Path) -> None:
    first = registry.register_file(colours)
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=colours.parent, check=True)
    again = registry.register_file(colours)
    assert (first.created, again.created) == (True, False)
    assert (again.number, again.release_id) == (first.number, first.release_id)
    assert [v.number for v in registry.versions("colours")] == [1]


def test_changed_content_is_the_next_version_and_register_sets_no_alias(colours: Path) -> None:
    registry.register_file(colours)
    registry.register_file(edit(colours, "lava", "magma"))
    assert [(v.number, v.aliases) for v in registry.versions("colours")] == [(1, ()), (2, ())]


def test_author_and_commit_stand_beside_the_hash(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_AUTHOR", "Ada")
    tags = registry.register_file(colours).tags or {}
    assert (tags["agentkit.author"], tags["agentkit.git_commit"]) == ("Ada", "none")


def test_prompts_become_prompt_versions_and_unchanged_ones_keep_theirs(project: Path) -> None:
    pair = COLOURS.replace("\ndef system", "\nclass Pair(dspy.Module):\n    pass\n\ndef system").replace(
        "    pass\n",
        "    def __init__(self):\n        super().__init__()\n        self.first = dspy.Predict(Colour)\n"
        "        self.second = dspy.Predict(Colour.with_instructions('Say it again.'))\n"
        "    def forward(self, text):\n        return self.first(text=text)\n",
    ).replace("dspy.Predict(Colour), name", "Pair(), name")  # fmt: skip
    source = project / "colours.py"
    source.write_text(pair)
    first = registry.register_file(source)
    second = registry.register_file(edit(source, "Say it again.", "Say it once more."))
    prompts = [json.loads((v.tags or {})["agentkit.prompts"]) for v in (first, second)]
    assert [(p["first"]["version"], p["second"]["version"]) for p in prompts] == [(1, 1), (1, 2)]
    stored = connect().get_prompt_version("colours.second", "2")
    assert stored.template.startswith("Say it once more.")
    assert "- Text:" in stored.template
    linked = json.loads(connect().get_logged_model(second.model_id).tags["mlflow.linkedPrompts"])
    assert sorted((p["name"], p["version"]) for p in linked) == [("colours.first", "1"), ("colours.second", "2")]


def test_a_prompt_with_demonstrations_reads_the_same_live_and_from_the_release(colours: Path) -> None:
    entry = parse_entry(colours)
    system = load_entry(entry)
    [(_, predictor)] = system.named_predictors()
    predictor.demos = [
        {"text": "lava", "label": "warm", "confidence": 1.0},
        {"text": "ice", "confidence": 1.0, "label": "cold"},
    ]
    put_in_production(registry.store(system, entry))
    assert loading.load("colours@production").run(text="lava").state == "DONE"


def test_a_very_long_prompt_is_cut_for_the_reader_and_whole_in_the_release(colours: Path) -> None:
    system = load_entry(parse_entry(colours))
    system.program.demos = [dspy.Example(text="lava " * 30_000, label="warm", confidence=1.0)]
    version = registry.register(system, colours)
    shown = connect().get_prompt_version("colours.program", "1").template
    assert shown.endswith("(cut; the release's manifest has it whole)")
    assert loading.load(str(version)).program.demos[0]["text"] == "lava " * 30_000


def test_a_source_saved_anew_while_it_is_registered_is_not_stored(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentkit_tracking import manifest

    built = manifest.build
    monkeypatch.setattr(manifest, "build", lambda *a: (built(*a), edit(colours, "lava", "magma"))[0])
    with pytest.raises(ReleaseError, match=r"altered: source/colours\.py"):
        registry.register_file(colours)
    assert registry.versions("colours") == []


# ---- find


def test_a_version_is_found_by_alias_number_name_and_id_prefix(colours: Path) -> None:
    first = registry.register_file(colours)
    second = registry.register_file(edit(colours, "lava", "magma"))
    move("candidate", first)
    found = {
        r: registry.resolve(r).number for r in ("colours@candidate", "colours/1", "colours", second.release_id[:8])
    }
    assert found == {"colours@candidate": 1, "colours/1": 1, "colours": 2, second.release_id[:8]: 2}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("colours@production", "colours has no version in production; promote one with `agentkit promote colours`"),
        ("colours/7", "colours has no version 7; its versions are 1"),
        ("flowers", "no system 'flowers' is registered \\(there are: colours\\)"),
        ("deadbeef", "0 registered releases begin with 'deadbeef'"),
        ("colours@", "'colours@' is no reference; use name@production, name/3, or a release id"),
        ("colours/x", "'colours/x' is no reference"),
    ],
)
def test_what_is_not_there_is_said_together_with_what_is(colours: Path, reference: str, message: str) -> None:
    registry.register_file(colours)
    with pytest.raises(ReleaseError, match=message):
        loading.load(reference)


def test_a_release_registered_twice_at_once_is_still_found_by_its_id(colours: Path) -> None:
    version = registry.register_file(colours)
    connect().create_model_version("colours", f"models:/{version.model_id}", tags=version.tags)
    assert registry.resolve(version.release_id[:12]).release_id == version.release_id


def test_a_store_that_fails_is_not_taken_for_an_empty_one(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register_file(colours)

    def down(name: str) -> Any:
        raise MlflowException("database is locked")

    monkeypatch.setattr(connect(), "get_registered_model", down)
    with pytest.raises(MlflowException, match="locked"):
        registry.versions("colours")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("work", [lambda: registry.systems(), lambda: loading.load("colours@production")])
def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, work: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with pytest.raises(
        UsageError, match=f"MLflow at http://127.0.0.1:{port} does not answer .*Connection refused.* start"
    ):
        work()


def test_each_home_has_a_store_of_its_own_also_within_one_process(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register_file(colours)
    monkeypatch.setenv("AGENTKIT_HOME", str(tmp_path / "another home"))
    assert registry.systems() == []


# ---- load


def fitted(colours: Path) -> ak.System:
    system = load_entry(parse_entry(colours))
    system.program.demos = [dspy.Example(text="a warm night", label="warm", confidence=1.0)]
    return system.use(ak.fit(system, [{"text": text, "label": label} for text, label in CASES]))


def test_another_process_gets_identical_outputs(colours: Path) -> None:
    system = fitted(colours)
    version = registry.register(system, colours)
    texts = [
        f"{a} and {b}"
        for a in ("a red sea", "ice on fire", "snow", "nothing", "LAVA")
        for b in ("sun", "frost", "?", "blue")
    ]
    script = (
        "import sys, json; from agentkit_tracking import load; system = load(sys.argv[1]);"
        "print(json.dumps([system.run(text=t).output for t in json.loads(sys.argv[2])]))"
    )
    colours.unlink()  # only the release is left
    there = json.loads(python(script, version.release_id, json.dumps(texts)))
    assert there == [system.run(text=text).output for text in texts]
    assert len({json.dumps(output) for output in there}) > 10


def test_a_loaded_release_knows_its_id_and_its_runs_carry_it(colours: Path) -> None:
    version = registry.register_file(colours)
    record = loading.load("colours/1").run(text="red")
    assert (record.release, record.system) == (version.release_id, "colours")


SETTINGS = """
[models]
fast = "openai/small"
[prices."openai/small"]
input = 1.0
output = 2.0
[options."openai/small"]
temperature = {temperature}
api_key = "{key}"
"""


def test_model_and_parameters_are_those_of_the_release_and_the_key_is_the_machines(colours: Path) -> None:
    settings = colours.parent / "agentkit.toml"
    settings.write_text(SETTINGS.format(temperature=0.2, key="authors"))
    registry.register_file(colours)
    settings.write_text(
        SETTINGS.format(temperature=0.9, key="operators").replace('fast = "openai/small"', 'fast = "a/b"')
    )
    lm = loading.load("colours").lm
    assert (lm.model, lm.kwargs["temperature"], lm.kwargs["api_key"]) == ("openai/small", 0.2, "operators")


def test_a_model_that_the_source_pins_to_a_predictor_stays_pinned(colours: Path) -> None:
    pinned = "    program = dspy.Predict(Colour)\n    program.lm = dspy.LM('openai/pinned', api_key='x')\n    return ak.adopt(program"
    registry.register_file(edit(colours, "    return ak.adopt(dspy.Predict(Colour)", pinned))
    assert loading.load("colours").program.lm.model == "openai/pinned"


def test_a_source_that_builds_something_else_in_another_environment_is_refused(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(colours, "success=success)", "success=success, budget=ak.Budget(usd=float(os.environ['LIMIT'])))")
    edit(colours, "import agentkit as ak", "import os\nimport agentkit as ak")
    monkeypatch.setenv("LIMIT", "1")
    registry.register_file(colours)
    assert loading.load("colours").budget.usd == 1
    monkeypatch.setenv("LIMIT", "1000")
    with pytest.raises(
        ReleaseError, match=r"builds something else than its manifest says: budget.usd is 1000.0, should be 1.0"
    ):
        loading.load("colours")


# ---- fetch


def test_two_processes_that_fetch_at_once_both_get_the_whole_release(colours: Path, own_home: Path) -> None:
    system = load_entry(parse_entry(colours))
    (colours.parent / "facts").mkdir()
    system.files = tuple(colours.parent / "facts" / f"{i:03}.txt" for i in range(200))
    for file in system.files:
        file.write_text(file.name)
    registry.store(system, parse_entry(colours))
    script = """
import os, shutil, sys, time
from pathlib import Path
import mlflow.artifacts, mlflow.store.tracking.sqlalchemy_store  # before the fork; the database is opened after it
import agentkit_tracking.guard.registry_store
from agentkit_tracking import registry
releases = Path(sys.argv[1])
for late in (0, 0.02, 0.05, 0.1, 0.2):
    shutil.rmtree(releases, ignore_errors=True)
    start = time.time() + 0.5
    children = []
    for wait in (0, late):
        if (child := os.fork()) == 0:
            version = registry.resolve("colours/1")
            time.sleep(max(0, start + wait - time.time()))
            registry.fetch_version(version)
            os._exit(0)
        children.append(child)
    print(*(os.waitpid(child, 0)[1] for child in children), len(list(releases.iterdir())))
"""
    rounds = python(script, own_home / "releases").splitlines()
    assert rounds == ["0 0 1"] * 5  # both succeed, and nothing but the release is left


def test_a_release_whose_artifacts_are_gone_is_said_and_leaves_nothing(colours: Path, own_home: Path) -> None:
    registry.register_file(colours)
    shutil.rmtree(own_home / "artifacts")
    with pytest.raises(ReleaseError, match=r"the store's copy of colours/1 is no release: manifest\.json cannot"):
        loading.load("colours/1")
    assert list((own_home / "releases").iterdir()) == []


def test_a_fetched_copy_that_was_altered_is_set_aside_and_fetched_anew(
    colours: Path, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register_file(colours)
    folder, manifest = loading.fetch("colours/1")
    edit(folder / "source" / "colours.py", "lava", "magma")
    again, same = loading.fetch("colours/1")
    assert (again, same) == (folder, manifest)
    assert "lava" in (folder / "source" / "colours.py").read_text()
    assert "is not intact: altered: source/colours.py" in caplog.text
    (aside,) = (own_home / "releases").glob("damaged-*")
    assert "magma" in (aside / "source" / "colours.py").read_text()


def test_artifacts_altered_in_the_store_are_refused(colours: Path, own_home: Path) -> None:
    version = registry.register_file(colours)
    registry.fetch_version(version)  # an intact copy is at hand
    [stored] = own_home.glob("artifacts/**/source/colours.py")
    edit(stored, "lava", "magma")
    with pytest.raises(
        ReleaseError, match=r"in the store's copy of colours/1 is not intact: altered: source/colours\.py"
    ):
        registry.check_stored(version)


def test_a_version_that_agentkit_did_not_make_is_refused(colours: Path) -> None:
    version = registry.register_file(colours)
    connect().create_model_version("colours", f"models:/{version.model_id}")
    with pytest.raises(ReleaseError, match="colours/2 carries no release id"):
        loading.load("colours/2")


# ---- follow

SLOW = """
import time
from pathlib import Path

def answer(wait_for: str = ""):
    while wait_for and not Path(wait_for).exists():
        time.sleep(0.01)
    return "first"
"""


@pytest.fixture
def answers(project: Path) -> tuple[registry.Version, registry.Version]:
    """Two releases of a program that can be made to take its time; the first is in production."""
    source = project / "answers.py"
    source.write_text(SLOW)
    first = registry.register_file("answers.py:answer")
    edit(source, "first", "second")
    second = registry.register_file("answers.py:answer")
    put_in_production(first)
    return first, second


def test_a_moved_alias_is_noticed_after_the_interval_and_a_run_under_way_keeps_its_release(
    answers: tuple[registry.Version, registry.Version], tmp_path: Path
) -> None:
    records: list[Any] = []
    under_way = threading.Thread(target=lambda: records.append(followed.run(wait_for=str(tmp_path / "go"))))
    with FakeClock() as now:
        followed = loading.follow("answer@production", reload_s=2)
        under_way.start()
        put_in_production(answers[1])
        early = followed.run()
        now.tick(2)
        late = followed.run()
        (tmp_path / "go").touch()
        under_way.join()
    outputs = [(r.output["value"], r.release) for r in (early, late, *records)]
    first, second = (("first", answers[0].release_id), ("second", answers[1].release_id))
    assert outputs == [first, second, first]


def test_a_store_that_is_away_does_not_stop_a_following_process(
    answers: tuple[registry.Version, registry.Version],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    followed = loading.follow("answer@production", reload_s=0)

    def down(name: str) -> Any:
        raise MlflowException("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(connect(), "get_registered_model", down)
        assert followed.run().output == {"value": "first"}
    assert (
        f"answer@production cannot be looked up, release {answers[0].release_id} goes on: no route to host"
        in caplog.text
    )
    put_in_production(answers[1])
    assert followed.run().output == {"value": "second"}


def test_a_release_that_was_withdrawn_stops_a_following_process(
    answers: tuple[registry.Version, registry.Version],
) -> None:
    followed = loading.follow("answer@production", reload_s=0)
    promotion.withdraw("answer", why="it lies")
    for _ in range(2):
        with pytest.raises(
            ReleaseError, match=r"answer has no version in production: .* withdrawn version 1 .* it lies"
        ):
            followed.run()


def test_only_an_alias_can_be_followed(answers: tuple[registry.Version, registry.Version]) -> None:
    with pytest.raises(UsageError, match="'answer/1' never moves"):
        loading.follow("answer/1")


def test_a_release_made_with_other_packages_says_so(
    colours: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register_file(colours)
    loading.load("colours/1")
    assert "was made with" not in caplog.text
    here = manifests.installed_packages()
    monkeypatch.setattr(manifests, "installed_packages", lambda: {**here, "dspy": "9.9"})
    loading.load("colours/1")
    assert f"was made with dspy {here['dspy']} (here 9.9)" in caplog.text
