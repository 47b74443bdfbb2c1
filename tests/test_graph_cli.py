"""`maestro graph`: it finds the graph of a file, shows it, runs nothing, and says in one line what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.cli import main
from maestro_agents.core import RunEnd

HEAD = """
from typing import TypedDict
from langchain_core.messages import SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

class State(TypedDict, total=False):
    q: str
"""
APP = (
    HEAD
    + """
WRITER_PROMPT = "You are the writer. " + "Be terse and exact in every line. " * 4
llm = ChatOpenAI(model="tiny")

def write(state):
    return {"q": llm.invoke([SystemMessage(WRITER_PROMPT), state["q"]]).text}

def tidy(state):
    return {"q": state["q"].strip()}

builder = StateGraph(State)
builder.add_node("write", write)
builder.add_node("tidy [x] \\"y\\"", tidy)
builder.add_edge(START, "write")
builder.add_conditional_edges("write", lambda s: "b", {"again": "write", "b": "tidy [x] \\"y\\""})
graph = builder.compile()
"""
)
BUILDER = (
    HEAD
    + '''
def build():
    """Build it."""
    builder = StateGraph(State)
    builder.add_node("{node}", lambda s: {{}})
    builder.add_edge(START, "{node}")
    return builder

async def make_other() -> StateGraph:
    return build().compile()

def needs(what):
    return build()

three = 3
'''
)


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command imports is forgotten after the test; no key is set."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", sys.modules)
    for name in ("app", "apps", "apps.app", "pkg", "pkg.inner", "pkg.inner.app", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")


def write(text: str, name: str = "app.py") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    sys.modules.pop(path.stem, None)
    return path


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["graph", *words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = called(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_it_shows_who_calls_a_model_as_whom_and_with_what(capsys: pytest.CaptureFixture[str]) -> None:
    """Node, answer, model, edges and loop; of a prompt the beginning on one line, the whole only as JSON."""
    write(APP)
    code, out, _ = called(capsys, "app.py:graph")
    assert code == 0
    assert re.search(r"write +llm +yes +write +tiny", out)
    assert "prompt of write: You are the writer. Be terse" in out
    assert "in every line. Be terse and exact in every line." not in out
    assert "loop: write" in out
    found = as_json(capsys, "app.py:graph")
    nodes = {n["id"]: n for n in found["nodes"]}
    assert nodes["write"]["prompts"] == ["You are the writer. " + "Be terse and exact in every line. " * 4]
    assert nodes["write"]["in_loop"]
    assert nodes['tidy [x] "y"']["llm"] == "no"
    assert {"from": "write", "to": "write", "conditional": True, "label": "again", "seen": 0, "drawn": True} in found[
        "edges"
    ]
    assert found["warnings"] == []


def test_mermaid_is_a_flowchart_that_mermaid_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is a node, an edge or a class; words that Mermaid would read as its own are escaped; LLM nodes are marked."""
    write(APP)
    code, out, _ = called(capsys, "app.py", "--mermaid")
    assert code == 0
    first, *rest = out.strip().splitlines()
    assert first == "flowchart TD"
    text = r'"[^"]*"'
    node = rf"n\d+(\(\[{text}\]\)|\[\[{text}\]\]|\[{text}\]|\({text}\):::(llm|maybe))"
    edge = rf"n\d+ (-->|-\.->)(\|{text}\|)? n\d+"
    assert [line for line in rest if not re.fullmatch(rf"    ({node}|{edge}|classDef \w+ [^\"]+)", line)] == []
    assert 'n1("write<br/>LLM"):::llm' in out
    assert "#quot;y#quot;" in out
    assert "-.->" not in out


def test_observed_runs_are_merged(capsys: pytest.CaptureFixture[str]) -> None:
    """Of this graph only, with counts; edges that only runs showed are dashed; a file of other runs says so."""
    write(APP)
    fingerprint = as_json(capsys, "app.py")["fingerprint"]

    def line(workflow: str) -> str:
        run = RunEnd(
            run_id="r", workflow=workflow, outcome="done", started_at_s=0, ended_at_s=1, tasks={"write": 2}, calls={"write": 2},
            moves=(("write", "write", 1), ("write", "hidden", 1)),
        )  # fmt: skip
        return f'{{"kind":"run",{run.encode()[1:]}\n'

    events = write(line(fingerprint) * 2 + line("another") + '{"kind":"stage"}\nnonsense\n', "events.jsonl")
    found = as_json(capsys, "app.py", "--observed", str(events))
    assert found["runs"] == 2
    assert {n["id"]: n["seen"] for n in found["nodes"]}["write"] == {"tasks": 4, "calls": 4}
    seen = {(e["from"], e["to"]): (e["seen"], e["drawn"]) for e in found["edges"] if e["seen"]}
    assert seen == {("write", "write"): (2, True), ("write", "hidden"): (2, False)}
    _, out, _ = called(capsys, "app.py", "--observed", str(events), "--mermaid")
    assert re.search(r'n1 -\.->\|"2x"\| n\d+', out)
    other = write(line("another"), "other.jsonl")
    code, out, err = called(capsys, "app.py", "--observed", str(other))
    assert code == 0
    assert f"no run of this graph (fingerprint {fingerprint}) was found there" in err


