"""A value that satisfies a JSON schema, drawn from a random source: what a model with structured output would give.

Known: type, enum, const, properties, required, minProperties, items, prefixItems, minItems, maxItems, minLength,
maxLength, pattern (without look-around), format (date, date-time, time, email, uri, uuid), bounds and multipleOf of
numbers, $ref within the schema, allOf, anyOf, oneOf. Anything else that constrains is ignored, as vLLM's grammars do.
"""

from __future__ import annotations

import importlib
import math
import random
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final, cast

# Python's own reader of regular expressions has no public name.
_regex_parser: Final[Any] = importlib.import_module("re._parser")

Schema = Mapping[str, Any]

_DEPTH: Final = 5
"""Below this many levels only what is required is given, so that recursive schemas end."""
_HOPELESS: Final = 64
_WORDS: Final = ("alpha", "order", "ready", "north", "seven", "delta", "paper", "green", "river", "check")
_PRINTABLE: Final = [chr(c) for c in range(32, 127)]
_CATEGORIES: Final = {
    "DIGIT": set("0123456789"),
    "SPACE": {" "},
    "WORD": {c for c in _PRINTABLE if c.isalnum() or c == "_"},
}
_FORMATS: Final = {
    "date": "2026-03-14",
    "time": "09:26:53Z",
    "date-time": "2026-03-14T09:26:53Z",
    "email": "someone@example.org",
    "uri": "https://example.org/item",
}


def value_for(schema: Schema, rng: random.Random) -> Any:
    """Return a value. Raises ValueError where the schema has none, or is beyond us."""
    return _Maker(schema, rng).value(schema, 0)


