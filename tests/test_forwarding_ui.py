"""What people see of a forwarded run in the MLflow UI, in headless Chromium, served by `agentkit ui` on loopback.

`AGENTKIT_SCREENSHOTS=folder` keeps pictures of what was looked at.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crews import Asks, crew, node, nothing_paid_yet, refund  # noqa: F401
from forwarded import own_log
from hedgehogs import speaking
from servers import free_port
from test_ui import browser, wait_for  # noqa: F401

import agentkit as ak
from agentkit.records import RunRecord
from agentkit.testing import Scripted
from agentkit_tracking import traces
from agentkit_tracking.home import experiment_id
from agentkit_tracking.runlog import feedback

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.usefixtures("chromium"), pytest.mark.timeout(600)]


class Left(Asks):
    pass


def failing(run: ak.Run, **inputs: Any) -> Any:
    return run.call(refund, order_id="A", usd="much")


@pytest.fixture
def runs(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunRecord]]:
    """One run of two agents with feedback on the whole and on a part, and one that failed; both are forwarded."""
    monkeypatch.setenv("AGENTKIT_TRACES", "on")
    with own_log() as log:
        with ak.acting_for("ann@example.com", "chat-17"):
            left = speaking(Left("left"), Scripted({"answer": "order A"}))
            payer = node("payer", lambda run: run.call(refund, order_id="A", usd=1), refund)
            whole = crew(left, payer).run(text="What did I order?")  # type: ignore[arg-type]
            failed = ak.System("crew", [node("payer", failing, refund)]).run(text="Pay me")
        part = next(step.outputs for step in whole.steps if step.kind == "handoff")
        feedback.give(log, whole.run_id, "corrected", rating=4, comment="the sum was wrong", by="bob")
        feedback.give(log, part, "accepted", by="bob")
        assert traces.flush(120)
        yield [whole, failed]


@pytest.fixture
def server(runs: list[RunRecord], own_home: Path) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with open(own_home / "server.log", "w") as out:
        command = [sys.executable, "-m", "agentkit_pipelines.cli", "ui", "--port", str(port)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for(lambda: urllib.request.urlopen(f"{url}/health", timeout=1).status == 200, 240)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def text_of(driver: Any) -> str:
    from selenium.webdriver.common.by import By

    text: str = driver.find_element(By.TAG_NAME, "body").text
    return text


def picture(driver: Any, name: str) -> None:
    if folder := os.environ.get("AGENTKIT_SCREENSHOTS"):
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_a_run_is_shown_with_its_agents_tokens_cost_session_and_feedback(
    server: str,
    runs: list[RunRecord],
    browser: Any,  # noqa: F811
) -> None:
    whole, failed = runs
    page = f"{server}/#/experiments/{experiment_id('crew')}/traces"
    assert (
        traces.link("crew", traces.trace_id(whole.run_id)).partition("#")[2]
        in f"{page}?selectedEvaluationId=tr-{whole.run_id}"
    )
    browser.get(f"{page}?selectedEvaluationId={traces.trace_id(whole.run_id)}")
    shown = (
        "left",
        "payer",
        "look_up",
        "script/1",
        "refund",
        "tier of refund",
        "110 tokens",
        "$0.01",
        "chat-17",
        "Success",
    )
    wait_for(lambda: all(word in text_of(browser) for word in shown), 120)
    click(browser, "//button[contains(., 'Assess')]")
    wait_for(lambda: "corrected" in text_of(browser), 60)
    picture(browser, "trace")
    click(browser, "//*[contains(normalize-space(text()), 'tags')]")
    wait_for(lambda: whole.run_id in text_of(browser) and "agentkit.stage" in text_of(browser), 60)
    picture(browser, "tags")

    browser.get("about:blank")
    browser.get(f"{page}?selectedEvaluationId={traces.trace_id(failed.run_id)}")
    wait_for(lambda: "Error" in text_of(browser) and "arguments that do not fit" in text_of(browser), 120)
    picture(browser, "failed")

    browser.get("about:blank")
    browser.get(page)
    wait_for(lambda: "What did I order?" in text_of(browser) and "Pay me" in text_of(browser), 120)
    picture(browser, "list")


def click(driver: Any, xpath: str) -> None:
    from selenium.webdriver.common.by import By

    def done() -> bool:
        driver.find_element(By.XPATH, xpath).click()
        return True

    wait_for(done, 60)
