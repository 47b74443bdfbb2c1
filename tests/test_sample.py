"""The sample app: real LangGraph, seven LLM nodes, one possible loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("langchain_openai")

from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage

from maestro_agents.cli.demo import sample
from sample_workflows import support_triage

ROOT = Path(__file__).resolve().parent.parent


class Scripted(FakeMessagesListChatModel):
    """Answers by node: the node is known by its system prompt. Keeps what it was asked."""

    verdicts: list[str]
    asked: list[str] = []
    bounds: list[int] = []

    async def ainvoke(self, messages, **kwargs):  # type: ignore[override]
        node = next(n for n, p in support_triage.PROMPTS.items() if messages[0].text.endswith(p))
        self.asked.append(node)
        self.bounds.append(kwargs["max_tokens"])
        return AIMessage(self.verdicts.pop(0) if node == "review" else f"{node} {len(self.asked)}")


@pytest.fixture
def scripted(monkeypatch):
    """The sample with a scripted model: call it with the reviewer's verdicts."""

    def build(*verdicts: str):
        model = Scripted(responses=[], verdicts=list(verdicts))
        monkeypatch.setattr(support_triage, "model_for", lambda *_: model)
        return support_triage.graph().compile(), model

    return build


async def test_seven_calls_answer_a_customer_and_the_look_ups_come_between(scripted):
    """Classify first, the four look-ups next, then draft and review; each within its own bound."""
    app, model = scripted("OK")
    state = await app.ainvoke({"message": "My parcel is late"})
    assert model.asked[0] == "classify"
    assert sorted(model.asked[1:5]) == sorted(support_triage.LOOK_UPS)
    assert model.asked[5:] == ["draft", "review"]
    assert model.bounds == [support_triage.MAX_TOKENS[node] for node in model.asked]
    assert state["reply"] == "draft 6"
    assert len(state["notes"]) == 4


async def test_the_reviewer_may_send_the_draft_back_once(scripted):
    """REVISE leads to one more draft and one more review."""
    app, model = scripted("REVISE: be kinder", "OK")
    state = await app.ainvoke({"message": "My parcel is late"})
    assert model.asked[5:] == ["draft", "review", "draft", "review"]
    assert state["reply"] == "draft 8"


async def test_a_reviewer_who_is_never_content_cannot_loop_for_ever(scripted):
    """The second draft is the last one."""
    app, model = scripted("REVISE", "revise again", "REVISE")
    await app.ainvoke({"message": "My parcel is late"})
    assert model.asked.count("draft") == 2


def test_the_static_graph_shows_seven_llm_nodes_and_the_way_back():
    """What Maestro reads from the graph before the first run."""
    drawn = support_triage.build("m", "http://127.0.0.1:9/v1").get_graph()
    nodes = set(drawn.nodes) - {"__start__", "__end__"}
    assert nodes == set(support_triage.PROMPTS)
    edges = {(e.source, e.target): e.conditional for e in drawn.edges}
    assert all(("classify", n) in edges and (n, "draft") in edges for n in support_triage.LOOK_UPS)
    assert edges["review", "draft"]


def test_the_model_comes_from_arguments_then_environment(monkeypatch):
    """An own server needs no key; OpenAI's own needs the user's."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("MAESTRO_SAMPLE_MODEL", "from-env")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = support_triage.model_for()
    assert (model.model_name, model.openai_api_base) == ("from-env", "http://127.0.0.1:9/v1")
    model = support_triage.model_for("named", "http://127.0.0.1:8/v1")
    assert (model.model_name, model.openai_api_base) == ("named", "http://127.0.0.1:8/v1")


def test_the_sample_is_found_in_a_checkout():
    """Installed from a wheel it is found too: the packaging tests run the demo there."""
    assert Path(sample("support_triage").__file__ or "").name == "support_triage.py"


@pytest.mark.parametrize(
    ("env", "says"),
    [({"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}, "127.0.0.1:9"), ({}, "api_key")],
)
def test_a_server_that_does_not_answer_and_a_missing_key_are_one_clear_line(env, says):
    """No traceback: the line names the server and what is wrong."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "MAESTRO_"))}
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), str(ROOT / "serving")])
    ended = subprocess.run(
        [sys.executable, "-m", "sample_workflows.support_triage", "My parcel is late"],
        cwd=ROOT,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert says in ended.stderr.strip().split("\n")[-1]
