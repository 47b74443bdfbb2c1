"""Numbers about a call, made where the prompt is: the text itself never leaves the app for Maestro's queue.

Works on the JSON body of the three OpenAI calls (chat completions, completions, responses) and on what the app's side knows
of the run. Nothing here raises on a body of an unexpected shape: what is not understood counts as nothing. Standard library
only, since this runs in the user's process in front of every call.

`FEATURES` is the one table of what each number means. A rule for it: **whatever changes in the table (a row, its place, its
meaning) makes a new** `FEATURES_VERSION`. The version travels as the vector's first number; who reads a vector of another
version, or of another length (`usable`), takes it as none and predicts from online statistics.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from maestro_agents.predict.prompt import (
    ID_CHARS,
    LOOKED_CHARS,
    SKETCH_BUCKETS,
    SKETCH_IDS,
    TEXT_FEATURES,
    Prompt,
    Text,
    items,
    mapping,
    max_output_tokens,
)
from maestro_agents.workflow import llm_heights, loops

if TYPE_CHECKING:
    from maestro_agents.predict.traces import Call

FEATURES_VERSION: Final = 1
"""Of the table below: see the rule above."""

UNKNOWN: Final = -1.0
"""What stands for a number that is not known."""


# -- the table -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """One number of the vector. -1 always means: not known, or not said."""

    name: str
    unit: str
    meaning: str
    #: Recorded traces tell it. The others are -1 there: no model uses them until live traffic has taught it.
    traced: bool = True


def _rows(*rows: tuple[str, str, str], traced: bool = True) -> tuple[Feature, ...]:
    return tuple(Feature(name=n, unit=u, meaning=m, traced=traced) for n, u, m in rows)


def _text_rows(of: str, what: str) -> tuple[Feature, ...]:
    return _rows(*((f"{of}_{name}", unit, f"{what}: {meaning}") for name, unit, meaning in TEXT_FEATURES))


FEATURES: Final[tuple[Feature, ...]] = (
    *_rows(
        ("version", "number", "FEATURES_VERSION"),
        ("prompt_tokens", "tokens", "estimate of the whole prompt, tools included"),
        ("system_tokens", "tokens", "estimate of system and developer messages, or of `instructions`"),
        ("last_tokens", "tokens", f"estimate of the last message, of at most its last {LOOKED_CHARS:,} characters"),
    ),
    *_rows(
        ("messages", "count", "messages in the prompt"),
        ("assistant_turns", "count", "messages of the assistant in the prompt"),
        ("answer_tokens", "tokens", "estimate of the assistant's last message in the prompt"),
        ("answers_mean_tokens", "tokens", "mean of the assistant's last three"),
        ("tool_results", "count", "tool results in the prompt"),
        ("last_is_tool_result", "0 or 1", "the last message is a tool's result"),
        ("last_is_assistant", "0 or 1", "the last message is the assistant's own: it is to go on"),
        ("tools", "count", "tools offered"),
        ("tool_forced", "0 or 1", "a tool must be called (`tool_choice`)"),
        ("tools_forbidden", "0 or 1", "no tool may be called"),
        ("json_answer", "0 or 1", "the answer must be JSON"),
        ("json_schema", "0 or 1", "the answer must fit a schema or a grammar"),
        ("max_tokens", "tokens", "the caller's bound on the answer, 0 for none"),
        ("temperature", "number", "sampling temperature"),
        ("choices", "count", "answers asked for (`n`)"),
        ("stops", "count", "stop strings"),
        ("streams", "0 or 1", "the answer is streamed"),
        ("thinking", "0 or 1", "reasoning is switched on (`enable_thinking`, `thinking`, any effort but none)"),
        ("reasoning_effort", "level", "0 none, 1 minimal, 2 low, 3 medium, 4 high, 5 more"),
        ("images", "count", "images in the prompt"),
        traced=False,
    ),
    *_text_rows("instruction", "system message"),
    *_text_rows("last", "last message"),
    *_rows(
        ("instruction_id", "id", f"hash of the first {ID_CHARS} characters of the system message, 0 to 65535"),
        ("role_id", "id", "hash of the role, 0 to 65535"),
        ("agent_id", "id", "hash of the role's first part (before `:`), 0 to 65535"),
        ("model_id", "id", "hash of the model's name, 0 to 65535"),
        ("previous_role_id", "id", "hash of the role whose call ended last in this run, 0 to 65535"),
        ("calls_before", "count", "calls that the run made before this one"),
        ("visit", "count", "calls that this node made before in this run"),
        ("run_last_tokens", "tokens", "output of the run's call that ended last"),
        ("run_last_2_tokens", "tokens", "output of the one before that"),
        ("run_last_3_tokens", "tokens", "output of the one before that"),
        ("run_mean_tokens", "tokens", "mean output of the run's ended calls"),
        ("run_max_tokens", "tokens", "longest output of the run's ended calls"),
        ("node_last_tokens", "tokens", "output of this node's call that ended last in this run"),
        ("node_mean_tokens", "tokens", "mean output of this node's ended calls in this run"),
        ("node_count", "count", "this node's ended calls in this run"),
    ),
    *_rows(
        ("siblings", "count", "other tasks of this node in the same superstep"),
        ("node_attempt", "count", "1 on the first try of the node (LangGraph's RetryPolicy)"),
        ("replayed", "0 or 1", "the same call was made before: its node runs once more"),
        ("depth", "nodes", "LLM nodes on the longest way to this node, as drawn"),
        ("height", "nodes", "LLM nodes on the longest way from this node to the end, as drawn"),
        ("in_loop", "0 or 1", "the node can lead back to itself"),
        ("fan_out", "nodes", "nodes that this one can lead to"),
        traced=False,
    ),
)
"""What each number of `stage_features` is, in order."""

FEATURE_NAMES: Final = tuple(f.name for f in FEATURES)
_UNTRACED: Final = tuple(i for i, f in enumerate(FEATURES) if not f.traced)


def usable(features: Sequence[object]) -> bool:
    """Whether a vector that came from somewhere is of this version, whole, and made of finite numbers."""
    if len(features) != len(FEATURES) or features[0] != FEATURES_VERSION:
        return False
    try:  # fast, since every prediction asks: what is not finite makes a sum that is not, what is no number makes none
        return math.isfinite(sum(cast("Sequence[float]", features)))
    except (TypeError, OverflowError):
        return False


# -- what is known of the run --------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What the app's side knows of a call beside its body. -1 where it is not known. Made by `History.facts`."""

    model: str = ""
    role: str = ""
    previous_role: str = ""
    calls_before: int = -1
    visit: int = -1
    #: Output tokens of the run's ended calls: the last three, newest first; their mean and largest over the whole run.
    recent: tuple[int, ...] = ()
    run_mean_tokens: float = UNKNOWN
    run_max_tokens: int = -1
    node_last_tokens: int = -1
    node_mean_tokens: float = UNKNOWN
    node_count: int = -1
    siblings: int = -1
    node_attempt: int = -1
    replayed: int = -1
    #: Of the node in the drawn graph: see `graph_shape`.
    shape: tuple[int, int, int, int] = (-1, -1, -1, -1)


