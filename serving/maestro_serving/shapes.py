"""vLLM's answers: the JSON of each kind of reply, and of the pieces of a stream."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from maestro_agents.simulator.engine import EngineRequest, RequestRecord
from maestro_serving.answers import Answer, Question, block_names
from maestro_serving.live import LiveEngine
from maestro_serving.protocol import Sampled

FINGERPRINT: Final = "maestro-emulator"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Answers that are known and wait for their tokens' time."""

    request_id: str
    created: int
    engine: LiveEngine
    questions: list[Question]
    answers: list[Answer]
    priority: int
    numbered: str = ""

    def requests(self) -> list[EngineRequest]:
        """What the engine has to do; new ids every time (a caller's id may come twice), which begin with `names`."""
        return [
            EngineRequest(
                request_id=f"{self.names[i]}-{i}-{uuid.uuid4().hex}",
                prompt_tokens=q.prompt_tokens,
                output_tokens=len(a.pieces),
                priority=self.priority,
                prefix=block_names(q, self.engine.profile.block_size),
            )
            for i, (q, a) in enumerate(zip(self.questions, self.answers, strict=True))
        ]

    @property
    def names(self) -> list[str]:
        """By which each is aborted, as in vLLM: the job's id, with the number of its prompt where ``numbered`` separates it."""
        if not self.numbered:
            return [self.request_id] * len(self.questions)
        prompts = [q.index == 0 for q in self.questions]
        return [f"{self.request_id}{self.numbered}{sum(prompts[: i + 1]) - 1}" for i in range(len(prompts))]

    def settle(self, index: int, record: RequestRecord | None) -> None:
        """An answer as it has become by now: cut where the server aborted it, noise where its weights are not the model's."""
        a = self.answers[index]
        if self.engine.garbled:
            self.answers[index] = a = dataclasses.replace(a, pieces=["!"] * len(a.pieces), tool="")
        if record is not None and record.aborted:
            pieces = a.pieces[: record.output_tokens]
            self.answers[index] = dataclasses.replace(a, pieces=pieces, finish_reason="abort", stop_reason=None)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once, however many answers it has."""
        return sum(q.prompt_tokens for q in self.questions if q.index == 0)

    @property
    def reasons(self) -> list[str]:
        return [a.finish_reason for a in self.answers]

    def usage(self, output_tokens: int) -> dict[str, Any]:
        """While it streams."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + output_tokens,
            "completion_tokens": output_tokens,
        }

    def used(self, records: Sequence[RequestRecord]) -> dict[str, Any]:
        """At the end. What was cached is said of the last prompt, as in vLLM."""
        last = max(i for i, q in enumerate(self.questions) if q.index == 0)
        details = {"cached_tokens": records[last].cached_tokens}
        return self.usage(sum(r.output_tokens for r in records)) | {"prompt_tokens_details": details}


class Deltas(Protocol):
    """The chunks that tell an answer's tokens from ``before`` up to ``after``; ``last``: there are no more."""

    def __call__(self, index: int, before: int, after: int, *, last: bool) -> list[str]: ...


def chat_reason(a: Answer, *, named: bool) -> str:
    """A call that the caller named ends as ``stop``, one that the model chose as ``tool_calls`` (OpenAI's habit)."""
    return "tool_calls" if a.tool and a.finish_reason == "stop" and not named else a.finish_reason


def chat_choice(index: int, a: Answer, *, named: bool) -> dict[str, Any]:
    """One choice of a whole chat answer."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": a.text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    if a.tool and a.finish_reason == "stop":  # a call that was cut stays text
        call = {
            "id": tool_id(),
            "type": "function",
            "function": {"name": a.tool, "arguments": a.text},
        }
        message |= {"content": "", "tool_calls": [call]}
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": chat_reason(a, named=named),
        "stop_reason": a.stop_reason,
    }


def response_item(a: Answer, *, status: str) -> dict[str, Any]:
    """What the Responses API calls an output item: a message or a call."""
    unique = uuid.uuid4().hex[:16]
    if a.tool:
        return {
            "arguments": a.text,
            "call_id": f"chatcmpl-tool-{unique}",
            "name": a.tool,
            "type": "function_call",
            "id": f"fc_{unique}",
            "status": status,
        }
    part: dict[str, Any] = {"annotations": [], "text": a.text, "type": "output_text", "logprobs": None}
    return {"id": f"msg_{unique}", "content": [part], "role": "assistant", "status": status, "type": "message"}


def blank(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of the Responses API before anything was said."""
    return {**item, "arguments": ""} if item["type"] == "function_call" else {**item, "content": []}


def tool_id() -> str:
    """A new id of a call."""
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"


def signature(body: Sampled) -> dict[str, Any]:
    """The last chunk of an answer is signed, unless a usage chunk follows, which is signed then."""
    follows = body.stream_options and body.stream_options.include_usage
    return {} if follows else {"system_fingerprint": FINGERPRINT}


def event(job: Job, kind: str, choices: list[dict[str, Any]], **more: Any) -> str:
    """One chunk of a stream."""
    body = {"id": job.request_id, "object": kind, "created": job.created, "model": job.engine.name, "choices": choices}
    return f"data: {json.dumps({**body, **more}, ensure_ascii=False, separators=(',', ':'))}\n\n"
