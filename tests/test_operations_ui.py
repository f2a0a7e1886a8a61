"""What an operator sees in `notebooks/operations.py`, served by `marimo run` on loopback, in headless Chromium without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import CHROMIUM, DRIVER, SOAK
from log_data import fill, make_log
from servers import marimo_page
from test_ui import FLAGS, wait_for

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "operations.py"
SHOTS = os.environ.get("AGENTKIT_SHOTS")  # a folder for screenshots
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.usefixtures("chromium")]
LAST = "From the pilot to production"  # what stands at the end of the page


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """As tall as the page, and with no host but this one."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    flags = [flag for flag in FLAGS.split() if "window-size" not in flag]
    for flag in (*flags, OFFLINE, "--window-size=1280,6900", f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, own_home: Path) -> Iterator[Callable[[], Any]]:
    """Serves the notebook on what is in the home, and opens it."""
    with marimo_page(NOTEBOOK, own_home / "marimo.log") as url:

        def open_page() -> Any:
            wait_for(lambda: urllib.request.urlopen(f"{url}/health", timeout=1).status == 200, 60)
            browser.get(url)
            return browser

        yield open_page
    said = (own_home / "marimo.log").read_text()
    assert "Traceback" not in said, said


def text(browser: Any) -> str:
    return str(browser.find_element("css selector", "body").text)


def wait_for_text(browser: Any, *words: str) -> str:
    try:
        wait_for(lambda: all(word in text(browser) for word in words), 90)
    except BaseException:
        print(text(browser))
        raise
    return text(browser)


def errors(browser: Any) -> list[str]:
    """What the page complained of."""
    return [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def choose(browser: Any, label: str, option: str) -> None:
    from selenium.webdriver.support.ui import Select

    hosts = [
        h
        for h in browser.find_elements("css selector", "marimo-dropdown")
        if label in (h.get_attribute("data-label") or "")
    ]
    Select(hosts[0].shadow_root.find_element("css selector", "select")).select_by_visible_text(option)


def runs_of(browser: Any) -> int:
    found = re.search(r"· ([\d,]+) finished runs", text(browser))
    assert found
    return int(found[1].replace(",", ""))


def test_an_empty_log_says_what_to_do(opened: Callable[[], Any]) -> None:
    browser = opened()
    said = wait_for_text(browser, "The run log has no finished run yet", "agentkit run notebooks/support_triage.py")
    assert LAST not in said
    assert errors(browser) == []


def test_the_page_shows_every_figure_and_filters_change_them(opened: Callable[[], Any], own_home: Path) -> None:
    make_log(own_home / "log", runs=1500, days=28, seed=0, end=datetime.now(UTC) - timedelta(minutes=5)).close()
    browser = opened()
    said = wait_for_text(browser, LAST)
    for heading in ("What a success costs", "Does it work", "How long it takes", "Tools", "People", "Rules and limits",
                    "Did it help", "Drift of support_triage", "What it will cost"):  # fmt: skip
        assert heading in said
    for card in (
        "Success",
        "Cost per success",
        "95 % of runs within",
        "Handed to a person",
        "Stopped by a rule",
        "Rating, 1 to 5",
    ):
        assert card in said
    assert "nothing to count" not in said
    wait_for(lambda: len(charts(browser)) >= 18, 30)
    everything = runs_of(browser)
    if SHOTS:
        browser.save_screenshot(str(Path(SHOTS) / "operations.png"))

    choose(browser, "System", "contract_review")
    wait_for(lambda: runs_of(browser) < everything / 2, 30)
    said = wait_for_text(browser, "Drift of contract_review", "No golden set to compare with")
    assert "lookup_order" not in said
    one_system = runs_of(browser)
    choose(browser, "Time", "7 days")
    wait_for_text(browser, "So each is compared with the time before", "still look like the time before this one")
    wait_for(lambda: runs_of(browser) < one_system and len(charts(browser)) >= 18, 30)
    if SHOTS:
        browser.save_screenshot(str(Path(SHOTS) / "operations-before.png"))
    choose(browser, "Time", "30 days")
    wait_for(lambda: runs_of(browser) == one_system, 30)
    choose(browser, "Stage", "draft")
    wait_for(lambda: runs_of(browser) < one_system, 30)
    choose(browser, "Stage", "all stages")
    choose(browser, "Time", "24 hours")
    wait_for(lambda: runs_of(browser) < one_system, 30)
    assert errors(browser) == []


def test_a_large_log_is_a_page_like_any_other(opened: Callable[[], Any], own_home: Path) -> None:
    fill(own_home / "log", runs=1_000_000 if SOAK else 20_000, days=28, end=datetime.now(UTC))
    browser = opened()
    wait_for_text(browser, LAST)
    assert runs_of(browser) > (900_000 if SOAK else 18_000)
    wait_for(lambda: len(charts(browser)) >= 18, 30)
    assert errors(browser) == []


def charts(browser: Any) -> list[Any]:
    """Charts that are drawn, wherever marimo keeps them."""
    script = """
        const found = [];
        const look = root => root.querySelectorAll('*').forEach(e => {
            if (e.matches('canvas.marks, svg.marks')) found.push(e);
            if (e.shadowRoot) look(e.shadowRoot);
        });
        look(document); return found;"""
    return list(browser.execute_script(script))


@pytest.mark.parametrize("runs", [0, 60])
def test_the_notebook_runs_from_top_to_bottom(own_home: Path, runs: int) -> None:
    if runs:
        make_log(own_home / "log", runs=runs, days=3, seed=0, end=datetime.now(UTC)).close()
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(NOTEBOOK)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
