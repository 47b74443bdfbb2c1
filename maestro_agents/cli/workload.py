"""`maestro workload`: a workload composed of recorded sessions and written to a file, or what is in one."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError
from maestro_agents.simulator.compose import (
    FAN,
    JOINED,
    MAX_MODEL_TOKENS,
    MIXES,
    MULTIPLES,
    Burst,
    compose,
    read_arrivals,
)
from maestro_agents.simulator.sessions import Foresight, Session, sessions
from maestro_agents.simulator.workload import Workload, kind_of, read, sample, work_s, write

SAMPLE: Final = "sample"
"""Stands for the workload that comes with the package."""

POISSON: Final = "poisson"
_MULTIPLES: Final = f"{MULTIPLES[ServiceClass.INTERACTIVE]:g},{MULTIPLES[ServiceClass.BATCH]:g}"


def run(
    trace: Annotated[
        Path,
        typer.Argument(
            help="Recorded calls: a CSV of sessions, or JSON lines. A workload, or `sample`: only described."
        ),
    ],
    mix: Annotated[str, typer.Option("--mix", help=f"Which apps, for whom: {', '.join(MIXES)}.")] = "everything",
    rate: Annotated[float, typer.Option("--rate", help="Runs a second, the mean of the window.")] = 1.0,
    arrivals: Annotated[
        str, typer.Option("--arrivals", help=f"`{POISSON}`, or a CSV file with a column t_s: its rhythm, at your rate.")
    ] = POISSON,
    burst: Annotated[
        list[str] | None,
        typer.Option("--burst", help="AT:FOR:FACTOR, say 1800:600:2: ten minutes at twice the mean. Repeat for more."),
    ] = None,
    window: Annotated[float, typer.Option("--window", help="Seconds in which runs arrive.")] = 3600.0,
    warmup: Annotated[
        float | None, typer.Option("--warmup", help="Seconds at its start that are not counted. Default: a sixth.")
    ] = None,
    horizon: Annotated[
        float | None, typer.Option("--horizon", help="Seconds until play stops. Default: window + longest deadline.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="0 to 99 draw from one half of the tasks, 100 and more from the other.")
    ] = 0,
    models: Annotated[
        str, typer.Option("--models", help="Names between commas, the most popular first; each role gets one.")
    ] = "small",
    max_model_tokens: Annotated[
        int, typer.Option("--max-model-tokens", min=1, help="Sessions with a longer prompt and answer are left out.")
    ] = MAX_MODEL_TOKENS,
    deadlines: Annotated[
        str, typer.Option("--deadlines", help="INTERACTIVE,BATCH: in median unloaded times of the run's app.")
    ] = _MULTIPLES,
    foreseen: Annotated[
        Path | None,
        typer.Option("--foreseen", help="Predictions of the trace's calls: what `maestro simulate --foreseen` wrote."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the workload here (.gz: gzipped).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON on stdout.")] = False,
) -> None:
    """Compose a workload of recorded sessions. Example: maestro workload sessions.csv.gz --mix coding --rate 1.5 -o w.jsonl.gz

    A workload is a file: every arrival, stage, tool gap and deadline is fixed in it, so that all policies play the same. What is
    not in the trace is filled in and said (`source`): gaps of untimed calls, fan-outs.
    """
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}")
    recorded: list[Session] = []
    if str(trace) == SAMPLE and not trace.exists():
        made = sample()
    elif kind_of(trace) == "workload":
        made = read(trace)
    else:
        if mix not in MIXES:
            raise ConfigError(f"--mix {mix!r}: take one of {', '.join(MIXES)}")
        recorded = sessions(trace)
        made = compose(
            recorded,
            mix=MIXES[mix],
            rate_per_s=rate,
            seed=seed,
            name=mix,
            trace=trace.name,
            arrivals=None if arrivals == POISSON else read_arrivals(Path(arrivals)),
            bursts=[_burst(b) for b in burst or ()],
            window_s=window,
            warmup_s=warmup,
            horizon_s=horizon,
            models=[m.strip() for m in models.split(",") if m.strip()],
            max_model_tokens=max_model_tokens,
            multiples=_multiples(deadlines),
            foreseen=_foreseen(foreseen, recorded) if foreseen else None,
        )
    if out is not None:
        if not recorded:
            raise ConfigError(f"{trace} is a workload already: --out composes one of a trace")
        write(made, out)
    found = summary(made, recorded)
    if as_json:
        print(json.dumps(found | {"file": None if out is None else str(out)}))
    else:
        _show(found, out)


def summary(workload: Workload, recorded: Sequence[Session] = ()) -> dict[str, Any]:
    """What is in a workload, as JSON values; with its sessions also how many of their tool gaps were drawn, not measured."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    deadline_s: dict[tuple[str, str], float] = {}
    uses: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    work: defaultdict[str, float] = defaultdict(float)
    for each in workload.runs:
        key = (each.app, each.service_class.value)
        rows[key].update(
            runs=1,
            stages=len(each.stages),
            prompt_tokens=sum(s.prompt_tokens for s in each.stages),
            shared_tokens=sum(s.shared_tokens for s in each.stages),
            output_tokens=sum(s.output_tokens for s in each.stages),
        )
        deadline_s[key] = each.deadline_s
        uses[key].update(each.session.split(JOINED))
        for stage in each.stages:
            work[stage.model] += work_s([stage])
    gaps: dict[str, list[bool]] = defaultdict(list)
    for session in recorded:
        gaps[session.app] += [not call.timed for call in session.calls if call.after]
    apps = [
        {
            "app": app,
            "class": service_class,
            **rows[app, service_class],
            "deadline_s": deadline_s[app, service_class],
            "sessions": len(uses[app, service_class]),
            "most_uses": max(uses[app, service_class].values()),
            "drawn_gaps": _share(gaps.get(app.removeprefix(FAN))),
        }
        for app, service_class in sorted(rows)
    ]
    total = sum(rows.values(), Counter[str]())
    seconds = sum(work.values())
    return {
        "name": workload.name,
        "source": workload.source,
        "warmup_s": workload.warmup_s,
        "window_s": workload.window_s,
        "horizon_s": workload.horizon_s,
        "rate_per_s": len(workload.runs) / workload.window_s,
        **{name: total[name] for name in ("runs", "stages", "prompt_tokens", "shared_tokens", "output_tokens")},
        "foreseen": sum(s.foreseen is not None for r in workload.runs for s in r.stages) / max(total["stages"], 1),
        "work_s": seconds,
        "models": {name: s / seconds for name, s in sorted(work.items(), key=lambda kv: -kv[1])},
        "tenants": dict(sorted(Counter(r.tenant for r in workload.runs).items())),
        "apps": apps,
    }


