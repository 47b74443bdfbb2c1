"""Every construct of LangGraph gives the same result with Maestro as without, served by the fleet, with its node known.

`maestro bench matrix` runs them all in every mode; here they run in the two basic ones, and a few in the others.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.messages import AIMessageChunk
from packaging.requirements import Requirement
from typer.testing import CliRunner

from maestro_agents.cli.bench import bench_app, matrix, venvs
from maestro_agents.cli.bench.matrix import Bench, Cell
from maestro_agents.errors import ConfigError
from maestro_langgraph import gate

FOLDER = Path(__file__).resolve().parent.parent / "sample_workflows" / "constructs"
CONSTRUCTS = sorted(p.stem for p in FOLDER.glob("[!_]*.py"))


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """One provider and one fleet for all cells: they share an event loop, as the cells of the command do."""
    with Bench() as bench:
        yield bench


def holds(cell: Cell) -> None:
    """All checks of a cell; skipped where a package is missing."""
    if cell.skipped:
        pytest.skip(cell.skipped)
    assert not cell.failed, cell.detail


@pytest.mark.parametrize("mode", ["invoke", "ainvoke"])
@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_every_construct_is_the_same_under_maestro(bench: Bench, construct: str, mode: str) -> None:
    """One observation a request, all at the fleet, with priority, node and role; and the same result."""
    holds(bench.cell(construct, mode))


@pytest.mark.parametrize(
    ("construct", "mode"),
    [
        ("send", "stream"),
        ("human", "astream"),
        ("loop", "batch"),
        ("subgraph", "abatch"),
        ("tools", "messages"),
        ("nested_stream", "amessages"),
        ("functional", "events"),
        ("agent", "events"),
    ],
)
def test_other_modes_are_the_same_too(bench: Bench, construct: str, mode: str) -> None:
    """Streams of updates, messages and events, and batches."""
    holds(bench.cell(construct, mode))


@pytest.mark.parametrize("way", ["decorator", "wrap", "wrap_model", "middleware"])
def test_other_ways_in_give_the_same(bench: Bench, way: str) -> None:
    """The decorator, a wrapped graph, a wrapped model, and the agent middleware."""
    holds(bench.cell("agent", "amessages", way))


def test_a_way_that_has_no_place_is_said(bench: Bench) -> None:
    """A graph without an agent takes no middleware, and one without a chat model has none to wrap."""
    assert bench.cell("chain", "invoke", "middleware").skipped == "middleware has no place here"
    assert "no chat model" in bench.cell("raw_sdk", "invoke", "wrap_model").skipped


def test_a_construct_without_its_package_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure, and the cell says what to install."""
    monkeypatch.delitem(sys.modules, "sample_workflows.constructs.swarm", raising=False)
    monkeypatch.setitem(sys.modules, "langgraph_swarm", None)
    cell = bench.cell("swarm", "stream")
    assert cell.skipped == "needs langgraph_swarm: pip install 'maestro-agents[matrix]'"
    assert not cell.failed


def test_a_call_past_the_gate_fails_its_cell(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gate is not there, the cell says so: nothing observed, all at the provider, no node known."""
    monkeypatch.setattr(gate, "install", lambda: True)
    cell = bench.cell("chain", "invoke")
    assert cell.failed == ("G", "R", "N")
    assert cell.detail == "0 observations of 3 requests"


def test_a_changed_answer_fails_its_cell(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Maestro changes a request, the answer differs and the cell tells where."""
    from maestro_agents.hints import Sent
    from maestro_langgraph.call import Call

    added = Call.added

    def changed(call: Call) -> Sent:
        sent = added(call)
        return dataclasses.replace(sent, body={**sent.body, "max_completion_tokens": 5})

    monkeypatch.setattr(Call, "added", changed)
    cell = bench.cell("chain", "invoke")
    assert cell.failed == ("E",)
    assert "plan" in cell.detail


def test_an_exception_fails_its_cell(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that breaks under Maestro is a failed cell, not a broken table."""
    drive = matrix._drive

    def broken(*args: object) -> object:
        if gate._active:
            raise LookupError("ours")
        return drive(*args)

    monkeypatch.setattr(matrix, "_drive", broken)
    cell = bench.cell("batch", "stream")
    assert cell.failed[0] == "X"
    assert cell.detail == "LookupError: ours"


def test_ids_times_and_chunking_do_not_count_as_differences() -> None:
    """What differs between any two runs is taken out, and nothing else."""
    one = {"id": "run-6f9619ff-8b86-d011-b42d-00c04fc964ff", "created": 7, "text": "a", "at": "2026-01-02T03:04:05.6Z"}
    other = {"id": "run-3f2504e0-4f89-11d3-9a0c-0305e82c3301", "created": 8, "text": "a", "at": "2026-01-02T03:04:06Z"}
    assert matrix.plain(one) == matrix.plain(other)
    assert matrix.plain(one) != matrix.plain({**other, "text": "b"})
    meta = {"langgraph_checkpoint_ns": "a:1"}
    pieces = [(AIMessageChunk("one ", id="x"), meta), (AIMessageChunk("two", id="x"), meta)]
    assert matrix.joined(pieces) == matrix.joined([(AIMessageChunk("one two", id="x"), meta)])
    assert matrix.joined(pieces) != matrix.joined(pieces[:1])


def test_the_command_prints_the_cells_as_json() -> None:
    """`--json` gives each cell, the versions and the totals; all is well: exit status 0."""
    done = CliRunner().invoke(bench_app, ["matrix", "--construct", "chain", "--mode", "invoke", "--json"])
    assert done.exit_code == 0, done.output
    (table,) = json.loads(done.stdout)
    assert table["totals"] | {"failed": 0} == {"cells": 1, "passed": 1, "skipped": 0, "requests": 3, "failed": 0}
    assert table["cells"][0]["construct"] == "chain"


@pytest.mark.parametrize(
    "options", [["--construct", "chains"], ["--mode", "invoked"], ["--way", "magic"], ["--openai", "newest"]]
)
def test_a_name_that_is_none_is_told(options: list[str]) -> None:
    """One line that names what is wrong."""
    done = CliRunner().invoke(bench_app, ["matrix", *options])
    assert isinstance(done.exception, ConfigError)
    assert options[1] in str(done.exception)


def test_each_sdk_gets_the_langchain_openai_that_goes_with_it() -> None:
    """Our own requirements stand, but openai and langchain-openai are the ones that were asked for."""
    _, ours = venvs.source()
    assert {"openai==1.109.1", "langchain-openai==1.1.9"} <= set(venvs.requirements("1.109.1", ours))
    newest = venvs.requirements("3", ours)
    assert "openai>=3,<4" in newest
    names = [Requirement(r).name for r in newest]
    assert names.count("openai") == names.count("langchain-openai") == 1
    assert {"langgraph", "deepagents"} <= set(names)


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_constructs_know_nothing_of_maestro(construct: str) -> None:
    """They are what users write: no import of ours, in a file that says what it shows."""
    tree = ast.parse((FOLDER / f"{construct}.py").read_text())
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert not [n for n in names if n.startswith(("maestro", "sample_workflows"))]
    assert len(ast.get_docstring(tree) or "") > 60
