"""What a user can set: arguments win over ``MAESTRO_*``, over ``maestro.toml``, over the defaults below.

``maestro.toml`` is looked for in the current directory, or where ``MAESTRO_CONFIG`` points. Its keys are the field names.
A wrong value is a `ConfigError` of one line that names the setting, the value and where it came from.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from maestro_agents.core import Mode, ServiceClass
from maestro_agents.errors import ConfigError
from maestro_agents.redis_url import check_redis_url, without_password
from maestro_agents.tomlfile import TomlFile, read_toml

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

ENV_PREFIX: Final = "MAESTRO_"
CONFIG_ENV: Final = "MAESTRO_CONFIG"
DEFAULT_CONFIG_FILE: Final = "maestro.toml"
OTHER_ENV: Final = frozenset(
    {CONFIG_ENV, "MAESTRO_DEBUG", "MAESTRO_ENVOY", "MAESTRO_VLLM", "MAESTRO_VLLM_MODEL", "MAESTRO_SAMPLE_MODEL"}
)
"""Variables of ours that are no settings."""
TEST_PREFIX: Final = "MAESTRO_TEST_"


def _redis_url(value: object) -> object:
    """An empty string means no Redis: it lets an argument undo the environment."""
    return (check_redis_url(value) if value else None) if isinstance(value, str) else value


class Settings(BaseSettings):
    """The settings of one process. Built by `Settings.load`; never changed afterwards."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    redis_url: Annotated[str | None, BeforeValidator(_redis_url)] = Field(
        default=None,
        description="Redis that joins this app to everybody else's, e.g. redis://127.0.0.1:6379/0. "
        "Unset: a scheduler inside this process orders its own calls.",
    )
    pool: str = Field(
        default="default",
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="The pool of GPUs that serves this app: one scheduler, one memory ledger, one trust domain.",
    )
    mode: Mode = Field(
        default=Mode.ON,
        description="on: order and route calls. observe: delay and change nothing, measure every call. "
        "off: do nothing at all, every call goes out as if Maestro were not there.",
    )
    rollout: float = Field(
        default=100.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Percent of the runs that mode `on` orders and routes, chosen by their ids; the others are observed.",
    )
    events: Path | None = Field(
        default=None,
        description="File to which every call and every run of this process is appended when it ends, as one JSON line: "
        "names and numbers, never text. Needs no Redis.",
    )
    on_outage: Literal["open", "closed", "original_url"] | None = Field(
        default=None,
        description="When Maestro itself is out. open: last known engines, within local_concurrency. closed: calls fail. "
        "original_url: calls go where they would have gone without Maestro. Unset: open; closed for a tenant that is allowed some "
        "clusters only, whose calls never go to their original URL then, and with open to allowed engines only.",
    )
    max_wait_s: float = Field(
        default=120.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest wait of a call at the gate, in seconds; then WaitTooLong, or QueueFull where the queue was full.",
    )
    local_concurrency: int = Field(
        default=8,
        ge=1,
        description="Calls in flight at a time where this process decides alone (no Redis, or an outage).",
    )
    max_attempts: int = Field(
        default=3, ge=1, description="How many engines a call may be tried on before its first byte arrived."
    )
    lease_s: float = Field(
        default=10.0,
        ge=1,
        allow_inf_nan=False,
        description="Seconds a grant stays valid without renewal; it is renewed every third of it.",
    )
    outage_after_s: float = Field(
        default=3.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without an answer from the queue before on_outage applies.",
    )
    max_queue: int = Field(
        default=10_000,
        ge=1,
        description="Stages that may wait for one model; others try again until max_wait_s is used up, then QueueFull.",
    )
    service_class: ServiceClass = Field(
        default=ServiceClass.INTERACTIVE,
        description="Who waits for the answers, where the code does not say: interactive or batch.",
    )
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds within which a run should end, where the code does not say. Unset: 30 for interactive, 600 for batch.",
    )
    tenant: str = Field(
        default="default",
        min_length=1,
        max_length=128,
        description="Whose work this is: kept with every stage and observation.",
    )
    site: str = Field(
        default="",
        max_length=64,
        pattern=r"^[A-Za-z0-9_.-]*$",
        description="Where this app runs, e.g. a region. Apps of one site share what they measure of the network to each cluster.",
    )
    text_features: bool = Field(
        default=True,
        description="Tell the scheduler, beside lengths and counts, what helps to guess an answer's length from the words: "
        "shares of digits, whether it speaks of JSON, some words as hashed numbers. Never the text.",
    )
    engine_key_file: Path | None = Field(
        default=None,
        description="File with the key that schedulers and node agents share, and no client has: it signs the short-lived tokens "
        "which the proxies in front of engines ask for. Needed by `maestro node --listen` and by the scheduler of such nodes.",
    )
    fleet: Path | None = Field(default=None, description="fleet.toml, where this process runs the scheduler itself.")
    retrain: bool = Field(
        default=True,
        description="Let `maestro scheduler` train its model of output lengths again on the pool's own traffic, in a process of "
        "low priority, and use what proves better. Off: the model that it has stays; statistics learn all the same.",
    )
    widen_executor: bool = Field(
        default=True,
        description="Give an event loop more threads, since synchronous nodes that wait at the gate each hold one of its few.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then maestro.toml; no .env file, which belongs to the app."""
        file = _config_file()
        in_file = InitSettingsSource(settings_cls, init_kwargs=dict(file.content) if file else {})
        return init_settings, env_settings, in_file

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read arguments, environment and file. An argument that is None counts as not given. Raises `ConfigError`."""
        given = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as e:
            raise _explain(e, given) from None
        except SettingsError as e:  # an environment variable that is no JSON where JSON is wanted
            raise ConfigError(str(e)) from None

    @classmethod
    def origins(cls) -> Mapping[str, str]:
        """Where each setting that is no default comes from now: ``MAESTRO_POOL`` or ``maestro.toml:3``."""
        file = _config_file()
        found = {name: _origin(name, (), file) for name in cls.model_fields}
        return {name: origin for name, origin in found.items() if origin}


def unknown_env() -> list[str]:
    """``MAESTRO_*`` variables that nothing reads: most likely misspelled."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | OTHER_ENV
    return sorted(
        name
        for name in os.environ
        if name.upper().startswith(ENV_PREFIX)
        and name.upper() not in known
        and not name.upper().startswith(TEST_PREFIX)
    )


def _config_file() -> TomlFile | None:
    named = os.environ.get(CONFIG_ENV)
    path = Path(named or DEFAULT_CONFIG_FILE)
    return read_toml(path) if named or path.is_file() else None


def _origin(name: str, given: Collection[str], file: TomlFile | None) -> str:
    if name in given:
        return "argument"
    env = next((key for key, value in os.environ.items() if value and key.upper() == ENV_PREFIX + name.upper()), "")
    if env:
        return env
    return f"{file.path}:{file.line((name,))}" if file and name in file.content else ""


def _explain(error: ValidationError, given: Mapping[str, object]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    origin = _origin(name, given, _config_file())
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, Settings.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(Settings.model_fields)}"
        return ConfigError(f"{origin}: there is no setting {name!r}: {hint}")
    problem = first["msg"].removeprefix("Value error, ")
    value = without_password(repr(first["input"]))
    return ConfigError(f"{origin}: {name} = {value}: {problem[:1].lower()}{problem[1:]}")