def _foreseen(path: Path, recorded: Sequence[Session]) -> Foresight:
    from maestro_agents.simulator.foresight import read_foreseen  # numpy comes with it

    return read_foreseen(path, recorded)


def _burst(text: str) -> Burst:
    try:
        at_s, for_s, factor = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"--burst {text!r}: give AT:FOR:FACTOR, say 1800:600:2") from None
    return Burst(at_s=at_s, for_s=for_s, factor=factor)


def _multiples(text: str) -> dict[ServiceClass, float]:
    try:
        person, nobody = (float(part) for part in text.split(","))
    except ValueError:
        person = nobody = 0.0
    if not (0 < person < 1e6 and 0 < nobody < 1e6):
        raise ConfigError(f"--deadlines {text!r}: give INTERACTIVE,BATCH, say {_MULTIPLES}")
    return {ServiceClass.INTERACTIVE: person, ServiceClass.BATCH: nobody}


def _share(held: Sequence[bool] | None) -> float | None:
    return sum(held) / len(held) if held else None


def _show(found: dict[str, Any], out: Path | None) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 130)
    table = Table(box=SIMPLE_HEAD, title=f"{found['name']}: {found['runs']:,} runs in {found['window_s']:,.0f} s")
    for name in ("app", "class"):
        table.add_column(name, no_wrap=True)
    for name in (
        "runs",
        "stages",
        "prompt tokens",
        "shared",
        "output",
        "deadline s",
        "sessions",
        "most uses",
        "drawn gaps",
    ):
        table.add_column(name, justify="right")
    for row in found["apps"]:
        shared, drawn = row["shared_tokens"] / row["prompt_tokens"], row["drawn_gaps"]
        table.add_row(
            row["app"],
            row["class"],
            *(f"{row[name]:,}" for name in ("runs", "stages", "prompt_tokens")),
            f"{shared:.0%}",
            f"{row['output_tokens']:,}",
            f"{row['deadline_s']:,.1f}",
            *(f"{row[name]:,}" for name in ("sessions", "most_uses")),
            "" if drawn is None else f"{drawn:.0%}",
        )
    console.print(table)
    for line in (
        f"{found['stages']:,} stages, {found['prompt_tokens']:,} tokens read, {found['output_tokens']:,} written",
        f"{found['rate_per_s']:.3f} runs/s; warm-up {found['warmup_s']:g} s, play stops at {found['horizon_s']:g} s",
        "work by model: " + ", ".join(f"{name} {share:.0%}" for name, share in found["models"].items()),
        "runs by tenant: " + ", ".join(f"{name} {n:,}" for name, n in found["tenants"].items()),
        f"predictions: of {found['foreseen']:.0%} of the stages",
        f"source: {found['source']}",
        *([] if out is None else [f"written to {out}"]),
    ):
        console.print(line, markup=False)
