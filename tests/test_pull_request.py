"""The comment on a pull request: what it says, that nobody can write Markdown into it, and the workflow that posts it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from provider import Provider, Reply, Request, answer, prompt
from releases import CASES, COLOURS, furnish

from agentkit.examples import Example, write_examples
from agentkit_pipelines import cli, evidence, gate_cli, pull_request
from agentkit_pipelines.gate import RuleResult, Status, Verdict, judge
from agentkit_pipelines.recording import Evaluation
from agentkit_pipelines.thresholds import Rule, Thresholds
from agentkit_tracking import keys
from agentkit_tracking.registry import Version

Word = Literal["pass", "fail", "inconclusive"]
MET, MISSED = Rule(metric="success", at_least=0.2), Rule(metric="success", at_least=0.99)
VERSUS = Rule(metric="success", margin=0.1, versus="production")
DEAR = Rule(metric="cost_usd", at_most=1.0)


def results(success: dict[str, list[bool | None]], *, task_type: str = "t", usd: float = 0.0) -> pl.DataFrame:
    """Results of cases by id, with a success per repeat; every run costs `usd`."""
    rows = [(case, repeat, yes) for case, outcomes in success.items() for repeat, yes in enumerate(outcomes)]
    frame = pl.DataFrame(
        rows, {"case_id": pl.String, "repeat": pl.Int64, "success": pl.Boolean}, orient="row"
    ).with_columns(task_type=pl.lit(task_type), cost_usd=pl.lit(usd), confidence=pl.lit(0.5))
    other = {"task_failure": False, "escalated": False, "tokens_in": 100, "tokens_out": 10}
    seconds = dict.fromkeys(("latency_s", "planning_s", "execution_s", "reflection_s"), 0.25)
    return frame.with_columns(pl.lit(value).alias(name) for name, value in (other | seconds).items())


NOW = results({"a": [True, True], "b": [True, False], "c": [False, False], "d": [True, True]}, usd=0.03)
BEFORE = results({"a": [False, False], "b": [True, True], "c": [True, True], "d": [True, True]}, usd=0.02)


def rendered(
    new: pl.DataFrame,
    old: pl.DataFrame | None,
    *rules: Rule,
    exercised: tuple[str, ...] = (),
    verdict: Verdict | None = None,
    version: str = "desk/2, release 0123456789ab",
) -> str:
    verdict = verdict or judge(new, Thresholds(system="desk", confidence=0.95, rules=rules or (MET,)), old, exercised)
    against = "desk/1, release ba9876543210" if old is not None else None
    return pull_request.render(
        verdict, new, old, version=version, against=against, attempts=3, exercised=exercised
    )  # fmt: skip


class Page:
    """Markdown as GitHub reads it: headings, tables as rows of text, and every kind of element that is in it."""

    def __init__(self, markdown: str) -> None:
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
        inline = [(before, token) for before, token in pairwise(tokens) if token.type == "inline"]
        self.headings = [_text(t) for before, t in inline if before.type == "heading_open"]
        self.items = [_text(t) for before, t in inline if before.type == "paragraph_open"]
        self.codes = [c.content for _, t in inline for c in t.children or [] if c.type == "code_inline"]
        self.tables: list[list[list[str]]] = []
        for i, token in enumerate(tokens):
            if token.type == "table_open":
                self.tables.append([])
            elif token.type == "tr_open":
                self.tables[-1].append([])
            elif token.type in ("th_open", "td_open"):
                self.tables[-1][-1].append(_text(tokens[i + 1]))
        self.kinds = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
        self.kinds |= {child.type for token in tokens for child in token.children or []}

    def rows(self, first: str) -> dict[str, list[str]]:
        """The table that has a column `first` on its left: the other cells by the first one."""
        [table] = [t for t in self.tables if t[0][0] == first]
        return {row[0]: row[1:] for row in table}


def _text(token: Token) -> str:
    return "".join("\n" if c.type == "softbreak" else c.content for c in token.children or [])


OUR_KINDS = {"heading", "paragraph", "inline", "text", "text_special", "code_inline", "softbreak", "bullet_list"}
OUR_KINDS |= {"list_item", "table", "thead", "tbody", "tr", "th", "td"}


# ---- what it says


def test_the_verdict_comes_first_with_versions_and_the_attempt():
    page = Page(rendered(NOW, BEFORE, MET, MISSED))
    assert page.headings[0] == "✗ Gate: fail"
    assert page.codes[:2] == ["desk/2, release 0123456789ab", "desk/1, release ba9876543210"]
    assert "4 cases × 2 repeats, attempt 3 of this system on this golden set" in page.items[0]


def test_every_blocking_rule_that_is_not_passed_is_shown_and_warnings_by_themselves():
    few = results({f"{i}": [i > 30] for i in range(60)})
    rules = (MET, MISSED, DEAR, VERSUS, Rule(metric="escalated", at_least=0.5, level="warn"))
    page = Page(rendered(few, None, *rules))
    assert page.headings[:3] == ["✗ Gate: fail", "Blocking rules that are not passed", "Warnings"]
    assert [row[:2] for row in page.tables[0][1:]] == [["✗", "success/at_least/0.99"]]
    assert "the rule asks for at least 0.99" in page.tables[0][1][2]
    assert [row[:2] for row in page.tables[1][1:]] == [["✗", "escalated/at_least/0.5"]]
    said = "\n".join(page.items)
    assert "✓ 1 of 4 blocking rules passed" in said
    assert "○ 1 not exercised by the model in use: cost_usd/at_most/1" in said
    assert "– 1 not compared, since there is no other version in production: success/margin/0.1" in said


def test_figures_stand_beside_those_of_production():
    figures = Page(rendered(NOW, BEFORE)).rows("figure")
    assert figures["figure"] == ["this version", "95 % interval", "production", "difference"]
    assert (figures["success"][0], *figures["success"][2:]) == ("0.625", "0.75", "−0.125")
    assert figures["task_failure"][3] == "0"
    assert "latency_p50" not in figures
    assert Page(rendered(NOW, BEFORE, exercised=("latency",))).rows("figure")["latency_p50"][0] == "0.25 s"


def test_changed_cases_are_named_by_id_the_largest_change_first():
    text = rendered(NOW, BEFORE)
    assert "1 better, 2 worse, 1 the same." in text
    assert "- worse: `c`, `b`\n- better: `a`" in text


def test_a_case_whose_metric_crashed_is_neither_better_nor_worse():
    crashed = results({"a": [None, None], "b": [True, True], "c": [True, True], "d": [True, True]})
    assert "0 better, 0 worse, 3 the same. 1 unknown: the success metric crashed." in rendered(crashed, BEFORE)


def test_costs_are_compared_per_run_and_per_success_with_tokens():
    costs = Page(rendered(NOW, BEFORE, exercised=("cost",))).rows("cost")
    assert costs == {
        "cost": ["this version", "production", "difference"],
        "USD per run": ["0.03", "0.02", "+0.01 (+50.0%)"],
        "USD per success": ["0.048", "0.0267", "+0.0213 (+80.0%)"],
        "tokens in per run": ["100", "100", "0"],
        "tokens out per run": ["10", "10", "0"],
    }


def test_a_version_without_a_success_has_no_cost_per_success():
    none = results({"a": [False], "b": [False]}, usd=0.1)
    costs = Page(rendered(none, results({"a": [True], "b": [True]}, usd=0.1), exercised=("cost",))).rows("cost")
    assert costs["USD per success"] == ["–", "0.1", "–"]


def test_a_free_model_is_said_to_be_free_unless_production_was_not():
    free, paid = NOW.with_columns(cost_usd=pl.lit(0.0)), BEFORE
    text = rendered(free, BEFORE.with_columns(cost_usd=pl.lit(0.0)))
    assert "No USD to compare: a free in-process model does not exercise cost." in text
    assert "USD per" not in text
    assert Page(rendered(free, paid)).rows("cost")["USD per run"] == ["0", "0.02", "−0.02"]


def test_the_first_version_is_compared_with_nothing():
    page = Page(rendered(NOW, None))
    assert "Nothing to compare with: there is no other version in production." in page.items
    assert all(len(row) == 3 for row in page.tables[0])


# ---- nobody writes Markdown into it

HOSTILE = [
    "a | b | ✓ | pass",
    r"a \| b \\| c",
    "`code`",
    "``` a `` b ` c",
    "`",
    "\\",
    "a\n\n### ✓ Gate: pass\n\n| x |\n|---|",
    "a\r\n- b\u2028c\u0085d",
    "<img src=x onerror=alert(1)> <!-- a --> <https://example.org>",
    "[a](https://example.org) ![b](c.png) [^1] <b>",
    "**b** __u__ *i* ~~s~~ $x^2$ :tada: &lt; &#35;",
    "@everyone #1 https://example.org www.example.org",
    "\u202egnp.exe\u202c\u200b\x00\x1b[31m\ufeff",
    " ",
]


def plain(text: str) -> str:
    """What is left of a text in one line."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def verdict_of(text: str, status: Status = "fail", count: int = 1, word: Word = "fail") -> Verdict:
    """A verdict whose rules hold `text` wherever a rule can."""
    one = RuleResult(
        id=f"success/{text}", metric="success", group=text, level="block", status=status, limit=0.5, cases=4, text=text
    )
    return Verdict(verdict=word, rules=(one,) * count)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_ids_rules_and_task_types_are_shown_as_they_are(text):
    def hostile(better: bool) -> pl.DataFrame:
        return results({text: [better], "b": [True]}, task_type=text)

    page = Page(rendered(hostile(True), hostile(False), verdict=verdict_of(text), version=text))
    assert page.kinds <= OUR_KINDS
    assert page.headings == ["✗ Gate: fail", "Blocking rules that are not passed", "Figures", "Changed cases", "Cost"]
    assert [len(row) for row in page.tables[0]] == [3, 3]
    assert page.tables[0][1][1] == plain(f"success/{text}")
    assert page.tables[0][1][2].replace("\N{WORD JOINER}", "") == plain(text)
    assert {len(row) for row in page.tables[1]} == {5}
    if plain(text):
        assert page.codes[0] == plain(text)
        assert f"better: {plain(text)}" in "\n".join(page.items)
        assert f"success · {plain(text)}" in page.rows("figure")