NO_FACTS: Final = RunFacts()


class History:
    """What the ended calls of one run cost, for the facts of its next. Bounded; any thread may add to it."""

    __slots__ = ("_counted", "_lock", "_max", "_n", "_nodes", "_previous", "_recent", "_sum")

    MOST: Final = 1_000
    """Nodes, and calls told apart, that are remembered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._counted: dict[tuple[str, int], None] = {}
            #: node -> calls, sum of their tokens, the last one's tokens
            self._nodes: dict[str, tuple[int, int, int]] = {}
            self._recent: tuple[int, ...] = ()
            self._previous = ""
            self._n = self._sum = 0
            self._max = -1

    def ended(self, *, node: str, visit: int, role: str, output_tokens: int) -> None:
        """Note a call whose output is known. The same visit of a node counts once, however often it is replayed."""
        with self._lock:
            if (node, visit) in self._counted:
                return
            self._counted[node, visit] = None
            if len(self._counted) > self.MOST:
                del self._counted[next(iter(self._counted))]
            self._recent = (output_tokens, *self._recent[:2])
            self._previous = role
            self._n += 1
            self._sum += output_tokens
            self._max = max(self._max, output_tokens)
            n, total, _ = self._nodes.get(node, (0, 0, 0))
            self._nodes[node] = (n + 1, total + output_tokens, output_tokens)
            if len(self._nodes) > self.MOST:
                del self._nodes[next(iter(self._nodes))]

    def facts(
        self,
        *,
        model: str,
        role: str,
        node: str,
        visit: int,
        calls_before: int,
        siblings: int = -1,
        node_attempt: int = -1,
        replayed: int = -1,
        spec: str = "",
    ) -> RunFacts:
        """The facts of a call that is about to be made. ``spec``: the drawn graph (`Workflows.describe`)."""
        with self._lock:
            n, total, last = self._nodes.get(node, (0, 0, -1))
            return RunFacts(
                model=model,
                role=role,
                previous_role=self._previous,
                calls_before=calls_before,
                visit=visit,
                recent=self._recent,
                run_mean_tokens=self._sum / self._n if self._n else UNKNOWN,
                run_max_tokens=self._max,
                node_last_tokens=last,
                node_mean_tokens=total / n if n else UNKNOWN,
                node_count=n,
                siblings=siblings,
                node_attempt=node_attempt,
                replayed=replayed,
                shape=graph_shape(spec).get(node, NO_FACTS.shape) if spec else NO_FACTS.shape,
            )


@functools.lru_cache(maxsize=128)
def graph_shape(spec: str) -> Mapping[str, tuple[int, int, int, int]]:
    """Node -> depth, height (LLM nodes on the longest way before and after it), in a loop, fan-out; {} for no graph.

    ``spec``: ``{"nodes": [{"id", "llm"}], "edges": [[from, to, conditional]]}``.
    """
    try:
        drawn = json.loads(spec)
        edges = [(str(e[0]), str(e[1])) for e in drawn["edges"]]
        after = llm_heights(drawn)
        before = llm_heights({"nodes": drawn["nodes"], "edges": [(b, a) for a, b in edges]})
        circles = {node for loop in loops(after, edges) for node in loop}
        out: dict[str, set[str]] = {}
        for a, b in edges:
            out.setdefault(a, set()).add(b)
        return {n: (before[n], after[n], int(n in circles), len(out.get(n, ()))) for n in after}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}


# -- a call in numbers ---------------------------------------------------------------------------------------------------
class StageNumbers(NamedTuple):
    """All that leaves the app of one call's prompt."""

    prompt_tokens: int
    features: tuple[float, ...]
    sketch: str


