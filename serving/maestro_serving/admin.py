"""vLLM's dev-mode endpoints (``VLLM_SERVER_DEV_MODE=1``) on an emulated server: sleep, wake, pause, abort, reload.

As vLLM 0.32 was seen to behave: who asks while the server sleeps or is paused waits, and is not counted; ``/health`` stays
200; ``mode=abort`` answers what is under way with ``finish_reason: "abort"``, ``wait`` lets what runs end, ``keep`` holds it
(its KV is lost, and computed again). After sleep level 2 the weights must be loaded again (``reload_weights``), else all answers
are noise.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from maestro_serving.live import LiveEngine, Metrics
from maestro_serving.protocol import RefusedError

Mode = Literal["abort", "wait", "keep"]

WEIGHTS: Final = "weights"
KV_CACHE: Final = "kv_cache"
_SCHEDULING: Final = "scheduling"

_T = TypeVar("_T")


class OutOfMemoryError(Exception):
    """There is no room on the GPU for what should come there."""


class Memory(Protocol):
    """What moves when a server sleeps and wakes. Each call takes the time that it would take on the GPU."""

    async def discard(self, level: int) -> None:
        """Weights and KV leave the GPU; at level 1 weights stay in host memory."""
        ...

    async def bring(self, tags: frozenset[str]) -> None:
        """Weights, KV memory, or both are to come back. Raises `OutOfMemoryError`, and nothing has changed then."""
        ...

    async def reload(self) -> None:
        """The weights are read anew from their files."""
        ...


class NoGpu:
    """A server on a CPU: vLLM's protocol, and no memory that moves."""

    async def discard(self, level: int) -> None:
        """Takes no time."""

    async def bring(self, tags: frozenset[str]) -> None:
        """Takes no time."""

    async def reload(self) -> None:
        """Takes no time."""


