"""Answers of models kept in this process, keyed by everything that could change them."""

from __future__ import annotations

import hashlib
import threading
from contextvars import ContextVar
from typing import Any

from agentkit import clock
from agentkit.answers import Answer, Reply
from agentkit.jsonable import canonical
from agentkit.settings import CacheSettings


class AnswerCache:
    """The most recently used answers, each for a limited time. Safe to share between threads."""

    def __init__(self, settings: CacheSettings) -> None:
        from cachetools import TTLCache  # of use only to who turns the cache on

        self._lock = threading.Lock()
        self._kept: TTLCache[str, Reply] = TTLCache(settings.entries, settings.seconds, timer=clock.monotonic)

    def get(self, key: str) -> Answer | None:
        """The answer kept under `key`, as good as new: what its reader does to it is not kept."""
        with self._lock:
            reply = self._kept.get(key)
        if reply is None:
            return None
        answer = Answer.of_reply(reply)
        answer.cached = True
        return answer

    def keep(self, key: str, answer: Answer) -> None:
        """Keep an answer; an empty one is not worth it."""
        if not any(answer.outputs):
            return
        reply = answer.reply()
        with self._lock:
            self._kept[key] = reply

    def forget(self, key: str) -> None:
        """Drop an answer that turned out to be of no use."""
        with self._lock:
            self._kept.pop(key, None)


def key_of(release: str, server: str, request: dict[str, Any]) -> str:
    """A SHA-256 over release (or draft), server address, model, messages and every parameter."""
    return hashlib.sha256(canonical([release, server, request])).hexdigest()


Used = list[tuple[AnswerCache, str]]
_used: ContextVar[Used | None] = ContextVar("agentkit_used_answers", default=None)


class used_answers:  # a class: a generator would cost more than the call it is around
    """Within: a list of the cache entries that calls read or wrote."""

    __slots__ = ("_token", "_used")

    def __enter__(self) -> Used:
        self._used: Used = []
        self._token = _used.set(self._used)
        return self._used

    def __exit__(self, *_: object) -> None:
        _used.reset(self._token)


def note_use(cache: AnswerCache, key: str) -> None:
    """Tell `used_answers`."""
    used = _used.get()
    if used is not None:
        used.append((cache, key))


_caches: dict[CacheSettings, AnswerCache] = {}
_lock = threading.Lock()


def shared_cache(settings: CacheSettings) -> AnswerCache | None:
    """The process's cache for these settings; None when it is off."""
    if not settings.enabled:
        return None
    with _lock:
        if settings not in _caches:
            _caches[settings] = AnswerCache(settings)
        return _caches[settings]
