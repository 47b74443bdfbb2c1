"""`maestro doctor`: look at everything that Maestro stands on, and say what to do about what is broken.

Each check returns findings and never raises; nothing is changed. Status 1 when something is broken. ``--hints`` sends calls.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from packaging.requirements import InvalidRequirement, Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maestro_agents.core import EngineSpec, Switch
from maestro_agents.errors import MaestroError, QueueUnavailable
from maestro_agents.fleet import load_fleet
from maestro_agents.queue.embedded import find_server
from maestro_agents.queue.redis import reach
from maestro_agents.redis_url import without_password
from maestro_agents.settings import Settings, unknown_env

Status = Literal["ok", "note", "broken"]

DISTRIBUTION: Final = "maestro-agents"
MIN_PYTHON: Final = (3, 11)
MIN_REDIS: Final = (6, 2)
SLOW_REDIS_S: Final = 0.005
"""A call pays for one or two round trips to Redis: beyond this the idle overhead is felt."""

_STYLE: Final = {"ok": "green", "note": "yellow", "broken": "red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. ``remedy`` is what to do, empty where all is well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    """All is well."""
    return Finding(name=name, status="ok", detail=detail)


def note(name: str, detail: str, remedy: str) -> Finding:
    """It works, but you may want to know."""
    return Finding(name=name, status="note", detail=detail, remedy=remedy)


def broken(name: str, detail: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(name=name, status="broken", detail=detail, remedy=remedy)


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> list[Finding]:
    """Is this Python new enough?"""
    shown = ".".join(map(str, version))
    if version[:2] < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return [broken("python", f"{shown} is too old", f"make a virtual environment with Python {wanted} or newer")]
    return [ok("python", f"{shown} on {platform.system()} {platform.machine()}")]


def check_packages(requirements: Iterable[str] | None = None) -> list[Finding]:
    """Is every package that Maestro needs here, in a version that it was tested with?"""
    if requirements is None:
        try:
            requirements = metadata.requires(DISTRIBUTION) or []
        except metadata.PackageNotFoundError:
            return [note("packages", "running from sources that are not installed", "python3 -m pip install -e .")]
    findings: list[Finding] = []
    fine = 0
    for text in requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement as e:
            findings.append(
                broken("packages", f"cannot read the requirement {text!r}: {e}", "reinstall maestro-agents")
            )
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            findings.append(
                broken(wanted.name, "is not installed", f"python3 -m pip install '{wanted.name}{wanted.specifier}'")
            )
            continue
        if wanted.specifier.contains(version, prereleases=True):
            fine += 1
        else:
            findings.append(
                broken(
                    wanted.name,
                    f"{version} is not supported: {wanted.specifier} is",
                    f"python3 -m pip install '{wanted.name}{wanted.specifier}'",
                )
            )
    return findings or [ok("packages", f"{fine} packages in supported versions")]


def check_settings(**overrides: str | None) -> tuple[Settings | None, list[Finding]]:
    """Can the settings be read, and does every ``MAESTRO_*`` variable mean something? ``overrides`` win over them."""
    findings = [
        note(
            "settings",
            f"{name} is set, but nothing reads it",
            "look for a spelling mistake: `maestro doctor --settings` lists all",
        )
        for name in unknown_env()
    ]
    try:
        settings = Settings.load(**overrides)
        origins = Settings.origins()
    except MaestroError as e:
        return None, [*findings, broken("settings", str(e), "correct or remove it")]
    shown = ", ".join(f"{name} from {origin}" for name, origin in origins.items()) or "all at their defaults"
    return settings, [*findings, ok("settings", shown)]


def check_redis(url: str | None) -> list[Finding]:
    """Does Redis answer, is it new enough, is it near? Without a URL: what would serve instead?"""
    if not url:
        found = find_server()
        if found is None:
            return [
                note(
                    "redis",
                    "MAESTRO_REDIS_URL is not set and no redis-server is here: calls of one process are ordered, no more",
                    "set MAESTRO_REDIS_URL to join apps; install redis-server to use `maestro up` and `maestro demo`",
                )
            ]
        return [
            ok(
                "redis",
                f"MAESTRO_REDIS_URL is not set: each app orders its own calls. `maestro up` would start {found[0]} ({found[1]})",
            )
        ]
    try:
        info = reach(url)
    except QueueUnavailable as e:
        return [broken("redis", str(e), "start it (`maestro up` brings one along), or correct MAESTRO_REDIS_URL")]
    role = f" ({info.role})" if info.role else ""
    detail = f"{info.version}{role} at {without_password(url)}, PING {info.latency_s * 1e3:.2f} ms"
    version = tuple(int(part) for part in info.version.split(".")[:2] if part.isdigit())
    if version < MIN_REDIS:
        wanted = ".".join(map(str, MIN_REDIS))
        return [broken("redis", f"{detail}: too old", f"Redis {wanted} or newer is needed")]
    if info.evicts != "noeviction":
        return [
            note(
                "redis",
                f"{detail}; maxmemory-policy {info.evicts}: it may throw tickets away",
                "set maxmemory-policy noeviction (docs/redis.md)",
            )
        ]
    if info.latency_s > SLOW_REDIS_S:
        return [note("redis", detail, "every call waits for one or two of these: bring Redis nearer to the apps")]
    return [ok("redis", detail)]


def check_fleet(fleet: Path | None, settings: Settings) -> tuple[Sequence[EngineSpec], list[Finding]]:
    """Which engines are there: by the fleet file, else by what a scheduler published in Redis?"""
    path = fleet or settings.fleet
    try:
        if path:
            engines = load_fleet(path).engines
            return [e for e in engines if e.url], [
                ok("fleet", f"{path}: {_count(engines)}"),
                *(
                    note(f"engine {e.engine_id}", "not launched yet", f"maestro up {path}")
                    for e in engines
                    if not e.url
                ),
            ]
        if settings.redis_url:
            engines = asyncio.run(_published(settings))
            if engines:
                return engines, [
                    ok("fleet", f"{_count(engines)}, published by the scheduler of pool {settings.pool!r}")
                ]
            return [], [
                broken(
                    "fleet",
                    f"no scheduler has published a fleet for pool {settings.pool!r}",
                    "start one: `maestro up fleet.toml`, or `maestro scheduler --fleet fleet.toml`",
                )
            ]
    except QueueUnavailable:
        return [], []  # said already, by check_redis
    except MaestroError as e:
        return [], [broken("fleet", str(e), "correct the file")]
    return [], [ok("fleet", "none named: calls go to the URLs that the app's own clients use")]


def _count(engines: Sequence[EngineSpec]) -> str:
    models = ", ".join(dict.fromkeys(e.model for e in engines))
    return f"{len(engines)} engine{'s' if len(engines) != 1 else ''} serving {models}"


def check_models(models: Iterable[str], fleet: Path | None, settings: Settings) -> list[Finding]:
    """Does the fleet serve each model that an app calls by this name?"""
    try:
        path = fleet or settings.fleet
        engines = load_fleet(path).engines if path else asyncio.run(_published(settings)) if settings.redis_url else ()
    except MaestroError:
        return []  # said already, by check_redis and check_fleet
    served = dict.fromkeys(e.model for e in engines)
    findings: list[Finding] = []
    for model in models:
        name = f"model {model}"
        if model in served:
            findings.append(ok(name, f"served by {', '.join(e.engine_id for e in engines if e.model == model)}"))
        elif served:
            findings.append(
                broken(
                    name,
                    "no engine of the fleet serves it: calls for it go to the app's own URL, untouched",
                    f"call one of {', '.join(served)}, or add an engine with model = {json.dumps(model)} to fleet.toml",
                )
            )
        else:
            findings.append(note(name, "there is no fleet that could serve it", "name one: --fleet fleet.toml"))
    return findings


async def _published(settings: Settings) -> Sequence[EngineSpec]:
    from maestro_agents.queue.redis import RedisQueue

    queue = RedisQueue(settings.redis_url or "", pool=settings.pool)
    try:
        return await queue.fleet()
    finally:
        await queue.close()


def check_switch(settings: Settings) -> list[Finding]:
    """Does an operator hold the pool back?"""
    from maestro_agents.queue.redis import RedisQueue

    async def look(url: str) -> Switch:
        queue = RedisQueue(url, pool=settings.pool)
        try:
            return await queue.switch()
        finally:
            await queue.close()

    try:
        switch = asyncio.run(look(settings.redis_url)) if settings.redis_url else Switch()
    except MaestroError:
        return []  # said already, by check_redis
    if switch.at_rest:
        return []
    detail = f"pool {settings.pool!r}: {switch.mode} ({switch.told() or 'nobody said why'})"
    return [note("switch", detail, "back to normal: `maestro switch on`")]


def check_clusters(settings: Settings) -> list[Finding]:
    """Of several clusters, or of any that apps measure: what of each lives, and from where can it be reached?"""
    from maestro_agents.cli.monitor import rtt
    from maestro_agents.cli.snapshot import ClusterLine, cluster_lines
    from maestro_agents.queue.redis import RedisClock, RedisQueue

    async def look(url: str) -> Sequence[ClusterLine]:
        queue, clock = RedisQueue(url, pool=settings.pool), RedisClock()
        try:
            await clock.sync(queue)
            return cluster_lines(await queue.fleet(), await queue.ledger(), await queue.distances(), clock.now_s())
        finally:
            await queue.close()

    try:
        lines = asyncio.run(look(settings.redis_url)) if settings.redis_url else ()
    except MaestroError:
        return []  # said already, by check_redis
    findings: list[Finding] = []
    for line in lines:
        far = ", ".join(f"{rtt(rtt_s)} from {site}" for site, rtt_s in sorted(line.rtts.items()))
        detail = f"{line.engines} engine{'s' if line.engines != 1 else ''} alive, {far or 'measured from nowhere'}"
        cut_off = [site for site, rtt_s in line.rtts.items() if not math.isfinite(rtt_s)]
        if not line.engines:
            findings.append(note(f"cluster {line.cluster}", detail, "its engines are dead or asleep: `maestro top`"))
        elif cut_off:
            remedy = f"apps of {', '.join(cut_off)} are served elsewhere: look at the network between"
            findings.append(note(f"cluster {line.cluster}", detail, remedy))
        elif not line.rtts and len(lines) > 1:
            remedy = "set MAESTRO_SITE in the apps, or rtt_s in the fleet file"
            findings.append(note(f"cluster {line.cluster}", detail, remedy))
        else:
            findings.append(ok(f"cluster {line.cluster}", detail))
    return findings


def check_model() -> list[Finding]:
    """Can the model of output lengths that ships be used?"""
    try:
        from maestro_agents.predict.live import shipped_model

        card = shipped_model().card
    except (MaestroError, ImportError) as e:
        return [
            note(
                "predictor",
                f"{e}: output lengths are predicted from online statistics",
                "python3 -m pip install --force-reinstall maestro-agents",
            )
        ]
    return [ok("predictor", f"model {card.version} ({card.rows:,} calls), features of version {card.features_version}")]


def check_engines(engines: Sequence[EngineSpec]) -> list[Finding]:
    """Does each engine answer, and does it serve the model that the fleet says?"""
    return asyncio.run(_ask_engines(engines)) if engines else []


async def _ask_engines(engines: Sequence[EngineSpec]) -> list[Finding]:
    from maestro_serving.models import served_models

    async def ask(engine: EngineSpec) -> Finding:
        name = f"engine {engine.engine_id}"
        if engine.api_key_env and not os.environ.get(engine.api_key_env):
            return broken(
                name, f"its key is to be in {engine.api_key_env}, which is not set", f"export {engine.api_key_env}=…"
            )
        try:
            models = await served_models(engine)
        except MaestroError as e:
            return broken(name, str(e), "start it, or correct its url in fleet.toml")
        wanted = engine.served_model or engine.model
        if wanted not in models:
            there = ", ".join(models) or "nothing"
            return broken(
                name, f"{engine.url} serves {there}, not {wanted!r}", "correct model or served_model in fleet.toml"
            )
        return ok(name, f"{engine.url} serves {wanted}")

    return list(await asyncio.gather(*(ask(e) for e in engines)))


def check_hints(engines: Sequence[EngineSpec]) -> list[Finding]:
    """Does each engine, or the router in its place, serve first what it is told is due first? Sends calls to find out."""
    from maestro_agents.hints import DIALECTS
    from maestro_serving.urgency import NotAnsweredError, burst

    findings: list[Finding] = []
    for engine in engines:
        dialect = DIALECTS[engine.hints]
        words = ", ".join(f"{field} as {where}" for field, where in dialect.words.items()).replace("`", "")
        name, said = f"hints {engine.engine_id}", f"{engine.hints}: {words or 'nothing'}; order: {dialect.order}"
        if not dialect.words:
            findings.append(ok(name, said))
            continue
        try:
            found = asyncio.run(burst(engine))
        except NotAnsweredError as e:
            findings.append(broken(name, f"{said}. It answered {e}", "name what stands there: [[engine]] hints"))
            continue
        detail = f"{said}. {found.verdict}: of {found.late} calls due later, {found.before} were served before the urgent one"
        match found.verdict:
            case "as meant":
                findings.append(ok(name, detail))
            case "turned round":
                findings.append(broken(name, detail, "another dialect stands there: correct [[engine]] hints"))
            case "nothing waited":
                findings.append(
                    note(
                        name,
                        detail,
                        f"does it run more than slots = {engine.slots} at a time? Correct slots, or try again",
                    )
                )
            case _:
                findings.append(note(name, detail, f"it needs {dialect.needs}".replace("`", "")))
    return findings


def check_seam() -> list[Finding]:
    """Is the OpenAI SDK as the gate needs it?"""
    try:
        from maestro_langgraph.gate import self_check

        problem = self_check()
        version = metadata.version("openai")
    except ImportError as e:
        return [broken("openai seam", f"cannot be imported: {e}", "reinstall maestro-agents")]
    if problem:
        return [
            broken(
                "openai seam",
                f"openai {version} is not supported: {problem}. Calls go out unmanaged",
                "install a supported version: python3 -m pip install --force-reinstall maestro-agents",
            )
        ]
    return [ok("openai seam", f"openai {version}: calls can be ordered and routed")]


def examine(
    fleet: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    *,
    models: Sequence[str] = (),
    hints: bool = False,
    **overrides: str | None,
) -> list[Finding]:
    """All checks, in the order in which things stand on each other. ``say`` hears which is running."""
    say("Python and packages")
    findings = [*check_python(), *check_packages()]
    settings, more = check_settings(**overrides)
    findings += more
    if settings is not None:
        say("Redis")
        findings += check_redis(settings.redis_url) + check_switch(settings)
        say("engines")
        engines, more = check_fleet(fleet, settings)
        findings += more + check_engines(engines) + check_models(models, fleet, settings) + check_clusters(settings)
        if hints:
            say("what engines make of hints")
            findings += check_hints(engines)
    say("the predictor")
    findings += check_model()
    say("the OpenAI seam")
    return findings + check_seam()


def render(findings: Sequence[Finding]) -> Table:
    """Findings for a terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for f in findings:
        told = Text(f.detail)
        if f.remedy:
            told.append(f"\n→ {f.remedy}", style="bold")
        table.add_row(Text(f.status, style=_STYLE[f.status]), f.name, told)
    return table


