"""The proxy in front of a node's engines, where clients are on other machines: Envoy, configured here.

Engines listen on loopback: their admin endpoints (sleep, wake, load an adapter, collective_rpc) share the port of ``/v1`` and know no
key. From outside only `ALLOWED` is reached, as ``http://HOST:PORT/ENGINE/v1/...``, with a token for that engine
(`maestro_agents.tokens`); everything else is 404, whatever way the path is spelled: paths are normalised, compared as a whole,
and written anew. Headers that vLLM would take orders from do not pass. Bodies do, unread: a token protects none.

One listener, told by files that Envoy watches what is behind it: engines come and go without a restart, and no stream is cut.
Answers are passed on as they come, without a time limit; when a client leaves, its engine hears it at once. An engine that is
not there is a 502 with `DOWN_HEADER`, which the gate takes for what it would be without a proxy: a connection refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_agents.tokens import EngineKey, call_audience, outage_audience, probe_audience
from maestro_serving.processes import Kept, keep_alive, until_healthy
from maestro_serving.vllm import EngineCommand

ENVOY_ENV: Final = "MAESTRO_ENVOY"
"""Path of the ``envoy`` program, where it is neither on PATH nor beside this Python."""

ALLOWED: Final = (
    ("POST", "/v1/chat/completions", "call"),
    ("POST", "/v1/completions", "call"),
    ("POST", "/v1/responses", "call"),
    ("POST", "/v1/embeddings", "call"),
    ("GET", "/v1/models", "call"),
    ("GET", "/health", "probe"),
    ("GET", "/metrics", "probe"),
)
"""All that passes: method, path of the engine, and what the token must be for."""

DOWN_HEADER: Final = "x-maestro-engine"
"""With the value ``down`` on an answer of the proxy itself: the engine behind it cannot be reached."""

STRIPPED_PREFIX: Final = "x-"
STRIPPED: Final = ("cookie", "baggage", "forwarded", "proxy-authorization")
"""Request headers that do not pass. By its ``X-`` headers vLLM takes priorities, request ids, data-parallel ranks, sessions and
routes, and Envoy itself time limits and retries.
"""

MAX_BODY_BYTES: Final = 64 << 20
"""Largest request; a long prompt with several images is some megabytes."""

CLOCK_SKEW_S: Final = 30
"""A token counts for so much longer, since clocks of machines differ."""

OUTAGE_CALLS: Final = 16
OUTAGE_CALLS_PER_S: Final = 4
"""Calls to one path of an engine with tokens for an outage: so many at once, then so many a second; others are 429 until then."""

GONE_S: Final = 20.0
"""A client that has vanished without a word (its machine lost power) while it waits is taken for gone after so long. One that
only reads slowly is not.
"""

START_LIMIT_S: Final = 30.0
_UPSTREAM_IDLE_S: Final = 3.0
"""vLLM closes a connection that was idle for 5 s; Envoy has let go of it by then."""
_BEAT_S: Final = 0.5

log = logging.getLogger("maestro.proxy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listen:
    """Where the proxy listens, and where clients find it."""

    host: str
    port: int
    #: As others reach it; of a wildcard address that of this machine.
    advertised: str

    @classmethod
    def read(cls, text: str, *, towards: str = "") -> Listen:
        """From ``HOST:PORT``. ``towards``: a machine that clients reach too (Redis's): behind a wildcard the address on the way there
        is what they get. Raises `ConfigError`.
        """
        parts = urlsplit(f"//{text}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if not parts.hostname or not port or parts.path:
            raise ConfigError(f"--listen {text}: it looks like 0.0.0.0:9000, or 10.0.0.5:9000")
        try:
            address = ipaddress.ip_address(parts.hostname)
        except ValueError:
            raise ConfigError(f"--listen {text}: an IP address of this machine, or 0.0.0.0 for all of them") from None
        advertised = _own_address(towards) if address.is_unspecified else str(address)
        return cls(host=str(address), port=port, advertised=advertised)

    @property
    def reached(self) -> str:
        """From this machine itself."""
        return "127.0.0.1" if self.host == "0.0.0.0" else "::1" if self.host == "::" else self.host  # noqa: S104 - compared


def _own_address(towards: str) -> str:
    """The address of this machine on the way to another; nothing is sent."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(towards or "192.0.2.1", 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(address)
            return str(s.getsockname()[0])
    return socket.getfqdn()


def envoy_program() -> str:
    """The Envoy to run. Raises `ConfigError` where there is none."""
    named = os.environ.get(ENVOY_ENV)
    beside = os.path.dirname(sys.executable)
    found = shutil.which(named) if named else shutil.which("envoy") or shutil.which("envoy", path=beside)
    if found is None:
        raise ConfigError(
            f"there is no Envoy at {named!r} ({ENVOY_ENV})"
            if named
            else f"--listen needs Envoy: pip install 'maestro-agents[proxy]', or name its program by {ENVOY_ENV}=/path/envoy"
        )
    return found


class Proxy:
    """One Envoy, and what it lets through. Start it, `serve` whenever an engine's address has changed, and run `keep` beside.

    It outlives an agent that was killed as its engines do (`processes.Kept`), and is taken over by the next.
    """

    def __init__(self, *, listen: Listen, key: EngineKey, folder: Path) -> None:
        self.listen = listen
        self._key = key
        self._folder = folder.resolve()
        self._engines: dict[str, str] = {}
        self._kept = Kept(self._folder, "envoy")
        self._written: dict[str, str] = {}
        self.restarts = 0

    def url(self, engine_id: str) -> str:
        """Where clients find an engine."""
        host = self.listen.advertised
        return f"http://{f'[{host}]' if ':' in host else host}:{self.listen.port}/{slug(engine_id)}/v1"

    @property
    def pid(self) -> int:
        """Envoy's own process, 0 while there is none."""
        return self._kept.pid

    async def start(self) -> None:
        """Have it up. Raises `ConfigError` without Envoy, or where its port is taken; `EngineUnavailable`, with the end of its log."""
        command = self._command()
        if await asyncio.to_thread(self._kept.adopt, lambda _port: command, model="proxy"):
            return  # what it lets through stays until it is told otherwise
        if not self._written:
            self.serve({})
        await asyncio.to_thread(self._wait_for_port)
        log_from = self._kept.log.stat().st_size if self._kept.log.exists() else 0
        try:
            await asyncio.to_thread(self._kept.spawn, command, port=self.listen.port, model="proxy")
        except FileNotFoundError as e:
            raise EngineUnavailable(f"the proxy: {e}") from None
        try:
            host = self.listen.reached
            here = f"http://{f'[{host}]' if ':' in host else host}:{self.listen.port}"
            await until_healthy(
                "proxy", here, self._kept.alive, limit_s=START_LIMIT_S, log=self._kept.log, log_from=log_from
            )
        except BaseException:
            await self.stop()
            raise

    def serve(self, engines: Mapping[str, str]) -> None:
        """Let these engines be reached, at these loopback URLs ("": known, and not up now), and no others. Seen within moments."""
        if engines == self._engines and self._written:
            return
        up = {engine_id: url for engine_id, url in engines.items() if url}
        # In this order: nothing is let through before it is checked, nor goes anywhere before that is there.
        self._write("tokens.json", [_checks(self._key, engines)])
        self._write("clusters.json", [_cluster(engine_id, url) for engine_id, url in up.items()])
        self._write("routes.json", [_routes(engines)])
        self._engines = dict(engines)

    async def keep(self) -> None:
        """Say that we live, and start it again when it dies, later each time, until cancelled."""

        def alive() -> bool:
            there = self._kept.alive()
            if there:
                self._kept.renew()
            return there

        def ended(backoff_s: float) -> None:
            log.warning("the proxy ended; it is started again in %g s (log: %s)", backoff_s, self._kept.log)

        async def again() -> None:
            self.restarts += 1
            try:
                await self.start()
            except (EngineUnavailable, ConfigError, OSError) as e:
                log.warning("%s", e)

        await keep_alive(alive, ended, self.stop, again, every_s=_BEAT_S)

    async def stop(self) -> None:
        """End it. Idempotent."""
        await asyncio.shield(asyncio.to_thread(self._kept.stop))

    def _command(self) -> EngineCommand:
        """How Envoy is started: its command names what cannot change while it runs, so another `Listen` is another command."""
        text = json.dumps(_bootstrap(self.listen, self._folder), indent=1)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        name = f"bootstrap-{digest}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("bootstrap-*.json"):
            if old.name != name:
                old.unlink(missing_ok=True)
        _write_private(self._folder / name, text)
        argv = [envoy_program(), "--config-path", str(self._folder / name), "--concurrency", "2"]
        return EngineCommand(argv=(*argv, "--disable-hot-restart", "--log-level", "warning"))

    def _write(self, name: str, resources: list[dict[str, Any]]) -> None:
        text = json.dumps(
            {"version_info": hashlib.sha256(json.dumps(resources).encode()).hexdigest()[:12], "resources": resources}
        )
        if self._written.get(name) != text:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_private(self._folder / name, text)
            self._written[name] = text

    def _wait_for_port(self) -> None:
        """One that has just ended may take a moment to let go."""
        give_up_s = time.monotonic() + 5
        family = socket.AF_INET6 if ":" in self.listen.host else socket.AF_INET
        while True:
            with socket.socket(family) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    s.bind((self.listen.host, self.listen.port))
                except OSError as e:
                    if time.monotonic() > give_up_s:
                        where = f"{self.listen.host}:{self.listen.port}"
                        raise ConfigError(
                            f"--listen {where}: it cannot be listened on ({e.strerror}): end what does, or name another"
                        ) from None
                else:
                    return
            time.sleep(0.1)


def on_loopback(url: str) -> bool:
    """Nobody but this machine reaches it: such an engine needs the proxy, and no other gets one."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def slug(engine_id: str) -> str:
    """An engine's id as one segment of a path; no two are alike."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", engine_id)
    if plain == engine_id and plain.strip(".") and plain != "health":
        return plain
    return f"{plain}-{hashlib.sha256(engine_id.encode()).hexdigest()[:8]}"


def _write_private(file: Path, text: str) -> None:
    """For our user's eyes only, and by a rename: what is watched sees the old file or the new one."""
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as f:
        f.write(text)
    new.replace(file)


# -- Envoy's configuration (its v3 API) --------------------------------------------------------------------------------
_TYPES: Final = "type.googleapis.com/envoy"
_JWT: Final = f"{_TYPES}.extensions.filters.http.jwt_authn.v3"
_LIMIT: Final = "envoy.filters.http.local_ratelimit"
_SHOWN: Final = "token"


def _watched(folder: Path, name: str) -> dict[str, Any]:
    return {"path_config_source": {"path": str(folder / name)}, "resource_api_version": "V3"}


def _bootstrap(listen: Listen, folder: Path) -> dict[str, Any]:
    """What stays while it runs: the listener, and no admin port."""
    http = {
        "@type": f"{_TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "engines",
        "codec_type": "HTTP1",
        "rds": {"route_config_name": "engines", "config_source": _watched(folder, "routes.json")},
        # Paths as they are meant, before anything is compared with them.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "common_http_protocol_options": {
            "headers_with_underscores_action": "REJECT_REQUEST",
            "idle_timeout": "300s",  # between two requests
        },
        "use_remote_address": True,
        "skip_xff_append": True,
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        "stream_idle_timeout": "0s",  # an answer takes as long as it takes
        "request_headers_timeout": "10s",
        "request_timeout": "60s",  # for the request to arrive whole
        "local_reply_config": _replies(),
        "http_filters": [
            {
                "name": "tokens",
                "config_discovery": {
                    "config_source": _watched(folder, "tokens.json"),
                    "type_urls": [f"{_JWT}.JwtAuthentication"],
                },
            },
            _filter("local_ratelimit", "LocalRateLimit", stat_prefix="outage"),
            _filter("buffer", "Buffer", max_request_bytes=MAX_BODY_BYTES),
            _filter("header_mutation", "HeaderMutation", mutations={"request_mutations": list(_stripped())}),
            _filter("router", "Router", suppress_envoy_headers=True),
        ],
    }
    return {
        "node": {"id": "maestro", "cluster": "maestro"},
        "dynamic_resources": {"cds_config": _watched(folder, "clusters.json")},
        "static_resources": {
            "listeners": [
                {
                    "name": "clients",
                    "address": {"socket_address": {"address": listen.host, "port_value": listen.port}},
                    "socket_options": list(_keepalive()),
                    "filter_chains": [
                        {"filters": [{"name": "http", "typed_config": http}]},
                    ],
                }
            ]
        },
        "stats_config": {"stats_matcher": {"reject_all": True}},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{_TYPES}.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 20_000,
                    },
                }
            ]
        },
    }


