"""What a governed model call costs beside a bare one, and how much of real provider traffic is read.

    python tests/benchmarks/model_calls.py [--data FOLDER]

FOLDER holds `provider_cassettes/calls.parquet`: recorded HTTP exchanges with columns host, model, status, request,
response and usage. About a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

os.environ["AGENTKIT_HOME"] = tempfile.mkdtemp(prefix="agentkit-bench-")
os.environ["AGENTKIT_TRACES"] = "off"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dspy
import polars as pl
from dspy.lm15 import Message, Response, TextPart, Usage
from provider import Provider, Reply, in_bad_health
from rich.console import Console
from rich.table import Table

import agentkit as ak
from agentkit.budget import Budget, Ledger
from agentkit.cassettes import cassette
from agentkit.current import CURRENT, DSPY_SETTING
from agentkit.errors import DataError
from agentkit.models import MeteredLM, Price
from agentkit.repair import repairing
from agentkit.runs import Run
from agentkit.traffic import read_reply

Note = Callable[[str, str, str, str], None]
INNER, ROUNDS = 20, 150


class NoOp:
    """An engine that answers at once: what remains is overhead."""

    def complete(self, request: object) -> Response:
        message = Message.assistant([TextPart("[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]")])
        usage = Usage(input_tokens=10, output_tokens=5, total_tokens=15)
        return Response(id=None, model="no-op", message=message, finish_reason="stop", usage=usage)

    def close(self) -> None: ...


# ---- overhead


def overhead(note: Note) -> None:
    """Processor time of one `dspy.Predict` in a run beside the same outside, in turn."""
    bare = dspy.LM("embedded/no-op", engine=NoOp(), cache=False, num_retries=0)
    ours = MeteredLM("embedded/no-op", engine=NoOp(), cache=False, num_retries=0)
    ours.price = Price(input=1, output=1)
    run = Run("bench", {}, budget=Budget.unlimited())

    def plain() -> AbstractContextManager[Any]:
        return dspy.context(lm=bare)

    def governed(**more: Any) -> AbstractContextManager[Any]:
        return dspy.context(lm=ours, **{DSPY_SETTING: run}, **more)

    def repaired() -> AbstractContextManager[Any]:
        return governed(adapter=repairing(None))

    for what, way in (("a model call in a run", governed), ("the same, its answers repaired", repaired)):
        mine, peer, ratio = _paired(run, way, plain)
        note(what, f"{mine:.0f} µs", f"bare dspy.Predict {peer:.0f} µs", f"+{ratio - 1:.2f}× (aim ≤ +0.15×)")


def _paired(run: Run, a: Callable[[], Any], b: Callable[[], Any]) -> tuple[float, float, float]:
    predict = dspy.Predict("question -> answer")
    times: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        spent = []
        for way in (a, b):
            with way():
                token = CURRENT.set(run if way is a else None)
                start = time.thread_time()  # other processes on the machine do not count
                for _ in range(INNER):
                    predict(question="q")
                spent.append((time.thread_time() - start) / INNER * 1e6)
                CURRENT.reset(token)
        times.append((spent[0], spent[1]))
        run.steps.clear()
        predict.history.clear()
    mine, peer = (statistics.median(t) for t in zip(*times, strict=True))
    return mine, peer, statistics.median(m / p for m, p in times)


# ---- against a server


@contextmanager
def _project(settings: str) -> Iterator[None]:
    before, folder = Path.cwd(), Path(tempfile.mkdtemp(prefix="agentkit-bench-"))
    (folder / "agentkit.toml").write_text(settings)
    os.chdir(folder)
    yield
    os.chdir(before)


def replays(note: Note) -> None:
    """Calls per second of a loopback provider and of a cassette of them."""
    frame = pl.DataFrame({"ticket": [f"I was charged twice for order {i}." for i in range(200)]})
    system = ak.adopt(dspy.Predict("ticket -> label"), name="bench")
    with Provider(Reply()) as provider, _project(provider.settings()):
        with cassette("tape.jsonl", "record"):
            live = _seconds(lambda: system.map(frame, workers=8))
        with cassette("tape.jsonl"):
            again = _seconds(lambda: system.map(frame, workers=8))
        sent = len(provider.requests)
    note("200 calls from a cassette", f"{again:.2f} s", f"recording them from loopback {live:.2f} s", f"{sent} sent")


def limits(note: Note) -> None:
    """64 workers on one ledger, three attempts in ten go wrong: the largest used share of each limit."""
    most = {"model_calls": 200.0, "tokens_in": 20_000.0, "tokens_out": 60_000.0, "usd": 20.0}
    for name, limit in most.items():
        with Provider(*in_bad_health(900)) as provider:
            settings = provider.settings(
                price=(100, 1000), num_retries=2, max_tokens=256, more="[circuit]\nfailures = 10000"
            )
            with _project(settings), ThreadPoolExecutor(64) as pool:
                shared = Ledger(Budget(**{**dict.fromkeys((*most, "tool_calls", "seconds")), name: limit}))
                system = ak.adopt(dspy.Predict("ticket -> label"), name="bench", budget=Budget.unlimited())
                records = list(pool.map(lambda i: system.run(ticket=f"ticket {i}", ledger=shared), range(300)))  # noqa: B023
        used = sum(getattr(r, name) for r in records)
        assert used <= limit, f"{name}: {used} of {limit}"
        done = sum(r.state == "DONE" for r in records)
        note(f"64 workers, 30 % faults: {name}", f"{used:g} used", f"limit {limit:g}", f"{done} runs done")


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- recorded traffic


def traffic(path: Path, note: Note) -> None:
    """How many replies of models are read, and in how many the usage is the recorded one."""
    outcomes, usage, unread = Counter[str](), Counter[bool](), Counter[str]()
    for row in pl.read_parquet(path).to_dicts():
        asked, body = json.loads(row["request"] or "null"), row["response"] or ""
        asked = {"model": row["model"], **asked} if isinstance(asked, dict) else {}
        if not _of_a_model(body):
            outcomes["no reply of a model"] += 1
            continue
        try:
            found = read_reply(asked, row["status"], body, host=row["host"])
        except DataError as e:
            unread[f"{row['host']}: {str(e).partition(':')[0]}"] += 1
            continue
        outcomes["error" if found.error else found.protocol] += 1
        counted = json.loads(row["usage"] or "null") or {}
        ours = (found.tokens_in, found.tokens_out)
        theirs = tuple(next((counted[k] for k in keys if k in counted), None) for keys in _COUNTERS)
        if any(n is not None for n in theirs):
            usage[ours == theirs] += 1
    read = sum(outcomes.values()) - outcomes["no reply of a model"]
    rest = ", ".join(f"{name} {n}" for name, n in outcomes.most_common())
    note("recorded replies of models read", f"{read} of {read + unread.total()}", rest, "")
    note("  their usage as recorded", f"{usage[True]} of {usage.total()}", "", "")
    for why, n in unread.most_common():
        note("  not read", str(n), why, "")


_COUNTERS = (
    ("prompt_tokens", "input_tokens", "promptTokenCount"),
    ("completion_tokens", "output_tokens", "candidatesTokenCount"),
)
# What providers answer that is no reply of a model: conversations, compactions, counts, stores, searches, MCP.
_OTHERS = re.compile(
    r'''"object":\s*"(conversation|response\.compaction|vector_store)|"name":\s*"fileSearchStores/|"jsonrpc"'''
    r'''|^\{"(input_?[tT]okens|promptTokensDetails|answer)"'''
)


def _of_a_model(body: str) -> bool:
    """Whether text was to be generated."""
    return _OTHERS.search(body) is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with provider_cassettes/calls.parquet")
    data = parser.parse_args().data
    table = Table("what", "ours", "beside it", "ratio or aim", title="model calls")
    overhead(table.add_row)
    replays(table.add_row)
    limits(table.add_row)
    if data is not None:
        traffic(data / "provider_cassettes" / "calls.parquet", table.add_row)
    Console().print(table)


if __name__ == "__main__":
    main()