def test_nobody_is_mentioned_and_no_address_becomes_a_link():
    text = rendered(
        NOW, None, verdict=verdict_of("@everyone #1 https://example.org www.example.org a@b.org :tada: $x$")
    )
    [row] = [line for line in text.splitlines() if line.startswith("| ✗ |")]
    sentence = row.split(" | ")[2]
    for found in ("@everyone", "#1", "https://", "www.e", "@b.org", " :tada", " $x"):
        assert found not in sentence


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=19, unique_by=plain))
def test_any_id_comes_through_as_one_piece(ids):
    ids = [i for i in ids if plain(i)]
    page = Page(rendered(results({i: [False] for i in [*ids, "same"]}), results({i: [True] for i in [*ids, "same"]})))
    assert page.kinds <= OUR_KINDS
    assert set(map(plain, ids)) <= set(page.codes)


def test_a_comment_stays_below_what_github_takes():
    many = {f"{'long' * 30}-{i:04}": [i % 2 == 0] for i in range(1500)}
    new = results(many).with_columns(task_type=pl.col("case_id").str.tail(3))
    old = results({case: [not yes for yes in outcomes] for case, outcomes in many.items()}).with_columns(
        new["task_type"]
    )
    text = rendered(new, old, verdict=verdict_of("`<|*_" * 200, count=500))
    assert len(text) < 60_000
    assert "… and 475 more; all are in the MLflow run." in text
    assert text.count("and 730 more") == 2


