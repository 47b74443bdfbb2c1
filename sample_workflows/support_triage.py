"""Support triage: seven LLM calls, four of them beside each other, one possible loop.

                 +-> order ---+
                 +-> account -+
    classify ----+            +----> draft ----> review ----> end
                 +-> policy --+        ^            |
                 +-> history -+        +---REVISE---+   (once at most)

What it shows. Nothing below knows about scheduling: the one line that joins this app to Maestro is the decorator on
`build`. From it Maestro learns that a call of ``classify`` still has a long draft behind it, that the four look-ups end
together or not at all, and that a call of ``review`` is all that stands between a customer and the answer.

Run it on any OpenAI-compatible server::

    export OPENAI_BASE_URL=http://localhost:8000/v1
    export MAESTRO_SAMPLE_MODEL=Qwen/Qwen3-8B
    python -m sample_workflows.support_triage "My parcel is late"
"""

from __future__ import annotations

import argparse
import asyncio
import operator
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from maestro_langgraph import maestro

LOOK_UPS = ("order", "account", "policy", "history")

# The same words open every prompt, so that an engine with a prefix cache computes them once for all seven roles.
HOUSE_RULES = (
    "You are part of the support team of an online shop. Be exact and kind. Never invent an order number, an amount or "
    "a date: say what is missing instead. Never promise a refund that the policy does not give."
)
PROMPTS = {
    "classify": "Name the customer's concern in one or two words: delivery, refund, exchange, booking, account, other.",
    "order": "List which facts about the order or booking matter here, and which of them the customer has given.",
    "account": "List what must be checked on the customer's account before anything is changed, and why.",
    "policy": "State which rules of the shop apply to this concern, with their conditions and time limits.",
    "history": "Say what earlier contacts with this customer would usually tell us, and what to ask if there were none.",
    "draft": (
        "Write the whole reply to the customer from the notes: acknowledge, explain, list the next steps with who does "
        "what by when, and close warmly."
    ),
    "review": "Check the reply against the notes. Answer OK, or REVISE and the one thing to change. One line only.",
}
MAX_TOKENS = {"classify": 16, "order": 160, "account": 120, "policy": 160, "history": 120, "draft": 400, "review": 32}


class State(TypedDict, total=False):
    """What the nodes hand to each other."""

    message: str
    concern: str
    notes: Annotated[list[str], operator.add]
    reply: str
    verdict: str
    drafts: int


def model_for(model: str | None = None, base_url: str | None = None) -> ChatOpenAI:
    """A chat model on the named server; from OPENAI_BASE_URL, OPENAI_API_KEY and MAESTRO_SAMPLE_MODEL by default."""
    url = base_url or os.environ.get("OPENAI_BASE_URL")
    # A server of one's own asks for no key, but the SDK wants one; OpenAI itself says clearly that this one is wrong.
    key = os.environ.get("OPENAI_API_KEY") or ("none" if url else None)
    name = model or os.environ.get("MAESTRO_SAMPLE_MODEL", "gpt-4o-mini")
    return ChatOpenAI(model=name, base_url=url, api_key=key, temperature=0)


ExtraBody = Callable[[str, str], dict[str, Any]]


def graph(
    model: str | None = None, base_url: str | None = None, extra_body: ExtraBody | None = None
) -> StateGraph[State]:
    """The plain LangGraph app, without Maestro.

    ``extra_body``: (node, prompt) -> fields that a particular server knows beyond OpenAI's, e.g. vLLM's ``min_tokens``.
    """
    llm = model_for(model, base_url)

    async def ask(role: str, content: str) -> str:
        system = SystemMessage(f"{HOUSE_RULES}\n\n{PROMPTS[role]}")
        extra = {"extra_body": extra_body(role, content)} if extra_body else {}
        answer = await llm.ainvoke([system, HumanMessage(content)], max_tokens=MAX_TOKENS[role], **extra)
        return answer.text

    def look_up(role: str) -> Any:
        async def node(state: State) -> State:
            found = await ask(role, f"Concern: {state['concern']}\nCustomer: {state['message']}")
            return {"notes": [f"{role}: {found}"]}

        return node

    async def classify(state: State) -> State:
        return {"concern": await ask("classify", state["message"]), "drafts": 0}

    async def draft(state: State) -> State:
        notes = "\n".join(state["notes"])
        wish = f"\nThe reviewer wants: {state['verdict']}" if state.get("verdict") else ""
        reply = await ask("draft", f"Customer: {state['message']}\n\nNotes:\n{notes}{wish}")
        return {"reply": reply, "drafts": state["drafts"] + 1}

    async def review(state: State) -> State:
        return {"verdict": await ask("review", f"Customer: {state['message']}\n\nReply: {state['reply']}")}

    def after_review(state: State) -> Literal["draft", "__end__"]:
        again = state["verdict"].lstrip().upper().startswith("REVISE") and state["drafts"] < 2
        return "draft" if again else END

    builder = StateGraph(State)
    builder.add_node("classify", classify)
    builder.add_edge(START, "classify")
    for role in LOOK_UPS:
        builder.add_node(role, look_up(role))
        builder.add_edge("classify", role)
    builder.add_node("draft", draft)
    builder.add_edge(list(LOOK_UPS), "draft")
    builder.add_node("review", review)
    builder.add_edge("draft", "review")
    builder.add_conditional_edges("review", after_review)
    return builder


@maestro(agent="support", tenant="support")
def build(model: str | None = None, base_url: str | None = None, extra_body: ExtraBody | None = None) -> Any:
    """Build the app as its users run it; then ``await app.ainvoke({"message": ...})``."""
    return graph(model, base_url, extra_body).compile(name="support_triage")


async def answer(message: str, model: str | None, base_url: str | None) -> str:
    """Run it once, saying on the way which node is done."""
    reply = ""
    async for step in build(model, base_url).astream({"message": message}, stream_mode="updates"):
        for node, update in step.items():
            reply = update.get("reply", reply)
            print(f"  {node} done")
    return reply


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer one customer with seven LLM calls.")
    parser.add_argument("message", help='what the customer wrote, e.g. "My parcel is late"')
    parser.add_argument("--model", help="default: MAESTRO_SAMPLE_MODEL, else gpt-4o-mini")
    parser.add_argument("--base-url", help="default: OPENAI_BASE_URL, else OpenAI")
    args = parser.parse_args()
    try:
        reply = asyncio.run(answer(args.message, args.model, args.base_url))
    except openai.OpenAIError as e:
        url = args.base_url or os.environ.get("OPENAI_BASE_URL", "api.openai.com")
        raise SystemExit(f"support_triage: {url} did not answer: {e}") from None
    print(f"\n{reply}")


if __name__ == "__main__":
    main()
