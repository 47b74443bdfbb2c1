"""What the demo's customers write, and when: the user's own messages or built-in ones, on a seeded arrival process."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError

MESSAGES: Final = (
    "My parcel should have been here on Monday and the tracking page has not moved since.",
    "I was charged twice for one pair of headphones. Please look into it.",
    "The blue kettle arrived with a broken lid. Can I swap it for the steel one?",
    "How do I change the name on a flight that I booked yesterday?",
    "Please cancel the second item of my order, but keep the first one.",
    "I moved last week. Can you send the lamp to my new address instead?",
    "Your invoice shows the wrong company name and our accountant needs a new one today.",
    "The shoes are one size too small. I threw the box away, is that a problem?",
    "I never got the confirmation mail for my hotel and I leave tomorrow morning.",
    "Is the warranty still valid if the first owner was my brother?",
    "I want my money back for the concert that was moved to a date when I am abroad.",
    "The app logs me out each time I try to pay with my saved card.",
    "Two of six glasses are missing from the set that came this morning.",
    "Can I add a second bag to my booking, and what does it cost at the airport?",
    "I ordered a desk in oak and what stands here is walnut. I would keep it at a lower price.",
    "My subscription was renewed although I had ended it in the spring.",
    "The courier says that I signed for it. I was at work and nobody was at home.",
    "Which of my three open orders will arrive before Friday?",
    "Please delete my account, but only after the last refund is through.",
    "The gift card has the right number and the shop still says that it is empty.",
    "I pressed order twice by mistake. One blender is quite enough.",
    "The chair squeaks, the manual is for another model, and the hotline plays music.",
    "We are fourteen people and one of us cannot fly. What happens to the group fare?",
    "Could you confirm that the charger works with 110 volts before I travel?",
)
"""Written for this demo."""

CALM_PER_S: Final = 1.6
BURST_PER_S: Final = 5.0
PHASE_S: Final = 3.0
"""The arrival process: Poisson, with a rate that alternates between calm and burst, each for one phase, burst first."""

INTERACTIVE_SHARE: Final = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One run to come: the same in both passes."""

    index: int
    #: Seconds after the pass began.
    at_s: float
    service_class: ServiceClass
    message: str


def arrivals(messages: Sequence[str], *, runs: int, seed: int) -> tuple[Arrival, ...]:
    """``runs`` arrivals, the same for the same seed; messages are taken in turn and again from the start."""
    rng = random.Random(seed)
    found: list[Arrival] = []
    at_s = 0.0
    for index in range(runs):
        at_s = _next_arrival(at_s, rng)
        interactive = rng.random() < INTERACTIVE_SHARE
        found.append(
            Arrival(
                index=index,
                at_s=at_s,
                service_class=ServiceClass.INTERACTIVE if interactive else ServiceClass.BATCH,
                message=messages[index % len(messages)],
            )
        )
    return tuple(found)


def _next_arrival(at_s: float, rng: random.Random) -> float:
    """A Poisson process whose rate changes with the phase: spend one unit of exponential work at the current rate."""
    work = rng.expovariate(1.0)
    while True:
        phase = int(at_s / PHASE_S)
        rate, ends_s = (CALM_PER_S if phase % 2 else BURST_PER_S), (phase + 1) * PHASE_S
        if work <= rate * (ends_s - at_s):
            return at_s + work / rate
        work -= rate * (ends_s - at_s)
        at_s = ends_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Messages:
    """What an input file holds."""

    texts: tuple[str, ...]
    bad: int
    #: The first bad line and what is wrong with it: ``line 7: no message in it``; "" where none is bad.
    first_bad: str


def read_messages(path: Path, *, limit: int) -> Messages:
    """Up to ``limit`` messages of a file, one a line; ``.gz`` is unpacked.

    A line is a JSON object with ``message``, ``input_text``, ``text`` or OpenAI's ``messages`` (the last one of the
    user), a JSON string, or plain text. Bad lines are counted and left out. Raises `ConfigError` where the file cannot
    be read or holds no message.
    """
    texts: list[str] = []
    bad, first_bad = 0, ""
    try:
        with _open(path) as lines:
            for number, line in _numbered(lines):
                if len(texts) == limit:
                    break
                try:
                    texts.append(_message(line))
                except ValueError as e:
                    bad += 1
                    first_bad = first_bad or f"line {number}: {e}"
    except (OSError, EOFError, zlib.error) as e:
        raise ConfigError(f"--input {path}: {getattr(e, 'strerror', None) or e}") from e
    if not texts:
        raise ConfigError(f"--input {path}: no message in it{f' ({first_bad})' if first_bad else ''}")
    return Messages(texts=tuple(texts), bad=bad, first_bad=first_bad)


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, with their numbers from 1."""
    return ((n, line) for n, line in enumerate(lines, 1) if line.strip())


def _message(line: bytes) -> str:
    """The message of one line; ValueError says why there is none."""
    try:
        text = line.decode().removeprefix("\ufeff").strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if text[0] not in '{["':
        return text
    try:
        body = json.loads(text)
    except ValueError:
        raise ValueError("not JSON") from None
    found = _text_of(body)
    if not found.strip():
        raise ValueError("no message in it")
    return found.strip()


def _text_of(body: Any) -> str:
    if isinstance(body, str):
        return body
    if not isinstance(body, dict):
        return ""
    fields = cast("dict[str, Any]", body)
    for name in ("message", "input_text", "text"):
        if isinstance(fields.get(name), str):
            return fields[name]
    spoken = fields.get("messages")
    if not isinstance(spoken, list):
        return ""
    for turn in reversed(cast("list[Any]", spoken)):
        if isinstance(turn, dict) and cast("dict[str, Any]", turn).get("role") == "user":
            return _content(cast("dict[str, Any]", turn).get("content"))
    return ""


def _content(content: Any) -> str:
    """OpenAI's content: a string, or parts of which the texts count."""
    if isinstance(content, str):
        return content
    parts = cast("list[Any]", content) if isinstance(content, list) else []
    texts = [cast("dict[str, Any]", p).get("text") for p in parts if isinstance(p, dict)]
    return "\n".join(t for t in texts if isinstance(t, str))
