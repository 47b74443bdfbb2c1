"""Short-lived signed tokens: what lets a call through the proxy in front of a node's engines (`maestro_serving.proxy`).

The scheduler signs one for each engine whenever it publishes the fleet; it travels with the fleet, and clients send it as
``Authorization: Bearer``. The key is in a file (``MAESTRO_ENGINE_KEY_FILE``) that schedulers and node agents have, and no
client. A token is a JWT (RFC 7519, HS256): for one engine (``aud``) of one pool (``iss``), until ``exp``. It says
where a call may go and not what is in its body: whoever has one is inside the trust domain of the pool.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError

if TYPE_CHECKING:
    from maestro_agents.settings import Settings  # what reads them is slow to import

LIFE_LEASES: Final = 6.0
"""A token lives so many leases; it is renewed several times in each."""

OUTAGE_LIFE_S: Final = 3600.0
"""How long the token for an outage lives: an app that can no longer hear the scheduler calls engines so long, a few times a second."""

SHORTEST_KEY: Final = 32
"""Bytes of a key, as many as HS256 makes of it (RFC 7518, 3.2)."""


class EngineKey:
    """The key of one pool: signs for its engines. ``life_s``: how long a token is good for."""

    def __init__(self, secret: str, *, pool: str, life_s: float) -> None:
        self.issuer = f"maestro:{pool}"
        self._secret = secret.encode()
        self._life_s = life_s

    @classmethod
    def of(cls, settings: Settings, *, pool: str) -> EngineKey | None:
        """The key that the settings name; None where they name none. Raises `ConfigError`."""
        file = settings.engine_key_file
        return file and cls.read(file, pool=pool, lease_s=settings.lease_s)

    @classmethod
    def read(cls, file: Path, *, pool: str, lease_s: float) -> EngineKey:
        """From the file that the settings name. Raises `ConfigError`."""
        try:
            secret = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "it is no text"
            raise ConfigError(f"MAESTRO_ENGINE_KEY_FILE = {file} cannot be read ({why}): `{HOW}`") from None
        if len(secret.encode()) < SHORTEST_KEY:
            raise ConfigError(f"the key in {file} is shorter than {SHORTEST_KEY} bytes: `{HOW}`")
        return cls(secret, pool=pool, life_s=LIFE_LEASES * lease_s)

    def sign(self, engine: EngineSpec, *, now_s: float) -> EngineSpec:
        """The engine with a token for calls to it; one that has a key of its own, or is the caller's own URL, as it is."""
        if engine.api_key_env or engine.original:
            return engine
        return dataclasses.replace(
            engine,
            token=self._token(call_audience(engine.engine_id), now_s + self._life_s),
            outage_token=self._token(outage_audience(engine.engine_id), now_s + OUTAGE_LIFE_S),
        )

    def probe_token(self, engine_id: str, *, now_s: float) -> str:
        """For an engine's health and metrics, and nothing else."""
        return self._token(probe_audience(engine_id), now_s + self._life_s)

    def _token(self, audience: str, until_s: float) -> str:
        import jwt

        claims = {"iss": self.issuer, "aud": audience, "exp": int(until_s)}
        return jwt.encode(claims, self._secret, algorithm="HS256")

    def jwks(self) -> Mapping[str, object]:
        """What checks the tokens needs (RFC 7517). It holds the key itself."""
        k = base64.urlsafe_b64encode(self._secret).rstrip(b"=").decode()
        return {"keys": [{"kty": "oct", "alg": "HS256", "k": k}]}


HOW: Final = "openssl rand -hex 32 > FILE; chmod 600 FILE"


def call_audience(engine_id: str) -> str:
    """What a token for calls to an engine is for."""
    return f"call:{engine_id}"


def outage_audience(engine_id: str) -> str:
    """What a token for calls to an engine is for, while Maestro is out."""
    return f"outage:{engine_id}"


def probe_audience(engine_id: str) -> str:
    """What a token of the scheduler's probe is for."""
    return f"probe:{engine_id}"
