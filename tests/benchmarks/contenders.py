"""One agent, one model call, text in and text out, in ours and in other frameworks; each in a process of its own.

    python contenders.py agentkit|langgraph|openai-agents|pydantic-ai

Every model is the framework's own kind of fake, answers at once and in process; what remains is overhead. The others
are in their plainest form, with tracing off and inside one event loop; ours has everything on that a run has in
production but the MLflow trace: states, permissions, budget, record, run log. First the version is printed, or nothing
if it is not installed; then for each number read from standard input the seconds that so many calls took.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

QUESTION, ANSWER = "Is it raining?", "yes"
Calls = Callable[[int], object]


def agentkit() -> Calls:
    import dspy
    from dspy.lm15 import Message, Response, TextPart, Usage
    from pydantic import BaseModel

    import agentkit as ak
    from agentkit.models import MeteredLM, Price

    class Engine:
        def complete(self, request: object) -> Response:
            message = Message.assistant([TextPart(f"[[ ## answer ## ]]\n{ANSWER}\n\n[[ ## completed ## ]]")])
            usage = Usage(input_tokens=10, output_tokens=5, total_tokens=15)
            return Response(id=None, model="no-op", message=message, finish_reason="stop", usage=usage)

        def close(self) -> None: ...

    class Answer(BaseModel):
        text: str

    @ak.tool(permission="write", human_at={"usd": 50})
    def pay(usd: float) -> str:
        """Pay; from $50.00 on a person decides."""
        return f"paid {usd}"

    class Helper(ak.Agent):
        name, result, tools = "helper", Answer, (pay,)

        def __init__(self) -> None:
            super().__init__()
            self.reply = dspy.Predict("question -> answer")

        def plan(self, run: ak.Run, question: str) -> None: ...

        def execute(self, run: ak.Run, plan: None, question: str) -> str:
            return str(self.reply(question=question).answer)

        def reflect(self, run: ak.Run, plan: None, facts: str, question: str) -> Answer:
            return Answer(text=facts)

    lm = MeteredLM("embedded/no-op", engine=Engine(), cache=False, num_retries=0)
    lm.price = Price(input=1, output=1)
    budget = ak.Budget(model_calls=10, usd=1)
    system = ak.System("bench", [Helper()], budget=budget)
    system._lm = ((system.model, id(system.weights)), lm)

    def call() -> None:
        record = system.run(question=QUESTION)
        assert record.output == {"text": ANSWER}, record.error

    return _repeat(call)


def langgraph() -> Calls:
    from langchain_core.language_models.fake_chat_models import FakeListChatModel
    from langgraph.graph import END, START, MessagesState, StateGraph

    model = FakeListChatModel(responses=[ANSWER])
    graph = StateGraph(MessagesState)
    graph.add_node("agent", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "agent")
    graph.add_edge("agent", END)
    agent = graph.compile()

    def call() -> None:
        assert agent.invoke({"messages": [("user", QUESTION)]})["messages"][-1].content == ANSWER

    return _repeat(call)


def openai_agents() -> Calls:
    from agents import Agent, Model, ModelResponse, Runner, Usage, set_tracing_disabled
    from openai.types.responses import ResponseOutputMessage, ResponseOutputText

    class Fake(Model):
        async def get_response(self, *_: Any, **__: Any) -> ModelResponse:
            text = ResponseOutputText(text=ANSWER, type="output_text", annotations=[])
            message = ResponseOutputMessage(
                id="m", content=[text], role="assistant", status="completed", type="message"
            )
            usage = Usage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
            return ModelResponse(output=[message], usage=usage, response_id=None)

        def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
            raise NotImplementedError  # abstract in Model; Runner.run, which is measured, never streams

    set_tracing_disabled(True)
    agent = Agent(name="helper", instructions="Answer.", model=Fake())

    async def call() -> None:
        assert (await Runner.run(agent, QUESTION)).final_output == ANSWER

    return _repeat_in_loop(call)


def pydantic_ai() -> Calls:
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelResponse, TextPart
    from pydantic_ai.models.function import FunctionModel

    agent = Agent(FunctionModel(lambda messages, info: ModelResponse(parts=[TextPart(ANSWER)])), instructions="Answer.")

    async def call() -> None:
        assert (await agent.run(QUESTION)).output == ANSWER

    return _repeat_in_loop(call)


def _repeat(call: Callable[[], object]) -> Calls:
    def calls(count: int) -> None:
        for _ in range(count):
            call()

    return calls


def _repeat_in_loop(call: Callable[[], Awaitable[object]]) -> Calls:
    async def calls(count: int) -> None:
        for _ in range(count):
            await call()

    runner = asyncio.Runner()
    return lambda count: runner.run(calls(count))


# Distribution, and what makes its calls.
CONTENDERS: dict[str, tuple[str, Callable[[], Calls]]] = {
    "agentkit": ("agentkit-hedgehog", agentkit),
    "langgraph": ("langgraph", langgraph),
    "openai-agents": ("openai-agents", openai_agents),
    "pydantic-ai": ("pydantic-ai-slim", pydantic_ai),
}


def main() -> None:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):  # tracing goes to a server; nobody's is measured
        os.environ[name] = "false"
    os.environ |= {"AGENTKIT_TRACES": "off", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    distribution, prepare = CONTENDERS[sys.argv[1]]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return
    with tempfile.TemporaryDirectory(prefix="agentkit-bench-") as home:
        os.environ["AGENTKIT_HOME"] = home
        calls = prepare()
        calls(20)
        print(version, flush=True)
        for line in sys.stdin:
            gc.collect()
            start = time.perf_counter()
            calls(int(line))
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
