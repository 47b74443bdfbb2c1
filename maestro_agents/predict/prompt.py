"""A request body read once: its messages, an estimate of its tokens, and what its words look like in numbers.

Works on the JSON body of the three OpenAI calls (chat completions, completions, responses). Nothing here raises on a body of
an unexpected shape: what is not understood counts as nothing. No text is kept.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

LOOKED_CHARS: Final = 4_000
"""Characters of a text that are looked at: the last so many of a message, first and last half of an instruction."""

ID_CHARS: Final = 400
"""An instruction is known again by its first so many characters: what is filled in usually stands further down."""

SKETCH_BUCKETS: Final = 4_096
"""Numbers of a sketch: words of the instruction fall into the lower half, those of the last message into the upper."""

SKETCH_IDS: Final = 192
"""Most numbers in one sketch."""

_INSTRUCTION_WORDS: Final = 16
_LAST_WORDS: Final = 32
"""Words at each end of a text that are sketched: 2 x 16 words and the 31 pairs between them, 2 x 32 and 63; 190 in all."""
_SKETCH_CHARS: Final = 12
"""Characters per sketched word that are looked at, on average."""

_TOKENS_PER_MESSAGE: Final = 5
"""Of a chat template around each message."""
_TOKENS_PER_IMAGE: Final = 768
_SAMPLE_CHARS: Final = 2_048
"""Characters of the middle of a conversation from which its bytes per token are told."""
_CACHED_INSTRUCTIONS: Final = 256

_SAID: Final[tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...]] = (
    ("one_word", "one word, yes or no", ("one word", "single word", "yes or no", "yes/no", "true or false"), ("是或否", "是否")),
    ("one_sentence", "one sentence, one line", ("one sentence", "single sentence", "1 sentence", "one line", "single line"), ("一句话",)),
    ("brief", "brief, short, concise", ("brief", "short", "concise", "succinct"), ("简短", "简洁", "简要")),
    ("list", "list, bullets", ("list", "bullet", "enumerate"), ("列表", "列出")),
    ("steps", "steps, step by step", ("step",), ("步骤", "逐步")),
    ("long", "detailed, comprehensive, report, essay", ("detail", "comprehensive", "report", "essay", "thorough"), ("详细", "报告")),
    ("json", "JSON, schema", ("json", "schema"), ()),
    ("code", "code, function, script", ("code", "function", "python", "script"), ("代码",)),
    ("summary", "summary", ("summar",), ("总结", "摘要")),
    ("translate", "translate", ("translat",), ("翻译",)),
    ("tool", "tool, action, call", ("tool", "action:", "call the"), ("工具",)),
    ("question", "ask", ("ask ", "clarif"), ("询问",)),
    ("thanks", "thanks, goodbye", ("thank", "goodbye"), ("谢谢", "再见")),
    ("error", "error, failed, traceback", ("error", "failed", "traceback", "exception"), ("错误", "失败")),
)  # fmt: skip
"""What a text says of the answer's length and kind: name, meaning, English parts of words, Chinese ones."""


_CLASSES: Final = (
    "0 none, 1 lower case, 2 capital, 3 digit, 4 full stop, 5 `?`, 6 `:`, 7 quote or brace, 8 other ASCII, 9 other"
)
TEXT_FEATURES: Final[tuple[tuple[str, str, str], ...]] = (
    ("bytes", "bytes", "UTF-8 bytes"),
    ("words", "words", "words, by white space"),
    ("lines", "lines", "lines"),
    ("digits", "share", "bytes that are digits"),
    ("capitals", "share", "bytes that are capitals A to Z"),
    ("punctuation", "share", "bytes that are ASCII punctuation, braces included"),
    ("braces", "share", "bytes that are braces, brackets or angle brackets"),
    ("non_ascii", "share", "bytes outside ASCII"),
    ("cjk", "share", "bytes of Chinese, Japanese and Korean characters"),
    ("fences", "count", "code fences"),
    ("is_json", "0 or 1", "begins and ends as a JSON object or array does"),
    ("questions", "count", "question marks"),
    ("asked_words", "words", 'N of the first "N words", 0 where there is none'),
    ("asked_sentences", "count", 'N of the first "N sentences" (or paragraphs), 0 where there is none'),
    *((f"says_{name}", "0 or 1", f"speaks of {meaning}") for name, meaning, _, _ in _SAID),
    ("first", "class", f"its first character ({_CLASSES})"),
    ("last", "class", "its last character, likewise"),
)  # fmt: skip
"""What `Text.features` holds, in order: name, unit, meaning. Of what is looked at (`LOOKED_CHARS`); all 0 for no text."""