def run(
    fleet: Annotated[Path | None, typer.Option("--fleet", help="A fleet.toml whose engines to look at.")] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Default: MAESTRO_REDIS_URL or maestro.toml.")
    ] = None,
    pool: Annotated[str | None, typer.Option("--pool", help="Default: MAESTRO_POOL, else `default`.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model that your app calls: is it served? May be repeated.")
    ] = None,
    hints: Annotated[
        bool,
        typer.Option(
            "--hints",
            help="Send each engine three times its slots in short calls: does it serve first what it is told is due first?",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    list_settings: Annotated[
        bool, typer.Option("--settings", help="List every setting and its meaning, and end.")
    ] = False,
) -> None:
    """Check Python, packages, settings, Redis, fleet and the OpenAI seam, and say what to do. Changes nothing."""
    console = Console()
    if list_settings:
        console.print(settings_table())
        return
    if as_json:
        findings = examine(fleet, models=model or (), hints=hints, redis_url=redis_url, pool=pool)
        print(json.dumps({"ok": not any_broken(findings), "checks": [asdict(f) for f in findings]}, indent=2))
    else:
        with console.status("looking") as status:
            findings = examine(
                fleet,
                lambda what: status.update(f"looking at {what}"),
                models=model or (),
                hints=hints,
                redis_url=redis_url,
                pool=pool,
            )
        console.print(render(findings))
        console.print("Something is broken." if any_broken(findings) else "All is well.")
    if any_broken(findings):
        raise typer.Exit(1)


def any_broken(findings: Iterable[Finding]) -> bool:
    """Does anything not work?"""
    return any(f.status == "broken" for f in findings)


def settings_table() -> Table:
    """Every setting, its default and its meaning."""
    table = Table("variable", "default", "meaning", box=None)
    for name, field in Settings.model_fields.items():
        table.add_row(
            f"MAESTRO_{name.upper()}", "" if field.default is None else str(field.default), field.description or ""
        )
    return table