# ---- on the command line


@pytest.fixture
def judged(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`agentkit evaluate desk …` on an evaluation that has run already, with the verdict to be given."""
    version, before = Version("desk", 2, "0123456789ab" * 5), Version("desk", 1, "ba9876543210" * 5)
    BEFORE.write_parquet(project / pull_request.PRODUCTION_RESULTS)
    (project / "desk.yaml").write_text("")

    def run(word: Word | None, *arguments: str) -> tuple[int, str]:
        verdict = None if word is None else verdict_of("success is what it is", word=word)
        done = Evaluation(version, project, NOW, verdict, before, "", 3, {"exercised": ["cost"]})
        monkeypatch.setattr(gate_cli, "_plan", lambda *_, **__: None)
        monkeypatch.setattr(evidence, "evaluate", lambda *_, **__: done)
        monkeypatch.setattr(sys, "argv", ["agentkit", "evaluate", "desk", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize(("word", "code"), [("pass", 0), ("fail", 3), ("inconclusive", 4)])
def test_evaluate_with_thresholds_ends_as_promote_does_and_writes_the_report(judged, project, word, code):
    assert judged(word, "--thresholds", "desk.yaml", "--report", "report.md")[0] == code
    page = Page((project / "report.md").read_text(encoding="utf-8"))
    assert page.headings[0].endswith(f"Gate: {word}")
    assert page.codes[:2] == ["desk/2, release 0123456789ab", "desk/1, release ba9876543210"]
    assert page.rows("cost")["USD per run"] == ["0.03", "0.02", "+0.01 (+50.0%)"]
    assert "- worse: `c`, `b`\n- better: `a`" in (project / "report.md").read_text(encoding="utf-8")


def test_evaluate_without_thresholds_has_no_verdict_and_ends_well(judged):
    assert judged(None)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--report", "report.md"], "--report shows a verdict; give --thresholds FILE.yaml, too"),
        (["--thresholds", "desk.yaml", "--report", "no/report.md"], "there is no folder no to write report.md to"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(judged, project, arguments, said):
    code, err = judged("pass", *arguments)
    assert (code, said in err) == (2, True), err
    assert not (project / "report.md").exists()


# ---- the workflow in the README


def workflow() -> dict[Any, Any]:
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "pipelines" / "README.md").read_text(encoding="utf-8"), re.S)
    found: dict[Any, Any] = yaml.safe_load(block)
    return found


def test_the_workflow_of_the_readme_is_one_and_gives_pull_requests_no_key():
    found = workflow()
    triggers = found[True]  # `on` is a yes in YAML 1.1
    assert set(found) == {"name", True, "permissions", "env", "jobs"}
    assert set(triggers) == {"pull_request", "push"}  # pull_request_target would run the branch's code with secrets
    assert triggers["push"]["branches"] == ["main"]
    assert found["permissions"] == {}
    evaluate, promote = found["jobs"]["evaluate"], found["jobs"]["promote"]
    assert evaluate["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert promote["permissions"] == {"contents": "read"}
    assert "github.event.pull_request.head.repo.full_name == github.repository" in evaluate["if"]
    assert (promote["if"], promote["environment"]) == ("github.event_name == 'push'", "production")
    for job in (evaluate, promote):
        assert set(job) <= {"if", "runs-on", "timeout-minutes", "environment", "concurrency", "permissions", "steps"}
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(step) <= {"name", "if", "uses", "with", "run", "env"}
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))
    with_the_key = [
        s for s in [found, evaluate, *evaluate["steps"], *promote["steps"]] if "SIGNING" in str(s.get("env"))
    ]
    assert with_the_key == [promote["steps"][-1]]
    assert "agentkit register" not in promote["steps"][-1]["run"]  # that runs the notebook


WORSE = COLOURS.replace("cold: blue", "cold (in one word, as short as can be): blue")
THRESHOLDS = """
system: colours
confidence: 0.95
rules:
  - {metric: success, at_least: 0.6}
  - {metric: success, margin: 0.1, versus: production}
  - {metric: cost_usd, at_most: 1}
"""
WRONG = ("ice", "sea", "snow")
GH = """#!/bin/sh
echo "$@" >> "$GH_SAID"
while [ "$1" != --body-file ]; do shift; done
cp "$2" "$GH_SAID.md"
"""


def colour(request: Request) -> str:
    """Right about every case, but for the shorter wording, which takes three cold things for warm."""
    text = prompt(request).rpartition("[[ ## text ## ]]")[2]
    is_cold = any(word in text for word in ("blue", "ice", "sea", "snow", "frost"))
    if "as short as can be" in prompt(request) and any(word in text for word in WRONG):
        is_cold = False
    return answer(label="cold" if is_cold else "warm", confidence="0.9")


class Runner:
    """Runs a job's `run:` steps as GitHub's runners do: `bash -e`, one process per step, files for what they hand on.

    Not here, so stood in for: `uses:` steps (skipped: the folder is the checkout, this Python the set-up one), `pip`
    (does nothing: agentkit is installed) and `gh` (keeps its arguments and the body file).
    """

    def __init__(self, checkout: Path, bin_: Path, values: dict[str, str]) -> None:
        self.checkout, self.values, self.failed = checkout, values, False
        bin_.mkdir()
        for name, script in (("gh", GH), ("pip", "#!/bin/sh\n")):
            (bin_ / name).write_text(script)
            (bin_ / name).chmod(0o755)
        (bin_ / "agentkit").symlink_to(Path(sys.executable).with_name("agentkit"))
        self.said, self.summary = bin_ / "gh.txt", bin_ / "summary.md"
        self.env = os.environ | {
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_ENV": str(bin_ / "env"),
            "GITHUB_REPOSITORY": "ada/desk",
            "GH_SAID": str(self.said),
            "AGENTKIT_HOME": "",
        }  # fmt: skip

    def run(self, found: dict[Any, Any], job: str) -> list[str]:
        """The output of each step that was run."""
        return [self._step(found, step) for step in found["jobs"][job]["steps"] if "run" in step and self._is_due(step)]

    def _is_due(self, step: dict[str, Any]) -> bool:
        condition = step.get("if")
        if condition is None:
            return not self.failed
        assert condition == "${{ !cancelled() && hashFiles('report.md') != '' }}"
        return (self.checkout / "report.md").is_file()

    def _step(self, found: dict[Any, Any], step: dict[str, Any]) -> str:
        assert "${{" not in step["run"]  # whoever names a branch could write the command
        env = self.env | {k: self._value(v) for k, v in (found["env"] | step.get("env", {})).items()}
        handed_on = Path(env["GITHUB_ENV"])
        if handed_on.is_file():
            env |= dict(line.split("=", 1) for line in handed_on.read_text().splitlines())
        done = subprocess.run(
            ["bash", "-e", "-c", step["run"]], cwd=self.checkout, env=env, capture_output=True, text=True, timeout=240
        )
        self.failed |= done.returncode != 0
        return f"exit code {done.returncode}\n{done.stdout}{done.stderr}"

    def _value(self, text: str) -> str:
        return re.sub(r"\$\{\{ (.+?) \}\}", lambda m: self.values[m[1]], text)


@pytest.fixture
def repository(tmp_path: Path, own_home: Path) -> Iterator[tuple[Path, str]]:
    """What is checked in (notebook, golden set, thresholds, public keys, a provider's address); and the private key."""
    folder = tmp_path / "repository"
    for name in ("notebooks", "data/colours", "thresholds", ".git"):
        (folder / name).mkdir(parents=True)
    (folder / "notebooks" / "colours.py").write_text(COLOURS)
    (folder / "thresholds" / "colours.yaml").write_text(THRESHOLDS)
    cases = [
        Example(id=f"{text.split()[3]}-{i:02}", inputs={"text": text}, expected={"label": label}, task_type="t")
        for i, (text, label) in enumerate(CASES)
    ]
    write_examples(folder / "data" / "colours" / "golden.jsonl", cases)
    keys.create("release pipeline")
    shutil.copy(keys.trust_path(), folder)
    with Provider(Reply(text=colour, tokens_in=None)) as provider:
        (folder / "agentkit.toml").write_text(provider.settings(price=(10, 10)))
        yield folder, keys.key_path().read_text()


@pytest.mark.slow
def test_the_steps_of_the_readme_run(repository, tmp_path):
    """Both jobs, each in a checkout of its own that shares nothing with the other but the MLflow store."""
    checked_in, private_key = repository
    found = workflow()
    found["env"] |= {"SYSTEM": "colours", "NOTEBOOK": "notebooks/colours.py"}  # the two that are the user's
    values = {
        "vars.MLFLOW_TRACKING_URI": f"sqlite:///{furnish(tmp_path / 'server') / 'mlflow.db'}",
        "secrets.MLFLOW_TRACKING_TOKEN": "a-token",
        "github.token": "a-token",
        "github.event.pull_request.number": "7",
        "secrets.AGENTKIT_SIGNING_KEY": private_key,
    }

    def runner(name: str) -> Runner:
        return Runner(shutil.copytree(checked_in, tmp_path / name), tmp_path / f"{name}-bin", values)

    main = runner("main")
    installed, registered, promoted = main.run(found, "promote")
    assert not main.failed, installed + registered + promoted
    assert "colours/1 is now colours@production" in promoted

    branch = runner("branch")
    (branch.checkout / "notebooks" / "colours.py").write_text(WORSE)
    _, evaluated, commented = branch.run(found, "evaluate")
    assert evaluated.startswith("exit code 3\n"), evaluated
    assert commented.startswith("exit code 0\n"), commented
    assert branch.failed  # so the check on the pull request is red, although the comment was posted
    assert branch.said.read_text().split() == [
        "pr", "comment", "7", "--repo", "ada/desk", "--edit-last", "--create-if-none", "--body-file", "report.md",
    ]  # fmt: skip
    posted = Path(f"{branch.said}.md").read_text(encoding="utf-8")
    assert branch.summary.read_text(encoding="utf-8") == posted
    page = Page(posted)
    assert page.headings[0] == "✗ Gate: fail"
    assert "success/margin/0.1" in page.codes
    wrong = {f"{word}-{i:02}" for i, (text, _) in enumerate(CASES) if (word := text.split()[3]) in WRONG}
    assert f"0 better, {len(wrong)} worse" in posted
    [named] = re.findall(r"^- worse: (.*)$", posted, re.M)
    assert set(re.findall(r"`(.+?)`", named)) == wrong
    costs = page.rows("cost")
    assert re.fullmatch(r"\+0\.0000\d+ \(\+\d\.\d%\)", costs["USD per run"][2]), costs
    assert costs["tokens in per run"][2].startswith("+")
    assert "look at the" not in posted  # ids, no texts


def test_a_step_that_fails_without_a_report_posts_nothing(tmp_path):
    values = dict.fromkeys(["vars.MLFLOW_TRACKING_URI", "secrets.MLFLOW_TRACKING_TOKEN"], "")
    branch = Runner(tmp_path, tmp_path / "bin", values)
    _, evaluated = branch.run(workflow(), "evaluate")
    assert "there is no file notebooks/travel_desk.ipynb" in evaluated
    assert branch.failed
    assert not branch.said.exists()
