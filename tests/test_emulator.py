"""The emulator: what it answers, when, and that it lets go (`maestro_serving.emulator`, `answers`, `jsonvalues`)."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_agents.fleet import Launch, load_fleet
from maestro_agents.simulator.engine import CPU_TINY
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from maestro_serving.jsonvalues import value_for
from maestro_serving.processes import EngineProcess, engine_command, free_port
from maestro_serving.vllm import EngineCommand, VllmProbe, read_metrics, vllm_command

FAST = dataclasses.replace(CPU_TINY, base_s=0.001, decode_s_per_seq=0.0001, prefill_s_per_token=1e-6)
ONE_AT_A_TIME = dataclasses.replace(CPU_TINY, max_num_seqs=1, max_queued=6)
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {
                "q": {"type": "string", "maxLength": 8},
                "n": {"type": "integer", "minimum": 1, "maximum": 3},
            },
            "required": ["q", "n"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def emulator():
    """A fast model and one that serves one request at a time, behind one port."""
    models = (EmulatedModel(name="tiny", profile=FAST), EmulatedModel(name="slow", profile=ONE_AT_A_TIME))
    with Emulator(EmulatorConfig(models=models)) as running:
        yield running


@pytest.fixture(scope="module")
def http(emulator):
    """A client of the server, at its root."""
    with httpx.Client(base_url=emulator.url.removesuffix("/v1"), timeout=20, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(emulator):
    """The SDK that most apps use."""
    with openai.OpenAI(base_url=emulator.url, api_key="none", max_retries=0) as client:
        yield client


def chat(http, text="hello", **body):
    """Ask the fast model."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 40, **body}
    return http.post("/v1/chat/completions", json=body)


def chunks(response):
    """A stream as its JSON objects."""
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def metric(http, name, **labels):
    """One sample of the metrics page."""
    for line in http.get("/metrics").text.splitlines():
        if line.startswith(f"vllm:{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no metric {name} with {labels}")


def wait_for(check, limit_s=5.0):
    """Ask until it is so; another process or thread makes it so."""
    deadline_s = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


# -- what is said ------------------------------------------------------------------------------------------------------
def test_the_same_request_has_the_same_answer_streamed_or_not(http):
    """Text, length and finish reason depend on the request alone; stream, priority and ids are no part of it."""
    plain = chat(http).json()
    again = chat(http, priority=3, request_id="other").json()
    streamed = chunks(chat(http, stream=True, stream_options={"include_usage": True}))
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed if c["choices"])
    assert plain["choices"][0]["message"]["content"] == again["choices"][0]["message"]["content"] == text
    assert plain["usage"] == again["usage"] == streamed[-1]["usage"]
    assert chat(http, "something else").json()["choices"][0]["message"]["content"] != text


@pytest.mark.parametrize(
    ("body", "tokens", "reason"),
    [
        ({"text": "x [[tokens=7]]"}, 7, "stop"),
        ({"text": "x [[tokens=90]]"}, 40, "length"),
        ({"ignore_eos": True, "min_tokens": 40}, 40, "length"),
        ({"ignore_eos": True, "max_tokens": None, "max_completion_tokens": 11}, 11, "length"),
        ({"text": "x [[tokens=2]]", "min_tokens": 30}, 30, "stop"),
    ],
)
def test_the_caller_can_set_the_length(http, body, tokens, reason):
    """A directive, min_tokens, ignore_eos and both spellings of the limit decide how many tokens come."""
    answer = chat(http, **body).json()
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["choices"][0]["finish_reason"] == reason


def test_lengths_vary_from_request_to_request(http):
    """Without a directive, lengths are spread as real ones are."""
    lengths = {chat(http, f"question {n}", max_tokens=2000).json()["usage"]["completion_tokens"] for n in range(12)}
    assert len(lengths) > 6


