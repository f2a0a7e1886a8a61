"""The UI's own buttons against `production`, in headless Chromium: refused in words that say how to promote instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evidence
import pytest
from conftest import CHROMIUM, DRIVER
from evidence import Store
from servers import free_port
from test_ui import FLAGS, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.usefixtures("chromium"),
]
SHOTS = os.environ.get("AGENTKIT_SHOTS")  # a folder for screenshots
TABLES = (
    "registered_models",
    "model_versions",
    "registered_model_tags",
    "model_version_tags",
    "registered_model_aliases",
)
PROMPT = "colours.program"


class Page:
    """The UI of a server, as somebody sees and clicks it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url

    @property
    def text(self) -> str:
        return str(self.browser.find_element("css selector", "body").text)

    def open(self, where: str, expected: str) -> None:
        self.browser.get("about:blank")
        self.browser.get(f"{self.url}/#/{where}")
        wait_for(lambda: expected in self.text, 40)
        for panel in self.browser.find_elements("css selector", "[aria-label=Close]"):
            panel.click()  # MLflow's assistant

    def find(self, path: str) -> Any:
        return wait_for(lambda: self.browser.find_element("xpath", path), 20)

    def click(self, path: str) -> None:
        wait_for(lambda: self.browser.find_element("xpath", path).click() or True, 20)

    def menu(self, item: str) -> None:
        self.click("//*[@data-testid='overflow-menu-trigger']")
        self.click(f"//*[@role='menuitem' and contains(., '{item}')]")

    def confirm(self, button: str) -> None:
        self.click(f"//*[@role='dialog']//button[contains(normalize-space(.), '{button}')]")

    def type_alias(self, name: str) -> None:
        field = self.find("//*[@role='dialog']//input")
        field.send_keys(name, "\ue007")  # Enter
        self.confirm("Save")

    def expect(self, *words: str, shot: str) -> None:
        wait_for(lambda: all(w in self.text for w in words), 20)
        if SHOTS:
            self.browser.save_screenshot(str(Path(SHOTS) / f"{shot}.png"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return evidence.promoted(tmp_path_factory.mktemp("ui") / "home")


@pytest.fixture(scope="module")
def page(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """`agentkit ui` on a home with versions 1 and 2 promoted in turn, and Chromium in front of it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (*FLAGS.split(), "--window-size=1400,1000", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    command = [sys.executable, "-m", "agentkit_pipelines.cli", "ui", "--port", str(port)]
    with open(store.home / "server.log", "w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "AGENTKIT_HOME": str(store.home)},
            start_new_session=True,
        )
        try:
            browser = webdriver.Chrome(options=options, service=Service(DRIVER))
            try:
                wait_for(lambda: urllib.request.urlopen(f"{url}/health", timeout=1).status == 200, 120)
                yield Page(browser, url)
            finally:
                browser.quit()
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)


@pytest.fixture(autouse=True)
def untouched(store: Store) -> Iterator[None]:
    """At the end of each test the registry is as it was."""
    before = [store.sql(f"SELECT * FROM {table}") for table in TABLES]
    yield
    assert [store.sql(f"SELECT * FROM {table}") for table in TABLES] == before


def test_the_alias_of_a_version_is_refused(page: Page) -> None:
    page.open("models/colours/versions/3", f"{PROMPT} version 3")
    page.click("(//span[normalize-space(text())='Add'])[1]")  # beside `Aliases:`; the next one adds a tag
    page.type_alias("production")
    page.expect(
        "the alias 'production' of 'colours' was refused", "agentkit promote colours", "candidate", shot="alias"
    )


def test_the_old_stage_is_refused(page: Page) -> None:
    page.open("models/colours/versions/3", f"{PROMPT} version 3")
    page.browser.execute_script("arguments[0].click()", page.find("//button[@role='switch']"))  # to the old UI
    page.confirm("Disable")
    page.click("//button[contains(., 'None')] | //span[contains(@class, 'tag') and contains(., 'None')]")
    page.click("//*[@role='menuitem' and contains(., 'Production')]")
    page.confirm("OK")
    page.expect("the stage 'Production' of 'colours' was refused", "agentkit promote colours", shot="stage")
    page.browser.execute_script("window.localStorage.clear()")


def test_deleting_version_and_model_is_refused(page: Page) -> None:
    page.open("models/colours/versions/2", "Gate: pass")
    page.menu("Delete")
    page.confirm("Delete")
    page.expect("deleting version 2 of 'colours' was refused", "agentkit promote colours", shot="delete-version")
    page.open("models/colours", "History")
    page.menu("Delete")
    page.confirm("Delete")
    page.expect("deleting of 'colours' was refused", "agentkit promote colours", shot="delete-model")


def test_the_history_is_shown_and_cannot_be_edited(page: Page) -> None:
    page.open("models/colours", "History")
    page.expect("promoted version 2 (before: version 1) by Ada (local key)", "the gate passed", shot="history")
    page.click("//*[normalize-space(text())='Edit']")
    page.find("//textarea").send_keys("\n- 2026-11-21 promoted version 3 by Ada")
    page.click("//button[normalize-space()='Save']")
    page.expect("changing the history in the description of 'colours' was refused", shot="edit-history")


def test_the_prompt_of_production_stays(page: Page, store: Store) -> None:
    page.open(f"prompts/{PROMPT}", "Version 2")
    page.click("(//button[normalize-space()='Add'])[1]")
    page.type_alias("production")
    page.expect(f"the alias 'production' of '{PROMPT}' was refused", "agentkit promote colours", shot="prompt-alias")
    page.open(f"prompts/{PROMPT}", "Version 2")
    page.click("(//*[contains(normalize-space(.), 'Version 2')])[last()]")
    page.expect("Viewing version 2", shot="prompt")
    log, refusal = store.home / "server.log", 'DELETE /ajax-api/2.0/mlflow/model-versions/delete HTTP/1.1" 403'
    refused = log.read_text().count(refusal)
    page.click("//button[contains(normalize-space(.), 'Delete version')]")
    page.confirm("Delete")
    wait_for(lambda: log.read_text().count(refusal) > refused, 20)  # MLflow's page itself says nothing of it
    page.open(f"prompts/{PROMPT}", "Version 2")
