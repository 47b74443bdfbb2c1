"""Requests of exact sizes against a vLLM server, and when each was answered. For measuring; apps use their own client.

A prompt is a list of random token ids: as many tokens as asked for, and nothing of it in the prefix cache. Answers stream and
are thrown away. Where a server is on this machine, `cores_of` says on which cores it may run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar, cast
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_serving.vllm import read_metrics

_TOKEN_IDS: Final = range(300, 8000)
"""Ordinary tokens in any vocabulary."""

_ASLEEP: Final = "vllm:engine_sleep_state"
_ITERATION: Final = "vllm:iteration_tokens_total"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """A request: how long prompt and answer are, how urgent it is (lower goes first)."""

    prompt_tokens: int
    output_tokens: int
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the client saw of one request, by `time.perf_counter`."""

    sent_at_s: float
    first_at_s: float
    ended_at_s: float
    cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What a server says of itself; 0 for what it does not say."""

    model: str
    version: str
    max_model_len: int
    block_size: int
    kv_tokens: int


class LoadClient:
    """One server. Raises `ConfigError` for what the caller can mend, `EngineUnavailable` for what only the engine can."""

    def __init__(self, url: str, *, model: str = "", api_key: str = "", timeout_s: float = 120.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"{url!r} is no server's address: give one like http://127.0.0.1:8000")
        self.base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.model = model
        self._random = random.Random()  # other prompts in every process: none is cached
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s),
            trust_env=False,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            # Servers close what is idle for 5 s; a request sent at that moment would be lost.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()

    # -- what it says of itself ----------------------------------------------------------------------------------------
    async def describe(self) -> Described:
        """Ask what it serves, and whether it would answer now: an engine that sleeps accepts requests and keeps them."""
        listed = json.loads(await self._get("/v1/models"))
        served = [entry for entry in listed.get("data", []) if not entry.get("parent")]
        names = [str(entry["id"]) for entry in served]
        if not names:
            raise EngineUnavailable(f"{self.base} serves no model")
        if not self.model and len(names) > 1:
            raise ConfigError(f"{self.base} serves {', '.join(names)}: say which by --model")
        self.model = self.model or names[0]
        if self.model not in names:
            raise ConfigError(f"{self.base} does not serve {self.model!r}, but {', '.join(names)}: name one by --model")
        page = await self._get("/metrics")
        if self._asleep(page):
            raise EngineUnavailable(f"the engine at {self.base} sleeps: wake it (POST /wake_up) and try again")
        health = read_metrics(page, self.model)
        if health.running > 0 or health.waiting > 0:
            raise EngineUnavailable(
                f"the engine at {self.base} serves others ({health.running} running, {health.waiting} waiting): measure "
                "one that nobody else uses"
            )
        version = "unknown"
        with suppress(EngineUnavailable, ConfigError, ValueError):
            version = str(json.loads(await self._get("/version")).get("version", version))
        return Described(
            model=self.model,
            version=version,
            max_model_len=int(served[names.index(self.model)].get("max_model_len") or 0),
            block_size=health.kv_block_tokens,
            kv_tokens=health.kv_tokens,
        )

    def _asleep(self, page: str) -> bool:
        awake = _labelled(page, _ASLEEP, {"sleep_state": "awake"})
        return awake == [0.0]

    async def busy(self) -> tuple[int, int]:
        """How many run and how many wait, by its metrics."""
        health = read_metrics(await self._get("/metrics"), self.model)
        return max(health.running, 0), max(health.waiting, 0)

    async def step_sizes(self) -> Mapping[float, float]:
        """By upper bound: steps so far with at most so many tokens. Empty where it does not count them."""
        page = await self._get("/metrics")
        lines = "\n".join(line for line in page.splitlines() if line.startswith(f"{_ITERATION}_bucket"))
        found: dict[float, float] = {}
        for name, labels, value in _samples(lines):
            if name.endswith("_bucket") and labels.get("model_name", self.model) == self.model:
                bound = float(labels["le"])
                found[bound] = found.get(bound, 0.0) + value
        return found

    # -- requests ------------------------------------------------------------------------------------------------------
    def prompt(self, tokens: int) -> list[int]:
        """So many tokens that nobody has seen."""
        return self._random.choices(_TOKEN_IDS, k=tokens)

    async def ask(self, sizes: Sizes, prompt: Sequence[int] | None = None) -> Reply:
        """Have one request answered in full."""
        body = {
            "model": self.model,
            "prompt": list(prompt) if prompt is not None else self.prompt(sizes.prompt_tokens),
            "max_tokens": sizes.output_tokens,
            "min_tokens": sizes.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "priority": sizes.priority,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_at_s = time.perf_counter()
        first_at_s = 0.0
        last = b""
        try:
            async with self._http.stream("POST", f"{self.base}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise self._refused(
                        "/v1/completions", response.status_code, (await response.aread()).decode(errors="replace")
                    )
                async for chunk in response.aiter_raw():
                    first_at_s = first_at_s or time.perf_counter()
                    last = (last + chunk)[-4096:]
        except httpx.TimeoutException:
            raise EngineUnavailable(
                f"{self.base} took a request and did not answer in time: is it asleep (POST /wake_up), or stuck?"
            ) from None
        except httpx.HTTPError as e:
            raise self._unreachable(e) from None
        usage = _usage(last)
        if usage.get("completion_tokens") != sizes.output_tokens:
            raise EngineUnavailable(
                f"{self.base} answered {usage.get('completion_tokens', 'an unknown number of')} tokens where "
                f"{sizes.output_tokens} were asked for: was it aborted, or does it ignore min_tokens and ignore_eos?"
            )
        details = cast("dict[str, Any]", usage.get("prompt_tokens_details") or {})
        return Reply(
            sent_at_s=sent_at_s,
            first_at_s=first_at_s,
            ended_at_s=time.perf_counter(),
            cached_tokens=int(details.get("cached_tokens") or 0),
        )

    async def burst(self, requests: Sequence[Sizes]) -> float:
        """Send all at once; seconds until the last is answered."""
        prompts = [self.prompt(sizes.prompt_tokens) for sizes in requests]
        begun_at_s = time.perf_counter()
        asked = [self.ask(sizes, prompt) for sizes, prompt in zip(requests, prompts, strict=True)]
        return max(reply.ended_at_s for reply in await together(asked)) - begun_at_s

    # -- inside --------------------------------------------------------------------------------------------------------
    async def _get(self, path: str) -> str:
        try:
            response = await self._http.get(f"{self.base}{path}")
        except httpx.HTTPError as e:
            raise self._unreachable(e) from None
        if response.status_code != 200:
            raise self._refused(path, response.status_code, response.text)
        return response.text

    def _unreachable(self, e: Exception) -> EngineUnavailable:
        return EngineUnavailable(
            f"nobody answers at {self.base} ({str(e) or type(e).__name__}): is the address right, and the server up?"
        )

    def _refused(self, path: str, status: int, said: str) -> ConfigError | EngineUnavailable:
        if status in {401, 403}:
            return ConfigError(f"{self.base} asks for an API key ({status}): give it by --api-key or VLLM_API_KEY")
        if status == 404:
            return ConfigError(f"{self.base}{path}: not found. Is that a vLLM server, and its address without a path?")
        return EngineUnavailable(f"{self.base}{path} answered {status}: {' '.join(said.split())[:200]}")


async def together(work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All at once; where one fails, the others are cancelled and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    return [task.result() for task in tasks]


def _usage(end_of_stream: bytes) -> Mapping[str, Any]:
    for line in reversed(end_of_stream.decode(errors="replace").splitlines()):
        if line.startswith("data: {"):
            with suppress(ValueError):
                return json.loads(line[6:]).get("usage") or {}
    return {}


def _samples(page: str) -> list[tuple[str, Mapping[str, str], float]]:
    try:
        families = list(text_string_to_metric_families(f"{page}\n"))
    except ValueError:
        return []
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


def _labelled(page: str, name: str, labels: Mapping[str, str]) -> list[float]:
    lines = "\n".join(line for line in page.splitlines() if line.startswith(name))
    return [value for _, has, value in _samples(lines) if labels.items() <= has.items()]


# -- where a server runs -----------------------------------------------------------------------------------------------
def cores_of(url: str) -> tuple[int, ...]:
    """The cores on which the server of a loopback address, or any process that it started, may run; empty: not known."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.hostname not in {"127.0.0.1", "localhost", "::1"} or not Path("/proc/net/tcp").exists():
        return ()
    pid = _listener(parts.port or 80)
    cores: set[int] = set()
    for member in _tree(pid) if pid else ():
        with suppress(OSError):
            cores |= os.sched_getaffinity(member)
    return tuple(sorted(cores))


def _listener(port: int) -> int:
    """The process that listens on a port of this machine; 0 where it cannot be seen."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                cells = line.split()
                if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{cells[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                return int(process.name)
    return 0


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


class Wire:
    """Requests to engines as somebody made them, each answer read to its end."""

    def __init__(self, *, timeout_s: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(timeout_s), trust_env=False, limits=limits)

    async def stream(self, url: str, body: Mapping[str, Any], feed: Callable[[bytes], None], *, token: str = "") -> int:
        """The status; 0 where nobody answered. ``feed`` gets the bytes of a 200 as they come, none after it broke off."""
        status = 0
        headers = {"authorization": f"Bearer {token}"} if token else {}
        with suppress(httpx.HTTPError):
            async with self._http.stream("POST", url, json=body, headers=headers) as reply:
                status = reply.status_code
                async for chunk in reply.aiter_raw():
                    if status == 200:
                        feed(chunk)
        return status

    async def aclose(self) -> None:
        await self._http.aclose()
