"""MCP: tools of other people's servers in our agents, and our systems as tools of a server. Needs the extra `mcp`.

A server's tools are denied until somebody grants them one by one, with the permission that person chooses. What was
granted is pinned: a server that later lists another text, schema or hint for the tool is refused. What a tool returns
is data of unknown origin and marked so; nothing in it is executed or fetched.

    everything = Server.stdio("npx", "-y", "@modelcontextprotocol/server-everything")
    with everything:
        for listed in everything.tools():
            print(listed.name, listed.description, listed.hints, listed.findings)
        echo = everything.grant("echo", permission="read")  # a `Tool`, for an agent's `tools`

In a notebook that is released, declare the tool with its pin instead (`agentkit mcp grant` prints that): it connects at
its first call, in whatever process that is. See `tool`. A stdio server is a program that runs with your rights: pin its
version as you would a dependency's.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import hmac
import inspect
import ipaddress
import json
import math
import os
import re
import shlex
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar, Union, Unpack, get_type_hints
from urllib.parse import urlsplit

from agentkit.current import current_run
from agentkit.errors import AgentkitError, PolicyRefused, ToolFailed, UsageError
from agentkit.redaction import without_secrets
from agentkit.tool_calls import abandoned
from agentkit.tools import Tool, ToolOptions

if TYPE_CHECKING:
    import mcp
    import mcp_types
    from mcp.server import Server as Protocol
    from pydantic import TypeAdapter
    from starlette.types import ASGIApp, Receive, Scope, Send

    from agentkit.records import RunRecord
    from agentkit.systems import System
    from agentkit.tool_lint import Finding

__all__ = ["Listed", "RemoteTool", "Server", "asgi_app", "build_server", "serve", "tool"]

T = TypeVar("T")
START_S = 20.0  # seconds a server may take to start and shake hands; `npx` may have to download it first
CLOSE_S = 10.0  # seconds its end may take; the SDK closes stdin, then terminates, then kills
MAX_BYTES = 100_000  # of one result, as JSON
TOKEN = "AGENTKIT_MCP_TOKEN"  # environment variable: what callers of our own server must bear
_POLL_S = 0.2  # a wait looks this often for whether anybody still wants its answer
_MAX_ERROR = 2_000  # characters of a server's error text
_MAX_PAGES = 100  # of a listing; one that never ends must not hang us
_HINTS = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")


def _sdk() -> None:
    if find_spec("mcp") is None:  # not imported yet: that takes seconds, and a declaration needs nothing of it
        raise UsageError("MCP needs an extra: pip install 'agentkit-hedgehog[mcp]'")


# ---- text from outside


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


def _clip(text: str, most: int = _MAX_ERROR) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _identifier(text: str) -> str:
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")[:64] or "server"
    return f"_{name}" if name[0].isdigit() else name


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def _expand(values: Mapping[str, str]) -> dict[str, str]:
    """`${NAME}` in values replaced by environment variables, so that no secret stands in a source."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UsageError(f"the environment variable {match[1]} is not set, and an MCP server is to be given it")
        return os.environ[match[1]]

    return {name: _VARIABLE.sub(value_of, value) for name, value in values.items()}


# ---- where a server is


class _Tail(threading.Thread):
    """The last a server said beside the protocol: on stderr (our own is no file in a notebook), or as an HTTP status."""

    def __init__(self) -> None:
        super().__init__(name="agentkit-mcp-stderr", daemon=True)
        self._kept, self.status = b"", 0  # over HTTP, the last status that meant no
        self.sink: TextIO | None = None

    def open(self) -> TextIO:
        """Where the program writes to."""
        self._read, write = os.pipe()
        self.sink = os.fdopen(write, "w")
        self.start()
        return self.sink

    def close(self) -> None:
        """Give up our end of it; the program has its own."""
        if self.sink is not None:
            self.sink.close()

    def run(self) -> None:
        with os.fdopen(self._read, "rb", buffering=0) as source:
            while chunk := source.read(65_536):
                self._kept = (self._kept + chunk)[-_MAX_ERROR:]

    def said(self) -> str:
        lines = str(clean(self._kept.decode("utf-8", "replace"))).strip().splitlines()
        wrote = f"; it wrote: {' / '.join(lines[-3:])[-500:]}" if lines else ""
        return wrote + (f"; it answered HTTP {self.status}" if self.status else "")