def test_a_stop_string_ends_the_text_before_it(http):
    """The stop string is not part of the answer, and is named as the reason."""
    whole = chat(http, ignore_eos=True).json()["choices"][0]["message"]["content"]
    word = whole.split()[3]
    choice = chat(http, ignore_eos=True, stop=[word]).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(word)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("ask", "name"),
    [
        ({"tool_choice": "required"}, "look"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "other"),
        ({"text": "[[tool]]"}, "look"),
        ({"text": "[[tool=other]] please", "tool_choice": "auto"}, "other"),
    ],
)
def test_a_tool_is_called_with_valid_arguments_when_forced_or_told(sdk, ask, name, stream):
    """Forced, named, or told by a directive, the model calls the tool, and its arguments fit the schema."""
    ask = dict(ask)
    messages = [{"role": "user", "content": ask.pop("text", "hi")}]
    with sdk.chat.completions.stream(model="tiny", messages=messages, tools=[LOOK, OTHER], **ask) as events:
        streamed = events.get_final_completion().choices[0]
    whole = sdk.chat.completions.create(model="tiny", messages=messages, tools=[LOOK, OTHER], **ask).choices[0]
    choice = streamed if stream else whole
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == name
    assert choice.finish_reason == ("stop" if isinstance(ask.get("tool_choice"), dict) else "tool_calls")
    if name == "look":
        assert set(arguments) == {"q", "n"}
        assert len(arguments["q"]) <= 8
        assert arguments["n"] in (1, 2, 3)


def test_after_a_tools_result_the_answer_is_text(http):
    """With a free choice the loop ends: a tool message is answered in words, whatever the directive before it said."""
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "[[tool]]"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "found [[tool]]"},
    ]
    message = chat(http, messages=messages, tools=[LOOK]).json()["choices"][0]["message"]
    assert message["content"]
    assert "tool_calls" not in message


