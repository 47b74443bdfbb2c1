"""Settings: who wins, and what a wrong value says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError
from maestro_agents.settings import ENV_PREFIX, Settings, unknown_env


def test_defaults_need_no_configuration() -> None:
    """Without any configuration there is a usable in-process setting."""
    settings = Settings.load()
    assert settings.redis_url is None
    assert (settings.mode, settings.pool, settings.local_concurrency) == ("on", "default", 8)
    assert settings.service_class is ServiceClass.INTERACTIVE


def test_arguments_win_over_environment_over_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source is used where the stronger ones are silent."""
    Path("maestro.toml").write_text('tenant = "file"\npool = "file"\nmax_attempts = 7\n')
    monkeypatch.setenv("MAESTRO_TENANT", "env")
    monkeypatch.setenv("MAESTRO_POOL", "env")
    settings = Settings.load(tenant="argument", pool=None)
    assert (settings.tenant, settings.pool, settings.max_attempts) == ("argument", "env", 7)
    assert Settings.origins() == {
        "tenant": "MAESTRO_TENANT",
        "pool": "MAESTRO_POOL",
        "max_attempts": "maestro.toml:3",
    }


def test_config_env_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MAESTRO_CONFIG points elsewhere, and a file that is not there is an error rather than silence."""
    (tmp_path / "mine.toml").write_text('mode = "off"\n')
    monkeypatch.setenv("MAESTRO_CONFIG", str(tmp_path / "mine.toml"))
    assert Settings.load().mode == "off"
    monkeypatch.setenv("MAESTRO_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match=r"gone\.toml: there is no such file"):
        Settings.load()


def test_empty_variable_is_unset_and_empty_argument_undoes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`export MAESTRO_POOL=` sets nothing, and ``redis_url=""`` asks for no Redis."""
    monkeypatch.setenv("MAESTRO_POOL", "")
    monkeypatch.setenv("MAESTRO_REDIS_URL", "redis://127.0.0.1/0")
    assert Settings.load().pool == "default"
    assert Settings.load(redis_url="").redis_url is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MAX_WAIT_S", "-1", "MAESTRO_MAX_WAIT_S: max_wait_s = '-1': input should be greater than 0"),
        ("MAX_WAIT_S", "inf", "MAESTRO_MAX_WAIT_S: max_wait_s = 'inf': input should be a finite number"),
        ("DEADLINE_S", "-20", "MAESTRO_DEADLINE_S: deadline_s = '-20': input should be greater than 0"),
        ("LOCAL_CONCURRENCY", "0", "MAESTRO_LOCAL_CONCURRENCY: local_concurrency = '0': input should be greater than"),
        ("MAX_QUEUE", "many", "MAESTRO_MAX_QUEUE: max_queue = 'many': input should be a valid integer"),
        ("MODE", "onn", "MAESTRO_MODE: mode = 'onn': input should be 'on', 'observe' or 'off'"),
        ("SERVICE_CLASS", "bulk", "MAESTRO_SERVICE_CLASS: service_class = 'bulk': input should be 'interactive' or"),
        ("POOL", "a b", "MAESTRO_POOL: pool = 'a b': string should match pattern"),
        ("REDIS_URL", "http://x", "MAESTRO_REDIS_URL: redis_url = 'http://x': a Redis URL starts with redis://"),
        ("REDIS_URL", "redis://", "MAESTRO_REDIS_URL: redis_url = 'redis://': a Redis URL needs a host"),
        ("REDIS_URL", "redis://h:99999", "MAESTRO_REDIS_URL: redis_url = 'redis://h:99999': the port of a Redis URL"),
        ("REDIS_URL", "unix://", "MAESTRO_REDIS_URL: redis_url = 'unix://': a unix:// URL needs the path"),
    ],
)
def test_a_wrong_variable_says_its_name_value_and_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    """One line names the variable, what it holds and what would be right."""
    monkeypatch.setenv(ENV_PREFIX + name, value)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\nmax_wait_s = -2\n", "maestro.toml:2: max_wait_s = -2: input should be greater than 0"),
        ("max_wait = 3\n", "maestro.toml:1: there is no setting 'max_wait': did you mean max_wait_s?"),
        ("[engine]\nx = 1\n", "maestro.toml:1: there is no setting 'engine': known are redis_url, pool"),
        ("mode = on\n", "maestro.toml:1: not valid TOML: Invalid value"),
        ('a = 1\nmode = "on', "maestro.toml:2: not valid TOML: "),
    ],
)
def test_a_wrong_file_says_its_line(text: str, says: str) -> None:
    """An error of maestro.toml begins with the file and the line."""
    Path("maestro.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert str(caught.value).startswith(says)


def test_a_wrong_argument_says_so() -> None:
    """An argument is named as such."""
    with pytest.raises(ConfigError, match=r"^argument: max_attempts = 0: "):
        Settings.load(max_attempts=0)


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong URL is quoted without its password."""
    monkeypatch.setenv("MAESTRO_REDIS_URL", "redis://me:hunter2@h:99999/0")
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert "hunter2" not in str(caught.value)
    assert "h:99999" in str(caught.value)


def test_misspelled_variables_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that nothing reads is reported; those that something reads are not."""
    monkeypatch.setenv("MAESTRO_REDIS", "redis://x")
    monkeypatch.setenv("MAESTRO_CONFIG", "x")
    monkeypatch.setenv("MAESTRO_POOL", "x")
    assert unknown_env() == ["MAESTRO_REDIS"]


def test_every_setting_is_described() -> None:
    """Each setting says what it means."""
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_importing_settings_loads_no_framework() -> None:
    """Apps import this at start: it must not bring Redis, XGBoost, LangChain or a web server along."""
    code = "import sys, maestro_agents.settings; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    heavy = {"redis", "xgboost", "numpy", "matplotlib", "langchain_core", "langgraph", "openai", "starlette", "typer"}
    assert heavy.isdisjoint(out.stdout.split())
