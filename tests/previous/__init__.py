"""The release before this one: its slim wheel (`make.py`), unpacked, imported beside this release, or run in processes."""

from __future__ import annotations

import contextlib
import importlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

(WHEEL,) = Path(__file__).parent.glob("*-slim.whl")
VERSION: Final = WHEEL.name.split("-")[1]
_PACKAGES: Final = ("maestro_agents", "maestro_langgraph", "maestro_serving")


def unpacked(folder: Path) -> Path:
    """Unpack it; returns what belongs first on PYTHONPATH."""
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(folder)
    return folder


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """None of our packages is imported, inside; what was is back afterwards."""
    ours = {name: m for name, m in sys.modules.items() if name.split(".")[0] in _PACKAGES}
    for name in ours:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in _PACKAGES]:
            del sys.modules[name]
        sys.modules.update(ours)


def imported(folder: Path, *names: str) -> list[ModuleType]:
    """Its modules, as they are, in this process; under their names this process keeps its own."""
    with _alone():
        sys.path.insert(0, str(folder))
        try:
            found = [importlib.import_module(name) for name in names]
        finally:
            sys.path.remove(str(folder))
    assert all(str(folder) in str(m.__file__) for m in found)
    return found