def tool_call(choice):
    (call,) = choice["message"]["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def test_a_message_leads_several_agents_through_their_tools(http):
    """Each named tool is called once, in order, with the arguments given; one that is not offered waits for who has it."""
    ask = {"role": "user", "content": '[[tool=hand_over]] [[tool=look {"q": "tea"}]] [[tool=other]]'}
    first = chat(http, messages=[ask], tools=[LOOK, OTHER]).json()["choices"][0]
    assert tool_call(first) == ("look", {"q": "tea"})
    result = {"role": "tool", "tool_call_id": first["message"]["tool_calls"][0]["id"], "content": "found"}
    told = [ask, first["message"], result]
    second = chat(http, messages=told, tools=[LOOK, OTHER]).json()["choices"][0]
    assert tool_call(second)[0] == "other"
    done = chat(http, messages=[*told, second["message"], {**result, "content": "seen"}], tools=[LOOK, OTHER])
    assert done.json()["choices"][0]["message"]["content"]


def test_a_named_tool_gets_the_arguments_of_its_directive(http):
    """Forced tools listen to a directive too."""
    forced = {"tools": [LOOK, OTHER], "tool_choice": {"type": "function", "function": {"name": "look"}}}
    choice = chat(http, '[[tool=look {"q": "x", "n": 2}]]', **forced).json()["choices"][0]
    assert tool_call(choice) == ("look", {"q": "x", "n": 2})


def test_what_is_to_be_said_is_said(http):
    """A workflow that branches on an answer can be led: the words, or the JSON of a schema."""
    assert chat(http, "Route it. [[say=billing desk]]").json()["choices"][0]["message"]["content"] == "billing desk"
    formed = chat(http, '[[say={"a": 1}]]', response_format={"type": "json_object"}).json()
    assert formed["choices"][0]["message"]["content"] == '{"a": 1}'


def test_the_ids_of_calls_change_no_answer(http):
    """An id is nothing that a model reads: the same conversation has the same answer, whatever its calls were named."""

    def answer(name):
        call = {"id": name, "type": "function", "function": {"name": "look", "arguments": "{}"}}
        spoken = {"role": "assistant", "content": None, "tool_calls": [call]}
        messages = [
            {"role": "user", "content": "hi"},
            spoken,
            {"role": "tool", "tool_call_id": name, "content": "found"},
        ]
        body = chat(http, messages=messages, tools=[LOOK]).json()
        return body["choices"][0]["message"]["content"], body["usage"]["total_tokens"]

    assert answer("chatcmpl-tool-1") == answer("another-and-much-longer-id")


class Ticket(BaseModel):
    """A structured answer as an app would ask for it."""

    label: str = Field(pattern=r"^[A-Z]{2}-\d{3}$")
    urgency: int = Field(ge=1, le=5)
    tags: list[str] = Field(min_length=1, max_length=3)
    parent: Ticket | None = None


def test_structured_output_fits_its_schema(sdk):
    """json_schema answers parse as the model that asked for them, recursion and pattern included."""
    for n in range(8):
        messages = [{"role": "user", "content": f"case {n}"}]
        done = sdk.chat.completions.parse(model="tiny", messages=messages, response_format=Ticket)
        assert isinstance(done.choices[0].message.parsed, Ticket)


def test_json_object_mode_gives_an_object(http):
    """Without a schema any object will do."""
    answer = chat(http, response_format={"type": "json_object"}).json()["choices"][0]["message"]["content"]
    assert isinstance(json.loads(answer), dict)


def test_a_directive_lengthens_structured_output_without_spoiling_it(http):
    """A workload can give a tool call the cost it had; max_tokens truncates it, as in vLLM."""
    forced = {"tools": [LOOK], "tool_choice": "required", "max_tokens": 200}
    answer = chat(http, "[[tokens=120]]", **forced).json()
    assert answer["usage"]["completion_tokens"] == 120
    assert json.loads(answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    cut = chat(http, **{**forced, "max_tokens": 3}).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert "tool_calls" not in cut["message"]


@pytest.mark.parametrize(
    ("schema", "holds"),
    [
        ({"const": 4}, lambda v: v == 4),
        ({"enum": ["a", None]}, lambda v: v in ("a", None)),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 5}, lambda v: v in (3, 4)),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.1}, lambda v: 0 < v < 0.1),
        ({"type": "integer", "multipleOf": 7, "minimum": 8}, lambda v: v % 7 == 0 and v >= 8),
        ({"type": "integer", "maximum": -4}, lambda v: v <= -4),
        ({"type": "string", "minLength": 80, "maxLength": 82}, lambda v: 80 <= len(v) <= 82),
        ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v)),
        (
            {"type": "string", "pattern": r"^(?:[a-f]|\d){4,6}\w?[^x]$"},
            lambda v: re.search(r"^(?:[a-f]|\d){4,6}\w?[^x]$", v),
        ),
        (
            {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "uniqueItems": True},
            lambda v: sorted(v) == [1, 2, 3],
        ),
        ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "minItems": 2}, lambda v: v[:2] == [1, 2]),
        ({"type": ["null", "boolean"]}, lambda v: isinstance(v, bool)),
        (
            {"allOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"required": ["b"]}]},
            lambda v: v["a"] == 1 and "b" in v,
        ),
        ({"anyOf": [{"type": "null"}, {"type": "object", "required": ["x"]}]}, lambda v: v is None or "x" in v),
        ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}, lambda v: len(v) == 2),
        ({}, json.dumps),
    ],
)
def test_values_satisfy_their_schema(schema, holds):
    """Each keyword that constrains is obeyed, from any seed."""
    for seed in range(25):
        value = value_for(schema, random.Random(seed))
        assert holds(json.loads(json.dumps(value)))


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": []},
        {"$ref": "#/$defs/nothing"},
        {"$ref": "#"},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "pattern": "("},
        {"type": "array", "items": {"enum": [1]}, "minItems": 2, "uniqueItems": True},
        {"type": "colour"},
        {"properties": {"a": False}, "required": ["a"]},
    ],
)
def test_a_schema_without_a_value_is_refused(http, schema):
    """What cannot be satisfied is a 400 of one line, not an invalid answer."""
    refused = chat(http, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert refused.status_code == 400
    assert "schema" in refused.json()["error"]["message"]


# -- when it is said ---------------------------------------------------------------------------------------------------
async def test_lower_priority_numbers_are_served_first(emulator):
    """Requests that wait together are served by priority, and the header overrides the body, as in vLLM."""
    order: list[int] = []

    async def ask(client, priority, **headers):
        body = {"model": "slow", "prompt": "[[tokens=8]] x", "max_tokens": 8, "priority": priority}
        assert (await client.post("/completions", json=body, headers=headers)).status_code == 200
        order.append(priority)

    async with httpx.AsyncClient(base_url=emulator.url, timeout=20, trust_env=False) as client:
        first = {"model": "slow", "prompt": "[[tokens=60]] x", "max_tokens": 60, "stream": True}
        async with client.stream("POST", "/completions", json=first) as running:
            lines = running.aiter_lines()
            await anext(lines)  # it runs: from now on the others wait
            async with asyncio.TaskGroup() as group:
                for priority in (5, -2, 9, 0):
                    group.create_task(ask(client, priority))
                group.create_task(ask(client, 7, **{"X-Vllm-Priority": "-9"}))
    assert order == [7, -2, 0, 5, 9]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
async def test_a_client_that_leaves_is_aborted(emulator, http, stream, waiting):
    """Running or still waiting, streamed or not: when the client goes, its place is free at once."""
    body = {"model": "slow", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    name = "num_requests_waiting" if waiting else "num_requests_running"
    async with httpx.AsyncClient(base_url=emulator.url, timeout=20, trust_env=False) as client:
        tasks = [asyncio.create_task(client.post("/completions", json=body)) for _ in range(2 if waiting else 1)]
        await asyncio.to_thread(wait_for, lambda: metric(http, name, model_name="slow") == 1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        wait_for(lambda gauge=gauge: metric(http, gauge, model_name="slow") == 0, limit_s=2)


def test_a_full_queue_answers_503_and_counts_it(http):
    """Beyond the bound requests are refused at once, streamed ones before their stream begins."""
    before = metric(http, "admission_rejections_total", model_name="slow", reason="max_num_queued_reqs")
    body = {"model": "slow", "prompt": "[[tokens=60]]", "max_tokens": 60}
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(http.post, "/v1/completions", json=body) for _ in range(6)]
        wait_for(lambda: metric(http, "num_requests_waiting", model_name="slow") == 5)
        for stream in (False, True):
            refused = chat(http, model="slow", stream=stream)
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "Service Unavailable"
        assert [a.result().status_code for a in answers] == [200] * 6
    assert metric(http, "admission_rejections_total", model_name="slow", reason="max_num_queued_reqs") == before + 2


def test_timing_is_the_models_own_and_speed_divides_it():
    """40 tokens at 200 tokens/s take 0.2 s, ten times less at ten times the speed; the answer says so itself."""
    took = {}
    for speed in (1.0, 10.0):
        with (
            Emulator(EmulatorConfig(speed=speed)) as emulator,
            httpx.Client(base_url=emulator.url, trust_env=False) as http,
        ):
            tries = []
            for _ in range(5):  # the quickest: the machine may be busy
                since_s = time.monotonic()
                answer = http.post("/completions", json={"model": "tiny", "prompt": "[[tokens=40]]", "max_tokens": 50})
                tries.append(time.monotonic() - since_s)
            took[speed] = min(tries)
            assert answer.json()["metrics"]["generation_time_ms"] == pytest.approx(39 * 4.9 / speed, rel=0.01)
    assert took[1.0] >= 0.19
    assert took[10.0] < took[1.0] - 0.1


def test_an_idle_emulator_uses_no_cpu():
    """Nothing is awake while nothing runs: half a second of idling costs less than a tenth of it."""
    with Emulator() as emulator, httpx.Client(base_url=emulator.url, trust_env=False) as http:
        http.post("/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 3})
        since_s = time.process_time()
        time.sleep(0.5)  # what is measured is the cost of time passing
        assert time.process_time() - since_s < 0.05


def test_metrics_count_what_happened(http):
    """Tokens, successes by reason and latencies move by exactly what a request cost."""
    labels = {"model_name": "tiny"}
    names = ("prompt_tokens_total", "generation_tokens_total", "e2e_request_latency_seconds_count")
    before = [metric(http, n, **labels) for n in names]
    stopped = metric(http, "request_success_total", finished_reason="stop", **labels)
    usage = chat(http, "[[tokens=9]]").json()["usage"]
    after = [metric(http, n, **labels) for n in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [usage["prompt_tokens"], 9, 1]
    assert metric(http, "request_success_total", finished_reason="stop", **labels) == stopped + 1


# -- the prefix cache, and dev mode ------------------------------------------------------------------------------------
def test_a_conversation_finds_its_beginning_in_the_prefix_cache(http):
    """Whole blocks of what was said before, tools and all; another salt or another beginning finds nothing."""
    said = [{"role": "system", "content": "be brief " * 100}, {"role": "user", "content": "one " * 150}]
    more = [*said, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three " * 150}]

    def cached(messages, **body):
        usage = chat(http, messages=messages, tools=[LOOK], **body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert (cached(said), cached(more)) == (0, 384)
    assert cached(more, cache_salt="mine") == 0
    assert cached([{"role": "system", "content": "other"}, *more[1:]]) == 0
    assert chat(http, cache_salt="").status_code == 400


def test_a_cached_prompt_is_answered_sooner():
    """The first token comes without the seconds of what was there."""
    slow = dataclasses.replace(CPU_TINY, prefill_s_per_token=0.001)
    with Emulator(EmulatorConfig(models=(EmulatedModel(name="tiny", profile=slow),))) as emulator:
        with httpx.Client(base_url=emulator.url, trust_env=False) as client:
            body = {"model": "tiny", "prompt": "word " * 500, "max_tokens": 2}
            waits = [client.post("/completions", json=body).json()["metrics"] for _ in range(2)]
    first, second = (told["time_to_first_token_ms"] for told in waits)
    assert first == pytest.approx(503.5 + 1.4, abs=3)
    assert second < first / 3


def test_the_administrators_endpoints_are_there_in_dev_mode_only(http):
    """Who did not ask for them has none: 404."""
    for path in ("sleep", "wake_up", "pause", "resume", "abort_requests", "reset_prefix_cache", "collective_rpc"):
        assert http.post(f"/{path}").status_code == 404
    assert http.get("/is_sleeping").status_code == 404


@pytest.fixture
def admin():
    """A client of an emulator in dev mode."""
    config = EmulatorConfig(models=(EmulatedModel(name="slow", profile=ONE_AT_A_TIME),), dev_mode=True)
    with (
        Emulator(config) as emulator,
        httpx.Client(base_url=emulator.url.removesuffix("/v1"), timeout=20, trust_env=False) as client,
    ):
        yield client


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_sleep_ends_what_is_under_way_with_abort(admin, path, stream):
    """200, what was said so far and "abort" for who ran, nothing for who waited; asleep, newcomers hang and do not show."""
    text = "[[tokens=1500]]"
    said = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text, "input": text}
    body = {"max_tokens": 1500, "max_output_tokens": 1500, "stream": stream, **said}
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(admin.post, path, json=body) for _ in range(2)]
        wait_for(lambda: metric(admin, "num_requests_waiting") == 1)
        wait_for(lambda: metric(admin, "generation_tokens_total") > 0)
        assert admin.post("/sleep").json() == {"status": "sleeping", "level": 1}
        texts = sorted((a.result().text for a in answers), key=len)
        assert [a.result().status_code for a in answers] == [200, 200]
        late = threads.submit(admin.post, path, json={**body, "max_tokens": 3, "max_output_tokens": 3})
        for _ in range(5):
            assert admin.get("/health").status_code == 200
        assert metric(admin, "num_requests_waiting") == 0
        assert metric(admin, "engine_sleep_state", sleep_state="weights_offloaded") == 1
        assert not late.done()
        assert admin.post("/wake_up").json()["status"] == "awake"
        assert late.result().status_code == 200
    if "responses" not in path:
        assert '"abort"' in texts[1]
        assert ('"abort"' in texts[0]) is not stream
    assert metric(admin, "request_success_total", finished_reason="abort") == 2


def test_named_requests_are_aborted_and_others_go_on(admin):
    """By the id that the caller gave or was given, with its prompt's number; without names all end."""
    body = {"prompt": "[[tokens=1500]]", "max_tokens": 1500}
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(admin.post, "/v1/completions", json={**body, "request_id": "a"})
        wait_for(lambda: metric(admin, "num_requests_running") == 1)
        second = threads.submit(admin.post, "/v1/completions", json={**body, "request_id": "b"})
        wait_for(lambda: metric(admin, "num_requests_waiting") == 1)
        assert admin.post("/abort_requests", json={"request_ids": ["cmpl-b-0"]}).json()["aborted"] == 1
        assert second.result().json()["choices"][0]["finish_reason"] == "abort"
        assert not first.done()
        assert admin.post("/abort_requests", json={}).json()["aborted"] == 1
        assert first.result().json()["choices"][0]["finish_reason"] == "abort"
    assert metric(admin, "request_success_total", finished_reason="abort") == 0


# -- the server --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nope"}, 404, "model"),
        ({"priority": 1.5}, 400, "body.priority"),
        ({"priority": 2**63}, 400, "body.priority"),
        ({"min_tokens": 41}, 400, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 4000}, 400, "max_tokens"),
        ({"text": "word " * 3000}, 400, "input_tokens"),
        ({"messages": []}, 400, None),
        ({"messages": "hi"}, 400, "body.messages"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tools": []}, 400, "tools"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"n": 0}, 400, None),
        ({"temperature": -1}, 400, "temperature"),
        ({"unknown_field": 1}, 200, None),
        ({"priority": 2.0}, 200, None),
    ],
)
def test_wrong_requests_are_refused_as_vllm_refuses_them(http, body, status, param):
    """Status and parameter of the error; the contract test compares the same with a real vLLM."""
    answer = chat(http, **body)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"]["code"] == status


def test_several_answers_and_prompts_are_several_requests(http):
    """Both n and a list of prompts give one choice each; each prompt counts once."""
    one = chat(http, stream=False).json()
    two = chat(http, n=2).json()
    assert [c["index"] for c in two["choices"]] == [0, 1]
    assert two["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    body = {"model": "tiny", "prompt": ["a b", "c d e"], "max_tokens": 3, "stream": True}
    streamed = chunks(http.post("/v1/completions", json=body))
    assert {c["choices"][0]["index"] for c in streamed} == {0, 1}


def test_the_responses_api_streams_text_and_calls(sdk):
    """The SDK's own reader understands both kinds of output."""
    with sdk.responses.stream(model="tiny", input="hi", max_output_tokens=6) as events:
        text = events.get_final_response()
    assert text.output_text
    assert text.usage.output_tokens == 6
    tool = {"type": "function", "name": "look", "parameters": LOOK["function"]["parameters"]}
    with sdk.responses.stream(model="tiny", input="hi", tools=[tool], tool_choice="required") as events:
        (call,) = events.get_final_response().output
    assert call.name == "look"
    assert json.loads(call.arguments)["n"] in (1, 2, 3)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model="tiny", input="hi", previous_response_id="resp_gone")


def test_with_a_key_the_api_is_closed_and_health_is_open():
    """As in vLLM: /v1 needs the key, /health and /metrics do not."""
    with Emulator(EmulatorConfig(api_key="secret")) as emulator:
        base = emulator.url.removesuffix("/v1")
        assert httpx.get(f"{base}/v1/models", trust_env=False).json() == {"error": "Unauthorized"}
        assert httpx.get(f"{base}/v1/models", headers={"Authorization": "Bearer secret"}, trust_env=False).is_success
        assert httpx.get(f"{base}/health", trust_env=False).is_success
        assert httpx.get(f"{base}/metrics", trust_env=False).is_success


def test_an_emulator_without_models_or_with_twins_cannot_be_built():
    """Each model has a name of its own."""
    for models in ((), (EmulatedModel(name="a"), EmulatedModel(name="a"))):
        with pytest.raises(ValueError, match="at least one model"):
            EmulatorConfig(models=models)


# -- the probe ---------------------------------------------------------------------------------------------------------
def spec(url, model="tiny", **more):
    """An engine as the fleet names it."""
    return EngineSpec(engine_id="a", url=url, model=model, **more)


async def test_the_probe_reads_each_models_own_account(emulator):
    """Running, waiting and KV tokens of the model that is asked for, though two share the port."""
    probe = VllmProbe()
    async with httpx.AsyncClient(base_url=emulator.url, timeout=20, trust_env=False) as client:
        body = {"model": "slow", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
        tasks = [asyncio.create_task(client.post("/completions", json=body)) for _ in range(3)]
        while (slow := await probe.probe(spec(emulator.url, "any", served_model="slow"))).waiting != 2:
            await asyncio.sleep(0.01)
        tiny = await probe.probe(spec(emulator.url))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert (slow.healthy, slow.running, slow.kv_tokens) == (True, 1, 262144)
    assert (tiny.healthy, tiny.running, tiny.waiting) == (True, 0, 0)
    await probe.close()


async def test_the_probe_never_raises():
    """No server, no HTTP, no URL at all: unhealthy. The caller's own URL is not asked."""
    probe = VllmProbe(timeout_s=0.5)
    for url in (f"http://127.0.0.1:{free_port()}/v1", "http://", "nonsense"):
        assert not (await probe.probe(spec(url))).healthy
    assert (await probe.probe(spec("http://127.0.0.1:1/v1", original=True))).healthy
    await probe.close()


def test_pages_of_older_vllms_and_of_strangers_are_read_as_far_as_they_go():
    """Blocks times their size where kv_cache_size_tokens is missing; what is no metrics page says nothing."""
    page = (
        'vllm:num_requests_running{engine="0",model_name="a"} 2.0\nvllm:num_requests_running{engine="1",model_name="a"} 1.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="a"} 4.0\n'
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
        'vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="None"} 1.0\n'
    )
    health = read_metrics(page, "a")
    assert (health.running, health.waiting, health.kv_tokens) == (3, 4, 1600)
    assert read_metrics(page, "alias") == health
    for other in ("", "<html>", 'vllm:num_requests_running{engine="0"'):
        assert read_metrics(other, "a").running == -1


# -- processes ---------------------------------------------------------------------------------------------------------
SERVE = """
import asyncio, sys
from maestro_serving.emulator import EmulatorConfig, serve
asyncio.run(serve(EmulatorConfig(), port=int(sys.argv[1])))
"""


def emulator_process(tmp_path, script=SERVE, **more):
    """An emulator as a child process."""
    port = free_port()
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    command = EngineCommand(argv=(sys.executable, "-c", script, str(port)), env=env)
    url = f"http://127.0.0.1:{port}/v1"
    return EngineProcess("e1", command, url=url, log=tmp_path / "logs" / "e1.log", **more)


async def test_a_killed_engine_is_started_again_at_the_same_address(tmp_path):
    """After kill -9 the keeper brings it back and says so; stopping it stops it for good."""
    notices: list[str] = []
    process = emulator_process(tmp_path, notice=notices.append)
    probe = VllmProbe()
    await process.start()
    keeper = asyncio.create_task(process.keep())
    try:
        first = process.pid
        os.kill(first, signal.SIGKILL)
        while len(notices) < 2:
            await asyncio.sleep(0.02)
        assert process.pid != first
        assert process.restarts == 1
        assert (await probe.probe(spec(process.url))).healthy
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await process.stop()
    assert not process.alive()
    assert [n.split()[2] for n in notices] == ["ended;", "is"]
    assert not (await probe.probe(spec(process.url))).healthy
    await probe.close()


PARENT = """
import asyncio, sys, time
from pathlib import Path
from maestro_serving.processes import EngineProcess
from maestro_serving.vllm import EngineCommand
port, log, script = sys.argv[1:]
command = EngineCommand(argv=(sys.executable, "-c", script, port))
engine = EngineProcess("e", command, url=f"http://127.0.0.1:{port}/v1", log=Path(log))
asyncio.run(engine.start())
print(engine.pid, flush=True)
time.sleep(100)
"""


def test_an_engine_ends_when_its_parent_is_killed(tmp_path):
    """Kill -9 of whoever started it leaves no engine behind."""
    env = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)}
    arguments = [sys.executable, "-c", PARENT, str(free_port()), str(tmp_path / "log"), SERVE]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=env) as parent:
        engine_pid = int(parent.stdout.readline())
        os.kill(engine_pid, 0)
        parent.kill()
    wait_for(lambda: not alive(engine_pid), limit_s=15)


