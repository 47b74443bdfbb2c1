"""What Maestro costs, and that a fault of its own costs no result: the benches of that, in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maestro_agents.cli.bench import cost, gate_faults, upstream
from maestro_agents.errors import MaestroError

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "xgboost",
    "typer",
    "rich",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "matplotlib",
    "pydantic_settings",
    "redis",
)


def silent(*_: object) -> None:
    return None


def test_importing_the_client_side_loads_nothing_that_it_may_never_need() -> None:
    """Neither the command line's nor the server's parties come with `import maestro_langgraph`, nor Redis or the settings."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "integrations", "serving"))
    code = (
        f"import sys, {cost._APP}; known = {{*sys.modules}}; import maestro_langgraph; print(*{{*sys.modules}} - known)"
    )
    env = {**os.environ, "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert set(HEAVY).isdisjoint(out.split())


def test_what_a_call_costs_is_measured_against_the_same_call_without() -> None:
    """Both modes, paired; each figure is there and none is absurd."""
    with cost.served() as url:
        found = cost._part("calls", "40", url, say=silent)
    assert set(found) == set(cost.MODES)
    for figures in found.values():
        assert figures["calls"] == 40
        assert figures["maestro_ms"] == pytest.approx(figures["plain_ms"] + figures["added_ms"])
        assert figures["added_ms"] < 20


def test_a_run_in_flight_is_weighed_against_one_without_maestro() -> None:
    """Bytes per run are told for both ways, and what a waiting call holds is small."""
    with cost.served() as url:
        plain, ours = (cost._part("memory", "100", url, way, say=silent) for way in ("plain", "maestro"))
    assert plain["runs"] == ours["runs"] == 100
    assert 0 < ours["python_bytes"] - plain["python_bytes"] < 100_000


def test_runs_of_every_kind_leave_nothing_behind() -> None:
    """Answered, streamed, failed, cancelled, abandoned: no waiting stage, no held grant, no run, no further file or thread."""
    with cost.served() as url:
        found = cost._part("leak", "500", url, "maestro", say=silent)
    first, last = found["looks"][0], found["looks"][-1]
    assert set(found["ended"].values()) == {100}
    for name in ("room.waiting", "room.held", "room.local", "room.unsent", "room._tasks"):
        assert last["tables"][f"client._{name}"] == 0
    assert last["tables"]["maestro_langgraph.runs._runs"] == 0
    assert last["threads"] <= first["threads"]
    assert last["tasks"] == 1


def test_a_part_that_fails_is_told() -> None:
    """A measurement that broke is an error, not a figure."""
    with pytest.raises(MaestroError, match="'leak' of the measurement failed"):
        cost._part("leak", "nonsense", "http://127.0.0.1:1/v1", "plain", say=silent)


@pytest.mark.parametrize("group", [("ticket", "finish"), ("thread dies", "SDK"), ("no Redis answers",)])
def test_the_graph_gives_its_normal_result_whatever_breaks_in_the_gate(group: tuple[str, ...]) -> None:
    """Sync and async, streamed and not; a few lines of log in all (`maestro bench gate-faults` has every fault)."""
    names = tuple(name for name in gate_faults.FAULTS if any(word in name for word in group))
    rows = gate_faults.run(names, silent)
    assert [row for row in rows if not row["survived"]] == []


def test_a_test_that_ends_otherwise_is_found_and_one_that_varies_by_itself_is_left_out() -> None:
    """The comparison of the upstream suites, on outcomes made up."""
    first = {"a": "passed", "b": "failed", "c": "passed", "d": "passed", "gone": "passed"}
    second = {**first, "c": "failed"}
    ours = {"a": "passed", "b": "failed", "c": "passed", "d": "failed", "new": "passed"}
    found = upstream.compare(first, second, ours)
    assert found["different"] == {
        "d": ["passed", "failed"],
        "gone": ["passed", "missing"],
        "new": ["missing", "passed"],
    }
    assert list(found["flaky"]) == ["c"]
    assert (found["tests"], found["passed"], found["failed"], found["same"]) == (5, 3, ["b"], 2)


def test_a_test_of_the_report_is_found_again_by_pytests_own_name(tmp_path: Path) -> None:
    """Also one of a class, in a folder, with dots in its parameters."""
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    (tmp_path / "tests" / "deep" / "test_a.py").touch()
    for told, name in (
        ("tests.deep.test_a::test_b[1.5::x]", "tests/deep/test_a.py::test_b[1.5::x]"),
        ("tests.deep.test_a.TestB::test_c", "tests/deep/test_a.py::TestB::test_c"),
    ):
        assert upstream._node(tmp_path, told) == name
    assert upstream._same({"plain": ["passed"] * 2, "maestro": ["passed"] * 2})
    assert not upstream._same({"plain": ["passed"] * 2, "maestro": ["passed", "failed"]})
    assert not upstream._same({"plain": [None], "maestro": [None]})


def test_outcomes_are_read_from_pytests_own_report(tmp_path: Path) -> None:
    """Passed, failed, skipped, expected failure, and an error in a teardown, which is the worst of its test."""
    suite = tmp_path / "test_them.py"
    suite.write_text(
        "import pytest\n"
        "@pytest.fixture\ndef bad():\n    yield\n    raise ValueError\n"
        "def test_good(): pass\ndef test_wrong(): assert 0\ndef test_torn(bad): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n@pytest.mark.xfail\ndef test_known(): assert 0\n"
    )
    report = tmp_path / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", suite, f"--junitxml={report}", "-q"], check=False, capture_output=True
    )
    found = {name.split("::")[-1]: outcome for name, outcome in upstream.read_junit(report)}
    assert found == {
        "test_good": "passed",
        "test_wrong": "failed",
        "test_torn": "error",
        "test_skipped": "skipped",
        "test_known": "xfailed",
    }
