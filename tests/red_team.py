"""For the red team's tests: what is tried on a server, by every route and by several at once, and how it must end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from attacks import GRACE, Attack, Person, Site, entry
from evidence import Store

from agentkit_tracking.history import KEY


def camel(name: str) -> str:
    return name[0] + name.title().replace("_", "")[1:]


def requests_of(attack: Attack, site: Site) -> Iterator[tuple[str, dict[str, Any], tuple[int, ...]]]:
    """The same attack by each route: prefix, what to send, and what may be answered."""
    body = attack.filled(site)
    text, kind = json.dumps(body), {"Content-Type": "application/json"}
    yield "/api", {"content": text, "headers": kind}, (attack.status,)
    yield "/ajax-api", {"content": text, "headers": kind}, (attack.status,)
    yield "/api", {"content": json.dumps(text), "headers": kind}, (attack.status,)
    yield "/ajax-api", {"content": text, "headers": {"Content-Type": "text/plain"}}, (400, attack.status)
    yield "/api", {"content": text}, (400, attack.status)
    spelled = json.dumps({camel(k): v for k, v in body.items()})
    if spelled != text:
        yield "/api", {"content": spelled, "headers": kind}, (400, attack.status)


def refused(site: Site, attack: Attack, *, every_route: bool = True) -> None:
    """Ask, be refused with a way to promote instead, and find everything as it was."""
    before = site.state()
    path = attack.path.replace("{model}", site.model_id)
    for prefix, options, statuses in requests_of(attack, site):
        answer = site.ask(attack.method, f"{prefix}/2.0/mlflow/{path}", **options)
        assert answer.status_code in statuses, answer.text
        if answer.status_code == 403:
            said = answer.json()
            assert said["error_code"] == "PERMISSION_DENIED"
            assert "agentkit promote" in said["message"]
            assert attack.says in said["message"]
        if not every_route:
            break
    assert site.state() == before


# ---- two at once

RACE = """
import sys, time
from pathlib import Path
from releases import finished
from agentkit.errors import ReleaseError
from agentkit_pipelines import promotion
from agentkit_tracking.keys import signing_key

number, folder, meeting = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
done, made = finished(folder, f"colours/{number}"), promotion.histories.next_entry

def made_at_the_same_time(*arguments, **named):
    entry = made(*arguments, **named)
    (meeting / number).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.01)
    return entry

promotion.histories.next_entry = made_at_the_same_time
try:
    promotion.commit(done, signing_key(), why=f"{number} was faster")
except ReleaseError as e:
    print(f"{type(e).__name__}: {e}")
else:
    print("won")
"""


def promote_at_once(site: Site, first: int, second: int, tmp_path: Path) -> None:
    """Two people, each with a home of his own, promote two versions with the same idea of what is in production."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    before, running = len(site.history.entries), {}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with ExitStack() as ends:
        for number, who in {first: GRACE, second: Person("Heidi", GRACE.key, GRACE.pem)}.items():
            with site.used_by(who):
                done = Store(site.home).evaluate(f"colours/{number}")
                process = subprocess.Popen(
                    [sys.executable, "-c", RACE, str(number), str(done.folder), str(meeting)],
                    env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
            running[number] = ends.enter_context(process)
            ends.callback(process.kill)
        answers = {number: process.communicate(timeout=200) for number, process in running.items()}
    for number, (_, err) in answers.items():
        assert running[number].returncode == 0, err[-3000:]
    [winner] = [n for n, (out, _) in answers.items() if out.startswith("won")]
    [loser] = set(answers) - {winner}
    assert site.consistent() == winner
    assert len(site.history.entries) == before + 1
    assert site.history.entries[-1].move.why == f"{winner} was faster"
    assert "somebody else was faster" in answers[loser][0]


def one_of_many_wins(site: Site, rounds: int) -> None:
    """Eight people sign different next entries, all valid, and send them at the same moment."""
    for _ in range(rounds):
        head = site.history.head
        assert head is not None
        number = head.move.sequence + 1
        moved = {"event": "withdrawn", "version": None, "prompts": None, "evidence": None, "release": head.move.release}
        if head.move.version is None:
            back = site.history.promotion_of(2)
            assert back is not None
            same = {k: getattr(back.move, k) for k in ("version", "release", "prompts", "evidence")}
            moved = {"event": "rolled_back", **same}
        gate = threading.Barrier(8)

        def send(
            who: int, number: int = number, moved: dict[str, Any] = moved, gate: threading.Barrier = gate
        ) -> httpx.Response:
            body = {"name": "colours", "key": f"{KEY}{number:06}", "value": entry(site, **moved, why=str(who))}
            gate.wait(60)
            return site.ask("POST", "/api/2.0/mlflow/registered-models/set-tag", json=body)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, range(8)))
        won = [who for who, a in enumerate(answers) if a.status_code == 200]
        assert len(won) == 1, [a.text for a in answers]
        assert all("somebody else was faster" in a.json()["message"] for a in answers if a.status_code != 200)
        assert site.history.entries[-1].move.why == str(won[0])
        assert site.consistent() == moved["version"]
