"""`maestro bench upstream`: LangGraph's own test suites, without Maestro and under it, test by test.

The suites come in the source distributions of the versions that are installed here, and run in a virtual environment of
their own that sees what this one has. Each suite runs twice plain, then under Maestro as the whole process (no Redis: calls
go to the URL that the app uses). A test that ends differently in the two plain runs says nothing and is left out; every
other must end the same under Maestro. Many of them wait for fractions of a second: one that ended differently runs again
alone, `ALONE` times each way, and counts as different unless it ends the same every time.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from maestro_agents.errors import ConfigError

SUITES: Final = {
    "langgraph": "langgraph",
    "supervisor": "langgraph-supervisor",
    "swarm": "langgraph-swarm",
}
"""Suite -> distribution."""

_TOOLS: Final = re.compile(r"(ruff|mypy|types-|pyperf|py-spy|pytest-(cov|watcher)|langgraph-cli)")
"""Of the suites' test dependencies, those that no test needs."""

_WORST: Final = ("passed", "xfailed", "skipped", "failed", "error")
_SHARE: Final = re.compile(rb"\[ *(\d+)%\]")

ALONE: Final = 5

Outcomes = Mapping[str, str]
Say = Callable[[str, str, int], None]
"""Told of suite, way (``plain 1``, ``plain 2``, ``maestro``) and percent done."""


def run(suites: tuple[str, ...], folder: Path, workers: int, say: Say) -> list[dict[str, Any]]:
    """Run the suites and compare. ``folder`` keeps environment, sources and reports. Raises `ConfigError`."""
    python = _environment(folder)
    return [_suite(name, folder, python, workers, say) for name in suites]


def _suite(name: str, folder: Path, python: Path, workers: int, say: Say) -> dict[str, Any]:
    where = _sources(SUITES[name], folder)
    _install(python, where)
    first, second, ours = (
        _outcomes(name, way, where, python, workers, say) for way in ("plain 1", "plain 2", "maestro")
    )
    found = compare(first, second, ours)
    again: dict[str, dict[str, list[str | None]]] = {}
    for test in found["different"]:
        ways = ("plain", "maestro") * ALONE
        ends = [_outcomes(name, f"{way} alone", where, python, 0, say, _node(where, test)).get(test) for way in ways]
        again[test] = {"plain": ends[::2], "maestro": ends[1::2]}
    found["once"] = {t: found["different"].pop(t) for t, ends in again.items() if _same(ends)}
    return {"suite": name, "version": importlib.metadata.version(SUITES[name]), **found, "alone": again}


def _same(ends: Mapping[str, list[str | None]]) -> bool:
    return len({*ends["plain"], *ends["maestro"]}) == 1 and ends["plain"][0] is not None


def _node(where: Path, test: str) -> str:
    """Pytest's own name of a test of the report: ``tests.test_a.TestB::test_c[d]`` -> ``tests/test_a.py::TestB::test_c[d]``."""
    module, _, name = test.partition("::")
    parts = module.split(".")
    files = (n for n in range(len(parts), 0, -1) if where.joinpath(*parts[:n]).with_suffix(".py").is_file())
    n = next(files, len(parts))
    return "::".join(["/".join(parts[:n]) + ".py", *parts[n:], name])


def compare(first: Outcomes, second: Outcomes, ours: Outcomes) -> dict[str, Any]:
    """Two plain runs and one under Maestro, each test id -> outcome. A test that one of them lacks is ``missing`` there."""
    plain = sorted(first.keys() | second.keys())
    flaky = [t for t in plain if first.get(t) != second.get(t)]
    steady = {t: first[t] for t in plain if first.get(t) == second.get(t)}
    found = steady.keys() | (ours.keys() - set(plain))
    pairs = {t: (steady.get(t, "missing"), ours.get(t, "missing")) for t in sorted(found)}
    counts = Counter(steady.values())
    return {
        "tests": len(plain),
        "passed": counts["passed"],
        "failed": sorted(t for t, outcome in steady.items() if outcome in {"failed", "error"}),
        "skipped": counts["skipped"] + counts["xfailed"],
        "flaky": {t: [first.get(t, "missing"), second.get(t, "missing"), ours.get(t, "missing")] for t in flaky},
        "same": sum(a == b for a, b in pairs.values()),
        "different": {t: [a, b] for t, (a, b) in pairs.items() if a != b},
    }