def test_what_a_pool_saw_is_merged(capsys: pytest.CaptureFixture[str], redis_url: str, pool: str) -> None:
    """From the observation log in Redis."""
    import asyncio

    from maestro_agents.queue.redis import RedisQueue

    write(APP)
    fingerprint = as_json(capsys, "app.py")["fingerprint"]

    async def put() -> None:
        queue = RedisQueue(redis_url, pool=pool)
        for workflow in (fingerprint, "another"):
            await queue.end_run(
                RunEnd(run_id="r", workflow=workflow, outcome="done", started_at_s=0, ended_at_s=1, tasks={"write": 7})
            )
        await queue.close()

    asyncio.run(put())
    found = as_json(capsys, "app.py", "--redis-url", redis_url, "--pool", pool)
    assert {n["id"]: n["seen"]["tasks"] for n in found["nodes"]}["write"] == 7


@pytest.mark.parametrize("target", ["app.py:build", "app:build", "app.py:make_other", "app:make_other"])
def test_builders_are_called(capsys: pytest.CaptureFixture[str], target: str) -> None:
    """Synchronous or not, returning a compiled graph or a StateGraph; by file or by module."""
    write(BUILDER.format(node="one"))
    assert "one" in {n["id"] for n in as_json(capsys, target)["nodes"]}


def test_a_file_of_a_package_is_imported_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Its relative imports work, from whatever folder the command is called."""
    write("", "pkg/__init__.py")
    write("", "pkg/inner/__init__.py")
    write("NODE = 'relative'\n", "pkg/names.py")
    write(BUILDER.format(node="x").replace('"x"', "NODE") + "\nfrom ..names import NODE\n", "pkg/inner/app.py")
    assert "relative" in {n["id"] for n in as_json(capsys, "pkg/inner/app.py:build")["nodes"]}


def test_langgraph_json_names_the_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    """One is taken, of several one must be named; both forms of an entry are read."""
    write(BUILDER.format(node="one"), "apps/app.py")
    file = write(json.dumps({"graphs": {"main": "./app.py:build"}}), "apps/langgraph.json")
    assert as_json(capsys, "apps")["name"] == ""
    file.write_text(json.dumps({"graphs": {"main": "./app.py:build", "other": {"path": "./app.py:make_other"}}}))
    code, _, err = called(capsys, "apps")
    assert code == 2
    assert "has 2 graphs: `maestro graph apps:main`, `maestro graph apps:other`" in err
    assert as_json(capsys, "apps:other")["nodes"]


def test_nothing_is_called_and_no_key_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dummy key stands in, and it says so; what the file prints at import does not spoil the JSON."""
    monkeypatch.delenv("OPENAI_API_KEY")
    write("print('hello from the app')\n" + APP)
    found = as_json(capsys, "app.py")
    assert any("OPENAI_API_KEY is not set" in note for note in found["notes"])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("text", "target", "says"),
    [
        (APP, "missing.py:graph", "there is no file missing.py: name one that is there"),
        (APP, "no_such_module:graph", "there is no module or file no_such_module"),
        (APP, "app.py:grap", "app.py has no 'grap'. Graphs there: `maestro graph app.py:graph`"),
        (APP, ".", "is a folder without langgraph.json"),
        (APP + "\nsecond = builder.compile()\n", "app.py", "app.py has 2 that may be meant: `maestro graph app.py:graph`"),
        (BUILDER.format(node="n"), "app.py:three", "app.py:three is a int: name a compiled graph"),
        (BUILDER.format(node="n"), "app.py:needs", "app.py:needs needs what: name a function without required arguments"),
        ("x = 1\n", "app.py", "app.py defines no graph: name what builds it"),
        ("import no_such_package_here\n", "app.py:graph", "needs the module no_such_package_here, which is not installed"),
        ("def f(:\n", "app.py:graph", "with SyntaxError"),
        ("x = 1\n1 / 0\n", "app.py:graph", "app.py:graph failed at app.py:2 with ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", "app.py:graph", "ends the program when it is imported (exit 3)"),
        ("def graph():\n    raise KeyError('x')\n", "app.py:graph", "failed at app.py:2 with KeyError"),
        ("graph = None\n", "app.py:graph", "app.py:graph is a NoneType"),
    ],
)  # fmt: skip
def test_a_wrong_target_gets_one_line(capsys: pytest.CaptureFixture[str], text: str, target: str, says: str) -> None:
    """What is wrong, where, and what to do; never a traceback."""
    write(text)
    code, out, err = called(capsys, target)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("app.py", "--observed", "missing.jsonl"), "Name the file that MAESTRO_EVENTS wrote"),
        (("app.py", "--json", "--mermaid"), "which of the two?"),
        (("app.py", "--redis-url", "redis://127.0.0.1:1/0"), "Redis does not answer"),
    ],
)
def test_a_wrong_option_gets_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str) -> None:
    """As for every command."""
    write(APP)
    code, _, err = called(capsys, *words)
    assert code == 2
    assert says in err


@pytest.mark.slow
def test_runs_complete_what_the_drawing_lacks() -> None:
    """`maestro bench graphs`: drawn and seen together are the truth after some runs, and nothing is seen that is not there."""
    names = ("send", "functional", "command_untyped", "model_in_node", "graph_in_function", "subgraph", "teams")
    words = [w for name in names for w in ("--construct", name)]
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *(p for p in sys.path if p)])}
    command = [sys.executable, "-m", "maestro_agents.cli", "bench", "graphs", "--json", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [r["construct"] for r in found["constructs"] if "skipped" not in r] == list(names)
    assert found["summary"]["incomplete"] == []
    assert [r["seen_wrong"] for r in found["constructs"]] == [[]] * len(names)
    after = {r["construct"]: r["complete_after_runs"] for r in found["constructs"]}
    assert after["command_untyped"]["edges"] == 1
    assert after["model_in_node"]["llm"] == 1
