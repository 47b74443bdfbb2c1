"""What hangs on a node: models, tools, prompts and graphs that its code can reach. It looks and never calls.

A node is anything: a function, a method, a chain, an agent of a library. From it the scan follows what its code *names*:
closure cells, globals, attributes of objects, functions it calls. Objects are looked at without their own attribute access
(``object.__getattribute__``), so a lazy proxy stays asleep. The scan is bounded; where it gave up, the answer is ``maybe``.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import SystemMessage
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.pregel import Pregel

Answer = Literal["yes", "maybe", "no"]

HANDOFF: Final = "__handoff_destination"
"""Metadata key under which langgraph-supervisor and langgraph-swarm tools name the agent that they hand over to."""

_MODEL_WORDS: Final = frozenset({
    "ChatOpenAI", "AzureChatOpenAI", "init_chat_model", "OpenAI", "AsyncOpenAI", "ChatLiteLLM", "ChatVLLM",
    "ChatAnthropic", "ChatOllama", "get_llm", "get_model", "load_chat_model", "with_structured_output", "bind_tools",
    "completions", "responses", "create_agent", "create_react_agent", "import_module",
})  # fmt: skip
_CALL_WORDS: Final = frozenset({
    "invoke", "ainvoke", "stream", "astream", "batch", "abatch", "generate", "agenerate", "predict", "apredict",
    "astream_events", "stream_events", "abatch_as_completed", "batch_as_completed",
})  # fmt: skip
_SDKS: Final = frozenset({"openai", "anthropic", "litellm", "ollama", "mistralai", "cohere", "groq", "together"})
_LIBRARIES: Final = sys.stdlib_module_names | frozenset({
    "langchain", "langgraph", "langsmith", "pydantic", "pydantic_core", "numpy", "pandas", "httpx", "httpx2",
    "requests", "redis", "deepagents", "maestro_agents", "maestro_langgraph", "typing_extensions",
})  # fmt: skip
_PROMPT_NAME: Final = re.compile(r"prompt|system|instruction|persona", re.IGNORECASE)
_IMPORT_NAME: Final = dis.opmap["IMPORT_NAME"]
_EXTENDED_ARG: Final = dis.opmap["EXTENDED_ARG"]
_DEEPEST: Final = 12
_MOST_OBJECTS: Final = 3_000
_MOST_PARTS: Final = 60
_MOST_PROMPTS: Final = 8


@dataclass(slots=True)
class Found:
    """What a node can reach."""

    llm: Answer = "no"
    models: set[str] = field(default_factory=set[str])
    tools: set[str] = field(default_factory=set[str])
    prompts: list[str] = field(default_factory=list[str])
    #: Graphs that run inside the node: a function or a tool invokes them.
    graphs: list[Pregel[Any, Any, Any, Any]] = field(default_factory=list[Pregel[Any, Any, Any, Any]])
    #: Functions of the functional API's ``@task`` that the node calls, in the order of its code.
    tasks: dict[str, object] = field(default_factory=dict[str, object])
    #: Agents that the node's tools hand over to: tool -> node of the graph around it.
    handoffs: dict[str, str] = field(default_factory=dict[str, str])
    #: The node runs tools (LangGraph's ``ToolNode``).
    runs_tools: bool = False
    #: Its code names ``Send``: more than one task of a node may follow it.
    sends: bool = False
    #: Texts in the code that does: names of nodes among them.
    sent_to: set[str] = field(default_factory=set[str])
    #: Its code names ``Command``: where it leads is known only where that is declared.
    commands: bool = False


def scan(*runnables: object) -> Found:
    """Look at a node (and its routers) and return what was found. Foreign objects may do anything: never raises."""
    scanner = _Scan()
    for runnable in runnables:
        try:
            scanner.look(runnable, 0)
        except Exception:  # a foreign object may fail in any way when it is looked at
            scanner.hints.add("failed")
    found = scanner.found
    found.llm = scanner.answer()
    return found


class _Scan:
    def __init__(self) -> None:
        self.found = Found()
        self.hints: set[str] = set()
        self.reached = False  # a model, by way of code
        self.certain = False  # a model, by way of what runs it
        self.calls = False
        self._by_library: bool | None = None  # whether the node's own function is a library's
        self._seen: set[int] = set()
        self._kept: list[object] = []  # an id is only an id while its object lives

    def answer(self) -> Answer:
        if self.certain or (self.reached and self.calls):
            return "yes"
        return "maybe" if self.reached or self.calls or self.hints else "no"

    def look(self, obj: object, depth: int, name: str = "", names: frozenset[str] = frozenset()) -> None:
        """Look at one thing; ``name``: what it is called there, ``names``: what the code around it names."""
        kind: type[Any] = type(obj)  # not `isinstance`: it would wake a lazy proxy up
        if obj is None or issubclass(kind, bytes | int | float | complex | type):
            return
        if issubclass(kind, str):
            self._text(str(obj), name)
            return
        if id(obj) in self._seen:
            return
        if depth > _DEEPEST or len(self._seen) > _MOST_OBJECTS:
            self.hints.add("too deep")
            return
        self._seen.add(id(obj))
        self._kept.append(obj)
        self._by_kind(obj, kind, depth, names)

    def _by_kind(self, obj: Any, kind: type[Any], depth: int, names: frozenset[str]) -> None:
        if issubclass(kind, BaseLanguageModel) or kind.__name__ == "_ConfigurableModel":
            self._model(obj, direct=depth == 0 or not names)
        elif issubclass(kind, Pregel):
            self.found.graphs.append(obj)
        elif issubclass(kind, BaseTool):
            self._tool(obj, depth, runs=False)
        elif issubclass(kind, SystemMessage):
            self._prompt(obj.content)
        elif issubclass(kind, BasePromptTemplate):
            self._template(obj)
        elif issubclass(kind, types.FunctionType):
            self._function(obj, depth)
        elif issubclass(kind, types.MethodType):
            self.look(obj.__func__, depth + 1)
            self._members(obj.__self__, depth, _names(obj.__func__))
        elif issubclass(kind, functools.partial):
            called = _names(obj.func)
            self.look(obj.func, depth + 1)
            for part in obj.args:
                self.look(part, depth + 1, names=called)
            for key, part in obj.keywords.items():
                self.look(part, depth + 1, key, called)
        elif issubclass(kind, dict | types.MappingProxyType):
            for key, part in list(cast("Mapping[object, object]", obj).items())[:_MOST_PARTS]:
                self.look(part, depth + 1, str(key) if type(key) is str else "", names)
        elif issubclass(kind, list | tuple | set | frozenset):
            for part in list(cast("Iterable[object]", obj))[:_MOST_PARTS]:
                self.look(part, depth + 1, names=names)
        elif kind.__name__ == "_TaskFunction" and kind.__module__.startswith("langgraph."):
            self.found.tasks.setdefault(str(getattr(obj, "__name__", "task")), obj.func)
        elif _top(kind) in _SDKS:
            self._sdk(names)
        elif issubclass(kind, Runnable):
            self._runnable(obj, cast("type[Any]", kind), depth, names)
        elif kind.__name__ == "_lru_cache_wrapper":
            self.look(obj.__wrapped__, depth + 1)
        else:
            self._members(obj, depth, names | {"__call__"})

    # -- what was found ------------------------------------------------------------------------------------------------
    def _model(self, model: Any, *, direct: bool) -> None:
        if direct:
            self.certain = True
        self.reached = True
        own = _own(model)
        given: Any = own.get("_default_config") or {}
        name: object = own.get("model_name") or own.get("model") or given.get("model")
        if type(name) is str and name:
            self.found.models.add(name)

    def _sdk(self, names: frozenset[str]) -> None:
        if names & {"create", "parse", "stream"} and names & {"completions", "responses", "messages"}:
            self.reached = self.calls = True
        else:
            self.hints.add("sdk")

    def _tool(self, tool: Any, depth: int, *, runs: bool) -> None:
        """A tool that the node runs is part of it; one that it only offers to a model runs elsewhere."""
        name = str(_own(tool).get("name") or tool.name)
        self.found.tools.add(name)
        metadata: Mapping[str, object] = _own(tool).get("metadata") or {}
        to = metadata.get(HANDOFF)
        if type(to) is str:
            self.found.handoffs[name] = to
        own = _own(tool)
        bodies = [own[part] for part in ("func", "coroutine") if own.get(part) is not None]
        bodies = bodies or [types.MethodType(f, tool) for f in (_method(tool, n) for n in ("_run", "_arun")) if f]
        if runs:
            for body in bodies:
                self.look(body, depth + 1)
            return
        if self._by_library:
            return  # an agent's model node: its tool node runs them
        inner = scan(*bodies) if depth < _DEEPEST // 2 else Found()
        if inner.llm != "no":
            self.hints.add("a tool")  # whether the node runs it itself shows when it runs

    def _text(self, text: str, name: str) -> None:
        if len(text) > 7 and _PROMPT_NAME.search(name) and not _PROMPT_NAME.fullmatch(text):
            self._prompt(text)

    def _prompt(self, content: object) -> None:
        prompts = self.found.prompts
        if content and str(content) not in prompts and len(prompts) < _MOST_PROMPTS:
            prompts.append(str(content))

    def _template(self, prompt: Any) -> None:
        for message in _own(prompt).get("messages") or [prompt]:
            own = _own(message)
            template = own.get("template") or _own(own.get("prompt")).get("template") or own.get("content")
            if type(template) is str:
                self._prompt(template)

    # -- where to look on ----------------------------------------------------------------------------------------------
    def _function(self, function: types.FunctionType, depth: int) -> None:
        if self._by_library is None:
            self._by_library = _library(function.__module__)
        code = _code(function.__code__)
        self.hints |= code.names & _MODEL_WORDS
        if code.names & _CALL_WORDS:
            self.calls = True
        if code.prompts and code.names & {"SystemMessage", "completions", "responses"} | code.roles:
            for text in code.prompts:
                self._prompt(text)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        for name, cell in cells:
            self.look(_cell(cell), depth + 1, name, code.names)
        before = self.found.commands
        for name in code.globals:
            value: object = function.__globals__.get(name)
            if name == "Send":
                self.found.sent_to |= code.texts
            self._global(value, name, depth, code.names)
        for module in code.imports:
            self._imported(module, depth, code.names)
        for value in function.__defaults__ or ():
            self.look(value, depth + 1, names=code.names)
        if _library(function.__module__):
            self.found.commands = before  # a library declares where its nodes lead

    def _global(self, value: object, name: str, depth: int, names: frozenset[str]) -> None:
        kind: type[Any] = type(value)
        if issubclass(kind, types.ModuleType):
            module = cast("types.ModuleType", value)
            if module.__name__.split(".")[0] in _SDKS:
                self._sdk(names)
            elif not _library(module.__name__):
                own = vars(module)
                for attribute in sorted(names & own.keys()):
                    self._global(own[attribute], attribute, depth + 1, names)
            return
        if issubclass(kind, type):
            self._class(cast("type[Any]", value), depth, names)
            return
        if issubclass(kind, types.FunctionType) and _library(str(getattr(value, "__module__", ""))):
            return
        self.look(value, depth + 1, name, names)

    def _imported(self, name: str, depth: int, names: frozenset[str]) -> None:
        """A module that a function imports when it runs."""
        if name.partition(".")[0] in _SDKS:
            self._sdk(names)
        elif not _library(name):
            module = sys.modules.get(name)
            if module is None:
                self.hints.add("an import")
            else:
                self._global(module, name, depth, names)

    def _class(self, named: type[Any], depth: int, names: frozenset[str]) -> None:
        module, word = named.__module__, named.__name__
        if module.startswith("langgraph.types"):
            self.found.sends |= word == "Send"
            self.found.commands |= word == "Command"
        elif issubclass(named, BaseLanguageModel) or _top(named) in _SDKS:
            self.hints.add(word)
        elif not _library(module) and not issubclass(named, dict | BaseException) and id(named) not in self._seen:
            self._seen.add(id(named))  # an instance of it may be made and used: look at the methods that are named
            for attribute in sorted(names & _attributes(named)) + ["__init__", "__call__"]:
                method = _static(named, attribute)
                if isinstance(method, types.FunctionType) and depth < _DEEPEST:
                    self.look(method, depth + 1)

    def _runnable(self, runnable: Any, kind: type[Any], depth: int, names: frozenset[str]) -> None:
        own = _own(runnable)
        tools = own.get("_tools_by_name", own.get("tools_by_name"))
        if type(tools) is dict:
            runs = not names  # else some code holds it: a model node that offers the tools, for one
            self.found.runs_tools |= runs
            for tool in list(cast("dict[str, object]", tools).values())[:_MOST_PARTS]:
                if id(tool) not in self._seen:
                    self._seen.add(id(tool))
                    self._kept.append(tool)
                    self._tool(tool, depth, runs=runs)
            return
        kwargs = own.get("kwargs")
        if type(kwargs) is dict:
            self._bound_tools(cast("dict[str, object]", kwargs).get("tools"))
        for key, part in list(own.items())[:_MOST_PARTS]:
            if key not in {"kwargs", "config", "name", "tags", "metadata", "custom_input_type"}:
                self.look(part, depth + 1, key, names)
        if not _library(kind.__module__):
            self._members(runnable, depth, names | {"invoke", "ainvoke", "__call__", "stream", "astream"})

    def _bound_tools(self, tools: object) -> None:
        for tool in cast("list[object]", tools) if type(tools) is list else []:
            if type(tool) is dict:
                given = cast("dict[str, Any]", tool)
                function: dict[str, object] = given.get("function") or given
                name = function.get("name")
                if type(name) is str:
                    self.found.tools.add(name)

    def _members(self, obj: object, depth: int, names: frozenset[str]) -> None:
        """Of an object only what the code around it names: a method, and the attributes that the method names."""
        own = _own(obj)
        kind: type[Any] = type(obj)
        if depth > _DEEPEST:
            self.hints.add("too deep")
            return
        if "getattr" in names:
            self.hints.add("getattr")
        for name in sorted(names):
            if name in own:
                self.look(own[name], depth + 1, name, names)
            elif (method := _static(kind, name)) is not None:
                key = hash((id(obj), name))
                if key in self._seen or (_library(kind.__module__) and name == "__call__"):
                    continue
                self._seen.add(key)
                if isinstance(method, types.MemberDescriptorType):  # one of its __slots__
                    with contextlib.suppress(AttributeError):
                        self.look(method.__get__(obj), depth + 1, name, names)
                    continue
                if isinstance(method, property):
                    method = method.fget
                if isinstance(method, staticmethod | classmethod):
                    method = cast("Any", method).__func__
                if isinstance(method, types.FunctionType) and not _library(method.__module__):
                    self.look(method, depth + 1)
                    self._members(obj, depth + 1, _names(method))
            elif not _library(kind.__module__) and (_static(kind, "__getattr__") or _static(kind, "__getattribute__")):
                self.hints.add("getattr")  # a proxy: what stands behind it shows when it runs


@dataclass(frozen=True, slots=True)
class _Code:
    """What a function's code names, functions inside it included."""

    names: frozenset[str]
    #: Global names in the order in which they are loaded.
    globals: tuple[str, ...]
    #: Modules that it imports when it runs.
    imports: tuple[str, ...]
    #: Its texts, and those that may be prompts.
    texts: frozenset[str]
    prompts: tuple[str, ...]
    #: ``system`` where a message with that role is written out.
    roles: frozenset[str]


