"""The metered `dspy.LM` that every model call inside a run goes through.

A call goes through, in order: cache, then for each attempt circuit breaker, budget, time-out; failed attempts are
repeated, then the models of the fallback chain asked, then the run ends with one clear line.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import dspy

from agentkit import clock
from agentkit.answers import Answer
from agentkit.asked import Asked
from agentkit.breaker import Breaker, CircuitOpen
from agentkit.calls import Call, Interceptor, around, around_attempt, interceptors
from agentkit.current import current_run
from agentkit.errors import MalformedOutput, ModelError
from agentkit.jsonable import canonical, jsonable
from agentkit.model_cache import AnswerCache, key_of, note_use, shared_cache
from agentkit.model_errors import advice, falls_back, is_outage
from agentkit.retries import again
from agentkit.runs import REHEARSALS
from agentkit.settings import SETTINGS_FILE, Price

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agentkit.budget import Ledger
    from agentkit.runs import Run
    from agentkit.settings import CacheSettings

_ASSUMED_TOKENS_OUT = 1000  # reserved for an answer that nothing limits; settled to the true number afterwards
# What a request asks for at most when it names no max_tokens and the budget limits its answer: twenty calls at once fit
# into the default budget. Reasoning models spend most of it before the answer begins.
_MOST_TOKENS_OUT, _MOST_REASONING = 2048, 16_000
_LEAST_TOKENS_OUT = 256  # with less left the answer would only be cut off: the budget refuses instead


@dataclass(slots=True)
class _Sent:
    """What DSPy tells of a request on its way; `keep` says whether the caller wants it in DSPy's history."""

    keep: bool
    entry: dict[str, Any] | None = None


_Taps = tuple[tuple[Interceptor, ...], Call]
_sent: ContextVar[_Sent | None] = ContextVar("agentkit_sent", default=None)
_breakers: dict[tuple[str, str, int, float], Breaker] = {}


