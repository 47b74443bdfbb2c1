"""`maestro graph`: what Maestro knows of a program's graph before it runs, and what runs added to it.

The user's file is imported, as any server would, and the graph is looked at: nothing is run, nothing is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from maestro_agents.cli.monitor import Pool
from maestro_agents.core import RunEnd
from maestro_agents.errors import ConfigError, WireError
from maestro_agents.settings import Settings
from maestro_agents.workflow import Seen

PROMPT_CHARS: Final = 60
SHOWN_TOOLS: Final = 4
WIDTH: Final = 140
"""Columns of a page that is no terminal."""

LOG_PAGE: Final = 500
_DUMMY_KEY: Final = "maestro-graph-calls-nothing"
_BUILDERS: Final = ("build", "make", "create", "get", "graph", "app", "compile")

Target = Annotated[
    str, typer.Argument(help="`app.py:graph`, `package.module:build`, or a folder with langgraph.json (`folder:name`).")
]


def run(
    target: Target,
    observed: Annotated[
        list[Path] | None, typer.Option("--observed", help="Merge what runs showed: a file that MAESTRO_EVENTS wrote.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Merge what runs showed: a pool's observation log.")
    ] = None,
    pool: Pool = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="A Mermaid flowchart on stdout.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as JSON on stdout, whole prompts included.")
    ] = False,
) -> None:
    """Show a program's graph: nodes, which call an LLM and as whom, tools, prompts, edges, loops. Nothing is run.

    The file is imported, so what it does at import happens. Named may be a compiled graph, a StateGraph, or a function
    without required arguments that returns one. `yes`: the node's code reaches a model and calls it. `maybe`: it may;
    runs tell. Prompts stay on this screen.
    """
    if mermaid and as_json:
        raise ConfigError("--mermaid or --json: which of the two?")
    from maestro_langgraph.graph.view import view

    graph, notes = load(target)
    fingerprint = str(view(graph, Seen())["fingerprint"])
    seen = Seen()
    for path in observed or ():
        _read_events(path, fingerprint, seen)
    settings = Settings.load(redis_url=redis_url, pool=pool) if redis_url else None
    if settings is not None and settings.redis_url is not None:
        asyncio.run(_read_log(settings.redis_url, settings.pool, fingerprint, seen))
    found = view(graph, seen)
    if (observed or redis_url) and not seen.runs:
        notes.append(f"no run of this graph (fingerprint {fingerprint}) was found there: was it changed since?")
    if as_json:
        print(json.dumps({**found, "notes": notes}))
    elif mermaid:
        print(to_mermaid(found))
    else:
        _print(found, Console(width=None if sys.stdout.isatty() else WIDTH))
    for note in notes if not as_json else ():
        print(f"maestro: {note}", file=sys.stderr)


# -- loading ---------------------------------------------------------------------------------------------------------------
def load(target: str) -> tuple[Any, list[str]]:
    """Import a target and return its compiled graph, and notes for the user. Raises `ConfigError` in one line."""
    place, attribute = _split(target)
    notes: list[str] = []
    path = Path(place)
    if (path / "langgraph.json").is_file() or path.name == "langgraph.json":
        place, attribute = _listed(path if path.is_file() else path / "langgraph.json", attribute)
        path = Path(place)
    if not os.environ.get("OPENAI_API_KEY"):
        os.environ["OPENAI_API_KEY"] = _DUMMY_KEY
        notes.append("OPENAI_API_KEY is not set: a dummy stands in for it, nothing is called")
    os.environ.setdefault("LANGSMITH_TRACING", "false")
    with contextlib.redirect_stdout(sys.stderr), _told(target):
        if path.is_dir():
            raise ConfigError(f"{place} is a folder without langgraph.json: name a file, `{place}/app.py:graph`")
        is_file = path.suffix == ".py" or path.is_file()
        if is_file and not path.is_file():
            raise ConfigError(
                f"there is no file {place}: name one that is there, `app.py:graph`, or `package.module:graph`"
            )
        module = _import_file(path) if is_file else _import_module(place)
        name, value = _pick(module, place, attribute)
        return _graph_of(value, f"{place}:{name}"), notes


def _split(target: str) -> tuple[str, str]:
    place, colon, attribute = target.rpartition(":")
    if not colon or (len(place) == 1 and attribute.startswith(("\\", "/"))):  # a drive letter
        return target, ""
    return place, attribute


def _listed(file: Path, name: str) -> tuple[str, str]:
    """Which graph of a ``langgraph.json`` is meant: its place and attribute."""
    try:
        graphs = json.loads(file.read_text(encoding="utf-8"))["graphs"]
        named: dict[str, str] = {n: g if isinstance(g, str) else g["path"] for n, g in graphs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{file} names no graphs ({type(e).__name__}: {e}): it needs {{'graphs': {{'name': 'file:attr'}}}}") from e  # fmt: skip
    if not name and len(named) == 1:
        (name,) = named
    if name not in named:
        known = ", ".join(f"`maestro graph {file.parent}:{n}`" for n in named)
        raise ConfigError(f"{file} has {len(named)} graphs: {known}")
    place, attribute = _split(named[name])
    sys.path.insert(0, str(file.parent.resolve()))
    return (str(file.parent / place) if place.endswith(".py") else place), attribute


@contextlib.contextmanager
def _told(target: str) -> Generator[None]:
    """What the user's own code raises becomes one line that says where, and what to do."""
    try:
        yield
    except (ConfigError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"{target} needs the module {e.name}, which is not installed here: "
            f"`{sys.executable} -m pip install ...` it, or run maestro with the Python that runs your app"
        ) from e
    except SystemExit as e:
        raise ConfigError(
            f"{target} ends the program when it is imported (exit {e.code}): put what runs it under `if __name__ == '__main__':`"
        ) from e
    except BaseException as e:
        at = _line_of(e)
        raise ConfigError(f"{target} failed{at} with {type(e).__name__}: {e}. Make it import without running, then again") from e  # fmt: skip


