"""One virtual environment per version of the OpenAI SDK, with this project in it: where `maestro bench matrix` runs again.

Each gets the project from the checkout that this process runs from, or from where pip installed it from, without its
dependencies, and these beside it: ours as they stand, but the asked-for openai and the langchain-openai that goes with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

import maestro_agents
from maestro_agents.errors import ConfigError

LANGCHAIN_OPENAI: Final = {1: "langchain-openai==1.1.9"}
"""By the SDK's major; newer ones take what the newest langchain-openai accepts."""

EXTRA: Final = "matrix"
_VERSION: Final = re.compile(r"\d+(\.\d+)*")
_MESSAGE_LINES: Final = 12


def source() -> tuple[str, list[str]]:
    """What to install of this project, and its requirements. Raises `ConfigError` where neither can be found."""
    checkout = Path(maestro_agents.__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        project: dict[str, Any] = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(checkout), _here([*project["dependencies"], *project["optional-dependencies"][EXTRA]])
    try:
        installed = importlib.metadata.distribution("maestro-agents")
        url = str(json.loads(installed.read_text("direct_url.json") or "{}").get("url", ""))
    except importlib.metadata.PackageNotFoundError:
        installed, url = None, ""
    path = Path(unquote(urlsplit(url).path))
    if installed is None or not url.startswith("file://") or not path.exists():
        raise ConfigError(
            "--openai needs maestro-agents to install again, and finds neither a checkout nor the file that pip installed: "
            "run it from a checkout, or leave --openai out"
        )
    return str(path), _here(installed.requires or ())


def _here(required: Iterable[str]) -> list[str]:
    """Those that this platform and `EXTRA` need, without the condition."""
    found = [Requirement(r) for r in required]
    return [f"{r.name}{r.specifier}" for r in found if r.marker is None or r.marker.evaluate({"extra": EXTRA})]


def requirements(version: str, ours: Sequence[str]) -> list[str]:
    """What stands beside this project in the environment for one version of openai: ``2.54.0``, or ``3`` for its newest."""
    if not _VERSION.fullmatch(version):
        raise ConfigError(f"--openai {version!r}: give a version, e.g. 2.54.0, or a major, e.g. 3")
    major = int(version.split(".", maxsplit=1)[0])
    sdk = f"openai=={version}" if "." in version else f"openai>={major},<{major + 1}"
    kept = [r for r in ours if Requirement(r).name not in {"openai", "langchain-openai"}]
    return [*kept, sdk, LANGCHAIN_OPENAI.get(major, "langchain-openai>=1.7,<2")]


def make(version: str, home: Path, say: Callable[[str], None]) -> Path:
    """Make the environment, or bring the one that is there up to date; return its Python. Raises `ConfigError`."""
    path, ours = source()
    beside = requirements(version, ours)
    folder = home / f"openai-{version}"
    python = folder / "bin" / "python"
    uv = shutil.which("uv")
    if not python.is_file():
        say(f"openai {version}: making {folder}")
        _run(
            [uv, "venv", "--python", sys.executable, folder] if uv else [sys.executable, "-m", "venv", folder], version
        )
    install = [uv, "pip", "install", "-q", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
    say(f"openai {version}: installing {beside[-2]}, {beside[-1]} and what goes with them")
    _run([*install, *beside], version)
    again = (
        ["--reinstall-package", "maestro-agents", "--refresh-package", "maestro-agents"]
        if uv
        else ["--force-reinstall"]
    )
    _run([*install, "--no-deps", *again, path], version)
    return python


def _run(command: Sequence[str | Path | None], version: str) -> None:
    ended = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if ended.returncode:
        said = "\n".join((ended.stderr or ended.stdout).strip().splitlines()[-_MESSAGE_LINES:])
        raise ConfigError(f"--openai {version}: the environment could not be made:\n{said}")


def matrix_in(python: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``maestro bench matrix --json`` with another Python; its progress goes to our stderr. Raises `ConfigError`."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    command = [str(python), "-m", "maestro_agents.cli", "bench", "matrix", "--json", *arguments]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False, cwd=python.parent)
    try:
        (found,) = json.loads(ended.stdout)
    except ValueError:
        raise ConfigError(f"{' '.join(command)} ended with {ended.returncode} and printed no result") from None
    return found