# -- a body --------------------------------------------------------------------------------------------------------------
class Text(NamedTuple):
    """What is known of one text. ``ids``: its words and word pairs as hashed numbers below `SKETCH_BUCKETS`."""

    tokens: float
    features: tuple[float, ...]
    ids: frozenset[int]


class Prompt:
    """The messages of a body, gone through once. It refers to the texts: made for one call, and let go."""

    __slots__ = ("answers", "assistants", "body", "images", "instruction", "instruction_text", "last_counted", "last_role", "last_text",
                 "last_unseen_tokens", "messages", "middle_tokens", "system_tokens", "token_ids", "tool_results")  # fmt: skip

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.images = self.tool_results = self.assistants = self.token_ids = 0
        middle_bytes = more_system_bytes = 0
        answers: list[int] = []
        instruction = ""
        sample: list[str] = []
        found = _messages(body)
        self.messages = len(found)
        last_text = self.last_role = ""
        extra = body.get("instructions")
        if isinstance(extra, str):
            instruction = extra
        per_sample = max(64, _SAMPLE_CHARS // max(1, self.messages))
        end = self.messages - 1
        for at, message in enumerate(found):
            role = message.get("role")
            if not isinstance(role, str):
                role = _ITEM_ROLES.get(str(message.get("type", "")), "")
            content = message.get("content")
            if content is None:
                content = message.get("output")  # a tool's result, in the responses API
            text = content if isinstance(content, str) else self._joined(content)
            size = len(text) if text.isascii() else _size(text)
            if role == "tool":
                self.tool_results += 1
            elif role == "assistant":
                self.assistants += 1
                calls = message.get("tool_calls") or message.get("arguments")
                if calls:
                    called = calls if isinstance(calls, str) else _json(calls)
                    text += called
                    size += _size(called)
                answers.append(size)
            if at == end:
                last_text, self.last_role = text, role
            elif role in _SYSTEM:
                if instruction:
                    more_system_bytes += size
                    sample.append(text[:per_sample])
                else:
                    instruction = text
            else:
                middle_bytes += size
                sample.append(text[:per_sample])
        if not found:
            last_text = self._completion(body.get("prompt"))
        elif end == 0 and self.last_role in _SYSTEM and not instruction:
            instruction, last_text = last_text, ""  # nothing but an instruction
        self.instruction_text, self.last_text = instruction, last_text
        rate = _tokens_per_byte("".join(sample) or last_text) if sample or answers else 0.0
        self.middle_tokens = middle_bytes * rate
        self.answers = [n * rate for n in answers[-3:]]
        self.instruction = _instruction(instruction)
        self.last_counted = _counted(last_text[-LOOKED_CHARS:])
        self.last_unseen_tokens = 0.0
        if len(last_text) > LOOKED_CHARS:
            unseen = last_text[:-LOOKED_CHARS]
            self.last_unseen_tokens = _size(unseen) * _tokens_per_byte(unseen)
        self.system_tokens = self.instruction.tokens + more_system_bytes * rate

    def last(self) -> Text:
        """What is found in the last message: more work than its tokens alone (`last_counted`)."""
        return _looked_at(self.last_counted, words=_LAST_WORDS, base=_HALF)

    def _joined(self, content: object) -> str:
        """The text of a content that is given in parts."""
        parts: list[str] = []
        for part in items(content):
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Mapping):
                fields = cast("Mapping[str, Any]", part)
                if "image" in str(fields.get("type", "")):
                    self.images += 1
                elif isinstance(text := fields.get("text"), str):
                    parts.append(text)
        return "\n".join(parts)

    def _completion(self, prompt: object) -> str:
        """A completion's prompt: text, several texts, token ids, or several lists of token ids."""
        if isinstance(prompt, str):
            return prompt
        texts: list[str] = []
        for part in items(prompt):
            if isinstance(part, str):
                texts.append(part)
            else:
                self.token_ids += 1 if type(part) is int else len(items(part))
        return "".join(texts)

    def tokens(self) -> int:
        """The estimate of the whole."""
        tokens = self.token_ids + self.messages * _TOKENS_PER_MESSAGE + self.images * _TOKENS_PER_IMAGE
        tokens += self.system_tokens + self.middle_tokens + self.last_counted.tokens + self.last_unseen_tokens
        for name in ("tools", "functions", "response_format"):
            if schema := self.body.get(name):
                text = _json(schema)
                tokens += _size(text) * _tokens_per_byte(text)
        return max(1, round(tokens))