class _Maker:
    def __init__(self, root: Schema, rng: random.Random) -> None:
        self.root = root
        self.rng = rng

    def value(self, schema: Schema | bool, depth: int) -> Any:  # noqa: FBT001 (true and false are schemas)
        if depth > _HOPELESS:
            raise ValueError("the schema is recursive without an end")
        if schema is False:
            raise ValueError("the schema allows no value")
        if schema is True or not schema:
            return self.rng.choice(_WORDS)
        schema = self.flat(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            if not schema["enum"]:
                raise ValueError("an empty enum allows no value")
            return self.rng.choice(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                rest = {k: v for k, v in schema.items() if k != key}
                options = list(schema[key])
                self.rng.shuffle(options)
                if depth >= _DEPTH:  # what needs no further level first
                    options.sort(key=lambda o: self.flat(o).get("type") in ("object", "array", None))
                return self.first(options, rest, depth)
        kind = schema.get("type")
        if isinstance(kind, list):
            kinds = [k for k in cast("list[str]", kind) if k != "null"] or ["null"]
            kind = self.rng.choice(kinds)
        return self.typed(kind or _implied(schema), schema, depth)

    def first(self, options: list[Schema | bool], rest: Schema, depth: int) -> Any:
        """The first option that has a value."""
        problem = ValueError("anyOf without options allows no value")
        for option in options:
            try:
                return self.value(_merge(rest, self.flat(option)) if isinstance(option, Mapping) else option, depth + 1)
            except ValueError as e:
                problem = e
        raise problem

    def flat(self, schema: Schema | bool) -> Schema:  # noqa: FBT001
        """The schema with $ref and allOf resolved."""
        if isinstance(schema, bool):
            return {}
        for _ in range(_HOPELESS):
            if "$ref" in schema:
                rest = {k: v for k, v in schema.items() if k != "$ref"}
                schema = _merge(self.lookup(schema["$ref"]), rest)
            elif "allOf" in schema:
                merged: Schema = {k: v for k, v in schema.items() if k != "allOf"}
                for part in schema["allOf"]:
                    merged = _merge(merged, self.flat(part))
                schema = merged
            else:
                return schema
        raise ValueError("the schema refers to itself without an end")

    def lookup(self, ref: str) -> Schema:
        found: Any = self.root
        for part in ref.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise ValueError(f"the schema has no {ref}")
            found = cast("Mapping[str, Any]", found)[key]
        if not isinstance(found, Mapping):
            raise ValueError(f"{ref} is no schema")  # noqa: TRY004 (the schema is a value)
        return cast("Schema", found)

    def typed(self, kind: str, schema: Schema, depth: int) -> Any:
        match kind:
            case "object":
                return self.object(schema, depth)
            case "array":
                return self.array(schema, depth)
            case "string":
                return self.string(schema)
            case "integer" | "number":
                return self.number(schema, whole=kind == "integer")
            case "boolean":
                return self.rng.random() < 0.5
            case "null":
                return None
            case _:
                raise ValueError(f"unknown type {kind!r} in the schema")

    def object(self, schema: Schema, depth: int) -> dict[str, Any]:
        properties: Mapping[str, Any] = schema.get("properties", {})
        required = list(schema.get("required", ()))
        made: dict[str, Any] = {}
        for name in [*properties, *(n for n in required if n not in properties)]:
            if name in required:
                made[name] = self.value(properties.get(name, True), depth + 1)
            elif depth < _DEPTH:
                try:
                    made[name] = self.value(properties[name], depth + 1)
                except ValueError:  # an optional property that has no value is left out
                    continue
        extra = schema.get("additionalProperties", True)
        for n in range(schema.get("minProperties", 0) - len(made)):
            made[f"extra_{n}"] = self.value(extra, depth + 1)
        return made

    def array(self, schema: Schema, depth: int) -> list[Any]:
        prefix: list[Any] = list(schema.get("prefixItems", ()))
        low = int(schema.get("minItems", 0))
        high = int(schema.get("maxItems", max(low, len(prefix), 3)))
        if low > high:
            raise ValueError("an array with minItems above maxItems has no value")
        n = low if depth >= _DEPTH else self.rng.randint(max(low, min(1, high)), max(low, min(high, low + 3)))
        n = max(n, min(len(prefix), high))
        items = schema.get("items", True)
        made: list[Any] = []
        for i in range(n * 8):
            if len(made) == n:
                break
            value = self.value(prefix[len(made)] if len(made) < len(prefix) else items, depth + 1)
            if not schema.get("uniqueItems") or value not in made:
                made.append(value)
            elif isinstance(value, str) and "enum" not in self.flat(items) and "maxLength" not in self.flat(items):
                made.append(f"{value}{i}")
        if len(made) < low:
            raise ValueError("an array of unique items found too few of them")
        return made

    def string(self, schema: Schema) -> str:
        low = int(schema.get("minLength", 0))
        high = int(schema.get("maxLength", max(low, 60)))
        if low > high:
            raise ValueError("a string with minLength above maxLength has no value")
        if "pattern" in schema:
            for _ in range(20):
                text = _from_pattern(schema["pattern"], self.rng)
                if low <= len(text) <= high and re.search(schema["pattern"], text):
                    return text
            raise ValueError(f"no string found for the pattern {schema['pattern']!r}")
        kind = schema.get("format")
        if kind == "uuid":
            return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        if kind in _FORMATS:
            return _FORMATS[kind]
        text = " ".join(self.rng.choice(_WORDS) for _ in range(3))
        while len(text) < low:
            text += f" {self.rng.choice(_WORDS)}"
        text = text[:high]
        return text if text == text.strip() else f"{text[:-1]}s"

    def number(self, schema: Schema, *, whole: bool) -> int | float:
        step = float(schema.get("multipleOf", 1 if whole else 0.5))
        low, high = -math.inf, math.inf
        for key, closed in (("minimum", True), ("exclusiveMinimum", False)):
            if isinstance(bound := schema.get(key), (int, float)) and not isinstance(bound, bool):
                first = math.ceil(bound / step)
                low = max(low, first if closed or first * step > bound else first + 1)
        for key, closed in (("maximum", True), ("exclusiveMaximum", False)):
            if isinstance(bound := schema.get(key), (int, float)) and not isinstance(bound, bool):
                last = math.floor(bound / step)
                high = min(high, last if closed or last * step < bound else last - 1)
        if low == -math.inf:
            low = 0 if high >= 0 else high - 10
        high = min(high, low + 100)
        if low > high:
            if not whole and "multipleOf" not in schema:  # a narrow interval: its middle
                bounds = [float(schema[k]) for k in schema if k.lower().endswith("imum")]
                if len(bounds) > 1 and min(bounds) < max(bounds):
                    return (min(bounds) + max(bounds)) / 2
            raise ValueError("the bounds of a number leave no value")
        value = self.rng.randint(int(low), int(high)) * step
        return round(value) if whole else value


def _implied(schema: Schema) -> str:
    """The type that a schema without one speaks of."""
    if "properties" in schema or "required" in schema or "additionalProperties" in schema:
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    if "minimum" in schema or "maximum" in schema:
        return "number"
    return "string"


def _merge(a: Schema, b: Schema) -> Schema:
    """Both at once, where that is a matter of adding keys."""
    merged = {**a, **b}
    if "properties" in a and "properties" in b:
        merged["properties"] = {**a["properties"], **b["properties"]}
    if "required" in a and "required" in b:
        merged["required"] = list(dict.fromkeys([*a["required"], *b["required"]]))
    return merged


def _from_pattern(pattern: str, rng: random.Random) -> str:
    """A string that a regular expression matches. Python's own parser reads it."""
    try:
        tree: Any = _regex_parser.parse(pattern)
    except re.error as e:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {e}") from None
    return "".join(_parts(tree, rng))


def _parts(tree: Any, rng: random.Random) -> list[str]:
    out: list[str] = []
    for op, arg in tree:
        match str(op):
            case "LITERAL":
                out.append(chr(arg))
            case "NOT_LITERAL":
                out.append(rng.choice([c for c in _PRINTABLE if ord(c) != arg]))
            case "ANY":
                out.append(rng.choice("abcdefgh"))
            case "IN":
                out.append(rng.choice(_members(arg)))
            case "BRANCH":
                out += _parts(rng.choice(arg[1]), rng)
            case "SUBPATTERN":
                out += _parts(arg[3], rng)
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, inner = arg
                for _ in range(rng.randint(low, min(int(high), low + 4))):
                    out += _parts(inner, rng)
            case "AT":
                continue
            case other:
                raise ValueError(f"patterns with {other} are not supported")
    return out


def _members(items: Any) -> list[str]:
    """The characters of a class, printable ones first."""
    chosen: set[str] = set()
    negate = False
    for op, arg in items:
        match str(op):
            case "NEGATE":
                negate = True
            case "LITERAL":
                chosen.add(chr(arg))
            case "RANGE":
                chosen.update(chr(c) for c in range(arg[0], min(arg[1], arg[0] + 127) + 1))
            case "CATEGORY":
                name = str(arg)
                members = next(m for key, m in _CATEGORIES.items() if name.endswith(key))
                chosen.update(set(_PRINTABLE) - members if "_NOT_" in name else members)
            case other:
                raise ValueError(f"patterns with {other} in a class are not supported")
    found = sorted(set(_PRINTABLE) - chosen) if negate else sorted(chosen)
    if not found:
        raise ValueError("an empty character class")
    return found