@dataclass(frozen=True)
class _Command:
    """A server that is a program of ours, spoken to over its stdin and stdout."""

    command: str
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None

    @property
    def label(self) -> str:
        return shlex.join((self.command, *self.arguments))

    def transport(self, tail: _Tail) -> AbstractAsyncContextManager[Any]:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        # The SDK hands on HOME, PATH and the like and nothing else: no key of ours reaches the server unless named.
        given = StdioServerParameters(
            command=self.command,
            args=list(self.arguments),
            env=_expand(self.env),
            cwd=self.cwd,
            encoding_error_handler="replace",
        )
        return stdio_client(given, errlog=tail.open())


@dataclass(frozen=True)
class _Address:
    """A server at a URL, spoken to over streamable HTTP."""

    url: str
    headers: Mapping[str, str]

    @property
    def label(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # no password, no key in a query

    def transport(self, tail: _Tail) -> AbstractAsyncContextManager[Any]:
        return _over_http(self.url, _expand(self.headers), tail)


@asynccontextmanager
async def _over_http(url: str, headers: dict[str, str], tail: _Tail) -> AsyncIterator[Any]:
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    async def note(response: Any) -> None:
        tail.status = response.status_code if response.status_code >= 400 else 0

    async with create_mcp_http_client(headers) as client, streamable_http_client(url, http_client=client) as streams:
        client.event_hooks = {"response": [note]}  # the SDK's errors do not tell a 401 from a 500
        yield streams


_LAUNCHERS = frozenset(
    ("npx", "bunx", "uvx", "uv", "node", "deno", "docker", "python", "python3", "pipx", "run", "exec")
)


def _name_of(words: Sequence[str]) -> str:
    """What a command line is called: of `npx -y @scope/server-everything@1` it is `everything`."""
    plain = [w for w in words if not w.startswith("-") and PurePath(w).stem not in _LAUNCHERS]
    found = PurePath((plain or list(words))[0]).name
    found = re.sub(r"(@[\w.-]+|\.(py|js|mjs|ts|exe))$", "", found[1:] if found.startswith("@") else found)
    return _identifier(re.sub(r"^(mcp-)?server-|^mcp-|-mcp(-server)?$", "", found))


# ---- connections: one event loop on one background thread of the process; one task on it holds each connection open


_guard = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_sessions: set[_Session] = set()
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _guard:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            # A daemon: a server nobody closed must not keep the process from ending; `_end` closes it then.
            threading.Thread(target=_turn, args=(_loop,), name="agentkit-mcp", daemon=True).start()
        return _loop


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(work, _running_loop())


@atexit.register
def _end() -> None:
    """Close what is open when the process ends, so that no server outlives it."""
    global _loop
    for session in list(_sessions):
        session.stop()
    for session in list(_sessions):
        session.wait()
    loop, _loop = _loop, None
    if loop is not None:
        loop.call_soon_threadsafe(loop.stop)


def _after_fork() -> None:
    """The thread and the connections are the parent's; a child makes its own."""
    global _guard, _loop
    _guard, _loop = threading.Lock(), None
    _sessions.clear()
    for server in list(_servers):
        server._lock, server._session = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Session:
    """One connection to a server."""

    def __init__(self, where: _Command | _Address, start_s: float) -> None:
        self.ready: Future[mcp.Client] = Future()
        self.tail = _Tail()
        self._stop = asyncio.Event()
        self._opening: Any = None  # the scope to cancel while it opens
        self._loop = _running_loop()
        _sessions.add(self)
        self._task = _submit(self._live(where, start_s))

    async def _live(self, where: _Command | _Address, start_s: float) -> None:
        """Open, wait to be stopped, close; all in one task, as the SDK's cancel scopes ask for."""
        import anyio
        import mcp

        try:
            with anyio.CancelScope(deadline=anyio.current_time() + start_s) as scope:
                self._opening = scope
                # No callbacks: what a server asks of us (sampling, elicitation, roots) is refused. No cache: it would be
                # the server that says how long we believe its listing.
                async with mcp.Client(where.transport(self.tail), cache=None, client_info=_client_info()) as client:
                    scope.deadline, self._opening = math.inf, None
                    self.tail.close()
                    self.ready.set_result(client)
                    await self._stop.wait()
            if not self.ready.done():
                raise TimeoutError("closed" if self._stop.is_set() else f"no answer within {start_s:g} s")
        except BaseException as e:
            if not self.ready.done():
                self.ready.set_exception(_first(e))
        finally:
            self.tail.close()
            _sessions.discard(self)

    @property
    def over(self) -> bool:
        return self._task.done() or self._stop.is_set()

    def stop(self) -> None:
        """Ask it to close."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._halt)

    def _halt(self) -> None:
        self._stop.set()
        if self._opening is not None:
            self._opening.cancel()

    def wait(self) -> None:
        """Until it is closed."""
        with suppress(BaseException):
            self._task.result(CLOSE_S)


def _client_info() -> mcp_types.Implementation:
    import mcp_types

    import agentkit

    return mcp_types.Implementation(name="agentkit", version=agentkit.__version__)


def _first(error: BaseException) -> BaseException:
    """What really happened, out of the groups that task groups wrap it in."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error


class _Late(Exception):
    """The tool's time is up, or nobody waits for it any more."""


class _Unreachable(Exception):
    """No connection; nothing was sent."""


class _Deadline:
    def __init__(self, seconds: float | None) -> None:
        self.seconds, self._end = seconds, math.inf if seconds is None else time.monotonic() + seconds

    def wait(self, answer: Future[T], *, cancel: bool = True) -> T:
        """The answer; where time is up the request is cancelled, which tells the server, too."""
        try:
            while True:
                left = self._end - time.monotonic()
                with suppress(TimeoutError):
                    return answer.result(max(0.0, min(_POLL_S, left)))
                if answer.done():
                    return answer.result()
                if left <= 0 or abandoned():
                    raise _Late(f"no answer within {self.seconds:g} s")
        except BaseException:
            if cancel:
                answer.cancel()
            raise


# ---- servers and their tools


@dataclass(frozen=True)
class Listed:
    """A tool as its server lists it: text to judge, nothing that can be called.

    `description` and `parameters` (a JSON schema) are cleaned; `hidden` says that characters nobody sees were taken out of
    them. `hints` are the server's own claims. `sha256` is over what the server sent; `findings` are the linter's.
    """

    server: str
    name: str
    description: str
    parameters: dict[str, Any]
    hints: dict[str, bool]
    sha256: str
    hidden: bool = False
    findings: tuple[Finding, ...] = ()


def _listed(server: str, raw: mcp_types.Tool) -> Listed:
    said = raw.annotations.model_dump(by_alias=True) if raw.annotations else {}
    hints = {name: said[name] for name in _HINTS if isinstance(said.get(name), bool)}
    text, schema = raw.description or "", raw.input_schema
    # json rather than orjson: a schema may hold integers past 64 bits and lone surrogates.
    whole = json.dumps([raw.name, text, schema, hints], sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(whole.encode()).hexdigest()
    cleaned = clean([text, schema])
    hidden = cleaned != [text.replace("\r\n", "\n"), schema]
    return Listed(server, raw.name, cleaned[0].strip(), cleaned[1], hints, sha256, hidden)


class Server:
    """An MCP server: connected to at first use, again (once per use) where the connection is lost, until `close`.

    Args:
        name: prefix of its tools' names; by default from the command line or the URL.
        start_s: seconds it may take to start.
        max_bytes: of one result; a larger one is `malformed`.
    """

    def __init__(
        self, where: _Command | _Address, name: str, *, start_s: float = START_S, max_bytes: int = MAX_BYTES
    ) -> None:
        _sdk()
        self.name, self.label = _identifier(name), str(clean(where.label))
        self.start_s, self.max_bytes = start_s, max_bytes
        self._where = where
        self._lock = threading.Lock()
        self._session: _Session | None = None
        self._at_end: weakref.finalize[..., Any] | None = None
        _servers.add(self)

    @classmethod
    def stdio(
        cls,
        command: str,
        *arguments: str,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        **limits: Any,
    ) -> Server:
        """A program to start. It gets HOME, PATH and the like, and `env`, where `${NAME}` stands for a variable of ours."""
        where = _Command(command, arguments, dict(env or {}), cwd)
        return cls(where, name or _name_of((command, *arguments)), **limits)

    @classmethod
    def http(
        cls, url: str, *, name: str | None = None, headers: Mapping[str, str] | None = None, **limits: Any
    ) -> Server:
        """A server at a URL. `headers` go with every request; `${NAME}` in them stands for an environment variable."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"an MCP server's URL begins with http:// or https://, got {url!r}")
        return cls(_Address(url, dict(headers or {})), name or parts.hostname, **limits)

    def __repr__(self) -> str:
        return f"<MCP server {self.name}: {self.label}>"

    def __enter__(self) -> Server:
        self._list(_Deadline(self.start_s))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and, over stdio, the server with all it started. A later use connects again."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.stop()
            session.wait()

    def tools(self) -> list[Listed]:
        """What the server offers, linted as a whole.

        Raises:
            UsageError: it does not start or does not answer; says why.
        """
        from dataclasses import replace

        from agentkit.tool_lint import ToolSchema, lint

        listed = self._list(_Deadline(self.start_s))
        found = lint([ToolSchema(t.name, t.description, t.parameters, _claimed(t)) for t in listed])
        return [replace(t, findings=tuple(f for f in found if f.tool == t.name)) for t in listed]

    def grant(
        self,
        name: str,
        *,
        sha256: str | None = None,
        alias: str | None = None,
        despite_hints: bool = False,
        **options: Unpack[ToolOptions],
    ) -> RemoteTool:
        """Make one of the server's tools a tool that an agent may be given.

        Args:
            name: as the server lists it.
            sha256: what the listing must be (from `tools` or `agentkit mcp grant`); default: what it is now.
            alias: what we call it; default: the server's name, an underscore, the tool's name.
            despite_hints: grant `read` although the server itself says that the tool changes something.
            options: as of `agentkit.tool`; `permission` must be among them: nobody but you decides it.

        Raises:
            UsageError: no or several tools of that name, another pin, a schema that cannot be used, no permission, or
                `read` for a tool that says it is none.
        """
        listed = _only(self._list(_Deadline(self.start_s)), name, self)
        if sha256 is not None and sha256 != listed.sha256:
            raise UsageError(f"{self.name}: {_other(name, sha256, listed)}; look at it and grant it anew")
        if options.get("permission") == "read" and not despite_hints and (claim := _says_it_changes(listed)):
            raise UsageError(
                f"{self.name} says of {name!r} {claim}; grant it as `write` or `execute`, or say despite_hints=True"
            )
        return tool(
            self,
            name,
            sha256=listed.sha256,
            description=listed.description or name,
            parameters=listed.parameters,
            alias=alias,
            **options,
        )

    # ---- the protocol

    def _current(self, lost: _Session | None = None) -> tuple[_Session, bool]:
        """The connection, and whether it is new; `lost` is replaced."""
        with self._lock:
            old = self._session
            if old is not None and old is not lost and not old.over:
                return old, False
            if old is not None:
                old.stop()
            session = self._session = _Session(self._where, self.start_s)
            if self._at_end is not None:
                self._at_end.detach()
            self._at_end = weakref.finalize(self, session.stop)
            return session, True

    def _reach(self, deadline: _Deadline) -> tuple[_Session, list[Listed]]:
        """A connection that has just answered with its listing. A lost one is replaced, once."""
        session, new = self._current()
        while True:
            try:
                client = deadline.wait(session.ready, cancel=False)
                return session, deadline.wait(_submit(_listing(client, self.name)))
            except _Late:
                raise
            except Exception as e:
                self._drop(session)
                if new:
                    raise _Unreachable(self._why(session, e)) from e
                session, new = self._current(lost=session)

    def _drop(self, session: _Session) -> None:
        with self._lock:
            if self._session is session:
                self._session = None
        session.stop()

    def _why(self, session: _Session, error: BaseException) -> str:
        if isinstance(error, FileNotFoundError) and isinstance(self._where, _Command):
            return f"there is no program {self._where.command!r} here"
        address = getattr(self._where, "url", self.label)
        told = clean(str(error)).replace(address, self.label)
        return f"{type(error).__name__}: {_clip(told)}{session.tail.said()}"

    def _list(self, deadline: _Deadline) -> list[Listed]:
        try:
            return self._reach(deadline)[1]
        except (_Unreachable, _Late) as e:
            raise UsageError(f"MCP server {self.name} ({self.label}) does not answer: {e}") from e

    def call(self, remote: RemoteTool, arguments: dict[str, Any]) -> dict[str, Any]:
        """Call a granted tool, if it still is what was granted; see `RemoteTool`."""
        deadline = _Deadline(remote.timeout_s)
        try:
            session, listed = self._reach(deadline)
        except (_Unreachable, _Late) as e:  # nothing was sent, whatever the tool does
            fault: Literal["timeout", "error"] = "timeout" if isinstance(e, _Late) else "error"
            raise ToolFailed(remote.name, fault, f"MCP server {self.name} cannot be reached: {e}") from e
        self._still_granted(remote, listed)
        try:
            answer = deadline.wait(_submit(_call(session.ready.result(), remote.remote_name, arguments)))
        except _Late as e:
            raise TimeoutError(str(e)) from e  # after it was sent: the run decides about another try
        except Exception as e:
            raise self._failed(remote, session, e) from e
        return self._read(remote, answer)

    def _still_granted(self, remote: RemoteTool, listed: list[Listed]) -> None:
        try:
            now = _only(listed, remote.remote_name, self)
        except UsageError as e:
            raise ToolFailed(remote.name, "error", str(e)) from e
        if now.sha256 == remote.sha256:
            return
        reason = _other(remote.remote_name, remote.sha256, now)
        error = PolicyRefused(remote.name, f"{self.name}: {reason}; `agentkit mcp grant` shows it")
        if (run := current_run()) is not None:
            run.refuse(error)
        raise error

    def _failed(self, remote: RemoteTool, session: _Session, error: Exception) -> Exception:
        """What the run is told of a call that brought no result."""
        import mcp
        import mcp_types
        from pydantic import ValidationError

        if isinstance(error, mcp.MCPError) and error.code != mcp_types.CONNECTION_CLOSED:
            return ToolFailed(remote.name, "error", _clip(clean(error.message)))
        if isinstance(error, RuntimeError | ValidationError):  # the SDK's word for what breaks schema or protocol
            told = _clip(str(clean(str(error))).partition("\n")[0], 500)
            return ToolFailed(remote.name, "malformed", told, unknown=remote.permission != "read")
        self._drop(session)
        return ConnectionError(f"MCP server {self.name} was lost during the call: {self._why(session, error)}")

    def _read(self, remote: RemoteTool, answer: Any) -> dict[str, Any]:
        import mcp_types

        unknown = remote.permission != "read"
        if not isinstance(answer, mcp_types.CallToolResult):
            asked = ", ".join(sorted(r.method for r in (answer.input_requests or {}).values())) or "more input"
            raise ToolFailed(remote.name, "error", f"the server asked for {asked} in the middle of the call: refused")
        source = f"mcp:{self.name}.{remote.remote_name}"
        result = {"source": clean(source), "untrusted": True, **_contents(answer)}
        if answer.is_error:
            raise ToolFailed(remote.name, "error", _clip(str(result["content"])) or "no reason was given")
        size = len(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace"))
        if size > self.max_bytes:
            told = f"a result of {size:,} bytes; at most {self.max_bytes:,} are taken"
            raise ToolFailed(remote.name, "malformed", told, unknown=unknown)
        return result


async def _listing(client: mcp.Client, server: str) -> list[Listed]:
    found, cursor = list[Listed](), None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        found += [_listed(server, raw) for raw in page.tools]
        if (cursor := page.next_cursor) is None:
            return found
    raise ValueError(f"its listing has more than {_MAX_PAGES} pages")


async def _call(client: mcp.Client, name: str, arguments: dict[str, Any]) -> Any:
    return await client.session.call_tool(name, arguments, allow_input_required=True)


def _only(listed: list[Listed], name: str, server: Server) -> Listed:
    found = [t for t in listed if t.name == name]
    if not found:
        names = ", ".join(clean(t.name) for t in listed)
        raise UsageError(f"MCP server {server.name} offers no tool {name!r}; it offers: {_clip(names) or 'none'}")
    if len(found) > 1:
        raise UsageError(f"MCP server {server.name} offers {len(found)} tools called {name!r}; none of them is used")
    return found[0]


def _other(name: str, pin: str, now: Listed) -> str:
    return f"what it lists as {name!r} is not what was granted (sha256 {pin[:12]} then, {now.sha256[:12]} now)"


def _claimed(listed: Listed) -> str | None:
    return {True: "read", False: "write"}.get(listed.hints.get("readOnlyHint"))  # type: ignore[arg-type]


def _says_it_changes(listed: Listed) -> str | None:
    for name, value in (("destructiveHint", True), ("readOnlyHint", False)):
        if listed.hints.get(name) is value:
            return f"{name}: {str(value).lower()}"
    return None


def _contents(answer: mcp_types.CallToolResult) -> dict[str, Any]:
    """`content` (all text), `data` (structured content) and `attachments` (what else there is, described)."""
    texts = [block.text for block in answer.content if block.type == "text"]
    attached = [_described(block) for block in answer.content if block.type != "text"]
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


def _described(block: Any) -> dict[str, Any]:
    """An image, sound, link or resource in words; a resource that is text, with its text."""
    if block.type in ("image", "audio"):
        return {"type": block.type, "mime_type": block.mime_type, "bytes": len(block.data) * 3 // 4}
    if block.type == "resource_link":
        return {"type": "link", "uri": str(block.uri), "name": block.name, "mime_type": block.mime_type}
    resource = block.resource
    made = {"type": "resource", "uri": str(resource.uri), "mime_type": resource.mime_type}
    text = getattr(resource, "text", None)
    return {**made, "bytes": len(resource.blob) * 3 // 4} if text is None else {**made, "text": text}


class RemoteTool(Tool[..., Any]):
    """A granted tool of an MCP server.

    It returns `{"source": "mcp:everything.echo", "untrusted": True, "content": text}`, with `data` (structured content) and
    `attachments` (images, sounds, links and resources, described) where there are any.
    """

    server: Server
    remote_name: str
    sha256: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise UsageError(f"tool {self.name!r} takes its arguments by name")
        run = current_run()
        return self.invoke(self.validate(kwargs), key="") if run is None else run.call(self, **kwargs)

    def spec(self) -> dict[str, Any]:
        """As of any tool, and where it comes from."""
        origin = {"server": self.server.label, "tool": self.remote_name, "sha256": self.sha256}
        return {**super().spec(), "mcp": origin}


def tool(
    server: Server,
    name: str,
    *,
    sha256: str,
    description: str,
    parameters: dict[str, Any],
    alias: str | None = None,
    **options: Unpack[ToolOptions],
) -> RemoteTool:
    """Declare a tool of a server with its pin, without connecting; `agentkit mcp grant` prints the declaration.

    It connects at its first call and is refused (`PolicyRefused`) if the server then lists anything else under that name.

    Args:
        name: as the server lists it.
        sha256: over name, description, schema and hints as the server lists them.
        description, parameters: what our model reads and what arguments are checked against; yours to sharpen.
        alias: what we call it; default: the server's name, an underscore, the tool's name.
        options: as of `agentkit.tool`; `permission` must be among them.

    Raises:
        UsageError: no permission, no pin, or a schema that is none or refers to something outside itself.
    """
    if "permission" not in options:
        raise UsageError(f"say what {name!r} may do: permission='read', 'write' or 'execute'")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError(
            f"{name!r}: sha256 must be 64 hexadecimal digits, got {sha256!r}; `agentkit mcp grant` prints it"
        )
    if outside := sorted(set(_references(parameters))):
        raise UsageError(f"{name!r}: its schema refers to {outside[0]!r}, outside itself; nothing is fetched")
    # Providers want letters, digits, underscores, at most 64 of them.
    called = _identifier(alias or f"{server.name}_{name}")

    def call(**arguments: Any) -> dict[str, Any]:
        return server.call(remote, arguments)

    remote: Any = RemoteTool.from_schema(called, description, parameters, call, **options)
    remote.server, remote.remote_name, remote.sha256 = server, name, sha256
    found: RemoteTool = remote
    if findings := _errors_of(found):
        raise UsageError(f"{name!r}: {findings[0].where}: {findings[0].message}")
    return found


def _errors_of(remote: RemoteTool) -> list[Finding]:
    from agentkit.tool_lint import ToolSchema, lint

    return [f for f in lint([ToolSchema.from_spec(remote.spec())]) if f.severity == "error"]


def _references(schema: Any) -> Iterator[str]:
    """References that do not stay in the schema: whoever checks arguments by it must not be sent to fetch them."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and not str(value).startswith("#"):
                yield str(value)
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


# ---- our systems as tools


def serve(
    systems: System | Sequence[System],
    *,
    transport: Literal["stdio", "http"] = "stdio",
    host: str = "127.0.0.1",
    port: int = 8321,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    at_once: int = 4,
) -> None:
    """Serve systems as an MCP server, one tool each, until the client goes (stdio) or the process is stopped (http).

    Args:
        transport: `http` is streamable HTTP at `/mcp`.
        token: what callers bear (`Authorization: Bearer …`); default: the environment variable AGENTKIT_MCP_TOKEN.
            Without one, `http` is for this machine only.
        allowed_hosts: further `Host` headers to answer to, such as `agents.example.com`, behind a proxy.
        at_once: runs at the same time; more wait.

    Raises:
        UsageError: a host that others can reach, and no token; a token of fewer than 16 characters; two systems of a name.
    """
    import anyio

    if transport == "stdio":
        anyio.run(_over_stdio, build_server(systems, at_once=at_once))
        return
    import uvicorn

    app = asgi_app(systems, host=host, port=port, token=token, allowed_hosts=allowed_hosts, at_once=at_once)
    uvicorn.run(app, host=host, port=port, log_level="warning", ws="none")


async def _over_stdio(server: Protocol[Any]) -> None:
    from mcp.server.stdio import stdio_server

    async with stdio_server() as (read, write):  # what our code prints goes to stderr meanwhile
        await server.run(read, write, server.create_initialization_options())


def asgi_app(
    systems: System | Sequence[System],
    *,
    host: str = "127.0.0.1",
    port: int = 8321,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    at_once: int = 4,
) -> ASGIApp:
    """The ASGI application behind `serve(transport="http")`, for a server of your own; arguments and errors are its."""
    from mcp.server.transport_security import TransportSecuritySettings

    token = token or os.environ.get(TOKEN) or None
    if token is not None and len(token) < 16:
        raise UsageError(f"the token of an MCP server ({TOKEN}) has at least 16 characters")
    if token is None and not _is_loopback(host):
        raise UsageError(f"{host} can be reached by others: set {TOKEN} to a secret that callers must bear")
    names = ["127.0.0.1", "localhost", "[::1]", host, *allowed_hosts]
    # A page in a browser must not reach us through a name that it points to this machine (DNS rebinding).
    security = TransportSecuritySettings(
        allowed_hosts=[form for name in names for form in (name, f"{name}:*")],
        allowed_origins=[
            f"{scheme}://{form}" for name in names for scheme in ("http", "https") for form in (name, f"{name}:*")
        ],
    )
    app = build_server(systems, at_once=at_once).streamable_http_app(transport_security=security)
    return app if token is None else _Bearer(app, token)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Bearer:
    """Lets through what bears the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _allows(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def build_server(systems: System | Sequence[System], *, at_once: int = 4) -> Protocol[Any]:
    """The protocol's server object, to be run over a transport of your own.

    Runs ask whoever is asked where this was called (`agentkit.approve_with`); where nobody is, the answer is no.
    """
    _sdk()
    import anyio
    import mcp_types
    from mcp import MCPError
    from mcp.server import Server as Protocol

    import agentkit

    exposed = _Exposed.all_of(systems)
    context = copy_context()
    limiter: list[anyio.CapacityLimiter] = []  # made where the event loop is

    async def listing(_: Any, __: Any) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(tools=[one.described() for one in exposed.values()])

    async def calling(_: Any, asked: mcp_types.CallToolRequestParams) -> mcp_types.CallToolResult:
        if (one := exposed.get(asked.name)) is None:
            raise MCPError(mcp_types.INVALID_PARAMS, f"no tool {asked.name!r}; there are {sorted(exposed)!r}")
        if not limiter:
            limiter.append(anyio.CapacityLimiter(at_once))
        work: Callable[[], mcp_types.CallToolResult] = lambda: one.answer(context.copy(), asked.arguments or {})  # noqa: E731
        # A run cannot be stopped half-way: it goes on, and keeps its place, though the caller be gone.
        return await anyio.to_thread.run_sync(work, limiter=limiter[0])

    name = next(iter(exposed)) if len(exposed) == 1 else "agentkit"
    return Protocol(name, version=agentkit.__version__, on_list_tools=listing, on_call_tool=calling)


class _Exposed:
    """One system as a tool."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.names, self.required = system.input_names()
        self.adapters, self.schema = _input_schema(system)

    @classmethod
    def all_of(cls, systems: System | Sequence[System]) -> dict[str, _Exposed]:
        made = [cls(system) for system in ([systems] if not isinstance(systems, Sequence) else systems)]
        found = {one.system.name: one for one in made}
        if not made or len(found) != len(made):
            raise UsageError("an MCP server needs systems, and each a name of its own")
        return found

    def described(self) -> mcp_types.Tool:
        import mcp_types

        changes = any(t["permission"] != "read" for t in self.system.spec()["tools"].values())
        # Of an adopted program's own doings nothing is known, so nothing is claimed.
        known = mcp_types.ToolAnnotations(read_only_hint=not changes, destructive_hint=changes)
        return mcp_types.Tool(
            name=self.system.name,
            description=_told(self.system),
            input_schema=self.schema,
            output_schema=_output_schema(self.system),
            annotations=known if self.system.agents else None,
        )

    def answer(self, context: Context, arguments: dict[str, Any]) -> mcp_types.CallToolResult:
        """Run once; what goes wrong is told, without traceback and secrets."""
        try:
            record = context.run(self.system.run, **self._inputs(arguments))
        except AgentkitError as e:
            return _answer(_public(str(e)), error=True)
        meta = _meta(record)
        if record.state != "DONE":
            return _answer(_public(record.error or record.state), error=True, meta=meta)
        text = json.dumps(record.output, ensure_ascii=False, default=str)
        return _answer(text, data=record.output, meta=meta)

    def _inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        from pydantic import ValidationError

        # `run` has options of its own (`kind`, `ledger`): only inputs may come from outside.
        allowed = set(self.names) if self.names else arguments.keys() - {"kind", "ledger"}
        if unknown := sorted(arguments.keys() - allowed):
            raise UsageError(f"{self.system.name} has no input {unknown[0]!r}; it takes {sorted(self.names)!r}")
        made = dict(arguments)
        for name, adapter in self.adapters.items():
            if name in made:
                try:
                    made[name] = adapter.validate_python(made[name])
                except ValidationError as e:
                    problem = e.errors(include_input=False, include_url=False)[0]
                    raise UsageError(f"input {name!r} does not fit: {problem['msg']}") from e
        return made


def _answer(text: str, *, data: Any = None, error: bool = False, meta: Any = None) -> mcp_types.CallToolResult:
    import mcp_types

    block = mcp_types.TextContent(text=text)
    return mcp_types.CallToolResult(content=[block], structured_content=data, is_error=error, _meta=meta)


def _meta(record: RunRecord) -> dict[str, Any]:
    return {
        f"agentkit/{name}": getattr(record, name) for name in ("run_id", "release", "state", "route", "seconds", "usd")
    }


_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.I)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")


def _public(text: str) -> str:
    """An error's text for a caller outside: nothing that is or looks like a secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, f"[{name}]")
    return _clip(_USERINFO.sub("", str(without_secrets(clean(text)))), 1_000)


# ---- what a system says of itself


def _told(system: System) -> str:
    """What it does, from the router's instructions or the docstrings of its agents or program."""
    if system.router is not None:
        return inspect.cleandoc(system.router.signature.instructions)
    program = getattr(system, "program", None)
    if program is not None:
        lone = getattr(program, "predict", program)
        texts = [getattr(getattr(lone, "signature", None), "instructions", None), _own_doc(program)]
    else:
        texts = [_own_doc(agent) for agent in system.agents.values()]
    return inspect.cleandoc(next((t for t in texts if t), f"Run the agent system {system.name}."))


def _own_doc(thing: Any) -> str | None:
    """The docstring of a function, or of the object's own class: that of `Agent` says nothing about an agent."""
    own = thing if inspect.isroutine(thing) else vars(type(thing))
    return own.get("__doc__") if isinstance(own, Mapping) else own.__doc__


def _annotations(system: System) -> dict[str, list[Any]]:
    """The types each input is declared with, by the router and the agents, or by the adopted program."""
    found: dict[str, list[Any]] = {}

    def add(hints: Mapping[str, Any]) -> None:
        for name, hint in hints.items():
            if hint not in found.setdefault(name, []):
                found[name].append(hint)

    if system.router is not None:
        add({name: field.annotation for name, field in system.router.signature.input_fields.items()})
    for agent in system.agents.values():
        add(_hints(type(agent).plan))
    program = getattr(system, "program", None)
    if program is not None:
        lone = getattr(program, "predict", program)
        if hasattr(lone, "signature"):
            add({name: field.annotation for name, field in lone.signature.input_fields.items()})
        else:
            add(_hints(getattr(type(program), "forward", None) or program))
    return found


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # a type that only a type checker imports, or an object that is no function
        return {}


def _input_schema(system: System) -> tuple[dict[str, TypeAdapter[Any]], dict[str, Any]]:
    """How inputs are read, and the JSON schema of them all; an input without a type is a string."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter
    from pydantic.errors import PydanticInvalidForJsonSchema

    names, required = system.input_names()
    declared = _annotations(system)
    adapters: dict[str, TypeAdapter[Any]] = {}
    for name in names:
        hints = declared.get(name) or [str]
        with suppress(PydanticSchemaGenerationError):  # an object that is no data
            either: Any = Union[tuple(hints)]  # noqa: UP007
            adapters[name] = TypeAdapter(either)
    try:
        by_name, shared = TypeAdapter.json_schemas([(name, "validation", a) for name, a in adapters.items()])
    except PydanticInvalidForJsonSchema:
        by_name, shared = {}, {}
    texts = _texts(system)
    properties: dict[str, Any] = {}
    for name in names:
        told = {"description": texts[name]} if name in texts else {}
        properties[name] = {**by_name.get((name, "validation"), {}), **told}
    schema = {"type": "object", "properties": properties, "required": sorted(required)}
    return adapters, {**schema, "additionalProperties": not names, **shared}


def _texts(system: System) -> dict[str, str]:
    """What the router's or the lone program's signature says of its fields."""
    program = getattr(system, "program", None)
    signature = getattr(system.router or getattr(program, "predict", program), "signature", None)
    fields = signature.input_fields.items() if signature is not None else ()
    texts = {name: str((field.json_schema_extra or {}).get("desc", "")) for name, field in fields}
    return {name: text for name, text in texts.items() if text and text != f"${{{name}}}"}  # DSPy's placeholder


def _output_schema(system: System) -> dict[str, Any] | None:
    """The schema of `RunRecord.output`: the agents' results, or None where a program declares none."""
    from pydantic import RootModel
    from pydantic.json_schema import models_json_schema

    results = list(dict.fromkeys(agent.result for agent in system.agents.values()))
    if not results:
        return None
    by_model, shared = models_json_schema([(r, "serialization") for r in results], by_alias=False)
    wrapped = [
        {"type": "object", "properties": {"value": s}, "required": ["value"]} if issubclass(r, RootModel) else s
        for r, s in ((r, by_model[(r, "serialization")]) for r in results)
    ]
    return {"type": "object", "anyOf": wrapped, **shared}
