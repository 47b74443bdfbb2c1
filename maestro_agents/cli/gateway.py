"""`maestro gateway`: the OpenAI-compatible server in front of a pool, and the keys of its callers."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.queue.embedded import ping, without_password
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.settings import Settings

if TYPE_CHECKING:
    from maestro_agents.ports import Queue

_T = TypeVar("_T")
_Redis = Annotated[str | None, typer.Option("--redis-url", help="Default: MAESTRO_REDIS_URL.")]
_Pool = Annotated[str | None, typer.Option("--pool", help="Default: MAESTRO_POOL.")]

gateway_app = typer.Typer(invoke_without_command=True, no_args_is_help=False, rich_markup_mode=None)
keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make, list and remove the keys of tenants.")
gateway_app.add_typer(keys_app, name="keys", epilog="Example: maestro gateway keys add acme --label ci")


@gateway_app.callback()
def gateway(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port; it is printed.")] = 8080,
    redis_url: _Redis = None,
    pool: _Pool = None,
    no_keys: Annotated[
        bool,
        typer.Option(
            "--no-keys",
            help="For development, on loopback only: no key is asked for, every call is MAESTRO_TENANT's. "
            "With MAESTRO_FLEET it needs no Redis.",
        ),
    ] = False,
    max_body_mb: Annotated[
        float, typer.Option("--max-body-mb", min=0.001, help="Largest request; larger ones get 413.")
    ] = 20.0,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Origin whose pages may call from a browser; may be repeated. Default: none."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that serve the port together.")] = 1,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate (PEM).")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key.")] = None,
) -> None:
    """Serve a pool to any OpenAI client: chat completions, completions, responses, embeddings, models.

    Make a key first: maestro gateway keys add acme. A client then needs two things, base_url http://HOST:8080/v1 and that key as
    api_key. Headers may say more of a call (x-maestro-run, -role, -class, -deadline-s ...): docs/gateway.md.
    """
    if context.invoked_subcommand is not None:
        return
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = Settings.load(redis_url=redis_url, pool=pool)
    if no_keys and not _is_loopback(host):
        raise ConfigError(f"--no-keys lets everybody in who reaches {host}: leave it out, or listen on 127.0.0.1")
    if settings.redis_url is not None:
        _reach(settings.redis_url)
    elif not no_keys or settings.fleet is None:
        raise ConfigError(
            "which Redis? Give --redis-url or MAESTRO_REDIS_URL, that of `maestro up` or `maestro scheduler`. To try it "
            "without one: MAESTRO_FLEET=fleet.toml maestro gateway --no-keys"
        )
    for file in (ssl_certfile, ssl_keyfile):
        if file is not None and not file.is_file():
            raise ConfigError(f"{file}: there is no such file: --ssl-certfile and --ssl-keyfile name PEM files")
    if workers > 1 and settings.redis_url is None:
        raise ConfigError("several workers meet in Redis alone: give --redis-url, or leave --workers out")

    from maestro_serving.gateway.server import Options, run

    options = Options(
        redis_url=redis_url,
        pool=pool,
        tenant=settings.tenant if no_keys else None,
        max_body_bytes=int(max_body_mb * 2**20),
        cors=tuple(cors or ()),
        ssl_certfile=str(ssl_certfile) if ssl_certfile else None,
        ssl_keyfile=str(ssl_keyfile) if ssl_keyfile else None,
    )
    whose = f"every call is tenant {settings.tenant!r}'s" if no_keys else "keys: maestro gateway keys"

    def ready(url: str) -> None:
        print(f"gateway of pool {settings.pool} at {url} ({whose})", flush=True)

    try:
        run(options, host=host, port=port, workers=workers, on_ready=ready)
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror or e}. Choose another --port, or 0") from None


@keys_app.command("add", short_help="Make a key for a tenant and print it once. Example: maestro gateway keys add acme")
def add(
    tenant: Annotated[str, typer.Argument(help="Whose calls it is for, as [[tenant]] of the fleet file names it.")],
    label: Annotated[str, typer.Option(help="What for, e.g. who got it.")] = "",
    redis_url: _Redis = None,
    pool: _Pool = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Make a key for a tenant. It is printed once and kept nowhere; running gateways take it within seconds."""
    from maestro_serving.gateway import keys

    if not tenant.strip() or len(tenant) > 128 or "/" in tenant or not tenant.isprintable():
        raise ConfigError(f"{tenant!r} is no tenant's name: 1 to 128 printable characters without '/'")
    key, made = _ask(redis_url, pool, lambda queue: keys.add(queue, tenant, label=label))
    if as_json:
        print(json.dumps({"key": key, "id": made.key_id, "tenant": tenant, "label": label}))
    else:
        print(key)
        typer.secho(f"key {made.key_id} of tenant {tenant}: it is not shown again.", err=True)


@keys_app.command("ls", short_help="List the keys. Example: maestro gateway keys ls")
def ls(
    redis_url: _Redis = None,
    pool: _Pool = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the keys that count: id, tenant, label, when made. The keys themselves nobody knows."""
    from maestro_serving.gateway import keys

    found = _ask(redis_url, pool, keys.listed)
    if as_json:
        about = [{"id": k.key_id, "tenant": k.tenant, "label": k.label, "made_at_s": k.made_at_s} for k in found]
        print(json.dumps(about))
        return
    table = Table("id", "tenant", "label", "made")
    for k in found:
        table.add_row(k.key_id, k.tenant, k.label, time.strftime("%Y-%m-%d %H:%M", time.localtime(k.made_at_s)))
    Console().print(table)


@keys_app.command("rm", short_help="Remove a key. Example: maestro gateway keys rm 1f0c22ab93de")
def rm(
    key_id: Annotated[str, typer.Argument(help="Its id, or how that begins (`maestro gateway keys ls`).")],
    redis_url: _Redis = None,
    pool: _Pool = None,
) -> None:
    """Remove a key: running gateways refuse it within seconds. Calls that it began go on to their end."""
    from maestro_serving.gateway import keys

    gone = _ask(redis_url, pool, lambda queue: keys.remove(queue, key_id))
    print(f"key {gone.key_id} of tenant {gone.tenant} counts no more")


def _ask(redis_url: str | None, pool: str | None, work: Callable[[Queue], Awaitable[_T]]) -> _T:
    settings = Settings.load(redis_url=redis_url, pool=pool)
    url = settings.redis_url
    if url is None:
        raise ConfigError("which Redis? Give --redis-url, or MAESTRO_REDIS_URL: keys are kept there")
    _reach(url)

    async def asked() -> _T:
        queue = RedisQueue(url, pool=settings.pool)
        try:
            return await work(queue)
        finally:
            await queue.close()

    return asyncio.run(asked())


def _reach(url: str) -> None:
    try:
        ping(url)
    except QueueUnavailable as e:
        raise QueueUnavailable(f"{e}. Is {without_password(url)} right? `maestro up` brings a Redis along") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
