"""Who may do what in a pool's Redis: a user of Redis per role, with the keys and commands that the role needs, no more.

`maestro redis acl` prints them. Redis 7 or newer: only there can a key be read-only. What a script may do is what its user
may do, command by command; a script's keys count as written, so a role may write the keys of every script that it runs.
This keeps a leaked password and a slip of the hand from doing much; it does not part apps of one pool from each other,
which can all write tickets and grants: they are one trust domain.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """What a role needs. Keys are named as in the schema (`queue.redis`), without the pool's prefix."""

    #: For people.
    of: str
    #: Lua files that it runs.
    scripts: frozenset[str] = frozenset()
    #: Commands that it sends itself, or ``command|subcommand``.
    commands: frozenset[str]
    #: Keys that it writes, and may read.
    writes: frozenset[str] = frozenset()
    #: Keys that it only reads.
    reads: frozenset[str] = frozenset()


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALWAYS: Final = _set("ping time info multi exec select")
"""Told by every role: how Redis is, what time it is there, and reads that belong together."""
_SCRIPTS: Final = _set("evalsha script|load")
_TICKETS: Final = _set("stage:* ready:* inbox:* leases clients slots kv draining wake waits")
_LOOK: Final = _set("get hget hmget hgetall hlen zrange zcard zscore zlexcount zrangebyscore xrange xrevrange xlen")

_CLIENT: Final = Role(
    of="apps",
    scripts=_set("push renew announce finish requeue cancel extend log"),
    commands=_ALWAYS | _SCRIPTS | _set("get set hget hmget hgetall hset hsetnx blpop lpop zrange zrangebyscore"),
    # The switch: a Redis that came back empty is told by the apps that knew. Epoch to p99: keys of their scripts.
    writes=_TICKETS | _set("credits p99 epoch fence leader log switch workflows salt rtts"),
    reads=_set("fleet tenants nodes reports"),
)

ROLES: Final[Mapping[str, Role]] = {
    "client": _CLIENT,
    "gateway": Role(
        of="gateways: as apps, and what API keys are valid",
        scripts=_CLIENT.scripts,
        commands=_CLIENT.commands,
        writes=_CLIENT.writes,
        reads=_CLIENT.reads | _set("api_keys"),
    ),
    "scheduler": Role(
        of="schedulers",
        scripts=_set("lead publish grant refuse lose settle publish_model want usage tidy"),
        commands=_ALWAYS | _SCRIPTS | _LOOK | _set("set hset blpop zadd zremrangebyscore"),
        writes=_TICKETS
        | _set("credits p99 epoch fence leader fleet models predictor wanted:* tenants usage:* charged_to"),
        reads=_set("workflows log nodes reports rtts switch"),
    ),
    "node": Role(
        of="node agents",
        scripts=_set("report"),
        commands=_ALWAYS | _SCRIPTS | _set("xrevrange xread"),
        writes=_set("nodes reports wake"),
        reads=_set("wanted:*"),
    ),
    "monitor": Role(
        of="people and dashboards that look: maestro top, queue ls, doctor, report, usage",
        commands=_ALWAYS | _LOOK,
        reads=_set(
            "stage:* ready:* leases clients slots kv draining waits credits p99 epoch leader fleet tenants workflows log nodes"
            " reports wanted:* switch models predictor rtts usage:* charged_to"
        ),
    ),
    "operator": Role(
        of="people who act: maestro switch, queue cancel, predict rollback, gateway keys, redis move",
        scripts=_set("refuse publish_model"),
        commands=_ALWAYS | _SCRIPTS | _LOOK | _set("set hset hdel hsetnx xadd scan type del"),
        writes=_set(
            "stage:* ready:* inbox:* waits epoch models switch api_keys workflows salt predictor log usage:* charged_to"
        ),
        reads=_set("leases clients slots kv draining credits p99 leader fleet tenants nodes reports wanted:* rtts"),
    ),
}

_CALL: Final = re.compile(r"redis\.p?call\('([A-Z]+)'")


def rules(role: str, pool: str) -> list[str]:
    """The rules of a role's user, as ``ACL SETUSER`` takes them, without name and password."""
    r = ROLES[role]
    commands = r.commands | {c.lower() for script in r.scripts for c in _CALL.findall(_source(script))}
    prefix = f"maestro:{{{pool}}}:"
    return [
        "resetchannels",
        *(f"~{prefix}{key}" for key in sorted(r.writes)),
        *(f"%R~{prefix}{key}" for key in sorted(r.reads)),
        "-@all",
        *(f"+{command}" for command in sorted(commands)),
    ]


def user(role: str, pool: str) -> str:
    """The name of a role's user."""
    return f"maestro-{pool}-{role}"


def line(role: str, pool: str, password: str | None, *, aclfile: bool) -> str:
    """Make, or make anew, a role's user: as a command, or as a line of an ACL file. ``password``: None leaves a gap to fill."""
    secret = f">PUT-A-PASSWORD-FOR-{role.upper()}-HERE" if password is None else f"#{_hash(password)}"
    words: Iterable[str] = ("on", secret, *rules(role, pool))
    name = user(role, pool)
    return f"user {name} {' '.join(words)}" if aclfile else f"ACL SETUSER {name} reset {' '.join(words)}"


def _hash(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def _source(script: str) -> str:
    path = resources.files("maestro_agents.queue") / "lua" / f"{script}.lua"
    return path.read_text(encoding="utf-8") if path.is_file() else ""
