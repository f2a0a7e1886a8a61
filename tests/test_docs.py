"""What the documents say is run: code blocks, settings, commands, links, and the changelog's version."""

from __future__ import annotations

import re
import tomllib

import pytest
from conftest import ROOT

import agentkit

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(p for p in ROOT.glob("**/*.md") if not {".venv", ".agentkit", ".pytest_cache"} & set(p.parts))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_blocks_of_the_readme_run(capsys):
    namespace: dict = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec", dont_inherit=True), namespace)
    assert "travel DONE {'text': 'A colleague will confirm your booking.'} USD 0.0000" in capsys.readouterr().out
    assert namespace["system"].run(question="why").state == "DONE"


def test_settings_block_of_the_readme_is_valid(project, monkeypatch):
    from agentkit.models import load_settings

    (project / "agentkit.toml").write_text(blocks("toml")[0])
    assert load_settings().models["fast"] == "openai/gpt-4.1-mini"


def test_commands_in_the_readme_exist():
    from typer.main import get_command

    from agentkit_pipelines.cli import app

    known = set(get_command(app).commands)
    named = set(re.findall(r"`agentkit ([\w-]+)", README)) | {"list", "show", "diff", "log", "data", "ui", "doctor"}
    assert named <= known
    assert known <= named


def test_make_recipes_in_the_readme_exist():
    recipes = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(blocks("")))) <= recipes


def test_the_readme_shows_a_demo_that_ran():
    assert "@@" not in README
    for said in ("REFUSED support_triage/1", "PROMOTED support_triage/2", "REFUSED support_triage/3", "PROMOTED"):
        assert said in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("folder", ["agentkit", "tracking", "pipelines", "notebooks", "data", "tests"])
def test_each_top_level_folder_has_a_readme_of_one_screen(folder):
    text = (ROOT / folder / "README.md").read_text()
    prose = re.sub(r"```yaml.*?```", "", text, flags=re.S)  # a whole workflow, to be copied
    assert 5 < len(prose.splitlines()) <= 50


def test_changelog_and_package_agree_on_the_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert declared == newest == agentkit.__version__


def test_thresholds_of_the_reference_system_hold_the_starting_rules():
    from agentkit_pipelines.evidence import find_thresholds
    from agentkit_pipelines.thresholds import load_thresholds

    bar = load_thresholds(find_thresholds("support_triage"))
    asked = {(r.metric, r.limit[0], r.limit[1], r.by) for r in bar.rules if r.level == "block"}
    for rule in (
        ("task_failure", "at_most", 0.08, None),
        ("cost_per_success_usd", "at_most", 0.28, None),
        ("latency_s", "at_most", 2.5, None),
        ("planning_s", "at_most", 1.2, None),
        ("execution_s", "at_most", 0.8, None),
        ("reflection_s", "at_most", 0.4, None),
        ("success", "margin", 0.05, None),
    ):
        assert rule in asked
    assert {"success"} == {m for m, form, _, by in asked if form == "margin" and by == "task_type"}