def _filter(name: str, kind: str, **config: Any) -> dict[str, Any]:
    return {
        "name": f"envoy.filters.http.{name}",
        "typed_config": {"@type": f"{_TYPES}.extensions.filters.http.{name}.v3.{kind}", **config},
    }


def _stripped() -> Iterator[dict[str, Any]]:
    yield {"remove_on_match": {"key_matcher": {"prefix": STRIPPED_PREFIX, "ignore_case": True}}}
    for name in STRIPPED:
        yield {"remove": name}


def _keepalive() -> Iterator[dict[str, Any]]:
    """A peer that says nothing is asked whether it is there."""
    quarter = max(1, int(GONE_S / 4))
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("KEEPIDLE", quarter), ("KEEPINTVL", quarter), ("KEEPCNT", 3)):
        if hasattr(socket, f"TCP_{name}"):  # macOS has fewer
            options.append((socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value))
    for level, name, value in options:
        yield {"level": int(level), "name": int(name), "int_value": value, "state": "STATE_LISTENING"}


def _replies() -> dict[str, Any]:
    """What the proxy itself answers, in OpenAI's shape. UF, UC, UH, NC: the engine was not reached, or broke off unanswered."""
    return {
        "mappers": [
            {
                "filter": {"response_flag_filter": {"flags": ["UF", "UC", "UH", "NC"]}},
                "status_code": 502,
                "headers_to_add": [_down()],
            }
        ],
        "body_format": {
            "json_format": {
                "error": {"message": "%LOCAL_REPLY_BODY%", "type": "maestro_proxy", "code": "%RESPONSE_CODE%"}
            }
        },
    }