_SYSTEM: Final = frozenset({"system", "developer"})
_ITEM_ROLES: Final = {"function_call_output": "tool", "function_call": "assistant", "reasoning": "assistant"}
"""Items of the responses API that name no role."""


def max_output_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the caller's own bound on the answer in tokens, None where there is none."""
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def choices_asked(body: Mapping[str, Any]) -> int:
    """Return how many answers are written beside each other: ``n`` of them, to each of a completion's prompts."""
    n, prompts = body.get("n"), body.get("prompt")
    texts = cast("list[object]", prompts) if isinstance(prompts, list) else []
    several = len(texts) if texts and not isinstance(texts[0], int) else 1
    return several * (n if type(n) is int and n > 0 else 1)


def _messages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    source = body.get("messages")
    if source is None:
        source = body.get("input")
        if isinstance(source, str):
            return [{"role": "user", "content": source}]
    return [cast("Mapping[str, Any]", m) for m in items(source) if type(m) is dict or isinstance(m, Mapping)]


def items(value: object) -> Sequence[object]:
    """The value where it is a list of things, else nothing."""
    if type(value) is list:  # the usual, and the abstract class is slow to ask
        return cast("Sequence[object]", value)
    if value is not None and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return cast("Sequence[object]", value)
    return ()


def mapping(value: object) -> Mapping[str, Any]:
    """The value where it is an object, else an empty one."""
    return cast("Mapping[str, Any]", value) if type(value) is dict or isinstance(value, Mapping) else {}


_instructions: dict[tuple[int, int], Text] = {}
"""What was found of instructions, by Python's hash of the text and its length: the text itself is not kept."""


def forget_instructions() -> None:
    """Let go of what was found of instructions."""
    _instructions.clear()


def _instruction(text: str) -> Text:
    """The same for an instruction; it comes again with every call of its role, so what was found is kept."""
    key = hash(text), len(text)
    found = _instructions.get(key)
    if found is None:
        ends = text if len(text) <= LOOKED_CHARS else text[: LOOKED_CHARS // 2] + text[-LOOKED_CHARS // 2 :]
        found = _looked_at(_counted(ends), words=_INSTRUCTION_WORDS, base=0)
        if len(text) > LOOKED_CHARS:
            found = found._replace(tokens=_size(text) * _tokens_per_byte(text))
        if len(_instructions) >= _CACHED_INSTRUCTIONS:
            _instructions.clear()
        _instructions[key] = found
    return found


# -- one text ------------------------------------------------------------------------------------------------------------
_DIGITS: Final = b"0123456789"
_CAPITALS: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BRACES: Final = b"{}[]<>"
_PUNCTUATION: Final = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_HIGH: Final = bytes(range(128, 256))
_CJK_LEADS: Final = bytes(range(0xE3, 0xEE))
"""First bytes, in UTF-8, of kana, CJK ideographs and Hangul (U+3000 to U+DFFF)."""
_DIGITS_TO_0: Final = bytes.maketrans(b"123456789", b"000000000")
_ASCII_WORD: Final = re.compile(rb"[a-z0-9_]+")
_HALF: Final = SKETCH_BUCKETS // 2
_WORD: Final = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7ff]|[^\\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7ff]+"
"""Compiled when the first text needs it: that takes longer than all else in this module's import."""
_ASKED_WORDS: Final = re.compile(r"(\d{1,5})[ -]?(?:word|字)")
_ASKED_SENTENCES: Final = re.compile(r"(\d{1,3})[ -]?(?:sentence|paragraph|句)")


class _Counted(NamedTuple):
    """Bytes of each kind in a text, its words (a space belongs to one) and lines."""

    text: str
    size: int
    digits: int
    punctuation: int
    high: int
    cjk: int
    words: int
    lines: int
    spaces: int

    @property
    def tokens(self) -> float:
        """Tokens of the text.

        Least absolute relative error over English and Chinese messages, code, JSON and Markdown, between what four tokenizers
        need (OpenAI's cl100k and o200k, DeepSeek's, Claude's); they are further apart than each is from its own best fit. A
        Chinese character, three bytes, is from half a token (DeepSeek) to one and a quarter (cl100k).
        """
        letters = self.size - self.digits - self.punctuation - self.high - self.lines - self.spaces
        marks = self.words + self.lines + self.punctuation
        return 0.075 * letters + 0.65 * self.digits + 0.70 * marks + 0.25 * self.cjk + 0.46 * (self.high - self.cjk)


