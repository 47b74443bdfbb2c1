"""`maestro redis`: users for a pool's Redis, and moving a pool to another Redis (docs/redis.md)."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from maestro_agents.cli.monitor import AsJson, Pool, RedisUrl
from maestro_agents.errors import ConfigError
from maestro_agents.queue import acl
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.redis_url import redis_url as parse
from maestro_agents.redis_url import without_password
from maestro_agents.settings import Settings

redis_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Users for a pool's Redis, and moving to another Redis."
)


@redis_app.command("acl", epilog="Example: maestro redis acl --pool prod --password client=CLIENT_PW | redis-cli")
def print_acl(
    pool: Pool = None,
    role: Annotated[
        list[str] | None, typer.Option("--role", help=f"Only these, of {', '.join(acl.ROLES)}.", show_default=False)
    ] = None,
    password: Annotated[
        list[str] | None,
        typer.Option(
            "--password",
            metavar="ROLE=NAME",
            help="The environment variable that holds a role's password. Its SHA-256 is printed. Without: a gap to fill.",
        ),
    ] = None,
    aclfile: Annotated[bool, typer.Option("--aclfile", help="Print lines of an ACL file, not commands.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a Redis user for each role of a pool, with the keys and commands that the role needs. Needs Redis 7.

    Each line is a command for redis-cli: look at it, fill in passwords, pipe it. An app then names its user:
    MAESTRO_REDIS_URL=redis://maestro-POOL-client:PASSWORD@HOST:6379/0
    """
    name = Settings.load(pool=pool).pool
    secrets = _passwords(password or [])
    for wanted in {*(role or ()), *secrets} - acl.ROLES.keys():
        raise ConfigError(f"there is no role {wanted!r}: known are {', '.join(acl.ROLES)}")
    chosen = role or list(acl.ROLES)
    if as_json:
        print(json.dumps([{"role": r, "of": acl.ROLES[r].of, "user": acl.user(r, name), "rules": acl.rules(r, name)} for r in chosen]))  # fmt: skip
        return
    for r in chosen:
        if aclfile or sys.stdout.isatty():  # redis-cli takes a comment for a command
            print(f"# {r}: {acl.ROLES[r].of}")
        print(acl.line(r, name, secrets.get(r), aclfile=aclfile))


def _passwords(given: list[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for text in given:
        role, _, name = text.partition("=")
        if not os.environ.get(name):
            raise ConfigError(f"--password {text}: the environment variable {name!r} is not set (ROLE=NAME)")
        found[role] = os.environ[name]
    return found


@redis_app.command("move", epilog="Example: maestro redis move --to rediss://new.example:6379/0")
def move(
    to: Annotated[str, typer.Option("--to", metavar="URL", help="The other Redis.")],
    redis_url: RedisUrl = None,
    pool: Pool = None,
    as_json: AsJson = False,
) -> None:
    """Copy what a pool must not lose to another Redis: log, models, workflows, salt, switch, API keys, usage.

    What waits and runs is not copied: apps announce it again. Nothing is changed at the old place, and what is copied
    twice counts once, so it may be run again. How to move without losing a stage is in docs/redis.md.
    """
    settings = Settings.load(redis_url=redis_url, pool=pool)
    if settings.redis_url is None:
        raise ConfigError("from which Redis? Set MAESTRO_REDIS_URL or --redis-url")
    if parse(settings.redis_url) == parse(to):
        raise ConfigError("--to names the Redis that the pool is in now")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("copying", total=None)

        def copied(name: str, n: int) -> None:
            progress.update(task, description=f"{name}: {n}")

        done = asyncio.run(_move(settings.redis_url, to, settings.pool, copied))
    if as_json:
        print(json.dumps({"pool": settings.pool, "copied": done}))
        return
    for name, n in done.items():
        print(f"{name}: {n}")
    print(f"pool {settings.pool} is copied to {without_password(to)}. Start its schedulers there, then its apps.")


async def _move(source: str, target: str, pool: str, copied: Callable[[str, int], None]) -> Mapping[str, int]:
    old, new = RedisQueue(source, pool=pool), RedisQueue(target, pool=pool)
    try:
        return await old.copy_to(new, copied)
    finally:
        await old.close()
        await new.close()
