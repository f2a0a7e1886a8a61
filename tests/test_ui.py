"""What people see and click in the MLflow UI, in headless Chromium, served by `agentkit ui` on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CHROMIUM, DRIVER
from releases import SHOUT

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1500,1300"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.usefixtures("chromium"),
]
THRESHOLDS = "system: shout\nconfidence: 0.95\nrules:\n  - {metric: success, at_least: 0.9}\n"


@pytest.fixture
def server(project: Path, own_home: Path) -> Iterator[str]:
    """A registered, evaluated version and a server that shows it."""
    from agentkit.examples import Example, write_examples
    from agentkit_pipelines import promotion
    from agentkit_tracking.registry import register_file

    (project / "shout.py").write_text(SHOUT)
    (project / "bar.yaml").write_text(THRESHOLDS)
    cases = [
        Example(id=f"c{i}", inputs={"text": f"word {i}"}, expected={"expected_text": f"WORD {i}"}, task_type="t")
        for i in range(40)
    ]
    write_examples(project / "golden.jsonl", cases)
    version = register_file("shout.py")
    promotion.evaluate(promotion.Plan(version, project / "golden.jsonl", project / "bar.yaml", repeats=1))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(own_home / "server.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "agentkit_pipelines.cli", "ui", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ.copy(),
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: urllib.request.urlopen(f"{url}/health", timeout=1).status == 200, 120)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[object]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def wait_for(check, seconds: float):
    """What `check` returns once it is true; errors while waiting are tried again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := check():
                return found
        except Exception:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            pytest.fail("waited in vain")
        time.sleep(0.3)


def test_verdict_is_readable_and_a_click_asks_for_promotion(server, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    from agentkit_pipelines import promotion

    browser.get(f"{server}/#/models/shout/versions/1")
    page = wait_for(
        lambda: (text := browser.find_element(By.TAG_NAME, "body").text) and "Gate: pass" in text and text, 40
    )
    assert "Attempt 1 of this system on this golden set." in page
    assert "✓ success is 1, at least" in page
    assert "Promote model" in page

    assert promotion.candidates() == []
    for panel in browser.find_elements(By.CSS_SELECTOR, "[aria-label=Close]"):
        panel.click()  # MLflow's assistant
    add = "(//span[normalize-space(text())='Add'])[1]"  # beside `Aliases:`; the next one adds a tag
    wait_for(lambda: browser.find_element(By.XPATH, add), 20).click()
    field = wait_for(lambda: browser.find_element(By.CSS_SELECTOR, "[role=dialog] input"), 20)
    field.send_keys("candidate", Keys.ENTER)
    save = "//*[@role='dialog']//button[contains(normalize-space(), 'Save')]"
    wait_for(lambda: browser.find_element(By.XPATH, save), 20).click()
    asked = wait_for(promotion.candidates, 20)
    assert [str(v) for v in asked] == ["shout/1"]