def alive(pid):
    """There is such a process, and it is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_an_engine_that_dies_while_starting_shows_the_end_of_its_log(tmp_path):
    """The error says which engine, that it ended, and what it last wrote."""
    process = emulator_process(tmp_path, script="raise SystemExit('no such weights')")
    with pytest.raises(EngineUnavailable, match=r"e1 ended while it started(.|\n)*no such weights"):
        await process.start()


async def test_an_engine_that_never_gets_healthy_is_given_up_and_ended(tmp_path):
    """The time limit holds, and nothing is left running."""
    process = emulator_process(tmp_path, script="import time; time.sleep(60)", start_limit_s=0.5)
    with pytest.raises(EngineUnavailable, match=r"not healthy after 0\.5 s"):
        await process.start()
    assert not process.alive()
    missing = EngineProcess("e2", EngineCommand(argv=("/no/such/program",)), url="http://x/v1", log=tmp_path / "l")
    with pytest.raises(EngineUnavailable, match="no program"):
        await missing.start()


def test_engine_commands_say_what_the_fleet_file_says(tmp_path, monkeypatch):
    """Slots, context, KV bytes and core travel into the command line, for the emulator as for vLLM."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("MAESTRO_VLLM", str(program))
    engine = spec("", slots=5, max_model_len=1024, served_model="served")
    launch = Launch(kind="vllm", model_path=str(tmp_path), kv_cache_memory_bytes=99, cpu_core=1, args=("--seed", "3"))
    command = engine_command(engine, launch, port=8101)
    line = " ".join(command.argv)
    for part in ("serve", "--max-num-seqs 5", "--max-model-len 1024", "--kv-cache-memory-bytes 99", "--port 8101"):
        assert part in line
    assert "--scheduling-policy priority" in line
    assert line.endswith("--seed 3")
    assert command.env["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert command.env["HF_HUB_OFFLINE"] == "1"
    emulated = " ".join(engine_command(engine, Launch(kind="emulator", args=("--speed", "2")), port=8102).argv)
    assert (
        "emulate --model served --port 8102 --profile cpu-tiny --max-num-seqs 5 --max-model-len 1024 --speed 2"
        in emulated
    )
    monkeypatch.setenv("MAESTRO_VLLM", "/no/such/vllm")
    with pytest.raises(ConfigError, match="MAESTRO_VLLM"):
        engine_command(engine, launch, port=1)


def test_a_cpu_engine_needs_its_kv_bytes_and_no_gpu():
    """Two mistakes that would take all memory, or the wrong device, are refused."""
    common = {"model": "m", "served_model": "m", "port": 1, "program": "vllm"}
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        vllm_command(**common, cpu_core=0)
    with pytest.raises(ConfigError, match="not both"):
        vllm_command(**common, cpu_core=0, gpus=(0,), kv_cache_memory_bytes=1)
    on_gpu = vllm_command(**common, gpus=(3,), max_num_queued=7)
    assert on_gpu.env["CUDA_VISIBLE_DEVICES"] == "3"
    assert "--enforce-eager" not in on_gpu.argv
    assert "--max-num-queued-reqs" in on_gpu.argv


@pytest.mark.parametrize("name", ["emulated", "cpu", "adopt"])
def test_the_example_fleets_are_valid(name):
    """Each example file is read, and each engine that it launches has a command."""
    path = Path(__file__).parents[1] / "serving" / "deploy" / f"fleet.{name}.toml"
    fleet = load_fleet(path)
    assert len(fleet.engines) == 2
    assert len(fleet.launches) == (0 if name == "adopt" else 2)
