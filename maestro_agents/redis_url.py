"""Which Redis: one URL says it, in settings, in fleet.toml and on the command line.

    redis://[USER:PASSWORD@]HOST[:6379][/DB]                         one server
    rediss://...                                                     the same over TLS
    unix://[USER:PASSWORD@]/PATH[?db=N]                              one server, by its socket
    redis+sentinel://[USER:PASSWORD@]HOST[:26379],.../MASTER[/DB]    the master that Sentinels know by this name
    redis+cluster://[USER:PASSWORD@]HOST[:6379],...                  a Redis Cluster, by some of its nodes
    rediss+sentinel://..., rediss+cluster://...                      the same over TLS, Sentinels included

Options stand behind a ``?`` and are called as redis-py calls them (`OPTIONS`), e.g. ``ssl_ca_certs=/etc/ca.pem``. User and
password are Redis's own; those of Sentinels are the options ``sentinel_username`` and ``sentinel_password``. Characters with
a meaning in URLs are written percent-encoded (``@`` as ``%40``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Self
from urllib.parse import parse_qsl, unquote

from maestro_agents.errors import ConfigError

Kind = Literal["single", "unix", "sentinel", "cluster"]

SCHEMES: Final[Mapping[str, tuple[Kind, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}

_TLS: Final = "ssl_ca_certs ssl_ca_data ssl_certfile ssl_keyfile ssl_cert_reqs ssl_check_hostname ssl_ciphers".split()
_SENTINEL: Final = ("sentinel_username", "sentinel_password")
OPTIONS: Final = frozenset([*_TLS, *_SENTINEL, "db", "username", "password"])
"""What may stand behind the ``?``."""

_SECRET: Final = re.compile(r"(?<=[?&])((?:sentinel_)?password=)[^&#]*")
_EXAMPLE: Final = "e.g. redis://127.0.0.1:6379/0"


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisUrl:
    """A URL of a Redis, taken apart. It holds passwords: show `without_password` of the text instead."""

    kind: Kind
    tls: bool
    #: Servers, Sentinels or some nodes of the cluster; empty for a socket.
    hosts: tuple[tuple[str, int], ...] = ()
    #: The socket.
    path: str = ""
    #: The name under which Sentinels know the master.
    master: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    #: As in `OPTIONS`, those above left out.
    options: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def parse(cls, url: str) -> Self:
        """Take a URL apart. Raises ValueError with what to do, where it cannot be one of a Redis; it names no password."""
        scheme, mark, rest = url.partition("://")
        if not mark or scheme not in SCHEMES:
            raise ValueError(
                "a Redis URL starts with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://, "
                + _EXAMPLE
            )
        kind, tls = SCHEMES[scheme]
        rest, _, query = rest.partition("?")
        options = dict(parse_qsl(query.partition("#")[0], keep_blank_values=True))
        for name in options.keys() - OPTIONS:
            raise ValueError(f"a Redis URL has no option {name!r}; known are {', '.join(sorted(OPTIONS))}")
        if not tls and (named := sorted(options.keys() & set(_TLS))):
            raise ValueError(f"{named[0]} is for TLS: start the URL with rediss{scheme.removeprefix('redis')}://")
        if kind != "sentinel" and (named := sorted(options.keys() & set(_SENTINEL))):
            raise ValueError(f"{named[0]} is for redis+sentinel:// URLs")
        place, slash, path = rest.partition("/")
        if "@" in path and kind != "unix":
            raise ValueError("a password in a Redis URL is percent-encoded: write / as %2F, @ as %40")
        user, _, place = place.rpartition("@")
        name, _, password = user.partition(":")
        username = unquote(name) or options.pop("username", None)
        secret = unquote(password) or options.pop("password", None)
        if kind == "unix":
            if not path or place:
                raise ValueError("a unix:// URL needs the path of the socket, e.g. unix:///run/redis.sock")
            db = _db(options.pop("db", "0"))
            path = unquote(slash + path)
            return cls(kind=kind, tls=tls, path=path, db=db, username=username, password=secret, options=options)
        hosts = tuple(_host(text, 26379 if kind == "sentinel" else 6379) for text in place.split(","))
        if kind == "single" and len(hosts) > 1:
            raise ValueError("several hosts: start the URL with redis+sentinel:// or redis+cluster://")
        master = ""
        if kind == "sentinel":
            master, _, path = path.partition("/")
            if not master:
                raise ValueError(
                    "a redis+sentinel:// URL names the master, e.g. redis+sentinel://h1:26379,h2:26379/mymaster"
                )
        db = _db(path.rstrip("/") or options.pop("db", "0"))
        if kind == "cluster" and db:
            raise ValueError("a Redis Cluster has database 0 only")
        return cls(
            kind=kind, tls=tls, hosts=hosts, master=unquote(master), db=db,
            username=username, password=secret, options=options,
        )  # fmt: skip


def check_redis_url(url: str) -> str:
    """Return the URL; raise ValueError with what to do where it cannot be one of a Redis."""
    RedisUrl.parse(url)
    return url


def redis_url(url: str) -> RedisUrl:
    """As `RedisUrl.parse`, with a `ConfigError` that shows the URL."""
    try:
        return RedisUrl.parse(url)
    except ValueError as e:
        raise ConfigError(f"redis URL {without_password(url)!r}: {e}") from None


def without_password(url: str) -> str:
    """The URL as it may be shown, be it a wrong one."""
    return _SECRET.sub(r"\1***", re.sub(r"//.*@", "//***@", url))


def _host(text: str, port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:]+)(?::(.*))?", text)
    if found is None:
        raise ValueError("a Redis URL needs a host, " + _EXAMPLE)
    name, given = found.groups()
    if given is None or given == "":
        return unquote(name).strip("[]"), port
    if not given.isdecimal() or not 0 < int(given) < 65536:
        raise ValueError("the port of a Redis URL is a number up to 65535")
    return unquote(name).strip("[]"), int(given)


def _db(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"the database of a Redis is a number, not {text!r}, {_EXAMPLE}")
    return int(text)