@functools.lru_cache(maxsize=4_096)
def _code(code: types.CodeType) -> _Code:
    codes = [code]
    for one in codes:
        codes += [c for c in one.co_consts if isinstance(c, types.CodeType)]
    loaded = dict.fromkeys(name for one in codes for name in _loaded(one))
    texts = [c for one in codes for c in _texts(one.co_consts[1:] if _has_doc(one) else one.co_consts)]
    return _Code(
        names=frozenset(name for one in codes for name in one.co_names),
        globals=tuple(loaded),
        imports=tuple(dict.fromkeys(name for one in codes for name in _loaded(one, _IMPORT_NAME, flags=0) if name)),
        texts=frozenset(texts),
        prompts=tuple(t for t in texts if len(t) > 11 and " " in t),
        roles=frozenset({"SystemMessage", "invoke", "ainvoke", "stream", "astream"} if "system" in texts else ()),
    )


def _loaded(code: types.CodeType, wanted: int = dis.opmap["LOAD_GLOBAL"], *, flags: int = 1) -> Iterator[str]:
    """The global names that a code loads. Not `dis.get_instructions`: it takes as long as all the rest together.

    From Python 3.11 on an instruction is two bytes, and the lowest bit of LOAD_GLOBAL's argument is a flag.
    """
    argument, operation = code.co_code[1::2], code.co_code[::2]
    at = operation.find(wanted)
    while at >= 0:
        index = argument[at]
        if at and operation[at - 1] == _EXTENDED_ARG:
            index |= argument[at - 1] << 8
        if index >> flags < len(code.co_names):
            yield code.co_names[index >> flags]
        at = operation.find(wanted, at + 1)


