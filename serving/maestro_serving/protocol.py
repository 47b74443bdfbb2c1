"""vLLM's requests, read and checked; and its refusals.

Pydantic reads the bodies, as it does in vLLM, so the same wrong values are wrong here. Unknown fields are ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maestro_serving.answers import Question, Tool, Turn, text_of, tokens_of, wishes

PRIORITY_HEADER: Final = "x-vllm-priority"
DEFAULT_COMPLETION_TOKENS: Final = 16
"""``max_tokens`` of /v1/completions where the caller gives none."""

_TEMPLATE: Final = ("<", "|", ">", "\n")
"""Tokens of each message, for the markers that a chat template puts around it."""
_ANY_OBJECT: Final = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}

_Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_Body = TypeVar("_Body", bound="Body")


class RefusedError(Exception):
    """A request that is answered with an error, in vLLM's words and shape."""

    def __init__(self, status: int, message: str, *, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class StreamOptions(BaseModel):
    """``stream_options`` of a request."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Body(BaseModel):
    """What the three kinds of request share."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    stream: bool | None = False
    priority: _Int64 = 0
    request_id: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    cache_salt: str | None = None


class Sampled(Body):
    """What chat and plain completions share."""

    n: int | None = 1
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False


class _Function(BaseModel):
    name: str
    parameters: dict[str, Any] | None = None


class _ChatTool(BaseModel):
    type: Literal["function"] = "function"
    function: _Function


class _NamedFunction(BaseModel):
    name: str


class _NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: _NamedFunction


class _JsonSchema(BaseModel):
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class _Format(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[Any] | dict[str, Any] | None = None


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: list[_Message]
    max_completion_tokens: int | None = None
    tools: list[_ChatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    response_format: _Format | None = None


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] | None = None
    max_tokens: int | None = DEFAULT_COMPLETION_TOKENS


class _FlatTool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str = "function"
    name: str = ""
    parameters: dict[str, Any] | None = None


class _FlatNamedTool(BaseModel):
    type: Literal["function"] = "function"
    name: str


class _TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class _TextOptions(BaseModel):
    format: _TextFormat | None = None


class ResponsesBody(Body):
    """POST /v1/responses, as far as text and function calls go."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    tools: list[_FlatTool] = []
    tool_choice: Literal["none", "auto", "required"] | _FlatNamedTool | None = None
    text: _TextOptions | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What bounds a request: the model it names and that model's context."""

    model: str
    max_model_len: int


def parse(kind: type[_Body], raw: bytes, headers: Mapping[str, str]) -> _Body:
    """Read a request's body. Raises `RefusedError`."""
    if headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise _invalid("Unsupported Media Type: Only 'application/json' is allowed", param=None)
    try:
        content = json.loads(raw)
    except ValueError as e:
        at = e.pos if isinstance(e, json.JSONDecodeError) else 0
        raise _invalid(f"JSON decode error: {e}", param=f"body.{at}") from None
    if isinstance(content, dict) and PRIORITY_HEADER in headers:
        content["priority"] = headers[PRIORITY_HEADER]
    try:
        body = kind.model_validate(content)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(["body", *(str(p) for p in first["loc"])])
        raise _invalid(f"{e.error_count()} validation error(s): {place}: {first['msg']}", param=place) from None
    if body.cache_salt == "":
        message = "Parameter 'cache_salt' must be a non-empty string if provided. (parameter=cache_salt)"
        raise RefusedError(400, message, param="cache_salt")
    if isinstance(body, Sampled):
        _check_sampling(body)
    if isinstance(body, ChatBody):
        _check_tools(body)
    return body


def chat_questions(body: ChatBody, limits: Limits) -> list[Question]:
    """What a chat request asks, ``n`` times."""
    if not body.messages:
        raise RefusedError(400, "There are no messages to apply the chat template to.")
    texts = [f"{m.role}\n{text_of(m.content)}{_calls_text(m)}" for m in body.messages]
    tools = [Tool(name=t.function.name, parameters=t.function.parameters or {}) for t in body.tools or ()]
    choice = body.tool_choice
    name = choice.function.name if isinstance(choice, _NamedTool) else choice
    offered = [json.dumps([t.name, t.parameters], sort_keys=True) for t in tools]
    base = Question(
        model=limits.model,
        text="\n".join([*texts, *offered]),
        prompt_tokens=0,
        prompt=_prompt(texts, offered),
        salt=body.cache_salt or "",
        max_tokens=0,
        last_text=text_of(body.messages[-1].content),
        wishes=wishes(Turn(role=m.role, text=text_of(m.content), calls=_called(m)) for m in body.messages),
        tools=tools,
        tool_choice=name or ("auto" if tools else "none"),
        schema=_chat_schema(body.response_format),
    )
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _sampled(base, body, limits, asked=asked, name=name)


def completion_questions(body: CompletionBody, limits: Limits) -> list[Question]:
    """What a plain completion asks: each prompt, ``n`` times."""
    prompt = body.prompt
    prompts: list[tuple[str, list[str]]]  # text, tokens
    match prompt:
        case str() if prompt:
            prompts = [(prompt, tokens_of(prompt))]
        case [int(), *_]:
            prompts = [(str(prompt), [str(token) for token in prompt])]
        case [_, *_]:
            prompts = [
                (str(p), tokens_of(p) if isinstance(p, str) else [str(token) for token in p])
                for p in prompt
                if not isinstance(p, int)
            ]
        case _:
            raise RefusedError(400, "Neither prompt nor prompt_embeds was given. (parameter=prompt)", param="prompt")
    questions: list[Question] = []
    for text, tokens in prompts:
        base = Question(
            model=limits.model,
            text=text,
            last_text=text,
            prompt_tokens=0,
            prompt=tokens or [""],
            salt=body.cache_salt or "",
            max_tokens=0,
        )
        questions += _sampled(base, body, limits, asked=body.max_tokens, name="max_tokens")
    return questions


def response_question(body: ResponsesBody, limits: Limits) -> Question:
    """What a request of the Responses API asks."""
    if body.previous_response_id is not None:
        message = f"Response with id '{body.previous_response_id}' not found."
        raise RefusedError(404, message, kind="invalid_request_error", param="response_id")
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    texts = [body.instructions] if body.instructions else []
    texts += [
        f"{i.get('role', '')}\n{text_of(i.get('content'))}{i.get('arguments') or i.get('output') or ''}" for i in items
    ]
    tools = [Tool(name=t.name, parameters=t.parameters or {}) for t in body.tools if t.type == "function" and t.name]
    choice = body.tool_choice
    name = choice.name if isinstance(choice, _FlatNamedTool) else choice
    if name not in (None, "none", "auto", "required", *(t.name for t in tools)) or (name == "required" and not tools):
        raise RefusedError(400, f"tool_choice names no tool of `tools`: {name}", param="tool_choice")
    text_format = body.text.format if body.text else None
    schema = None
    if text_format and text_format.type != "text":
        schema = _ANY_OBJECT if text_format.type == "json_object" else text_format.json_schema
    last = items[-1] if items else {}
    offered = [json.dumps([t.name, t.parameters], sort_keys=True) for t in tools]
    prompt = _prompt(texts or [""], offered)
    prompt_tokens = len(prompt)
    question = Question(
        model=limits.model,
        text="\n".join([*texts, *offered]),
        prompt_tokens=prompt_tokens,
        prompt=prompt,
        salt=body.cache_salt or "",
        max_tokens=0,
        last_text=text_of(last.get("content")),
        wishes=wishes(_turn(item) for item in items),
        tools=tools,
        tool_choice=name or ("auto" if tools else "none"),
        schema=schema,
    )
    return dataclasses.replace(
        question, max_tokens=_room(prompt_tokens, limits, asked=body.max_output_tokens, name="max_output_tokens")
    )


def _prompt(texts: Sequence[str], offered: Sequence[str]) -> list[str]:
    """The tokens of messages and tools in a template's order: tools come first, so that a conversation only grows."""
    tokens = [token for text in offered for token in tokens_of(f"\n{text}")]
    for n, text in enumerate(texts):
        tokens += _TEMPLATE
        tokens += tokens_of(f"\n{text}" if n else text)
    return tokens


def _sampled(base: Question, body: Sampled, limits: Limits, *, asked: int | None, name: str) -> list[Question]:
    prompt_tokens = len(base.prompt)
    room = _room(prompt_tokens, limits, asked=asked, name=name)
    if body.min_tokens < 0 or body.min_tokens > (asked or room):
        raise RefusedError(400, f"min_tokens must be between 0 and max_tokens={asked or room}, got {body.min_tokens}.")
    filled = dataclasses.replace(
        base,
        prompt_tokens=prompt_tokens,
        max_tokens=room,
        min_tokens=min(body.min_tokens, room),
        ignore_eos=body.ignore_eos,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
    )
    return [dataclasses.replace(filled, index=i) for i in range(body.n or 1)]


def _room(prompt_tokens: int, limits: Limits, *, asked: int | None, name: str) -> int:
    """The longest answer that the caller and the context allow."""
    if asked is not None and asked < 1:
        raise RefusedError(
            400, f"{name} must be at least 1, got {asked}. (parameter={name}, value={asked})", param=name
        )
    if asked is not None and asked > limits.max_model_len:
        message = f"{name}={asked} is above max_model_len={limits.max_model_len}. (parameter={name}, value={asked})"
        raise RefusedError(400, message, param=name)
    room = limits.max_model_len - prompt_tokens
    if room < 1:
        message = (
            f"This model's maximum context length is {limits.max_model_len} tokens; the prompt has {prompt_tokens}. "
            f"(parameter=input_tokens, value={prompt_tokens})"
        )
        raise RefusedError(400, message, param="input_tokens")
    return room if asked is None else min(room, asked)


def _check_sampling(body: Sampled) -> None:
    if body.stream_options is not None and not body.stream:
        message = "stream_options are for `stream=True` only. (parameter=stream_options)"
        raise RefusedError(400, message, param="stream_options")
    if (body.n if body.n is not None else 1) < 1:
        raise RefusedError(400, f"n must be at least 1, got {body.n}.")
    if body.temperature is not None and body.temperature < 0:
        message = f"temperature must not be negative, got {body.temperature}. (parameter=temperature)"
        raise RefusedError(400, message, param="temperature")


def _check_tools(body: ChatBody) -> None:
    if body.tools is not None and not body.tools:
        raise RefusedError(
            400, "`tools` must not be empty: name a tool or leave it out. (parameter=tools)", param="tools"
        )
    choice = body.tool_choice
    if choice not in (None, "none") and not body.tools:
        raise RefusedError(400, "`tool_choice` needs `tools`. (parameter=tool_choice)", param="tool_choice")
    if isinstance(choice, _NamedTool) and choice.function.name not in {t.function.name for t in body.tools or ()}:
        raise RefusedError(400, "`tool_choice` names none of `tools`. (parameter=tool_choice)", param="tool_choice")


def _chat_schema(wanted: _Format | None) -> Mapping[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _ANY_OBJECT
    if wanted.json_schema is None:
        message = "A response_format of type 'json_schema' needs the field 'json_schema'. (parameter=response_format)"
        raise RefusedError(400, message, param="response_format")
    return wanted.json_schema.json_schema or {}


def _calls(message: _Message) -> list[Mapping[str, Any]]:
    """The functions that a message calls, without the calls' ids."""
    calls: Sequence[Any] = (message.model_extra or {}).get("tool_calls") or ()
    return [call["function"] for call in calls if isinstance(call, dict) and isinstance(call.get("function"), dict)]


def _calls_text(message: _Message) -> str:
    calls = _calls(message)
    return json.dumps(calls) if calls else ""


def _called(message: _Message) -> list[str]:
    return [str(function.get("name", "")) for function in _calls(message)]


def _turn(item: Mapping[str, Any]) -> Turn:
    """An input item of the Responses API."""
    kind = item.get("type")
    if kind == "function_call":
        return Turn(role="assistant", text="", calls=[str(item.get("name", ""))])
    if kind == "function_call_output":
        return Turn(role="tool", text="")
    return Turn(role=str(item.get("role", "user")), text=text_of(item.get("content")))


def _invalid(message: str, *, param: str | None) -> RefusedError:
    return RefusedError(400, message, kind="Bad Request", param=param)