class MeteredLM(dspy.LM):  # type: ignore[misc]
    """A `dspy.LM` whose calls inside a run are reserved in the run's budget, timed, priced and recorded.

    It repeats failed attempts itself, since each is a request the provider may charge: each is reserved and recorded.
    DSPy's cache is never used: a cached answer would look fast and free. Our own (`[cache]`) records what it answers.
    """

    price: Price | None = None
    retries: int = 0
    others: Callable[[str], tuple[MeteredLM, ...]] | None = None  # builds a model's fallbacks; None means none
    caching: CacheSettings | None = None  # of our cache; None means that it is not used
    circuit: tuple[str, str, int, float] | None = None  # provider, address, failures, seconds; shared by the process
    _others: tuple[MeteredLM, ...] | None = None

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        kwargs["cache"] = False
        asked, run = Asked(prompt, messages, kwargs), current_run()
        taps = _outside() if run is None else run.interceptors
        try:
            answer = self._within(taps, asked, run) if taps else self._answer(asked, run, None)
        except ModelError:
            if run is not None:
                run.failures += 1  # a call that a retry or another model saved is none
            raise
        return answer.outputs if answer.typed is None else answer.typed

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """`__call__` beside a running event loop, on a thread: waits, breaker and interceptors are the same."""
        import anyio

        call = partial(self, prompt, messages=messages, **kwargs)
        # A limiter of its own: how many calls run at once is for the budget to say, not for a default of 40.
        return await anyio.to_thread.run_sync(call, limiter=anyio.CapacityLimiter(1))

    def update_history(self, entry: dict[str, Any]) -> None:
        """DSPy hands over usage and cost here, on the calling thread, once per answered call."""
        sent = _sent.get()
        if sent is not None:
            sent.entry = entry
        if sent is None or sent.keep:
            super().update_history(entry)

    # ---- the whole call

    def _within(self, taps: tuple[Interceptor, ...], asked: Asked, run: Run | None) -> Answer:
        request, made = self._data(asked), False
        call = _call_outside(self.model, request) if run is None else run.next_call("model", self.model, request)
        known = 0 if run is None else len(run.steps)

        def proceed() -> dict[str, Any]:
            nonlocal made
            made = True
            return self._answer(asked, run, (taps, call)).reply()

        answer = Answer.of_reply(around(taps, call, proceed))
        if not made and run is not None and len(run.steps) == known:
            # Answered from a recording that left no trace in the run: it counts, but nothing has to be set aside.
            with run.model_call(answer.model, {}) as step:
                answer.write_to(step)
        return answer

    def _answer(self, asked: Asked, run: Run | None, taps: _Taps | None) -> Answer:
        cache, key = self._cache(asked, run)
        # What records exchanges has to see one.
        if cache is None or (taps is not None and any(getattr(tap, "is_recording", False) for tap in taps[0])):
            return self._chain(asked, run, taps)
        note_use(cache, key)
        if (kept := cache.get(key)) is not None:
            if run is not None:
                run.heed()
                run.note("model", self.model, model=self.model, outputs=jsonable(kept.outputs), cached=True)
            return kept
        answer = self._chain(asked, run, taps)
        if answer.model == self.model:  # not that of a fallback: it is no answer of this model
            cache.keep(key, answer)
        return answer

    def _chain(self, asked: Asked, run: Run | None, taps: _Taps | None) -> Answer:
        """This model's answer, or else that of the first of its fallbacks that gives one."""
        try:
            return self._alone(asked, run, taps)
        except ModelError as e:
            if not falls_back(e.__cause__) or not (others := self._fallbacks()):
                raise
            return _ask_others(others, e, asked, run, taps)

    def _alone(self, asked: Asked, run: Run | None, taps: _Taps | None) -> Answer:
        """This model's own answer, its retries included, its fallbacks not."""
        try:
            try:
                return self._attempt(asked, run, taps)
            except dspy.LMError as e:
                return again(partial(self._attempt, asked, run, taps), e, self.retries, run)
        except (dspy.LMError, CircuitOpen) as e:
            raise ModelError(f"{self.model}: {advice(e)}") from e

    def _data(self, asked: Asked) -> dict[str, Any]:
        return asked.data(self.model, self.model_type, self.kwargs)

    def _cache(self, asked: Asked, run: Run | None) -> tuple[AnswerCache | None, str]:
        settings = self.caching
        if settings is None or (run is not None and run.kind in REHEARSALS and not settings.evaluations):
            return None, ""
        release = "" if run is None else run.release or f"draft of {run.system}"
        request = self._data(asked)
        return shared_cache(settings), key_of(release, asked.place(self.kwargs), request)

    def _fallbacks(self) -> tuple[MeteredLM, ...]:
        if self._others is None:
            self._others = () if self.others is None else self.others(self.model)
        return self._others

    # ---- one attempt

    def _attempt(self, asked: Asked, run: Run | None, taps: _Taps | None) -> Answer:
        if self.circuit is None:
            return self._metered(asked, run, taps)
        breaker = _breakers.get(self.circuit) or _breakers.setdefault(self.circuit, Breaker(*self.circuit[2:]))
        return breaker.call(partial(self._metered, asked, run, taps), is_outage)

    def _metered(self, asked: Asked, run: Run | None, taps: _Taps | None) -> Answer:
        if run is None:
            return self._whole(self._send(asked, {}) if taps is None else self._tapped(asked, taps, {}))
        reserved, limits = self._reservation(run.ledger, asked)
        with run.model_call(self.model, reserved) as step:
            answer = self._send(asked, limits) if taps is None else self._tapped(asked, taps, limits)
            answer.write_to(step)
            return self._whole(answer)

    def _tapped(self, asked: Asked, taps: _Taps, limits: dict[str, Any]) -> Answer:
        """One request, within what stands around it, which may answer in the engine's place."""
        standing, call = taps
        if call.name != self.model:
            call = replace(call, name=self.model, arguments=self._data(asked))
        sent: list[Answer] = []

        def proceed() -> dict[str, Any]:
            sent.append(self._send(asked, limits))
            return sent[0].reply()

        answer = Answer.of_reply(around_attempt(standing, call, proceed))
        answer.cost = self._usd(answer)
        if not sent:
            self._remember(asked, answer)
        return answer

    def _send(self, asked: Asked, limits: dict[str, Any]) -> Answer:
        """One request to the engine."""
        settings = dspy.settings
        sent = _Sent(keep=not settings.disable_history)
        if limits:
            asked = asked.limited(limits)
        token = _sent.set(sent)
        try:
            if sent.keep and settings.send_stream is None:
                value = super().__call__(asked.prompt, messages=asked.messages, **asked.options)
            else:
                # Without DSPy's history there would be no usage, and the call would look free.
                with dspy.context(disable_history=False), _noting_what_was_emitted():
                    value = super().__call__(asked.prompt, messages=asked.messages, **asked.options)
        finally:
            _sent.reset(token)
        answer = Answer.of_entry(sent.entry or {"outputs": value}, self.model, value)
        answer.cost = self._usd(answer)
        return answer

    def _whole(self, answer: Answer) -> Answer:
        """The answer, if the model has finished it.

        Raises:
            MalformedOutput: it was cut off at max_tokens.
            ModelError: a content filter stopped it; no other model is asked round the filter.
        """
        if answer.finish == "length":
            tokens = answer.usage.get("completion_tokens") or "its"
            found = f"the answer was cut off after {tokens} tokens; raise `max_tokens` in [options] of {SETTINGS_FILE}"
            raise MalformedOutput(self.model, found)
        if answer.finish == "content_filter":
            raise ModelError(f"{self.model}: the provider's content filter stopped the answer")
        return answer

    def _reservation(self, ledger: Ledger, asked: Asked) -> tuple[dict[str, float], dict[str, Any]]:
        """What to set aside, and what the request must carry so that it cannot become more."""
        options = {**self.kwargs, **asked.options}
        answers = options.get("n") or 1
        tokens_in = asked.tokens_in(options) * answers
        most = asked.max_tokens(options)
        limits: dict[str, Any] = {}
        if self.is_remote:
            most, limits = self._limits(ledger, options, most, tokens_in, answers)
        tokens_out, usd = (most or _ASSUMED_TOKENS_OUT) * answers, 0.0
        if self.price is not None:
            usd = self.price.usd(tokens_in, tokens_out)
        elif ledger.limits("usd"):
            raise ModelError(f"a USD limit is set but no price is known for {self.model}; add it to [prices]")
        return {"model_calls": 1, "tokens_in": tokens_in, "tokens_out": tokens_out, "usd": usd}, limits

    def _limits(
        self, ledger: Ledger, options: dict[str, Any], most: int | None, tokens_in: float, answers: int
    ) -> tuple[int | None, dict[str, Any]]:
        """The longest answer, tokens, and the options that say so to the provider, where the budget is limited."""
        limits: dict[str, Any] = {}
        if most is None and (ledger.limits("tokens_out") or ledger.limits("usd")):
            # Reasoning models are told by another name; DSPy's LM has chosen it.
            name = "max_completion_tokens" if "max_completion_tokens" in self.kwargs else "max_tokens"
            most = limits[name] = self._affordable(ledger, tokens_in, answers, reasoning=name != "max_tokens")
        timeout = options.get("timeout")
        if isinstance(timeout, int | float) and (left := ledger.seconds_left) < timeout:
            # Whole seconds: DSPy opens a connection pool for every time-out it has not seen yet.
            limits["timeout"] = float(max(1, math.ceil(left)))
        return most, limits

    def _affordable(self, ledger: Ledger, tokens_in: float, answers: int, *, reasoning: bool) -> int:
        """How long one answer may become, tokens, with what is left of the budget."""
        left = ledger.left("tokens_out")
        if self.price is not None and self.price.output > 0:
            left = min(left, (ledger.left("usd") - self.price.usd(tokens_in, 0)) * 1e6 / self.price.output)
        wanted = _MOST_REASONING if reasoning else _MOST_TOKENS_OUT
        return max(_LEAST_TOKENS_OUT, int(min(wanted, left / answers)))

    def _usd(self, answer: Answer) -> float | None:
        """What an answer costs, USD; None when nobody knows."""
        if self.price is None:
            return answer.cost
        tokens_in = answer.usage.get("prompt_tokens") or 0
        if not tokens_in and self.price != Price(input=0, output=0):
            return None  # no prompt has no tokens: the provider did not count
        return self.price.usd(tokens_in, answer.usage.get("completion_tokens") or 0)

    def _remember(self, asked: Asked, answer: Answer) -> None:
        """Write an answer that did not come from the engine into DSPy's history and usage."""
        if dspy.settings.usage_tracker:
            dspy.settings.usage_tracker.add_usage(self.model, answer.usage)
        if not dspy.settings.disable_history:
            entry = {
                "prompt": None if asked.is_typed else asked.prompt,
                "messages": asked.messages,
                "kwargs": {k: v for k, v in asked.options.items() if not k.startswith("api_")},
                "response": answer.typed,
                "outputs": answer.outputs,
                "usage": answer.usage,
                "cost": answer.cost,
                "timestamp": clock.utc().isoformat(),
                "uuid": uuid.uuid4().hex,
                "model": self.model,
                "response_model": answer.response_model,
                "model_type": self.model_type,
            }
            super().update_history(entry)

    @property
    def is_remote(self) -> bool:
        """Whether a provider answers; an engine object, as the embedded one, works in process and costs nothing."""
        return isinstance(self.engine, str)

    @property
    def address(self) -> str:
        return str(self.kwargs.get("api_base") or self.kwargs.get("base_url") or "")