def _environment(folder: Path) -> Path:
    """A virtual environment that sees everything which this process can import."""
    place = (folder / "venv").absolute()
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(place, with_pip=True)
    paths = _output([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    base = (sys.base_prefix, sys.base_exec_prefix)
    seen = [os.path.abspath(p) for p in sys.path]
    here = [p for p in seen if os.path.isdir(p) and (not p.startswith(base) or p.endswith("-packages"))]
    Path(paths, "maestro_upstream.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    return python


def _sources(distribution: str, folder: Path) -> Path:
    """The suite and its pyproject, from the source distribution of the installed version."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{distribution} is not installed here: pip install {distribution}") from None
    stem = f"{distribution.replace('-', '_')}-{version}"
    archive, where = folder / f"{stem}.tar.gz", folder / stem
    if not archive.exists():
        download = ["-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
        _output([sys.executable, *download, f"{distribution}=={version}"])
    if not where.exists():
        with tarfile.open(archive) as content:
            # not the package itself, which would hide the installed one
            wanted = [m for m in content if m.name.startswith((f"{stem}/tests/", f"{stem}/pyproject.toml"))]
            content.extractall(folder, wanted, filter="data")
    return where


def _install(python: Path, where: Path) -> None:
    project = tomllib.loads((where / "pyproject.toml").read_text(encoding="utf-8"))
    group: list[str] = project["dependency-groups"]["test"]
    needed = [line for line in group if not _TOOLS.match(line)]
    _output([str(python), "-m", "pip", "install", "-q", "pytest-xdist", *needed])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ConfigError(f"{' '.join(command[1:6])} ... failed: {' '.join(last)}")
    return done.stdout.strip()


def _outcomes(
    suite: str, way: str, where: Path, python: Path, workers: int, say: Say, only: str = "tests"
) -> dict[str, str]:
    """Run pytest once, under Maestro where the way says so. Its log and report lie beside the suite."""
    report, log = (where.with_name(f"{where.name} {way}.{ending}") for ending in ("xml", "log"))
    report.unlink(missing_ok=True)
    tests = ["-m", "pytest", only, "-p", "no:cacheprovider", f"--junitxml={report.absolute()}", "-n", str(workers)]
    command = [str(python), *tests]
    if way.startswith("maestro"):
        command = [str(python), "-m", "maestro_agents.cli", "run", "--", *command]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAESTRO_") and k != "PYTHONPATH"}
    env |= {"NO_DOCKER": "true", "PYTHONUNBUFFERED": "1"}
    say(suite, way, 0)
    with log.open("wb") as out, subprocess.Popen(
        command, cwd=where, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            if shares := _SHARE.findall(line):
                say(suite, way, int(shares[-1]))
    if not report.exists():
        raise ConfigError(f"{suite} ({way}): pytest gave no report, see {log}")
    return dict(read_junit(report))


def read_junit(report: Path) -> Iterator[tuple[str, str]]:
    """Test ids and outcomes of a JUnit report; where a test has several (its teardown failed too), the worst."""
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - as above
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        found[name] = max(found.get(name, "passed"), _outcome(case), key=_WORST.index)
    yield from found.items()


def _outcome(case: ET.Element) -> str:
    for child in case:
        if child.tag == "skipped":
            return "xfailed" if child.get("type") == "pytest.xfail" else "skipped"
        if child.tag in {"failure", "error"}:
            return "failed" if child.tag == "failure" else "error"
    return "passed"
