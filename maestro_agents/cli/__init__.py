"""The ``maestro`` command. One table names every sub-command, its module and an example.

A sub-command is a function whose signature typer turns into options (or a `typer.Typer` of its own). Its module is
imported only when it is called: ``maestro --help`` loads none of them. A `MaestroError` becomes one red line on stderr
and exit status 2; ``MAESTRO_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from maestro_agents import __version__
from maestro_agents.errors import MaestroError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sub-command."""

    name: str
    #: ``module:attribute`` below `maestro_agents.cli`.
    target: str
    summary: str
    example: str
    #: Its arguments are a command line of somebody else: from the first on nothing is read as an option of ours.
    hands_on: bool = False


COMMANDS: Final = (
    Entry(
        name="demo",
        target="demo:run",
        summary="See it work: the same runs first come first served and under Maestro, on an emulated fleet.",
        example="maestro demo --input messages.jsonl",
    ),
    Entry(
        name="sample",
        target="sample:run",
        summary="Run a sample workflow, several users at once; without a name it lists them.",
        example="maestro sample research_report",
    ),
    Entry(
        name="up",
        target="up:run",
        summary="Start Redis, the scheduler and a whole fleet from fleet.toml. Ctrl-C ends them all.",
        example="maestro up fleet.toml",
    ),
    Entry(
        name="run",
        target="run:run",
        summary="Run any command with Maestro in its Python processes. The app is not changed.",
        example="maestro run --service-class batch -- python app.py",
        hands_on=True,
    ),
    Entry(
        name="scheduler",
        target="serve:scheduler",
        summary="Run the scheduler of a pool. Start two: the second takes over when the first dies.",
        example="maestro scheduler --redis-url redis://127.0.0.1:6379/0 --fleet fleet.toml",
    ),
    Entry(
        name="gateway",
        target="gateway:gateway_app",
        summary="Serve the fleet to any OpenAI client: one URL, a key for each tenant. `keys` makes them.",
        example="maestro gateway --host 0.0.0.0 --port 8080",
    ),
    Entry(
        name="node",
        target="node:run",
        summary="Run the agent of one GPU host: engines, weights in tiers, reports. --status shows them.",
        example="maestro node --fleet serving/deploy/fleet.node-emulated.toml",
    ),
    Entry(
        name="emulate",
        target="serve:emulate",
        summary="Run an emulated vLLM server: same API and metrics, timing from a model, no GPU.",
        example="maestro emulate --port 8101 --model tiny",
    ),
    Entry(
        name="calibrate",
        target="calibrate:run",
        summary="Measure a vLLM server and write its profile for the emulator; --check compares the two.",
        example="maestro calibrate http://127.0.0.1:8000 --profile mine.toml",
    ),
    Entry(
        name="top",
        target="monitor:top",
        summary="Watch the queue: what waits, what runs, what is reserved. Only looks.",
        example="maestro top --redis-url redis://127.0.0.1:6379/0",
    ),
    Entry(
        name="queue",
        target="monitor:queue_app",
        summary="List, show or withdraw single stages.",
        example="maestro queue ls",
    ),
    Entry(
        name="usage",
        target="usage:run",
        summary="What tenants used, by day: calls, tokens, GPU seconds. For chargeback.",
        example="maestro usage --since 2026-11-01 --tenant acme",
    ),
    Entry(
        name="switch",
        target="switch:run",
        summary="The emergency brake of a pool: off, observe or on, in every app within a second.",
        example='maestro switch off --reason "answers are slow since 14:00"',
    ),
    Entry(
        name="redis",
        target="redis:redis_app",
        summary="Users for a pool's Redis, one per role; and moving a pool to another Redis.",
        example="maestro redis acl --pool prod",
    ),
    Entry(
        name="graph",
        target="graph:run",
        summary="Show a program's graph: who calls an LLM, as whom, edges, loops, and what runs showed. Runs nothing.",
        example="maestro graph app.py:graph",
    ),
    Entry(
        name="doctor",
        target="doctor:run",
        summary="Check Python, packages, settings, Redis, fleet and the OpenAI seam, and say what to do.",
        example="maestro doctor --fleet fleet.toml",
    ),
    Entry(
        name="report",
        target="report:run",
        summary="What was observed, and what Maestro would have made of it: the same runs played again.",
        example="maestro report events.jsonl --fleet fleet.toml",
    ),
    Entry(
        name="predict",
        target="predict:predict_app",
        summary="The predictor of output lengths: train it, measure it, watch it, and ask it why.",
        example="maestro predict eval calls.jsonl.gz",
    ),
    Entry(
        name="workload",
        target="workload:run",
        summary="Compose a workload for the simulator of recorded sessions, or say what is in one.",
        example="maestro workload sessions.csv.gz --mix coding --rate 1.5 -o w.jsonl.gz",
    ),
    Entry(
        name="simulate",
        target="simulate:run",
        summary="Compare policies on a virtual clock: who meets deadlines at which load.",
        example="maestro simulate w.jsonl.gz --fleet fleet.toml --policy edf --policy ours",
    ),
    Entry(
        name="bench",
        target="bench:bench_app",
        summary="Measure: overhead per call, what faults do, whether engines keep our order.",
        example="maestro bench overhead --json",
    ),
)


def build_app(load: Collection[str]) -> typer.Typer:
    """The command line, with the sub-commands of ``load`` real and the others a line of help."""
    app = typer.Typer(
        name="maestro",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        epilog="Try: maestro demo",
    )

    def root(
        version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
    ) -> None:
        """Make a fleet of vLLM servers understand LangGraph programs."""
        if version:
            print(f"maestro {__version__}")
            raise typer.Exit

    app.callback(invoke_without_command=True)(root)
    for entry in COMMANDS:
        target = _load(entry.target) if entry.name in load else _not_loaded
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=entry.name, epilog=f"Example: {entry.example}")
        else:
            app.command(
                entry.name,
                short_help=f"{entry.summary} Example: {entry.example}",
                help=None if entry.name in load else entry.summary,
                epilog=f"Example: {entry.example}",
                context_settings={"allow_interspersed_args": not entry.hands_on},
            )(target)
    return app


def main(arguments: list[str] | None = None) -> None:
    """The entry point of ``maestro``."""
    words = sys.argv[1:] if arguments is None else arguments
    named = next((word for word in words if not word.startswith("-")), "")
    completing = "_MAESTRO_COMPLETE" in os.environ
    try:
        app = build_app([entry.name for entry in COMMANDS if completing or entry.name == named])
        app(words, prog_name="maestro")
    except MaestroError as e:
        if os.environ.get("MAESTRO_DEBUG"):
            raise
        line = " ".join(str(e).split())
        typer.secho(f"maestro: {line}", fg=typer.colors.RED, err=True)
        sys.exit(2)


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def _not_loaded() -> None:
    """Stand for a sub-command that was not called."""
