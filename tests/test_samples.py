"""The samples: real LangGraph programs, run as users run them, on a real Redis, scheduler and emulated engines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from typer.testing import CliRunner

from maestro_agents.cli import build_app
from maestro_agents.cli.demo_pass import sample
from maestro_agents.cli.sample import NAMES, _about

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_sample_ends_with_one_command_and_no_server() -> None:
    """All of them at once, each with a line that says how long it took."""
    pytest.importorskip("langchain.agents")
    command = [
        sys.executable,
        "-m",
        "maestro_agents.cli",
        "sample",
        "mix",
        "--runs",
        str(len(NAMES)),
        "--rate",
        "0",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    ran = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["sample"] for r in ran} == set(NAMES)
    assert not [r for r in ran if r["error"]]


def test_a_sample_that_there_is_not_is_one_line() -> None:
    """It names those that there are."""
    found = CliRunner().invoke(build_app(["sample"]), ["sample", "poetry"])
    assert str(found.exception).startswith("there is no sample 'poetry': use research_report, ")


def test_without_a_name_it_lists_them() -> None:
    """Each with what it is."""
    found = CliRunner().invoke(build_app(["sample"]), ["sample"])
    assert all(name in found.output for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_says_what_to_look_at(name: str) -> None:
    """In `maestro top`, while it runs."""
    first, look = _about(name)
    assert re.match(r"[A-Z][a-z ]+: .+\.$", first)
    assert len(look) > 20


def answering(answers: list[str], asked: list[dict[str, Any]]) -> Any:
    """Models that share their answers, in the order in which they are asked."""
    messages = iter([AIMessage(a) for a in answers])

    def make(**settings: Any) -> GenericFakeChatModel:
        asked.append(settings)
        return GenericFakeChatModel(messages=messages)

    return make


async def test_code_is_written_again_until_the_reviewer_approves() -> None:
    """Two rounds where the second is good."""
    make = answering(["v1", "Change the name.", "v2", "APPROVED"], [])
    state = await sample("code_review").build(make).ainvoke({"task": "t"})
    assert (state["code"], state["rounds"]) == ("v2", 2)


async def test_a_reviewer_who_is_never_content_gets_three_rounds() -> None:
    """The loop has an end."""
    make = answering(["v", "no"] * 4, [])
    state = await sample("code_review").build(make).ainvoke({"task": "t"})
    assert state["rounds"] == sample("code_review").MOST_ROUNDS


async def test_a_report_has_a_researcher_for_each_part() -> None:
    """As many as the plan has lines, five at most."""
    make = answering(["1. a\n2. b\n3. c", "about one", "about two", "about three", "long", "short"], [])
    state = await sample("research_report").build(make).ainvoke({"question": "q"})
    assert state["parts"] == ["a", "b", "c"]
    assert len(state["findings"]) == 3
    assert state["report"] == "short"


async def test_twelve_roles_come_to_one_decision() -> None:
    """Four analysts, two rounds of two, manager, trader, three voices and the decision."""
    make = answering([f"said {n}" for n in range(40)], [])
    graph = sample("trading_debate").build(make)
    assert len(set(graph.get_graph().nodes) - {"__start__", "__end__"}) == 12
    state = await graph.ainvoke({"asset": "a"})
    assert Counter(line.split(":")[0] for line in state["debate"]) == {"bull": 2, "bear": 2}
    assert state["decision"]


async def test_a_consultation_ends_with_a_finding() -> None:
    """As soon as the doctor has one."""
    make = answering(["Since when?", "Monday.", "FINDING: rest.", "letter"], [])
    state = await sample("consultation").build(make).ainvoke({"complaint": "c"})
    assert [line.split(":")[0] for line in state["talk"]] == ["doctor", "patient", "doctor"]
    assert state["report"] == "letter"


async def test_a_consultation_without_one_ends_after_six_questions() -> None:
    """And the letter is written all the same."""
    make = answering(["hm"] * 20, [])
    state = await sample("consultation").build(make).ainvoke({"complaint": "c"})
    assert len(state["talk"]) == 2 * sample("consultation").MOST_QUESTIONS - 1


async def test_no_money_moves_before_a_person_says_yes() -> None:
    """The run stops at the refund, and goes on with it when it is resumed."""
    pytest.importorskip("langchain.agents")
    calls = [
        AIMessage("", tool_calls=[{"name": "look_up", "args": {"order": 17}, "id": "1"}]),
        AIMessage("", tool_calls=[{"name": "refund", "args": {"order": 17}, "id": "2"}]),
        AIMessage("Done."),
    ]

    class Model(GenericFakeChatModel):
        def bind_tools(self, tools: Any, **_: Any) -> Any:
            return self

    module = sample("refund_agent")
    app = module.build(lambda **_: Model(messages=iter(calls)))
    config = {"configurable": {"thread_id": "t"}}
    state = await partial(app.ainvoke, config=config)(module.INPUTS[0])
    assert state["__interrupt__"]
    assert "on their way" not in str(state["messages"])
    state = await app.ainvoke(module.RESUME, config)
    assert "49 EUR of order 17 are on their way." in [m.content for m in state["messages"]]
