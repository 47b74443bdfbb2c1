"""What the emulator says: a pure function of the request. The same request has the same answer, to the token.

A *token* is a piece of at most six letters or digits with the space before it, or one other character. JSON is valid for
its schema; a ``max_tokens`` too small truncates it, as it would in vLLM. Ids of calls are nothing that a model reads.

*Directives* in a message steer the answer:

``[[tokens=120]]``          its length (last message only)
``[[say=approved]]``        its text (last message only); JSON where a schema is asked for: the caller vouches for it
``[[tool=search]]``         a call of this tool where the model may choose; ``[[tool]]``: of the first one
``[[tool=add {"a": 1}]]``   the same with these arguments

The last message that names tools counts. Each is called once, in their order, one an answer, and skipped where the request
does not offer it: so one message leads a team of agents, each of which has tools of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from maestro_serving.jsonvalues import value_for

_PIECE: Final = re.compile(r"\s?[^\W_]{1,6}|.", re.DOTALL)
_TOKENS: Final = re.compile(r"\[\[tokens=(\d{1,7})\]\]")
_SAY: Final = re.compile(r"\[\[say=(.*?)\]\]", re.DOTALL)
_TOOL: Final = re.compile(r"\[\[tool(?:=([\w.-]+))?(?:\s+(\{.*?\}))?\]\]", re.DOTALL)
_WORDS: Final = tuple(
    (
        "the order was checked and found ready so we can ship it today please note that your account shows one "
        "open request which our team will review before noon after that a short message follows with all details "
        "you need if anything is unclear ask again and include the number of the invoice thank you for waiting"
    ).split(" ")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    #: JSON schema of its arguments.
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message, as far as directives go."""

    role: str
    text: str
    #: Names of the tools that it calls.
    calls: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """A call that a directive wants."""

    #: Empty: whichever tool comes first.
    tool: str
    #: JSON; empty: any that fit.
    arguments: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A request, without what does not change its answer (stream, priority, ids)."""

    model: str
    #: Everything the model would read, as text.
    text: str
    prompt_tokens: int
    #: The same, token by token, as the model would read it; and what keeps its prefix from others (vLLM's ``cache_salt``).
    prompt: Sequence[str] = ()
    salt: str = ""
    #: The last message's own text.
    last_text: str = ""
    #: Calls that directives want and that were not made yet.
    wishes: Sequence[Wish] = ()
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    tools: Sequence[Tool] = ()
    #: ``none``, ``auto``, ``required``, or the name of a tool.
    tool_choice: str = "none"
    #: JSON schema that the answer must satisfy, None for free text.
    schema: Mapping[str, Any] | None = None
    #: Which of several answers to the same question.
    index: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What is said, token by token."""

    #: The text (or the arguments of the call) that each token adds; some add none.
    pieces: Sequence[str]
    #: Name of the tool that is called, "" where the answer is text.
    tool: str = ""
    #: ``stop`` or ``length``.
    finish_reason: str
    #: The stop string that ended it.
    stop_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def tokens_of(text: str) -> list[str]:
    """A text in the emulator's tokens."""
    return _PIECE.findall(text)


def block_names(question: Question, block_size: int) -> tuple[tuple[str, int], ...]:
    """How its prompt begins, for `maestro_agents.simulator.prefix_cache`: each whole KV block by a hash of all up to its end,
    as vLLM's prefix cache names them. About 1 ms for 10,000 tokens in blocks of 16.
    """
    prompt, digest = question.prompt, hashlib.blake2b(question.salt.encode(), digest_size=16)
    names: list[tuple[str, int]] = []
    for end in range(block_size, len(prompt) + 1, block_size):
        digest.update("\0".join(prompt[end - block_size : end]).encode(errors="surrogatepass"))
        names.append((digest.hexdigest(), end))
    return tuple(names)