def _down() -> dict[str, Any]:
    return {"header": {"key": DOWN_HEADER, "value": "down"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _checks(key: EngineKey, engines: Mapping[str, str]) -> dict[str, Any]:
    """The token filter: a signature, an engine, a moment."""
    providers: dict[str, Any] = {}
    for engine_id in engines:
        for use, audiences in (
            ("call", [call_audience(engine_id), outage_audience(engine_id)]),
            ("probe", [probe_audience(engine_id)]),
        ):
            providers[f"{use} {engine_id}"] = {
                "payload_in_metadata": _SHOWN,
                "issuer": key.issuer,
                "audiences": audiences,
                "local_jwks": {"inline_string": json.dumps(key.jwks())},
                "from_headers": [{"name": "Authorization", "value_prefix": "Bearer "}],
                "forward": False,
                "require_expiration": True,
                "clock_skew_seconds": CLOCK_SKEW_S,
            }
    return {
        "@type": f"{_TYPES}.config.core.v3.TypedExtensionConfig",
        "name": "tokens",
        "typed_config": {
            "@type": f"{_JWT}.JwtAuthentication",
            "providers": providers,
            "requirement_map": {name: {"provider_name": name} for name in providers},
        },
    }


def _cluster(engine_id: str, url: str) -> dict[str, Any]:
    address = urlsplit(url)
    host = "127.0.0.1" if address.hostname == "localhost" else address.hostname
    many = 100_000  # how many an engine takes is the scheduler's business
    return {
        "@type": f"{_TYPES}.config.cluster.v3.Cluster",
        "name": engine_id,
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": {
            "thresholds": [{"max_connections": many, "max_pending_requests": many, "max_requests": many}]
        },
        "typed_extension_protocol_options": {
            f"{_TYPES.removeprefix('type.googleapis.com/')}.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": f"{_UPSTREAM_IDLE_S}s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": engine_id,
            "endpoints": [
                {
                    "lb_endpoints": [
                        {
                            "endpoint": {
                                "address": {"socket_address": {"address": host, "port_value": address.port or 80}}
                            }
                        }
                    ]
                }
            ],
        },
    }


def _routes(engines: Mapping[str, str]) -> dict[str, Any]:
    """The allow-list, and the proxy's own health. What matches nothing is 404."""
    routes: list[dict[str, Any]] = [
        {
            "match": _match("GET", "/health"),
            "direct_response": {"status": 200},
            "typed_per_filter_config": {"tokens": {"@type": f"{_JWT}.PerRouteConfig", "disabled": True}},
        }
    ]
    for engine_id, url in engines.items():
        for method, path, use in ALLOWED:
            route = {
                "match": _match(method, f"/{slug(engine_id)}{path}"),
                "typed_per_filter_config": {
                    "tokens": {"@type": f"{_JWT}.PerRouteConfig", "requirement_name": f"{use} {engine_id}"},
                    **({_LIMIT: _in_outage(engine_id)} if use == "call" else {}),
                },
            }
            if url:
                route["route"] = {
                    "cluster": engine_id,
                    "timeout": "0s",
                    "prefix_rewrite": path,
                    "host_rewrite_literal": urlsplit(url).netloc,
                }
            else:
                route |= {
                    "direct_response": {"status": 502, "body": {"inline_string": "this engine is not up"}},
                    "response_headers_to_add": [_down()],
                }
            routes.append(route)
    return {
        "@type": f"{_TYPES}.config.route.v3.RouteConfiguration",
        "name": "engines",
        "virtual_hosts": [{"name": "engines", "domains": ["*"], "routes": routes}],
    }


def _in_outage(engine_id: str) -> dict[str, Any]:
    """Few calls a second to a path of the engine for who shows a token for an outage; no limit for others."""
    aud = {"key": "envoy.filters.http.jwt_authn", "path": [{"key": _SHOWN}, {"key": "aud"}]}
    shown = {"metadata": {"descriptor_key": "for", "metadata_key": aud, "source": "DYNAMIC", "skip_if_absent": True}}
    every = {"numerator": 100, "denominator": "HUNDRED"}
    return {
        "@type": f"{_TYPES}.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "outage",
        "filter_enabled": {"default_value": every},
        "filter_enforced": {"default_value": every},
        "token_bucket": {"max_tokens": 1_000_000_000, "tokens_per_fill": 1_000_000_000, "fill_interval": "1s"},
        "always_consume_default_token_bucket": False,
        "rate_limits": [{"actions": [shown]}],
        "descriptors": [
            {
                "entries": [{"key": "for", "value": outage_audience(engine_id)}],
                "token_bucket": {
                    "max_tokens": OUTAGE_CALLS,
                    "tokens_per_fill": OUTAGE_CALLS_PER_S,
                    "fill_interval": "1s",
                },
            }
        ],
    }


def _match(method: str, path: str) -> dict[str, Any]:
    return {"path": path, "headers": [{"name": ":method", "string_match": {"exact": method}}]}
