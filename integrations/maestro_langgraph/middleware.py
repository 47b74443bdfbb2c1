"""`MaestroMiddleware`: Maestro in one agent of ``langchain.agents.create_agent``. The one module that imports ``langchain``.

    agent = create_agent(llm, tools, middleware=[MaestroMiddleware(service_class="batch")])

It changes nothing but the model that a step calls, which becomes the same model under Maestro (`maestro.wrap_model`): no node
more, no state, no patch. Put it last, so that the model is wrapped that others have chosen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final, Unpack

from langchain.agents.middleware import AgentMiddleware
from langchain.agents.middleware.types import ModelRequest, ModelResponse
from langchain_core.language_models import BaseChatModel

from maestro_langgraph.models import wrap_model
from maestro_langgraph.options import OptionArgs, Options
from maestro_langgraph.quiet import warn_once

MAX_MODELS: Final = 64


class MaestroMiddleware(AgentMiddleware[Any, Any, Any]):
    """Manages the model calls of one agent. Options as for ``maestro.wrap_model``; raises `ConfigError` for a wrong one."""

    def __init__(self, **options: Unpack[OptionArgs]) -> None:
        super().__init__()
        self._options = Options.check(options)
        # by identity: models have none that can be hashed. The model is kept, so that its id is not given away.
        self._wrapped: OrderedDict[int, tuple[BaseChatModel, BaseChatModel]] = OrderedDict()

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        return handler(self._managed(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        return await handler(self._managed(request))

    def _managed(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        try:
            return request.override(model=self._model(request.model))
        except Exception as e:  # e.g. a model that cannot be wrapped: the agent goes on with its own
            warn_once("wrapping a model", e)
            return request

    def _model(self, model: BaseChatModel) -> BaseChatModel:
        known = self._wrapped.get(id(model))
        if known is None:
            known = self._wrapped[id(model)] = (model, wrap_model(model, self._options))
            while len(self._wrapped) > MAX_MODELS:
                self._wrapped.popitem(last=False)
        return known[1]
