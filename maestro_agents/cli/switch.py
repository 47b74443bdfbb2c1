"""`maestro switch`: what a whole pool may do, from one key in Redis. The emergency brake: it asks nothing."""

from __future__ import annotations

import asyncio
import getpass
import json
import platform
import time
from dataclasses import asdict
from typing import Annotated, Final

import typer

from maestro_agents.cli.monitor import AsJson, Pool, RedisUrl
from maestro_agents.core import Mode, Switch
from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.settings import Settings

MEANS: Final = {
    Mode.ON: "calls are ordered and routed",
    Mode.OBSERVE: "calls go out as their apps made them, and are measured",
    Mode.OFF: "calls go out as if Maestro were not there",
}


def run(
    mode: Annotated[Mode | None, typer.Argument(help="Left out: show how it stands.", show_default=False)] = None,
    reason: Annotated[str, typer.Option("--reason", help="Kept with it, for whoever looks next.")] = "",
    redis_url: RedisUrl = None,
    pool: Pool = None,
    as_json: AsJson = False,
) -> None:
    """Show or turn the switch of a pool. Every process obeys within a second, and what waits leaves at once.

    off: as if Maestro were not there. observe: nothing is delayed or rerouted, everything is measured. on: back to
    normal. It only lowers what an app's own MAESTRO_MODE allows. Calls that run are not touched.
    """
    settings = Settings.load(redis_url=redis_url, pool=pool)
    if settings.redis_url is None:
        raise ConfigError(
            "which Redis? Set MAESTRO_REDIS_URL or --redis-url (`maestro up` prints it). "
            "An app without Redis has no switch: set its MAESTRO_MODE and start it again."
        )
    if reason and mode is None:
        raise ConfigError("a reason for what? `maestro switch off --reason TEXT`")
    turned = Switch(mode=mode, by=_who(), at_s=time.time(), reason=reason) if mode else None
    try:
        switch = asyncio.run(_turn(settings.redis_url, settings.pool, turned))
    except QueueUnavailable as e:
        raise QueueUnavailable(
            f"{e} Apps keep the last switch they saw. Without Redis: start them with MAESTRO_MODE=off."
        ) from e
    if as_json:
        print(json.dumps({"pool": settings.pool, **asdict(switch)}))
    else:
        told = switch.told()
        print(f"pool {settings.pool}: {switch.mode}, {MEANS[switch.mode]}{f' ({told})' if told else ''}")


async def _turn(url: str, pool: str, switch: Switch | None) -> Switch:
    """Turn the switch where there is something to turn it to; return how it stands then."""
    from maestro_agents.queue.redis import RedisQueue

    queue = RedisQueue(url, pool=pool)
    try:
        if switch is not None:
            await queue.set_switch(switch)
        return await queue.switch()
    finally:
        await queue.close()


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "somebody"
    return f"{user}@{platform.node()}"