def _ask_others(
    others: tuple[MeteredLM, ...], failed: ModelError, asked: Asked, run: Run | None, taps: _Taps | None
) -> Answer:
    """The answer of the first model of the fallback chain that gives one; the run's budget is theirs, too."""
    from dspy.clients._deprecation import adapter_message_call

    failures = [failed]
    for lm in others:
        if run is not None:
            run.decide("fallback", lm.model, str(failures[-1]))
        theirs = asked.to_another(lm.model)
        try:
            # DSPy ties an adapter's messages to the one LM it called, and warns of any other.
            with adapter_message_call(lm, theirs.messages):
                return lm._alone(theirs, run, taps)
        except ModelError as e:
            if not falls_back(e.__cause__):
                raise
            failures.append(e)
    raise ModelError("; ".join(map(str, failures))) from failures[-1].__cause__


@contextmanager
def _noting_what_was_emitted() -> Iterator[None]:
    """Where `dspy.streamify` shows an answer while it comes, an error says whether part of it was shown."""
    from dspy.clients.call_context import adapter_fallback_scope

    with adapter_fallback_scope() as progress:
        try:
            yield
        except dspy.LMError as e:
            e.emitted = progress.emitted
            raise


def _outside() -> tuple[Interceptor, ...]:
    """Those that stand around calls of no run, too: a cassette does, since a replay must not reach the network."""
    standing = interceptors()
    return tuple(one for one in standing if getattr(one, "outside_runs", False)) if standing else ()


def _call_outside(model: str, request: dict[str, Any]) -> Call:
    """A call that belongs to no run, as when a program is tuned."""
    key = hashlib.sha256(canonical(request)).hexdigest()[:32]
    return Call("model", model, request, 0, key, None, cast("Any", None))


def reset_circuits() -> None:
    """Close the circuits of all providers; after injected faults, which say nothing about them."""
    for breaker in _breakers.values():
        breaker.reset()
