"""What people see and press in `notebooks/approvals.py`, served by `marimo run` on loopback, in headless Chromium."""

# ruff: noqa: F811 (fixtures of another module are imported by name)

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from approvals_desk import HOSTILE
from servers import marimo_page
from test_control import own_control, plane, request_for  # noqa: F401
from test_ui import browser, wait_for  # noqa: F401

from agentkit_tracking.control import ControlPlane

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "approvals.py"
SHOTS = os.environ.get("AGENTKIT_SHOTS")  # a folder for screenshots
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.usefixtures("chromium"),
]


class Page:
    """The page as somebody reads, types and presses; marimo's controls live in shadow roots."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    @property
    def text(self) -> str:
        return str(self.browser.find_element("css selector", "body").text)

    def wait(self, *words: str) -> None:
        try:
            wait_for(lambda: all(w in self.text for w in words), 30)
        except BaseException:
            print(self.text)
            raise

    def inside(self, element: str, what: str) -> list[Any]:
        hosts = self.browser.find_elements("css selector", element)
        return [found for host in hosts for found in host.shadow_root.find_elements("css selector", what)]

    def press(self, label: str) -> None:
        [button] = [b for b in self.inside("marimo-button", "button") if b.text.strip() == label]
        button.click()

    def write(self, field: int, text: str) -> None:
        area = self.inside("marimo-text-area", "textarea")[field]
        area.send_keys("\ue009a\ue000", text)  # Ctrl+A

    def choose(self, number: int) -> None:
        self.inside("marimo-radio", "[role=radio]")[number].click()

    def shoot(self, name: str) -> None:
        if SHOTS:
            self.browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


ARGUMENTS, REASON = 0, 1


@pytest.fixture
def page(browser: Any, plane: ControlPlane, own_home: Path) -> Iterator[Page]:
    with marimo_page(NOTEBOOK, own_home / "marimo.log", AGENTKIT_AUTHOR="ada") as url:
        wait_for(lambda: urllib.request.urlopen(f"{url}/health", timeout=1).status == 200, 60)
        browser.get(url)
        yield Page(browser)


def test_a_person_approves_changes_and_rejects(page: Page, plane: ControlPlane) -> None:
    page.wait("You decide as ada", "Nothing waits for a decision.")
    first = plane.desk.ask(request_for("1"))
    page.wait(first)  # the list follows by itself
    second, third = plane.desk.ask(request_for("2")), plane.desk.ask(request_for("3"))
    page.wait(second, third, "3 waiting")

    page.choose(0)
    page.wait(
        "May billing call issue_refund?", "The customer was charged twice", "Confidence 0.93", f"Approval {first}"
    )
    page.shoot("card")
    page.press("Approve")
    page.wait("Recorded and signed", f"{first} approved by ada", "2 waiting")
    assert plane.desk.decision(first).by == "ada"  # type: ignore[union-attr]
    assert page.inside("marimo-text-area", "textarea") == []  # the next one is opened by hand

    page.choose(0)
    page.wait(f"Approval {second}")
    assert "Recorded and signed" not in page.text
    page.press("Reject")
    page.wait("Nothing was recorded", "reject needs a reason")
    page.write(ARGUMENTS, '{"order_id": "ORD-1", "usd": 40}')
    page.press("Approve")
    page.wait("you changed the arguments")
    page.press("Approve as changed")
    page.wait("modify needs a reason")
    page.write(ARGUMENTS, '{"order_id": "ORD-1", "usd"')
    page.write(REASON, "half of it")
    page.press("Approve as changed")
    page.wait("the arguments are no JSON")
    assert plane.desk.decision(second) is None
    page.shoot("refused")
    page.write(ARGUMENTS, '{"order_id": "ORD-1", "usd": 40}')
    page.press("Approve as changed")
    page.wait("Recorded and signed", f"{second} modified by ada", "half of it")
    assert plane.desk.decision(second).arguments == {"order_id": "ORD-1", "usd": 40}  # type: ignore[union-attr]

    page.choose(0)
    page.wait(f"Approval {third}")
    page.write(REASON, "typed while the list is refreshed")
    fourth = plane.desk.ask(request_for("4"))
    page.wait(fourth)
    assert page.inside("marimo-text-area", "textarea")[REASON].get_attribute("value").startswith("typed while")
    plane.desk.decide(third, "approve", "somebody else was faster")
    page.press("Reject")
    page.wait("Nothing was recorded", "is decided: approved by", "somebody else was faster")
    page.shoot("late")


def test_hostile_text_stays_text(page: Page, plane: ControlPlane) -> None:
    hostile = request_for(
        agent=HOSTILE[:80], tool=HOSTILE, arguments={HOSTILE: f"</textarea>{HOSTILE}"}, doing=HOSTILE, reason=HOSTILE
    )
    page.wait("Nothing waits")
    plane.desk.ask(hostile)
    page.wait("1 waiting")
    page.choose(0)
    page.wait("What it was doing", "<script>alert(1)</script>", "[a](javascript:alert(1))")
    browser = page.browser
    with pytest.raises(Exception, match="no such alert"):
        browser.switch_to.alert.text  # noqa: B018
    assert browser.find_elements("css selector", "marimo-callout-output a, [src='http://x/y.png'], h1 ~ h1") == []
    page.write(REASON, HOSTILE.replace("\n", " ").replace("\x1b", "").replace("\u202e", ""))
    page.press("Reject")
    page.wait("Recorded and signed", "Decided (1)")
    assert browser.find_elements("css selector", "marimo-callout-output a") == []
