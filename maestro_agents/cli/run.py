"""`maestro run`: any command, with Maestro in every Python process that it starts. The app is not changed.

The way of ``opentelemetry-instrument`` and ``ddtrace-run``: a folder with a ``sitecustomize.py`` of ours goes to the front of
PYTHONPATH (`maestro_langgraph.bootstrap`), settings go into ``MAESTRO_*``, and the command takes the place of this process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from maestro_agents.errors import ConfigError
from maestro_agents.fleet import load_fleet
from maestro_agents.settings import ENV_PREFIX, Settings

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
"""Exit statuses where the command never began, as a shell gives them."""

_PYTHON: Final = re.compile(r"(python|pypy)[\d.]*t?(\.exe)?", re.IGNORECASE)
_DEAF: Final = {"I": "ignores PYTHONPATH", "E": "ignores PYTHONPATH", "S": "runs no sitecustomize"}


def run(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments, as without Maestro.")],
    service_class: Annotated[
        str | None, typer.Option("--service-class", help="Who waits for the answers: `interactive` or `batch`.")
    ] = None,
    deadline: Annotated[float | None, typer.Option("--deadline", help="Seconds within which a run should end.")] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Whose work it is.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="As MAESTRO_MODE, e.g. `off`.")] = None,
    redis_url: Annotated[str | None, typer.Option("--redis-url", help="The Redis of the pool to join.")] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="The pool to join.")] = None,
    fleet: Annotated[Path | None, typer.Option("--fleet", help="fleet.toml, where the app schedules alone.")] = None,
) -> None:
    """Run any command with Maestro in its Python processes: every LangGraph graph, every OpenAI call, no change in the app.

    Works with `python app.py`, `python -m app`, `pytest`, `uvicorn app:app`, `langgraph dev` and whatever starts them. The
    command becomes this very process: same id, signals and exit status. Options go before it. What is not given comes from
    MAESTRO_* and maestro.toml.

    The command's Python needs Maestro installed. Where it has none, one line says so and the app runs as without Maestro.
    """
    given = {
        "service_class": service_class,
        "deadline_s": deadline,
        "tenant": tenant,
        "mode": mode,
        "redis_url": redis_url,
        "pool": pool,
        "fleet": fleet.resolve() if fleet else None,
    }
    settings = Settings.load(**given)
    if settings.fleet is not None and settings.redis_url is None:
        load_fleet(settings.fleet)
    if deaf := _deaf(command):
        typer.echo(f"maestro: {deaf}: the app runs as without Maestro. Put @maestro into its code instead.", err=True)
    _become(command, environment(given))


def environment(given: dict[str, Any]) -> dict[str, str]:
    """The environment of the command: ours in front of its PYTHONPATH, and what was given as ``MAESTRO_*``."""
    found = importlib.util.find_spec("maestro_langgraph")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("maestro_langgraph is not installed here: python3 -m pip install maestro-agents")
    ours = os.path.join(found.submodule_search_locations[0], "bootstrap")
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != ours]
    said = {ENV_PREFIX + name.upper(): str(value) for name, value in given.items() if value is not None}
    return {**os.environ, **said, "PYTHONPATH": os.pathsep.join([ours, *before])}


def _become(command: list[str], env: dict[str, str]) -> None:
    """Replace this process by the command. Returns never: where it cannot, it exits as a shell would."""
    name = command[0]
    hint = f" (say: maestro run -- python {shlex.join(command)})" if name.endswith(".py") else ""
    for number in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and who takes its place would
        if hasattr(signal, number):
            signal.signal(getattr(signal, number), signal.SIG_DFL)
    sys.stdout.flush()
    try:
        os.execvpe(name, command, env)  # noqa: S606 - the command as it was given, no shell
    except FileNotFoundError:
        where = "whose interpreter does not exist" if shutil.which(name) else "that can be run"
        typer.secho(f"maestro: there is no program {name!r} {where}{hint}", fg=typer.colors.RED, err=True)
        raise typer.Exit(NOT_FOUND) from None
    except OSError as e:
        typer.secho(f"maestro: cannot run {name!r}: {e.strerror}{hint}", fg=typer.colors.RED, err=True)
        raise typer.Exit(NOT_EXECUTABLE) from None


def _deaf(command: Sequence[str]) -> str:
    """Why the command's Python will not hear of us, as far as its command line or its first line says; else empty."""
    words = list(command)
    if not _PYTHON.fullmatch(os.path.basename(words[0])):
        words = _first_line(words[0])
        if not words or not _PYTHON.fullmatch(os.path.basename(words[0])):
            return ""
    taken = False  # by the option before it
    for word in words[1:]:
        if taken:
            taken = False
            continue
        if not word.startswith("-") or word == "-":
            return ""  # the program
        for n, letter in enumerate(word[1:], 2):
            if letter in _DEAF:
                return f"{os.path.basename(words[0])} -{letter} {_DEAF[letter]}"
            if letter in "cm":
                return ""
            if letter in "WX":
                taken = n == len(word)
                break
    return ""


def _first_line(program: str) -> list[str]:
    """What a script is run by: the words behind its ``#!``."""
    path = shutil.which(program)
    if path is None:
        return []
    with open(path, "rb") as f:
        line = f.readline(512).decode(errors="replace")
    words = shlex.split(line[2:]) if line.startswith("#!") else []
    return words[1:] if words and os.path.basename(words[0]) == "env" else words
