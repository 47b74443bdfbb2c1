"""Numbers about a prompt, made where the prompt is: the text itself never leaves the app for Maestro's queue.

Works on the JSON body of the three OpenAI calls (chat completions, completions, responses). Nothing here raises on a
body of an unexpected shape: what is not understood counts as nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

BYTES_PER_TOKEN: Final = 4.0
"""UTF-8 bytes of prose per token; errs a little high for Chinese, a little low for code."""
_SCHEMA_BYTES_PER_TOKEN: Final = 3.2
_TOKENS_PER_MESSAGE: Final = 4
_TOKENS_PER_IMAGE: Final = 768

FEATURE_NAMES: Final = (
    "messages",
    "system_tokens",
    "last_tokens",
    "assistant_turns",
    "tool_results",
    "last_is_tool_result",
    "tools",
    "tool_forced",
    "tools_forbidden",
    "json_answer",
    "max_tokens",
    "temperature",
    "choices",
    "questions",
    "streams",
)
"""What each number of `stage_features` is, in order. New ones are added at the end only."""


def estimate_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the prompt tokens of an OpenAI request body, tools included. Fast: no tokenizer, linear in the text."""
    tokens = sum(_message_tokens(m) for m in _messages(body))
    tokens += _text_tokens(body.get("instructions"))
    tokens += _prompt_tokens(body.get("prompt"))
    schema = [body.get("tools"), body.get("functions"), body.get("response_format")]
    return max(1, round(tokens + sum(_schema_tokens(s) for s in schema if s)))


def stage_features(body: Mapping[str, Any]) -> tuple[float, ...]:
    """Describe the shape of a request in numbers, in the order of `FEATURE_NAMES`."""
    messages = _messages(body)
    roles = [str(m.get("role", "")) for m in messages]
    last: Mapping[str, Any] = messages[-1] if messages else {}
    last_content = last.get("content")
    choice = body.get("tool_choice")
    answer = body.get("response_format") or body.get("text")
    return (
        float(len(messages)),
        sum((_message_tokens(m) for m, r in zip(messages, roles, strict=True) if r in {"system", "developer"}), 0.0),
        _message_tokens(last) if last else 0.0,
        float(roles.count("assistant")),
        float(roles.count("tool")),
        float(bool(roles) and roles[-1] == "tool"),
        float(len(_items(body.get("tools"))) or len(_items(body.get("functions")))),
        float(choice == "required" or isinstance(choice, Mapping)),
        float(choice == "none"),
        float(isinstance(answer, Mapping) and "json" in str(cast("Mapping[str, Any]", answer).get("type", ""))),
        float(max_output_tokens(body) or 0),
        _number(body.get("temperature"), -1.0),
        _number(body.get("n"), 1.0),
        float(last_content.count("?")) if isinstance(last_content, str) else 0.0,
        float(bool(body.get("stream"))),
    )


def max_output_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the caller's own bound on the answer in tokens, None where there is none."""
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def _messages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    source = body.get("messages")
    if source is None:
        source = body.get("input")
        if isinstance(source, str):
            return [{"role": "user", "content": source}]
    return [cast("Mapping[str, Any]", m) for m in _items(source) if type(m) is dict or isinstance(m, Mapping)]


def _items(value: object) -> Sequence[object]:
    if type(value) is list:  # the usual, and the abstract class is slow to ask
        return cast("Sequence[object]", value)
    if value is not None and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return cast("Sequence[object]", value)
    return ()


def _message_tokens(message: Mapping[str, Any]) -> float:
    tokens = _TOKENS_PER_MESSAGE + _text_tokens(message.get("content"))
    tokens += _text_tokens(message.get("output"))  # a tool's result, in the responses API
    if calls := message.get("tool_calls"):
        tokens += _schema_tokens(calls)
    return tokens


def _text_tokens(content: object) -> float:
    if isinstance(content, str):
        size = len(content) if content.isascii() else len(content.encode("utf-8", "ignore"))
        return size / BYTES_PER_TOKEN
    return 0.0 if content is None else sum(_part_tokens(part) for part in _items(content))


def _part_tokens(part: object) -> float:
    if isinstance(part, str):
        return _text_tokens(part)
    if not isinstance(part, Mapping):
        return 0.0
    fields = cast("Mapping[str, Any]", part)
    return _TOKENS_PER_IMAGE if "image" in str(fields.get("type", "")) else _text_tokens(fields.get("text"))


def _prompt_tokens(prompt: object) -> float:
    """A completion's prompt: text, several texts, token ids, or several lists of token ids."""
    if isinstance(prompt, str):
        return _text_tokens(prompt)
    if prompt is None:
        return 0.0
    parts = _items(prompt)
    if parts and all(isinstance(p, int) for p in parts):
        return float(len(parts))
    return sum(_prompt_tokens(p) for p in cast("Iterable[object]", parts))


def _schema_tokens(schema: object) -> float:
    try:
        return len(json.dumps(schema, default=str)) / _SCHEMA_BYTES_PER_TOKEN
    except (TypeError, ValueError):
        return 0.0


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default
