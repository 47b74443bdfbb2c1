"""vLLM from outside: the command that starts a server, and the probe that reads its account of itself.

Metric names are those of vLLM 0.32; where an older name exists it is read too. Both work on the emulator as well.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError
from maestro_agents.ports import EngineHealth

VLLM_ENV: Final = "MAESTRO_VLLM"
"""Path of the ``vllm`` program, where it is not the one on PATH (it likes a virtual environment of its own)."""

_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_CACHE_CONFIG: Final = "vllm:cache_config_info"
_SLEEP_STATE: Final = "vllm:engine_sleep_state"
_GENERATED: Final = "vllm:generation_tokens_total"
_PREEMPTIONS: Final = "vllm:num_preemptions_total"
_KV_USE: Final = "vllm:kv_cache_usage_perc"
_QUERIES: Final = "vllm:prefix_cache_queries_total"
_HITS: Final = "vllm:prefix_cache_hits_total"
OLD_NAMES: Final = {
    "vllm:gpu_cache_usage_perc": _KV_USE,
    "vllm:gpu_prefix_cache_queries_total": _QUERIES,
    "vllm:gpu_prefix_cache_hits_total": _HITS,
}
"""What vLLM called some of them before 0.10. A page has one or the other, or both with the same value."""

SCRAPED: Final = (
    *(_RUNNING, _WAITING, _CACHE_CONFIG, _SLEEP_STATE, _GENERATED, _PREEMPTIONS, _KV_USE, _QUERIES, _HITS),
)
"""The metrics that are read."""

# Parsing a whole page of some 50 kB on every probe would cost more than the probe itself.
_PREFIXES: Final = tuple(f"{name}{{" for name in (*SCRAPED, *OLD_NAMES))

SLEEP_STATES: Final = {"weights_offloaded": 1, "discard_all": 2}
"""Labels of the sleep state, and the level that each is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What a server's metrics say of one model. -1 where they do not."""

    running: int = -1
    waiting: int = -1
    #: Share of its KV blocks in use, 0 to 1.
    kv_use: float = -1.0
    #: KV memory in tokens, and tokens in a block of it; 0 where it does not say.
    kv_tokens: int = 0
    kv_block_tokens: int = 0
    #: Since the server began: tokens made, requests preempted, prompt tokens looked for in the prefix cache, and found.
    generated: float = -1.0
    preemptions: int = -1
    queried: float = -1.0
    found: float = -1.0
    #: The sleep level; None while awake, or where it does not say.
    asleep: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCommand:
    """How a server is started: its arguments, and what its environment has beyond ours."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])


def vllm_program() -> str:
    """The ``vllm`` to run. Raises `ConfigError` where there is none."""
    program = os.environ.get(VLLM_ENV) or "vllm"
    found = shutil.which(program)
    if found is None:
        raise ConfigError(
            f"there is no vLLM at {program!r}: install it, or name its program by {VLLM_ENV}=/path/bin/vllm"
        )
    return found


def _device(number: int) -> str:
    """The node's GPU of this number, as CUDA knows it: of those that this process was given, where it was not given all."""
    given = [d.strip() for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    return given[number] if number < len(given) else str(number)


def vllm_command(
    *,
    model: str,
    served_model: str,
    port: int,
    program: str,
    host: str = "127.0.0.1",
    max_num_seqs: int = 16,
    max_model_len: int = 0,
    kv_cache_memory_bytes: int = 0,
    max_num_queued: int | None = None,
    cpu_core: int | None = None,
    gpus: Sequence[int] = (),
    sleeps: bool = False,
    args: tuple[str, ...] = (),
) -> EngineCommand:
    """The command of a vLLM server as Maestro wants it: priority scheduling, prefix cache, per-request metrics.

    ``cpu_core``: run on this CPU core. Then ``kv_cache_memory_bytes`` is required, since vLLM on a CPU would take most
    of the node's memory for itself, and two engines need two cores, since by default each binds itself to the first.
    ``gpus``: run on these GPUs, tensor-parallel where they are several. ``max_model_len`` and ``kv_cache_memory_bytes`` of 0
    leave the choice to vLLM. ``sleeps``: with the endpoints that put it to sleep and wake it, which know no API key: on
    loopback only. vLLM on a CPU refuses the flag for it, answers all the same, and frees nothing.
    Raises `ConfigError`.
    """
    if sleeps and host not in {"127.0.0.1", "localhost", "::1"}:
        raise ConfigError(
            f"engine {served_model}: a server that can be put to sleep listens on loopback, not on {host}"
        )
    if cpu_core is not None and gpus:
        raise ConfigError(f"engine {served_model}: either a CPU core or a GPU, not both")
    if cpu_core is not None and not kv_cache_memory_bytes:
        raise ConfigError(f"engine {served_model}: on a CPU core vLLM needs kv_cache_memory_bytes (e.g. 268435456)")
    argv = [program, "serve", model, "--served-model-name", served_model, "--host", host, "--port", str(port)]
    argv += ["--scheduling-policy", "priority", "--enable-prefix-caching", "--max-num-seqs", str(max_num_seqs)]
    argv += ["--enable-per-request-metrics", "--enable-prompt-tokens-details"]
    if max_model_len:
        argv += ["--max-model-len", str(max_model_len)]
    if kv_cache_memory_bytes:
        argv += ["--kv-cache-memory-bytes", str(kv_cache_memory_bytes)]
    if max_num_queued is not None:
        argv += ["--max-num-queued-reqs", str(max_num_queued)]
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if cpu_core is not None:
        argv += ["--enforce-eager"]  # compiling costs minutes and gains little on a CPU
        env["VLLM_CPU_OMP_THREADS_BIND"] = str(cpu_core)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(_device(n) for n in gpus)
        if len(gpus) > 1 and not any(a.startswith(("--tensor-parallel-size", "-tp")) for a in args):
            argv += ["--tensor-parallel-size", str(len(gpus))]
    if sleeps:
        env["VLLM_SERVER_DEV_MODE"] = "1"
        argv += ["--enable-sleep-mode"] if cpu_core is None else []
    return EngineCommand(argv=(*argv, *args), env=env)


class VllmProbe:
    """`maestro_agents.ports.EngineProbe` over HTTP: ``/health``, then ``/metrics``. A server that has no ``/health`` (a router in
    an engine's place) lives as long as it lists its models; without vLLM's metrics its load is unknown.

    ``token``: what the proxy in front of an engine asks for, by the engine's id (`maestro_agents.tokens`).
    """

    def __init__(self, *, timeout_s: float = 2.0, token: Callable[[str], str] | None = None) -> None:
        self._token = token
        # Engines are ours: no proxy of the environment stands between.
        self._http = httpx.AsyncClient(timeout=timeout_s, trust_env=False)

    async def probe(self, spec: EngineSpec) -> EngineHealth:
        """Never raises. The caller's own URL (`EngineSpec.original`) is not ours to ask: healthy, nothing known."""
        if spec.original:
            return EngineHealth(healthy=True)
        base = spec.url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(spec.api_key_env, "") if spec.api_key_env else ""
        if not spec.api_key_env and self._token is not None:
            key = self._token(spec.engine_id)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            status = (await self._http.get(f"{base}/health", headers=headers)).status_code
            if status == 404:
                status = (await self._http.get(f"{base}/v1/models", headers=headers)).status_code
            if status != 200:
                return EngineHealth(healthy=False)
            page = await self._http.get(f"{base}/metrics", headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL):
            return EngineHealth(healthy=False)
        if page.status_code != 200:
            return EngineHealth(healthy=True)
        return read_metrics(page.text, spec.served_model or spec.model)

    async def close(self) -> None:
        await self._http.aclose()


def read_metrics(page: str, model: str) -> EngineHealth:
    """What a page of vLLM's metrics says of one model's load, for the scheduler's probe."""
    account = read_account(page, model)
    return EngineHealth(
        healthy=True,
        running=account.running,
        waiting=account.waiting,
        kv_tokens=account.kv_tokens,
        kv_block_tokens=account.kv_block_tokens,
    )


def read_account(page: str, model: str) -> Account:
    """What a page of vLLM's metrics says of one model; several engine cores behind one port add up.

    A page that names only other models is read as a whole: a server may serve one model under several names and report
    the first. Never raises: a page that is none says nothing.
    """
    try:
        samples = list(_samples(page))
    except ValueError:
        return Account()
    names = {labels.get("model_name") for _, labels, _ in samples} - {None}
    wanted = {model} if model in names else names
    there = {name for name, _, _ in samples}
    cores: set[str | None] = set()
    totals: dict[str, float] = defaultdict(float)
    asleep: int | None = None
    for name, labels, value in samples:
        if labels.get("model_name") not in wanted or OLD_NAMES.get(name) in there:
            continue
        if name == _SLEEP_STATE:
            asleep = SLEEP_STATES.get(labels.get("sleep_state", ""), asleep) if value else asleep
        else:
            totals[OLD_NAMES.get(name, name)] += value
        if name in (_RUNNING, _WAITING):
            cores.add(labels.get("engine"))
    caches = [labels for name, labels, _ in samples if name == _CACHE_CONFIG and labels.get("engine") in cores]
    return Account(
        running=int(totals.get(_RUNNING, -1)),
        waiting=int(totals.get(_WAITING, -1)),
        kv_use=totals[_KV_USE] / len(cores) if _KV_USE in totals and cores else -1.0,
        kv_tokens=sum(map(_kv_tokens, caches)),
        kv_block_tokens=max((_number(labels, "block_size") for labels in caches), default=0),
        generated=totals.get(_GENERATED, -1.0),
        preemptions=int(totals.get(_PREEMPTIONS, -1)),
        queried=totals.get(_QUERIES, -1.0),
        found=totals.get(_HITS, -1.0),
        asleep=asleep,
    )


def _samples(page: str) -> Iterable[tuple[str, Mapping[str, str], float]]:
    lines = "\n".join(line for line in page.splitlines() if line.startswith(_PREFIXES))
    for family in text_string_to_metric_families(f"{lines}\n"):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def _kv_tokens(labels: Mapping[str, str]) -> int:
    """``kv_cache_size_tokens``; before vLLM had it, blocks times their size."""
    said = _number(labels, "kv_cache_size_tokens")
    return said or _number(labels, "num_gpu_blocks") * _number(labels, "block_size")


def _number(labels: Mapping[str, str], name: str) -> int:
    said = labels.get(name, "")
    return int(said) if said.isdecimal() else 0  # "None" where vLLM does not know
