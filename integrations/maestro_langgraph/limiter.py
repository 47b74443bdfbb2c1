"""The gate for chat models that are not on the OpenAI SDK: LangChain's rate limiter, for `maestro.wrap_model`.

LangChain asks it between the start of a model call and its request, after its cache. It makes the call wait until it is its
turn; the request is the model's own, to the model's own URL. So it acts only where Maestro has no fleet (no Redis, no
fleet.toml) and orders what this process asks its providers for, at most ``local_concurrency`` at a time for each. A fleet
serves its models' names for others: a call that cannot be moved there is none of its business, and passes by.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, cast
from uuid import UUID

from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.rate_limiters import BaseRateLimiter

from maestro_agents.client import Client
from maestro_agents.core import Mode
from maestro_agents.errors import MaestroError
from maestro_agents.usage import Usage
from maestro_langgraph.call import Call, limited, opened
from maestro_langgraph.options import Options
from maestro_langgraph.quiet import quietly


class _Asked(NamedTuple):
    run_id: UUID
    body: dict[str, Any]


_asked: ContextVar[deque[_Asked] | None] = ContextVar("maestro_asked", default=None)
"""What was asked of a model in this context and did not come to its limiter yet."""


class LimitedCall(Call):
    """A call that a client of somebody else makes. ``run_id``: its callback id."""

    def __init__(self, run_id: UUID, body: dict[str, Any], *, url: str, options: Options, is_async: bool) -> None:
        self.run_id = run_id
        super().__init__(body, suffix="", url=url, httpx=None, retries=0, is_async=is_async, model_options=options)
        if self.caller.llm_run == run_id:
            self.caller.taken = False  # should the request come by the gate, it is known there

    def refusal(self, error: MaestroError) -> MaestroError:
        return error  # its handlers know another SDK, or none


class MaestroLimiter(BaseRateLimiter):
    """Makes a model's calls wait for their turn. ``inner``: the limiter that the model had; it is asked afterwards."""

    def __init__(self, inner: BaseRateLimiter | None, *, url: str, options: Options) -> None:
        self.inner = inner
        self._url = url
        self._options = options

    def acquire(self, *, blocking: bool = True) -> bool:
        call = self._open(is_async=False) if blocking else None
        if call is not None:
            call.wait()
            call.sent()
        try:
            return self.inner.acquire(blocking=blocking) if self.inner is not None else True
        except BaseException:
            _cancel(call)
            raise

    async def aacquire(self, *, blocking: bool = True) -> bool:
        call = self._open(is_async=True) if blocking else None
        if call is not None:
            task = asyncio.current_task()
            if task is not None:  # callbacks are not always told of a cancelled one
                task.add_done_callback(lambda ended: _cancel(call) if ended.cancelled() else None)
            await call.wait_async()
            call.sent()
        try:
            return await self.inner.aacquire(blocking=blocking) if self.inner is not None else True
        except BaseException:
            _cancel(call)
            raise

    def _open(self, *, is_async: bool) -> LimitedCall | None:
        asked = _asked.get()
        if not asked:
            return None
        run_id, body = asked.popleft()

        def make() -> LimitedCall | None:
            client = Client.current()
            has_fleet = client.settings.redis_url is not None or client.settings.fleet is not None
            if has_fleet and client.mode is Mode.ON:
                return None
            return LimitedCall(run_id, body, url=self._url, options=self._options, is_async=is_async)

        call = opened(make)
        if call is not None:
            limited[run_id] = call
        return call

    # -- what the model's handler tells ------------------------------------------------------------------------------
    def asked(self, run_id: UUID, messages: object, metadata: Mapping[str, Any], *, batch: int) -> None:
        """A model call has begun here; unless LangChain's cache answers, it comes to the limiter next."""
        with quietly("reading a model call"):
            first = cast("list[list[BaseMessage]]", messages)[0]
            model = str(metadata.get("ls_model_name") or metadata.get("ls_provider") or "model")
            body: dict[str, Any] = {"model": model, "messages": convert_to_openai_messages(first)}
            if isinstance(most := metadata.get("ls_max_tokens"), int):
                body["max_tokens"] = most
            before = _asked.get() if batch > 1 else None
            if before is None:
                _asked.set(deque([_Asked(run_id, body)]))
            else:
                before.append(_Asked(run_id, body))

    def first_byte(self, run_id: UUID) -> None:
        """A first piece of the answer came."""
        call = limited.get(run_id)
        if call is not None:
            call.first_byte()

    def answered(self, run_id: UUID, response: object) -> None:
        """The answer is complete, or came from the cache."""
        call = limited.pop(run_id, None)
        if call is not None:
            usage = Usage()
            with quietly("reading usage"):
                _read(usage, response)
            call.first_byte()
            call.finish(usage, ok=True)
        self._forget(run_id)

    def failed(self, run_id: UUID, error: BaseException) -> None:
        """The call failed, or was cancelled."""
        call = limited.pop(run_id, None)
        if call is not None and isinstance(error, Exception):
            call.finish(Usage(), ok=False)
        elif call is not None:
            call.cancel()
        self._forget(run_id)

    def _forget(self, run_id: UUID) -> None:
        asked = _asked.get()
        if asked and asked[0].run_id == run_id:
            asked.popleft()


def _cancel(call: LimitedCall | None) -> None:
    if call is not None:
        limited.pop(call.run_id, None)
        call.cancel()


def _read(usage: Usage, response: object) -> None:
    generations = response.generations if isinstance(response, LLMResult) else []
    generation = generations[0][0] if generations and generations[0] else None
    message = generation.message if isinstance(generation, ChatGeneration) else None
    if isinstance(message, AIMessage):
        usage.tool_calls = len(message.tool_calls)
        if message.usage_metadata:
            usage.prompt_tokens = message.usage_metadata["input_tokens"]
            usage.output_tokens = message.usage_metadata["output_tokens"]
            usage.cached_tokens = message.usage_metadata.get("input_token_details", {}).get("cache_read", 0)