def _has_doc(code: types.CodeType) -> bool:
    """Whether the first constant is (taken for) the docstring."""
    return bool(code.co_consts) and type(code.co_consts[0]) is str and code.co_name != "<lambda>"


def _texts(constants: Iterable[object]) -> Iterable[str]:
    for constant in constants:
        if type(constant) is str:
            yield constant
        elif type(constant) is tuple:
            yield from _texts(cast("tuple[object, ...]", constant))


def _names(function: object) -> frozenset[str]:
    code = getattr(function, "__code__", None) if isinstance(function, types.FunctionType | types.MethodType) else None
    return _code(code).names if isinstance(code, types.CodeType) else frozenset()


def _own(obj: object) -> Mapping[str, Any]:
    """An object's own attributes, without asking the object."""
    try:
        found = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return {}
    private: Any = None
    if hasattr(type(obj), "__pydantic_private__"):
        private = object.__getattribute__(obj, "__pydantic_private__")
    return {**found, **private} if private else cast("Mapping[str, Any]", found)


def _attributes(kind: type[Any]) -> frozenset[str]:
    return frozenset(name for base in kind.__mro__ for name in vars(base))


def _static(kind: type[Any], name: str) -> Any:
    for base in kind.__mro__[:-1]:
        if name in vars(base):
            return vars(base)[name]
    return None


def _method(obj: object, name: str) -> types.FunctionType | None:
    found = _static(type(obj), name)
    return found if inspect.isfunction(found) and not _library(found.__module__) else None


def _top(kind: type[Any]) -> str:
    return str(kind.__module__).split(".")[0]


def _library(module: str | None) -> bool:
    top = (module or "").split(".")[0]
    return top in _LIBRARIES or top.startswith(("langchain_", "langgraph_"))


def _cell(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
