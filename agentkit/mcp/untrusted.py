"""What comes from outside, made fit to be read: texts cleaned and cut, results in words. Nothing is executed or fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mcp_types

MAX_ERROR = 2_000  # characters of a server's error text

# Escape sequences of terminals; then controls but tab and newline, direction marks and overrides, characters of no width,
# tags, lone surrogates: what a person does not see, a model still reads.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[@-Z\\-_])")
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def clean(value: Any) -> Any:
    """JSON-able data without escape sequences, control characters and characters that cannot be seen."""
    if isinstance(value, str):
        return _HIDDEN.sub("", _ANSI.sub("", value.replace("\r\n", "\n")))
    if isinstance(value, Mapping):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def clip(text: str, most: int = MAX_ERROR) -> str:
    """At most so many characters, and how many there were."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def identifier(text: str) -> str:
    """The text as a name of letters, digits and underscores."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")[:64] or "server"
    return f"_{name}" if name[0].isdigit() else name


def contents(answer: mcp_types.CallToolResult) -> dict[str, Any]:
    """`content` (all text), `data` (structured content) and `attachments` (what else there is, described)."""
    texts = [block.text for block in answer.content if block.type == "text"]
    attached = [_in_words(block) for block in answer.content if block.type != "text"]
    data = answer.structured_content
    if data is not None:  # servers send it as text as well, for clients that read nothing else
        texts = [text for text in texts if not _is_json_of(text, data)]
    made: dict[str, Any] = {"content": clean("\n".join(texts))}
    if data is not None:
        made["data"] = clean(data)
    if attached:
        made["attachments"] = clean(attached)
    return made


def _is_json_of(text: str, data: Any) -> bool:
    try:
        return bool(json.loads(text) == data)
    except (ValueError, RecursionError):
        return False


def _in_words(block: Any) -> dict[str, Any]:
    """An image, sound, link or resource in words; a resource that is text, with its text."""
    if block.type in ("image", "audio"):
        return {"type": block.type, "mime_type": block.mime_type, "bytes": len(block.data) * 3 // 4}
    if block.type == "resource_link":
        return {"type": "link", "uri": str(block.uri), "name": block.name, "mime_type": block.mime_type}
    resource = block.resource
    made = {"type": "resource", "uri": str(resource.uri), "mime_type": resource.mime_type}
    text = getattr(resource, "text", None)
    return {**made, "bytes": len(resource.blob) * 3 // 4} if text is None else {**made, "text": text}
