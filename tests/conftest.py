"""Every test gets a home of its own, no key and no settings file; nothing outside its temporary folder is touched."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
# Else every server starts eight processes more for jobs, three times the work of its own; no test has a job done.
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"

import pytest
from hypothesis import settings
from provider import Serve, serving

if TYPE_CHECKING:
    from collector import Collector

    from agentkit import RunRecord

# Helpers whose asserts are to say what they compared, as those of test files do.
pytest.register_assert_rewrite("approvals_desk", "durable_runs", "red_team")

# A busy machine is slow, not wrong. `make soak` searches for longer.
settings.register_profile("ci", deadline=None)
settings.register_profile("soak", deadline=None, max_examples=2_000)
SOAK = bool(os.environ.get("AGENTKIT_SOAK"))
settings.load_profile("soak" if SOAK else "ci")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "support_triage.py"
DATA = ROOT / "data" / "support"
sys.path.insert(0, str(ROOT / "notebooks"))


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist keeps the order of below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers files of slow tests go first, those of few before others, so that no core waits at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        count = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path not in slow, count[item.path]))


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def not_here(what: str) -> NoReturn:
    """Skip for want of a program; in CI, which must have them all, fail: what is skipped there nobody sees."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="session")
def chromium() -> None:
    """Headless Chromium is here; asked for first, before a server is started for it."""
    if not (CHROMIUM and DRIVER):
        not_here("needs Debian's chromium and chromium-driver")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """AGENTKIT_HOME in the test's folder, traces off, no provider key and no inherited settings."""
    home = tmp_path / "home"
    monkeypatch.setenv("AGENTKIT_HOME", str(home))
    monkeypatch.setenv("AGENTKIT_TRACES", "off")
    for name in (
        "AGENTKIT_LM",
        "MLFLOW_TRACKING_URI",
        "AGENTKIT_AUTHOR",
        "AGENTKIT_SIGNING_KEY",
        "AGENTKIT_SIGNING_KEY_FILE",
        "AGENTKIT_TRUST",
        "AGENTKIT_CONTROL",
        "AGENTKIT_DURABLE",
        "AGENTKIT_WEBHOOK_URL",
        "AGENTKIT_WEBHOOK_SECRET",
        "AGENTKIT_APPROVAL_HOURS",
        *(n for n in os.environ if n.endswith("_API_KEY")),
    ):
        monkeypatch.delenv(name, raising=False)
    yield home
    if (forwarding := sys.modules.get("agentkit_tracking.forwarding.background")) is not None:
        forwarding.stop()
    from agentkit_tracking import keys, runlog
    from agentkit_tracking.control import database

    keys._taken.clear()
    database.close()
    for log in runlog._logs.values():
        log.close()
    runlog._logs.clear()
    runlog.sink._begun.clear()  # of runs that never ended: a later test may call one by the same id


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project of the user's own, as the working directory: tests write notebooks and data into it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").write_text("")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def dspy_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What DSPy has to complain about; its logger does not propagate."""
    logging.getLogger("dspy").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("dspy").removeHandler(caplog.handler)


@pytest.fixture
def records() -> Iterator[list[RunRecord]]:
    """The records of all runs of the test, as they are handed over."""
    import agentkit as ak

    kept: list[RunRecord] = []
    with ak.add_sink(kept.append):
        yield kept


@pytest.fixture
def serve(project: Path) -> Iterator[Serve]:
    """`serve(*replies, **settings)`: a provider on loopback that the project's settings name; no circuit is open."""
    from agentkit import metering

    metering._breakers.clear()
    with serving(project) as start:
        yield start


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """An OTLP collector on loopback that the standard variable names."""
    from collector import collecting

    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A PostgreSQL server, one for all files of a process."""
    from postgres import postgresql

    with postgresql() as url:
        yield url