class Admin:
    """The state of one server, between asleep and awake, and the endpoints that change it."""

    def __init__(self, engines: Sequence[LiveEngine], metrics: Metrics, memory: Memory | None = None) -> None:
        self._engines = engines
        self._metrics = metrics
        self._memory = memory or NoGpu()
        #: What is not on the GPU.
        self.asleep: frozenset[str] = frozenset()
        #: The sleep level; None while awake.
        self.level: int | None = None
        self._dropped = False
        self._moving = asyncio.Lock()

    def routes(self) -> list[Route]:
        return [
            Route("/sleep", self._sleep, methods=["POST"]),
            Route("/wake_up", self._wake_up, methods=["POST"]),
            Route("/is_sleeping", self._is_sleeping),
            Route("/pause", self._pause, methods=["POST"]),
            Route("/resume", self._resume, methods=["POST"]),
            Route("/is_paused", self._is_paused),
            Route("/abort_requests", self._abort_requests, methods=["POST"]),
            Route("/reset_prefix_cache", self._reset_prefix_cache, methods=["POST"]),
            Route("/collective_rpc", self._collective_rpc, methods=["POST"]),
        ]

    # -- what happens --------------------------------------------------------------------------------------------------
    async def sleep(self, level: int, mode: Mode) -> None:
        """As ``POST /sleep``: returns when the server sleeps."""
        await self.pause(mode, keep_kv=level == 0)
        if level and WEIGHTS not in self.asleep:
            async with self._moving:
                self.asleep = frozenset((WEIGHTS, KV_CACHE))
                self._dropped = level == 2
                await self._memory.discard(level)
        self.level = level
        for engine in self._engines:
            engine.show_sleep(level)

    async def wake(self, tags: frozenset[str] | None) -> bool:
        """As ``POST /wake_up``: whether the server is awake as a whole then. Raises `OutOfMemoryError`."""
        wanted = (self.asleep if tags is None else tags) - {_SCHEDULING}
        if wanted and wanted <= self.asleep:
            async with self._moving:
                await self._memory.bring(wanted)
                self.asleep -= wanted
                self._garble()
        if self.asleep:
            return False
        self.level = None
        for engine in self._engines:
            engine.show_sleep(None)
        self.resume()
        return True

    async def reload(self) -> None:
        """As ``reload_weights``. Raises `OutOfMemoryError` where there is no memory for them yet."""
        if WEIGHTS in self.asleep:
            raise OutOfMemoryError("the weights have no memory on the GPU: wake their tag first")
        async with self._moving:
            await self._memory.reload()
            self._dropped = False
            self._garble()

    async def pause(self, mode: Mode, *, keep_kv: bool = False) -> None:
        """As ``POST /pause``: returns when nothing is computed any more."""
        for engine in self._engines:
            if mode == "abort":
                engine.abort(None, answered=True)
            engine.pause(frozen=mode == "keep")
        for engine in self._engines:
            await engine.quiet()
            if not keep_kv:
                engine.drop_kv()

    def resume(self) -> None:
        for engine in self._engines:
            engine.resume()

    @property
    def paused(self) -> bool:
        return any(engine.paused for engine in self._engines)

    def _garble(self) -> None:
        for engine in self._engines:
            engine.garbled = self._dropped and WEIGHTS not in self.asleep

    # -- endpoints -----------------------------------------------------------------------------------------------------
    async def _sleep(self, request: Request) -> Response:
        try:
            level = _chosen(request, "level", {"0": 0, "1": 1, "2": 2}, 1)
            mode: Mode = _chosen(request, "mode", _MODES, "abort")
        except RefusedError as e:
            return JSONResponse(e.body, status_code=e.status)
        with self._metrics.move("sleep"):
            await self.sleep(level, mode)
        return JSONResponse({"status": "sleeping", "level": level})

    async def _wake_up(self, request: Request) -> Response:
        tags = request.query_params.getlist("tags") or None
        with self._metrics.move("wake"):
            try:
                awake = await self.wake(None if tags is None else frozenset(tags))
            except OutOfMemoryError as e:
                return _failed(str(e))
        return JSONResponse({"status": "awake" if awake else "sleeping", "tags": tags})

    async def _is_sleeping(self, request: Request) -> Response:
        return JSONResponse({"is_sleeping": self.paused or bool(self.asleep)})

    async def _pause(self, request: Request) -> Response:
        try:
            mode: Mode = _chosen(request, "mode", _MODES, "abort")
        except RefusedError as e:
            return JSONResponse(e.body, status_code=e.status)
        await self.pause(mode, keep_kv=request.query_params.get("clear_cache", "").lower() in ("0", "false"))
        return JSONResponse({"status": "paused"})

    async def _resume(self, request: Request) -> Response:
        self.resume()
        return JSONResponse({"status": "resumed"})

    async def _is_paused(self, request: Request) -> Response:
        return JSONResponse({"is_paused": self.paused})

    async def _abort_requests(self, request: Request) -> Response:
        try:
            body = await _object(request, "Invalid JSON format")
        except RefusedError as e:
            return JSONResponse(e.body, status_code=e.status)
        wanted: Any = body.get("request_ids")
        ended = sum(engine.abort(wanted or None, answered=False) for engine in self._engines)
        return JSONResponse({"status": "aborted", "aborted": len(wanted) if wanted else ended})

    async def _reset_prefix_cache(self, request: Request) -> Response:
        forced = request.query_params.get("reset_running_requests", "").lower() in ("1", "true")
        busy = not forced and any(engine.model.num_running for engine in self._engines)
        for engine in () if busy else self._engines:
            engine.drop_kv()
        return JSONResponse({"success": not busy})

    async def _collective_rpc(self, request: Request) -> Response:
        try:
            body = await _object(request, "JSON decode error: not JSON")
            if body.get("method") is None:
                raise RefusedError(400, "Missing 'method' in request body", kind="Bad Request")
        except RefusedError as e:
            return JSONResponse(e.body, status_code=e.status)
        if body["method"] != "reload_weights":
            return _failed(f"Call to collective_rpc method failed: {body['method']} is not emulated")
        try:
            await self.reload()
        except OutOfMemoryError as e:
            return _failed(f"Call to collective_rpc method failed: {e}")
        return JSONResponse({"results": [None]})


_MODES: Final[Mapping[str, Mode]] = {"abort": "abort", "wait": "wait", "keep": "keep"}


def _chosen(request: Request, name: str, known: Mapping[str, _T], default: _T) -> _T:
    said = request.query_params.get(name)
    if said is None:
        return default
    if said not in known:
        raise RefusedError(
            400,
            f"query.{name} must be one of {', '.join(known)}, got {said}",
            kind="Bad Request",
            param=f"query.{name}",
        )
    return known[said]


async def _object(request: Request, broken: str) -> Mapping[str, Any]:
    try:
        body: Any = json.loads(await request.body())
    except ValueError:
        raise RefusedError(400, broken, kind="Bad Request") from None
    if not isinstance(body, dict):
        raise RefusedError(400, "Request body must be a JSON object", kind="Bad Request")
    return cast("Mapping[str, Any]", body)


def _failed(message: str) -> Response:
    refused = RefusedError(500, message, kind="InternalServerError")
    return JSONResponse(refused.body, status_code=500)