def _counted(text: str) -> _Counted:
    data = text.encode("utf-8", "ignore")
    size = len(data)
    digits = size - len(data.translate(None, _DIGITS))
    punctuation = size - len(data.translate(None, _PUNCTUATION))
    high = 0 if text.isascii() else size - len(data.translate(None, _HIGH))
    cjk = min(high, 3 * (size - len(data.translate(None, _CJK_LEADS)))) if high else 0
    return _Counted(text, size, digits, punctuation, high, cjk, len(text.split()), data.count(b"\n"), data.count(b" "))


def _looked_at(counted: _Counted, *, words: int, base: int) -> Text:
    """Features, sketch and tokens of a text."""
    text, size, digits, punctuation, high, cjk, words_in, lines, _ = counted
    if not size:
        return Text(0.0, _EMPTY, frozenset())
    data = text.encode("utf-8", "ignore")
    capitals = size - len(data.translate(None, _CAPITALS))
    braces = size - len(data.translate(None, _BRACES)) if punctuation else 0
    low = text.lower()
    said: list[float] = []
    for _, _, english, chinese in _SAID:
        hit = 0.0
        for part in english:
            if part in low:
                hit = 1.0
                break
        else:
            if cjk:
                hit = float(any(part in low for part in chinese))
        said.append(hit)
    bare = text.strip()
    begins, ends = bare[:1], bare[-1:]
    features = (
        float(size),
        float(words_in),
        float(lines + 1),
        round(digits / size, 3),
        round(capitals / size, 3),
        round(punctuation / size, 3),
        round(braces / size, 3),
        round(high / size, 3),
        round(cjk / size, 3),
        float(text.count("```")),
        float((begins == "{" and ends == "}") or (begins == "[" and ends == "]")),
        float(text.count("?") + (text.count("\uff1f") if high else 0)),
        _asked(_ASKED_WORDS, low, "word", "字"),
        _asked(_ASKED_SENTENCES, low, "sentence", "句"),
        *said,
        _class(begins),
        _class(ends),
    )
    return Text(counted.tokens, features, _hashed(low, words, base))


_EMPTY: Final = (0.0,) * len(TEXT_FEATURES)


def _asked(pattern: re.Pattern[str], low: str, *words: str) -> float:
    if not any(word in low for word in words):
        return 0.0
    found = pattern.search(low)
    return float(found[1]) if found else 0.0


def _class(character: str) -> float:
    if not character:
        return 0.0
    if not character.isascii():
        return 9.0
    if character.isalpha():
        return 1.0 if character.islower() else 2.0
    if character.isdigit():
        return 3.0
    return _CLASS_OF.get(character, 8.0)


_CLASS_OF: Final = {".": 4.0, "?": 5.0, ":": 6.0, **dict.fromkeys("\"'`{}[]()<>", 7.0)}


def _hashed(low: str, words: int, base: int) -> frozenset[int]:
    """Words and word pairs at both ends of a text in lower case, as numbers from ``base``."""
    span = words * _SKETCH_CHARS
    if len(low) <= 2 * span:
        found = _words(low)
        if len(found) > 2 * words:
            found = found[:words] + found[-words:]
    else:
        found = _words(low[:span])[:words] + _words(low[-span:])[-words:]
    alone = list(map(zlib.crc32, found))
    hashes = alone + list(map(zlib.crc32, found[1:], alone))
    return frozenset({base + (h ^ (h >> 16)) % _HALF for h in hashes})


def _words(low: str) -> list[bytes]:
    if low.isascii():
        return _ASCII_WORD.findall(low.encode().translate(_DIGITS_TO_0))
    return [word.encode("utf-8", "ignore") for word in re.findall(_WORD, re.sub("[1-9]", "0", low))]


# -- tokens --------------------------------------------------------------------------------------------------------------
def _tokens_per_byte(text: str) -> float:
    """Tokens for each byte of a longer text, by a few pieces of it."""
    if len(text) > _SAMPLE_CHARS:
        step = len(text) // 4
        text = "".join(text[at : at + _SAMPLE_CHARS // 4] for at in range(0, 4 * step, step))
    counted = _counted(text)
    return counted.tokens / counted.size if counted.size else 0.0


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "ignore"))


def _json(value: object) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return ""
