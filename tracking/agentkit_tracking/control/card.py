"""An approval on one card: what the agent was doing, why it stops, what is to be decided. For people with 30 seconds.

What agents say is not trusted: it can write neither Markdown nor HTML, and no terminal code, into the card.
"""

from __future__ import annotations

import html
import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from agentkit import clock
from agentkit_tracking.statements import day

if TYPE_CHECKING:
    from agentkit_tracking.control.decisions import Approval

DOING, REASON, _NAME, _WHY = 260, 100, 60, 200  # characters; at most 115 words on the card, read in 30 s
_VALUE, _VALUES = 160, 12  # characters of an argument, and how many arguments
_MARKUP = re.compile(r"[^\w\s,.;'/()%?!-]", re.ASCII)
_WWW = re.compile(r"\bwww\.", re.IGNORECASE)  # some renderers make links of such words


def card(approval: Approval) -> str:
    """The approval as Markdown, safe to render and to print."""
    from agentkit_tracking.control.decisions import decided

    request = approval.request
    who = f" for {prose(request.user, _NAME)}" if request.user else ""
    sure = f" Confidence {request.confidence:.2f}." if request.confidence is not None else ""
    system = f"{request.system} / " if request.system else ""
    lines = [
        f"### May {prose(request.agent, _NAME)} call {prose(request.tool, _NAME)}?",
        f"**What it was doing** ({prose(system + request.agent, 2 * _NAME)}{who}): "
        f"{_sentence(prose(request.doing, DOING) or 'it did not say')}{sure}",
        f"**Why it stops:** {_sentence(prose(request.reason, REASON))}",
        f"**The call:**\n\n{arguments(request.arguments)}",
    ]
    if approval.problem:
        lines.append(f"**Beware:** a decision stored for this does not count: {prose(approval.problem, _WHY)}")
    if approval.decision is None:
        lines.append(
            "**Decide:** approve, approve with other arguments, or reject. "
            f"Undecided, it is rejected in {until(approval.expires_at)} ({day(approval.expires_at)} UTC)."
        )
    else:
        lines.append(f"**Decided:** {prose(decided(approval), 2 * _WHY)}")
    lines.append(f"Approval {approval.id} · run {prose(request.run_id, _NAME)}")
    return "\n\n".join(lines)


def arguments(values: dict[str, Any]) -> str:
    """Arguments as a fenced block of `name = JSON` lines; what is cut is counted."""
    shown = [f"{visible(str(name))[:_NAME]} = {clip(_json(value), _VALUE)}" for name, value in values.items()]
    if len(shown) > _VALUES:
        shown[_VALUES:] = [f"… {len(values) - _VALUES} more arguments are not shown here"]
    text = "\n".join(shown) or "(no arguments)"
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def clip(text: str, length: int) -> str:
    """At most `length` characters, and how many more there were."""
    more = len(text) - length
    return text if more <= 0 else f"{text[:length].rstrip()}… ({more:,} characters more)"


def visible(text: str) -> str:
    """One line without anything that acts on a terminal or hides: control, bidirectional and zero-width characters show
    as their code."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in line)


def prose(text: str, length: int) -> str:
    """Text of an agent's within Markdown: cut, and without any markup of its own."""
    plain = clip(visible(text), length)
    escaped = "".join(c if c == "…" or ord(c) > 127 else _MARKUP.sub(_entity, c) for c in plain)
    return _WWW.sub(lambda m: f"{m[0][:-1]}&#46;", escaped)


def _entity(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"


def _sentence(text: str) -> str:
    return text if html.unescape(text)[-1:] in ".!?)" else f"{text}."


def _json(value: Any) -> str:
    return visible(json.dumps(value, ensure_ascii=False, default=str))


def until(time: datetime) -> str:
    """How long it is until then, in words."""
    minutes = max(0, round((time - clock.utc()).total_seconds() / 60))
    hours, rest = divmod(minutes, 60)
    if hours >= 48:
        return f"{round(hours / 24)} days"
    parts = [f"{hours} h"] * bool(hours) + [f"{rest} min"] * bool(rest or not hours)
    return " ".join(parts)