def answer(question: Question) -> Answer:
    """Answer a question. Raises ValueError for a schema that has no value or is beyond us."""
    rng = random.Random(_seed(question))
    directive = _TOKENS.search(question.last_text)
    asked = int(directive[1]) if directive else 0
    tool, arguments = _tool(question)
    say = arguments if tool else _said(question.last_text)
    if tool or question.schema is not None:
        schema = tool.parameters if tool else question.schema
        text = say or json.dumps(value_for(schema or {}, rng), ensure_ascii=False)
        said = _PIECE.findall(text)
        # What a caller asks for by directive or min_tokens is spent before the value begins, as on thinking.
        said = [""] * (max(asked, question.min_tokens) - len(said)) + said
        return _cut(said, question, tool=tool.name if tool else "")
    if say:
        return _cut(_PIECE.findall(say), question)
    natural = asked or _plausible_tokens(rng)
    length = question.max_tokens if question.ignore_eos else max(natural, question.min_tokens)
    said = _prose(rng, min(length, question.max_tokens))
    return _cut(said, question, more=length >= question.max_tokens)


def _cut(said: list[str], question: Question, *, tool: str = "", more: bool = False) -> Answer:
    """End the answer where a stop string or ``max_tokens`` ends it."""
    if len(said) > question.max_tokens:
        said, more = said[: question.max_tokens], True
    text = "".join(said)
    found = [(text.find(stop), stop) for stop in question.stop if stop and stop in text and not tool]
    if not found:
        return Answer(pieces=said, tool=tool, finish_reason="length" if more else "stop")
    at, stop = min(found)
    kept: list[str] = []
    for piece in said:
        kept.append(piece[: max(0, at)])
        at -= len(piece)
        if at + len(stop) <= 0:
            break
    return Answer(pieces=kept, finish_reason="stop", stop_reason=stop)


def wishes(turns: Iterable[Turn]) -> tuple[Wish, ...]:
    """The calls that the last message with tool directives wants, without those that were made since."""
    due: list[Wish] = []
    for turn in turns:
        if turn.role not in {"assistant", "tool"}:
            due = [Wish(tool=name, arguments=arguments) for name, arguments in _TOOL.findall(turn.text)] or due
        for called in turn.calls:
            made = next((wish for wish in due if wish.tool in {called, ""}), None)
            if made:
                due.remove(made)
    return tuple(due)


def _said(text: str) -> str:
    directive = _SAY.search(text)
    return directive[1] if directive else ""


def _tool(question: Question) -> tuple[Tool | None, str]:
    """The tool that is called, and the arguments that a directive gives it."""
    by_name = {tool.name: tool for tool in question.tools}
    if question.tool_choice == "none" or not by_name:
        return None, ""
    first = question.tools[0]
    offered = [(by_name.get(w.tool, first), w.arguments) for w in question.wishes if not w.tool or w.tool in by_name]
    if question.tool_choice in by_name:
        return next((o for o in offered if o[0].name == question.tool_choice), (by_name[question.tool_choice], ""))
    if offered:
        return offered[0]
    return (None, "") if question.tool_choice == "auto" else (first, "")


def _plausible_tokens(rng: random.Random) -> int:
    """Log-normal, median 60: most answers are short, some are long."""
    return max(4, min(600, round(math.exp(rng.gauss(math.log(60), 0.7)))))


def _prose(rng: random.Random, tokens: int) -> list[str]:
    pieces: list[str] = []
    while len(pieces) < tokens:
        word = rng.choice(_WORDS)
        pieces += _PIECE.findall(f" {word}" if pieces else word.capitalize())
    return pieces[:tokens]


def _seed(question: Question) -> int:
    body = [
        question.model,
        question.text,
        question.max_tokens,
        question.min_tokens,
        question.ignore_eos,
        question.tool_choice,
        question.schema,
        [(tool.name, tool.parameters) for tool in question.tools],
        question.index,
    ]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def text_of(content: object) -> str:
    """The text of a message's content: a string, or a list of parts of which only texts count."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = cast("list[object]", content)
        return "".join(str(cast("dict[str, object]", p).get("text") or "") for p in parts if isinstance(p, dict))
    return ""
