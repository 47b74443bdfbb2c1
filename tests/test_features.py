"""Numbers about a prompt: near enough, never wrong about the shape, and silent about bodies it does not know."""

from __future__ import annotations

from typing import Any

import pytest

from maestro_agents.predict.features import FEATURE_NAMES, estimate_tokens, max_output_tokens, stage_features

TEXT = "The quick brown fox jumps over the lazy dog. " * 40  # 400 words, 1,800 bytes


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "body",
    [
        user(TEXT),
        user([{"type": "text", "text": TEXT}]),
        {"prompt": TEXT},
        {"prompt": [TEXT[:900], TEXT[900:]]},
        {"prompt": list(range(450))},
        {"input": TEXT},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": TEXT}]}]},
        {"input": "", "instructions": TEXT},
    ],
)
def test_the_same_text_counts_the_same_in_every_shape(body: dict[str, Any]) -> None:
    """Chat, completions and responses; text, parts and token ids."""
    assert estimate_tokens(body) == pytest.approx(450, abs=6)


def test_tools_images_and_other_alphabets_count() -> None:
    """A schema, an image and Chinese text each make a prompt longer."""
    plain = estimate_tokens(user("hi"))
    tool = {"type": "function", "function": {"name": "search", "description": TEXT, "parameters": {}}}
    assert estimate_tokens({**user("hi"), "tools": [tool]}) > plain + 450
    assert estimate_tokens(user([{"type": "image_url", "image_url": {"url": "data:" + "x" * 99_999}}])) < 2_000
    assert estimate_tokens(user("\u4f60\u597d" * 100)) > estimate_tokens(user("ab" * 100))


@pytest.mark.parametrize(
    "body",
    [{}, {"messages": None}, {"messages": [1, None]}, {"messages": [{"content": 3}]}, {"prompt": {}}, {"tools": "x"}],
)
def test_an_unknown_shape_counts_as_little_and_raises_nothing(body: dict[str, Any]) -> None:
    """What is not understood is not counted."""
    assert 1 <= estimate_tokens(body) <= 10
    assert len(stage_features(body)) == len(FEATURE_NAMES)


def test_features_are_named_numbers_and_hold_no_text() -> None:
    """Each has a name, all are floats."""
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why? How?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
            {"role": "tool", "content": "42"},
        ],
        "tools": [{}, {}],
        "tool_choice": "required",
        "response_format": {"type": "json_schema"},
        "max_tokens": 9,
        "temperature": 0,
        "stream": True,
    }
    named = dict(zip(FEATURE_NAMES, stage_features(body), strict=True))
    assert all(isinstance(v, float) for v in named.values())
    assert {k: named[k] for k in ("messages", "assistant_turns", "tool_results", "last_is_tool_result", "tools")} == {
        "messages": 4,
        "assistant_turns": 1,
        "tool_results": 1,
        "last_is_tool_result": 1,
        "tools": 2,
    }
    assert (named["tool_forced"], named["json_answer"], named["max_tokens"]) == (1, 1, 9)
    assert (named["temperature"], named["streams"], named["questions"]) == (0, 1, 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6),
        ({"max_output_tokens": 7}, 7),
        ({"max_tokens": None}, None),
        ({"max_tokens": True}, None),
        ({"max_tokens": -1}, None),
        ({}, None),
    ],
)
def test_the_callers_bound_on_the_output(body: dict[str, Any], expected: int | None) -> None:
    """Whatever the call names it; nonsense is no bound."""
    assert max_output_tokens(body) == expected