def stage_numbers(
    body: Mapping[str, Any], run: RunFacts = NO_FACTS, *, text: bool = True, prompt_tokens: int | None = None
) -> StageNumbers:
    """Estimate, features and sketch of a request in one pass.

    ``text=False`` leaves out what is told of the words themselves: those features are -1, the sketch is empty.
    ``prompt_tokens`` stands instead of the estimate where somebody knows better.
    """
    prompt = Prompt(body)
    tokens = prompt.tokens() if prompt_tokens is None else prompt_tokens
    last = prompt.last() if text else None
    return StageNumbers(tokens, _vector(prompt, run, tokens, last), _packed(prompt, last) if last else "")


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the prompt tokens of an OpenAI request body, tools included. No tokenizer; its error: `maestro bench features`."""
    return Prompt(body).tokens()


def stage_features(body: Mapping[str, Any], run: RunFacts = NO_FACTS, *, text: bool = True) -> tuple[float, ...]:
    """Describe a request in numbers, in the order of `FEATURES`."""
    return stage_numbers(body, run, text=text).features


def stage_sketch(body: Mapping[str, Any]) -> str:
    """Words and word pairs of instruction and last message as a set of hashed numbers: see `sketch_ids`.

    Lower case, digits as 0, the first and last 16 words of the instruction, 32 of the message; a character of Chinese,
    Japanese or Korean counts as a word. CRC-32 folded into `SKETCH_BUCKETS`; base64 of little-endian 16-bit numbers.
    """
    prompt = Prompt(body)
    return _packed(prompt, prompt.last())


def sketch_ids(sketch: str) -> tuple[int, ...]:
    """The numbers in a sketch, ascending, each below `SKETCH_BUCKETS`; none for a text that is no sketch."""
    try:
        data = base64.b64decode(sketch, validate=True)
        ids = struct.unpack(f"<{len(data) // 2}H", data)
    except (ValueError, TypeError, struct.error):
        return ()
    return ids if len(ids) <= SKETCH_IDS and all(i < SKETCH_BUCKETS for i in ids) else ()


# -- the same of recorded calls ------------------------------------------------------------------------------------------
def trace_numbers(session: Iterable[Call], prompt_tokens: Iterable[int] | None = None) -> Iterator[StageNumbers]:
    """What a live client would have said of the calls of one recorded session, in their order: agent = app, node = role.

    ``prompt_tokens``: what the estimate would have been, call by call; the recorded count where it is not given. Features
    that a trace does not tell are -1.
    """
    history = History()
    visits: dict[str, int] = {}
    tokens = iter(prompt_tokens) if prompt_tokens is not None else None
    for at, call in enumerate(session):
        visit = visits[call.role] = visits.get(call.role, -1) + 1
        role = f"{call.app}:{call.role}"
        facts = history.facts(model=call.model, role=role, node=call.role, visit=visit, calls_before=at)
        body = {
            "messages": [
                {"role": "system", "content": call.system_prompt},
                {"role": "user", "content": call.input_text},
            ]
        }
        told = stage_numbers(body, facts, prompt_tokens=next(tokens) if tokens else call.input_tokens)
        features = list(told.features)
        for i in _UNTRACED:
            features[i] = UNKNOWN
        yield told._replace(features=tuple(features))
        history.ended(node=call.role, visit=visit, role=role, output_tokens=call.output_tokens)


class Checked(NamedTuple):
    """An estimate of recorded text beside what the provider counted."""

    app: str
    #: ``message``: one message. ``conversation``: all that came in since the session's first call of this role.
    #: ``first call``: system prompt and message of a session's first call, without the tools that were counted too.
    of: str
    estimate: int
    true: int
    #: UTF-8 bytes of the text, to hold simpler rules against it.
    size_bytes: int

    @property
    def ratio(self) -> float:
        """The estimate over the truth."""
        return self.estimate / max(1, self.true)


def checked_estimates(calls: Iterable[Call]) -> Iterator[Checked]:
    """Hold `estimate_tokens` to the counts of recorded calls, where these are the provider's own (``usage``).

    What a role's next call has more than its last one's input and output is its new message. Left out: messages that the
    trace may have cut (`LOOKED_CHARS`), and counts that no tokenizer gives to that text (fewer than a tenth of its bytes,
    or more than its bytes and 30), where the app did something else with its conversation.
    """
    before: dict[tuple[str, str, str, str], Call] = {}
    added: dict[tuple[str, str, str, str], tuple[int, int, int] | None] = {}
    for c in calls:
        if c.token_source != "usage":  # noqa: S105 - no password
            continue
        key = (c.app, c.session_id, c.role, c.model)
        last, before[key] = before.get(key), c
        whole = len(c.input_text) < LOOKED_CHARS
        if last is None:
            added[key] = (0, 0, 0)
            if whole:
                told = [{"role": "system", "content": c.system_prompt}, {"role": "user", "content": c.input_text}]
                size = len((c.system_prompt + c.input_text).encode("utf-8", "ignore"))
                yield Checked(c.app, "first call", estimate_tokens({"messages": told}), c.input_tokens, size)
            continue
        true = c.input_tokens - last.input_tokens - last.output_tokens
        size = len(c.input_text.encode("utf-8", "ignore"))
        if not whole or not size or not size / 10 <= true <= size + 30:
            added[key] = None
            continue
        estimate = estimate_tokens({"messages": [{"role": "user", "content": c.input_text}]})
        yield Checked(c.app, "message", estimate, true, size)
        if (sums := added[key]) is not None:
            added[key] = sums = (sums[0] + estimate, sums[1] + true, sums[2] + size)
            yield Checked(c.app, "conversation", *sums)


def estimate_ratios(calls: Iterable[Call]) -> list[float]:
    """Estimate over truth for the growing conversations of a trace: the noise that training should know. See above."""
    return [checked.ratio for checked in checked_estimates(calls) if checked.of == "conversation"]


# -- the vector -----------------------------------------------------------------------------------------------------------
def _vector(prompt: Prompt, run: RunFacts, tokens: int, message: Text | None) -> tuple[float, ...]:
    """Without ``message``, what is found in the last one, nothing is told of words."""
    body, answers = prompt.body, prompt.answers
    json_answer, json_schema = _format(body)
    effort, thinking = _reasoning(body)
    choice = body.get("tool_choice")
    stop = body.get("stop")
    last = (*run.recent, -1, -1, -1)
    return (
        float(FEATURES_VERSION),
        float(tokens),
        float(round(prompt.system_tokens)),
        float(round(prompt.last_counted.tokens)),
        float(prompt.messages),
        float(prompt.assistants),
        float(round(answers[-1])) if answers else UNKNOWN,
        float(round(sum(answers) / len(answers))) if answers else UNKNOWN,
        float(prompt.tool_results),
        float(prompt.last_role == "tool"),
        float(prompt.last_role == "assistant"),
        float(len(items(body.get("tools"))) or len(items(body.get("functions")))),
        float(choice == "required" or isinstance(choice, Mapping)),
        float(choice == "none"),
        json_answer,
        json_schema,
        _number(max_output_tokens(body), 0.0),
        _number(body.get("temperature"), UNKNOWN),
        _number(body.get("n"), 1.0),
        float(isinstance(stop, str) or len(items(stop))),
        float(bool(body.get("stream"))),
        thinking,
        effort,
        float(prompt.images),
        *(prompt.instruction.features if message else _NO_TEXT),
        *(message.features if message else _NO_TEXT),
        _id(prompt.instruction_text[:ID_CHARS]) if message else UNKNOWN,
        _name_id(run.role),
        _name_id(run.role.partition(":")[0]),
        _name_id(run.model),
        _name_id(run.previous_role),
        float(run.calls_before),
        float(run.visit),
        float(last[0]),
        float(last[1]),
        float(last[2]),
        round(run.run_mean_tokens, 1),
        float(run.run_max_tokens),
        float(run.node_last_tokens),
        round(run.node_mean_tokens, 1),
        float(run.node_count),
        float(run.siblings),
        float(run.node_attempt),
        float(run.replayed),
        *map(float, run.shape),
    )


_NO_TEXT: Final = (UNKNOWN,) * len(TEXT_FEATURES)


def _packed(prompt: Prompt, message: Text) -> str:
    ids = sorted(prompt.instruction.ids | message.ids)
    return base64.b64encode(struct.pack(f"<{len(ids)}H", *ids)).decode()


# -- a body's other fields -----------------------------------------------------------------------------------------------
def _format(body: Mapping[str, Any]) -> tuple[float, float]:
    """Whether the answer must be JSON, and whether it must fit a schema or grammar."""
    answer = body.get("response_format") or mapping(body.get("text")).get("format")
    kind = str(mapping(answer).get("type", ""))
    guided = any(body.get(name) for name in _GUIDED)
    return float("json" in kind or bool(body.get("guided_json"))), float("schema" in kind or guided)


_GUIDED: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
"""vLLM's own fields."""


