"""Which models a server serves, by its own list."""

from __future__ import annotations

import os

import httpx

from maestro_agents.core import EngineSpec
from maestro_agents.errors import EngineUnavailable


async def served_models(spec: EngineSpec, *, timeout_s: float = 5.0) -> tuple[str, ...]:
    """The names that an engine answers to (``GET /v1/models``). Raises `EngineUnavailable` with the reason."""
    key = (os.environ.get(spec.api_key_env, "") if spec.api_key_env else "") or spec.token
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{spec.url.rstrip('/')}/models"
    try:
        async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as http:
            reply = await http.get(url, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise EngineUnavailable(f"{url} does not answer: {e or type(e).__name__}") from e
    if reply.status_code in (401, 403):
        raise EngineUnavailable(f"{url} wants an API key ({reply.status_code}): name its variable in api_key_env")
    if reply.status_code != 200:
        raise EngineUnavailable(f"{url} answers {reply.status_code}: is that the URL of a vLLM server, ending in /v1?")
    try:
        return tuple(str(model["id"]) for model in reply.json()["data"])
    except (ValueError, KeyError, TypeError) as e:
        raise EngineUnavailable(f"{url} answers with no list of models: is that a vLLM server?") from e