def _line_of(error: BaseException) -> str:
    """Where in the user's code it happened: the last frame outside of libraries."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    trace, at = error.__traceback__, ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name != __file__ and not name.startswith("<") and "site-packages" not in name:
            at = f" at {os.path.relpath(name)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return at


def _import_file(path: Path) -> ModuleType:
    """Import a file as Python would: as part of its package where it has one, else with its folder on the path."""
    path = path.resolve()
    parts, root = [path.stem], path.parent
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    sys.path[:0] = [p for p in (str(root), os.getcwd()) if p not in sys.path]
    name = ".".join(parts)
    if len(parts) > 1:
        return importlib.import_module(name.removesuffix(".__init__"))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file: name one, `app.py:graph`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    sys.path[:0] = [p for p in (os.getcwd(),) if p not in sys.path]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and (name == e.name or name.startswith(f"{e.name}.")):
            raise ConfigError(
                f"there is no module or file {name}: name a file that is there, `app.py:graph`, or `package.module:graph`"
            ) from e
        raise


def _pick(module: ModuleType, place: str, attribute: str) -> tuple[str, Any]:
    """What a target names in its module; without a name, the one graph (or else the one builder) that is there."""
    graphs, builders = _candidates(module)
    names = [*graphs, *builders]
    listed = ", ".join(f"`maestro graph {place}:{n}`" for n in names) or "none was found"
    if not attribute:
        for kind in (graphs, builders):
            if len(kind) == 1:
                return next(iter(kind.items()))
        what = f"has {len(names)} that may be meant" if names else "defines no graph"
        raise ConfigError(f"{place} {what}: {listed if names else 'name what builds it, `app.py:build`'}")
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"{place} has no {attribute!r}. Graphs there: {listed}")
        value = getattr(value, part)
    return attribute, value


def _candidates(module: ModuleType) -> tuple[dict[str, Any], dict[str, Any]]:
    from maestro_langgraph.graph.view import compiled

    graphs: dict[str, Any] = {}
    builders: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if compiled(value) is not None:
            if not any(value is other for other in graphs.values()):
                graphs[name] = value
        elif inspect.isfunction(value) and value.__module__ == module.__name__ and not _required(value):
            says = str(inspect.signature(value).return_annotation)
            if "Graph" in says or "Pregel" in says or name.startswith(_BUILDERS):
                builders[name] = value
    final = {n: g for n, g in graphs.items() if hasattr(g, "invoke")}  # compiled ones, where there are both
    return final or graphs, builders


def _required(function: Callable[..., Any]) -> list[str]:
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
    ]


def _graph_of(value: Any, name: str) -> Any:
    from maestro_langgraph.graph.view import compiled

    graph = compiled(value)
    if graph is None and callable(value):
        required = _required(value)
        if required and required != ["config"]:
            raise ConfigError(f"{name} needs {', '.join(required)}: name a function without required arguments")
        value = asyncio.run(_built(value, [{}] if required else []))
        graph = compiled(value)
        name += "()"
    if graph is None:
        raise ConfigError(f"{name} is a {type(value).__name__}: name a compiled graph, a StateGraph or what builds one")
    return graph


async def _built(build: Callable[..., Any], arguments: list[Any]) -> Any:
    found = build(*arguments)
    if inspect.isawaitable(found):
        found = await found
    if hasattr(found, "__aenter__"):
        async with found as graph:
            return graph
    if hasattr(found, "__enter__"):
        with found as graph:
            return graph
    return found


# -- what runs showed --------------------------------------------------------------------------------------------------------
def _read_events(path: Path, fingerprint: str, seen: Seen) -> None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--observed {path}: {e}. Name the file that MAESTRO_EVENTS wrote") from e
    for line in lines:
        if '"kind":"run"' in line.replace(" ", "")[:40]:
            with contextlib.suppress(WireError):  # one bad line does not stop the reader
                run = RunEnd.decode(line)
                if run.workflow == fingerprint:
                    seen.add(run)


async def _read_log(url: str, pool: str, fingerprint: str, seen: Seen) -> None:
    from maestro_agents.queue.redis import RedisQueue

    queue = RedisQueue(url, pool=pool)
    after = ""
    try:
        while True:
            after, entries = await queue.read_log(after, LOG_PAGE)
            for entry in entries:
                if isinstance(entry, RunEnd) and entry.workflow == fingerprint:
                    seen.add(entry)
            if not entries:
                return
    finally:
        await queue.close()


# -- showing -----------------------------------------------------------------------------------------------------------------
def _print(found: Mapping[str, Any], console: Console) -> None:
    runs = f", with what {found['runs']} runs showed" if found["runs"] else ""
    name = f"{found['name']}, " if found["name"] else ""
    console.print(f"{name}fingerprint {found['fingerprint']}; longest way (*): {found['longest']} LLM nodes{runs}")
    nodes = Table("node", "kind", "LLM", "role", "model", "tools", "loop", "LLMs after", box=SIMPLE_HEAD)
    for column in ("ran", "calls") if found["runs"] else ():
        nodes.add_column(column, justify="right")
    for n in found["nodes"]:
        tools = list(n.get("tools", ()))
        more = f" and {len(tools) - SHOWN_TOOLS} more" if len(tools) > SHOWN_TOOLS else ""
        cells = [
            n["id"] + ("" if n["drawn"] else " (seen only)"), n["kind"], n["llm"], ", ".join(n.get("roles", ())),
            ", ".join(n.get("models", ())), ", ".join(tools[:SHOWN_TOOLS]) + more, "yes" if n["in_loop"] else "",
            f"{n['height']}{' *' if n['on_longest'] else ''}",
        ]  # fmt: skip
        seen = [str(n["seen"]["tasks"]), str(n["seen"]["calls"])] if found["runs"] else []
        nodes.add_row(*map(escape, cells + seen))
    console.print(nodes)
    for n in found["nodes"]:
        for prompt in n.get("prompts", ()):
            line = " ".join(prompt.split())
            short = line[:PROMPT_CHARS] + ("…" if len(line) > PROMPT_CHARS else "")
            console.print(f"prompt of {n['id']}: {short}", markup=False, highlight=False, soft_wrap=True)
    edges = Table("from", "to", "", "label", *(["seen"] if found["runs"] else []), box=SIMPLE_HEAD)
    for e in found["edges"]:
        kind = "seen only" if not e["drawn"] else "conditional" if e["conditional"] else ""
        cells = [e["from"], e["to"], kind, e["label"], *([str(e["seen"])] if found["runs"] else [])]
        edges.add_row(*map(escape, cells))
    console.print(edges)
    for loop in found["loops"]:
        console.print(f"loop: {', '.join(loop)}", markup=False, highlight=False)
    for a, b in found["fan_out"]:
        console.print(f"may begin many at a time: {a} -> {b}", markup=False, highlight=False)
    for warning in found["warnings"]:
        console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)


def to_mermaid(found: Mapping[str, Any]) -> str:
    """Return the view as a Mermaid flowchart: LLM nodes marked, edges that only runs showed dashed, with their counts."""
    ids = {n["id"]: f"n{i}" for i, n in enumerate(found["nodes"])}
    lines = ["flowchart TD"]
    for n in found["nodes"]:
        text = _text(n["id"])
        match n["kind"], n["llm"]:
            case ("start" | "end", _):
                shape = f'(["{text}"])'
            case ("tool", "no"):
                shape = f'[["{text}"]]'
            case (_, "no"):
                shape = f'["{text}"]'
            case (_, llm):
                shape = f'("{text}<br/>LLM{"" if llm == "yes" else "?"}"):::{"llm" if llm == "yes" else "maybe"}'
        lines.append(f"    {ids[n['id']]}{shape}")
    for e in found["edges"]:
        words = [e["label"] or ("?" if e["conditional"] and e["drawn"] else ""), f"{e['seen']}x" if e["seen"] else ""]
        label = _text(" ".join(w for w in words if w))
        arrow = "-->" if e["drawn"] else "-.->"
        middle = f'|"{label}"|' if label else ""
        lines.append(f"    {ids[e['from']]} {arrow}{middle} {ids[e['to']]}")
    lines += [
        "    classDef llm fill:#cfe8ff,stroke:#1f6feb",
        "    classDef maybe fill:#eef6ff,stroke:#1f6feb,stroke-dasharray:4 3",
    ]
    return "\n".join(lines)


def _text(text: str) -> str:
    """Escape what Mermaid would read as its own."""
    return text.replace("&", "#amp;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
