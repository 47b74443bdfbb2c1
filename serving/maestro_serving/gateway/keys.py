"""The keys of a gateway's callers: each is a tenant's. Only a digest of a key is kept (Redis hash ``api_keys``).

A key is 256 random bits, so nobody finds one by trying: a plain SHA-256 keeps it as safe as a slow password hash would.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from maestro_agents.errors import ConfigError, MaestroError
from maestro_agents.ports import Queue
from maestro_agents.predict.prompt import mapping

log = logging.getLogger("maestro")

PREFIX: Final = "mk-"
ID_CHARS: Final = 12
"""Characters of a digest by which people name a key."""

READ_EVERY_S: Final = 1.0
"""A key that was added or removed counts, or not, from so many seconds later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """What is kept of one key."""

    digest: str
    tenant: str
    label: str = ""
    made_at_s: float = 0.0

    @property
    def key_id(self) -> str:
        """How people name it."""
        return self.digest[:ID_CHARS]

    @classmethod
    def decode(cls, digest: str, about: str) -> ApiKey | None:
        """None for what no command of ours wrote."""
        try:
            body = mapping(json.loads(about))
            tenant, made_at_s = body.get("tenant"), float(body.get("made_at_s", 0.0))
        except (ValueError, TypeError):
            return None
        if not isinstance(tenant, str) or not tenant:
            return None
        return cls(digest=digest, tenant=tenant, label=str(body.get("label", "")), made_at_s=made_at_s)


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


async def add(queue: Queue, tenant: str, *, label: str = "") -> tuple[str, ApiKey]:
    """Make a key for a tenant. The key itself is returned once and kept nowhere."""
    key = PREFIX + secrets.token_urlsafe(32)
    made = ApiKey(digest=digest_of(key), tenant=tenant, label=label, made_at_s=time.time())
    about = {"tenant": tenant, "label": label, "made_at_s": made.made_at_s}
    await queue.add_api_key(made.digest, json.dumps(about))
    return key, made


async def listed(queue: Queue) -> list[ApiKey]:
    """All keys, the oldest first."""
    found = [ApiKey.decode(digest, about) for digest, about in (await queue.api_keys()).items()]
    return sorted((k for k in found if k is not None), key=lambda k: k.made_at_s)


async def remove(queue: Queue, key_id: str) -> ApiKey:
    """Let the key of this id count no more. Raises `ConfigError` where there is none, or several."""
    found = [k for k in await listed(queue) if key_id and k.digest.startswith(key_id)]
    if len(found) != 1:
        what = "several keys begin" if found else "no key begins"
        raise ConfigError(f"{what} with {key_id!r}: take an id of `maestro gateway keys ls`")
    await queue.remove_api_key(found[0].digest)
    return found[0]


class KeyRing:
    """The keys that count, as they were last read. While Redis is away the last known ones hold."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._keys: Mapping[str, tuple[ApiKey, ...]] = {}
        self._told = False
        #: They were read at least once.
        self.known = False

    async def read(self) -> None:
        """Read them now. Raises `QueueUnavailable`."""
        found: defaultdict[str, tuple[ApiKey, ...]] = defaultdict(tuple)
        for key in await listed(self._queue):
            found[key.key_id] += (key,)
        self._keys, self.known = dict(found), True

    async def keep(self) -> None:
        """Read them again and again, until cancelled."""
        while True:
            try:
                await self.read()
                self._told = False
            except Exception as e:
                if not self._told:
                    self._told = True
                    why = str(e) if isinstance(e, MaestroError) else type(e).__name__
                    log.warning("gateway: keys cannot be read (%s). The last known ones hold.", why)
            await asyncio.sleep(READ_EVERY_S)

    def tenant_of(self, key: str) -> str | None:
        """Whose key it is; None for one that does not count."""
        digest = digest_of(key)
        tenant: str | None = None
        for known in self._keys.get(
            digest[:ID_CHARS], ()
        ):  # the first digits find it, all of them are compared in constant time
            if hmac.compare_digest(known.digest, digest):
                tenant = known.tenant
        return tenant

    async def close(self) -> None:
        await self._queue.close()
