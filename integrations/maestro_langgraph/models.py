"""`maestro.wrap_model`: one chat model under Maestro through public interfaces alone; nothing is patched.

A model on the OpenAI SDK (``ChatOpenAI``, its subclasses, ``AzureChatOpenAI``) gets HTTP clients whose transport is the gate
(`transport`). Any other chat model gets a rate limiter (`limiter`), which can make its calls wait but not move them.
Either way a callback handler on the model tells who calls.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast
from uuid import UUID

import openai
from langchain_core.callbacks import BaseCallbackManager
from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableBinding

from maestro_agents.errors import ConfigError
from maestro_langgraph import transport
from maestro_langgraph.identity import MaestroHandler
from maestro_langgraph.limiter import MaestroLimiter
from maestro_langgraph.options import Options, model_options

M = TypeVar("M")


class ModelHandler(MaestroHandler):
    """Watches the calls of one model: who makes each, and what was said of the model.

    With a limiter it also tells it what is asked and when the answer has come.
    """

    def __init__(self, options: Options, limiter: MaestroLimiter | None = None) -> None:
        super().__init__(None, options)
        self.limiter = limiter

    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: object,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().on_chat_model_start(
            serialized, messages, run_id=run_id, parent_run_id=parent_run_id, metadata=metadata, **kwargs
        )
        model_options.set((run_id, self.options))
        if self.limiter is not None:
            self.limiter.asked(run_id, messages, metadata or {}, batch=int(kwargs.get("batch_size") or 1))

    def on_llm_new_token(self, token: object, *, run_id: UUID, **kwargs: Any) -> None:
        if self.limiter is not None:
            self.limiter.first_byte(run_id)

    def on_llm_end(self, response: object, *, run_id: UUID, **kwargs: Any) -> None:
        if self.limiter is not None:
            self.limiter.answered(run_id, response)
        super().on_llm_end(response, run_id=run_id, **kwargs)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        if self.limiter is not None:
            self.limiter.failed(run_id, error)
        super().on_llm_error(error, run_id=run_id, **kwargs)


def wrap_model(llm: M, options: Options) -> M:
    """Return a copy of a model, of the same class, whose calls are managed. Again: once, with the options of both.

    Raises `ConfigError` for what is no chat model, nor one with arguments bound to it.
    """
    if isinstance(llm, RunnableBinding):
        bound = cast("RunnableBinding[Any, Any]", llm)
        return cast("M", bound.model_copy(update={"bound": wrap_model(bound.bound, options)}))
    if not isinstance(llm, BaseChatModel):
        raise ConfigError(
            f"maestro cannot wrap a {type(llm).__name__} as a model: give wrap_model the chat model itself, "
            "before with_structured_output, with_retry or with_fallbacks"
        )
    known = next((h for h in _handlers(llm) if isinstance(h, ModelHandler)), None)
    if known is not None:
        options = options.over(known.options)
    update = _over_http(llm, options)
    limiter: MaestroLimiter | None = None
    if not update:
        inner = llm.rate_limiter.inner if isinstance(llm.rate_limiter, MaestroLimiter) else llm.rate_limiter
        limiter = MaestroLimiter(inner, url=_url_of(llm), options=options)
        update["rate_limiter"] = limiter
    update["callbacks"] = _with_handler(llm, ModelHandler(options, limiter))
    return cast("M", llm.model_copy(update=update))


def _over_http(llm: BaseChatModel, options: Options) -> dict[str, Any]:
    """The fields of a model on the OpenAI SDK, with managed clients; empty for any other."""
    update: dict[str, Any] = {}
    for root, part, http in (
        ("root_client", "client", "http_client"),
        ("root_async_client", "async_client", "http_async_client"),
    ):
        sdk_client = getattr(llm, root, None)
        if isinstance(sdk_client, openai.OpenAI | openai.AsyncOpenAI):
            managed, update[http] = transport.through(sdk_client, options)
            update[root], update[part] = managed, managed.chat.completions
    return update


def _handlers(llm: BaseChatModel) -> list[Any]:
    callbacks = llm.callbacks
    return callbacks.handlers if isinstance(callbacks, BaseCallbackManager) else list(callbacks or ())


def _with_handler(llm: BaseChatModel, ours: ModelHandler) -> Any:
    callbacks = llm.callbacks
    if isinstance(callbacks, BaseCallbackManager):
        grown = callbacks.copy()
        for known in [h for h in grown.handlers if isinstance(h, ModelHandler)]:
            grown.remove_handler(known)
        grown.add_handler(ours, inherit=True)
        return grown
    return [*(h for h in callbacks or () if not isinstance(h, ModelHandler)), ours]


def _url_of(llm: BaseChatModel) -> str:
    """Where a model sends its calls, as far as it says; calls to one place are ordered together."""
    for name in ("base_url", "anthropic_api_url", "api_base", "endpoint", "endpoint_url"):
        value = getattr(llm, name, None)
        if isinstance(value, str) and value:
            return value
    return f"{llm._llm_type}:"