def _reasoning(body: Mapping[str, Any]) -> tuple[float, float]:
    """Effort, and whether reasoning is on; -1 where nothing is said."""
    more = mapping(body.get("extra_body"))
    effort = (
        body.get("reasoning_effort") or mapping(body.get("reasoning")).get("effort") or more.get("reasoning_effort")
    )
    level = _EFFORTS.get(effort, 5.0) if isinstance(effort, str) else UNKNOWN
    for source in (body.get("chat_template_kwargs"), more.get("chat_template_kwargs"), body):
        said = mapping(source)
        for name in ("enable_thinking", "thinking"):
            value = said.get(name)
            if isinstance(value, bool):
                return level, float(value)
            if isinstance(value, Mapping):
                return level, float(cast("Mapping[str, Any]", value).get("type") != "disabled")
    return level, UNKNOWN if level < 0 else float(level > 0)


_EFFORTS: Final = {"none": 0.0, "minimal": 1.0, "low": 2.0, "medium": 3.0, "high": 4.0}


def _number(value: object, default: float) -> float:
    """A finite number as a float, kept below what a float cannot hold."""
    if not isinstance(value, int | float):
        return default
    return float(max(-1e9, min(1e9, value))) if value == value else default  # noqa: PLR0124 - a NaN is not itself


def _id(text: str) -> float:
    """CRC-32 folded to 16 bits; -1 for no text."""
    if not text:
        return UNKNOWN
    crc = zlib.crc32(text.encode("utf-8", "ignore"))
    return float((crc ^ (crc >> 16)) & 0xFFFF)


_name_id: Final = functools.lru_cache(maxsize=4096)(_id)
