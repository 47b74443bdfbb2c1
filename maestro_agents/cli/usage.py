"""`maestro usage`: what tenants used, by day, for chargeback. Only looks."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from maestro_agents.chargeback import COUNTERS, read
from maestro_agents.cli.monitor import AsJson, Pool, RedisUrl, with_queue
from maestro_agents.errors import ConfigError
from maestro_agents.ports import USAGE_DAYS, Queue

SHOWN_DAYS: Final = 30
KEYS: Final = ("day", "tenant", "model", "class")

Row = Mapping[str, str | int | float]


def run(
    since: Annotated[str, typer.Option("--since", metavar="DAY", help="First day (UTC). Default: 30 days ago.")] = "",
    until: Annotated[str, typer.Option("--until", metavar="DAY", help="Last day (UTC). Default: today.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="This tenant alone.")] = "",
    redis_url: RedisUrl = None,
    pool: Pool = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV, a line per day, tenant, model and class.")] = False,
) -> None:
    """What tenants used: calls, tokens and GPU seconds, by model and service class. Kept for 400 days.

    maestro usage --since 2026-11-01 --tenant acme --csv > acme.csv
    """
    today = datetime.now(UTC).date()
    last = _date(until, "--until") if until else today
    first = _date(since, "--since") if since else last - timedelta(days=SHOWN_DAYS - 1)
    if first > last:
        raise ConfigError(f"--since {first} is after --until {last}")
    first = max(first, today - timedelta(days=USAGE_DAYS))

    async def look(queue: Queue, _: Callable[[], float], __: str) -> None:
        days = [(first + timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]
        rows = [row for day in days for row in rows_of(day, await queue.usage(day)) if tenant in ("", row["tenant"])]
        if as_csv:
            out = csv.DictWriter(sys.stdout, [*KEYS, *_COLUMNS], lineterminator="\n")
            out.writeheader()
            out.writerows(rows)
        elif as_json:
            print(json.dumps(rows))
        elif rows:
            Console().print(_table(rows))
        else:
            print(f"No usage was counted from {first} to {last}.")

    with_queue(redis_url, pool, look)


_COLUMNS: Final = (*COUNTERS[:-1], "gpu_s")


def rows_of(day: str, counters: Mapping[str, int]) -> list[Row]:
    """The counters of a day as lines: who, what, and how much of it."""
    return [
        {
            **dict(zip(KEYS, (day, *who), strict=True)),
            **{name: n for name, n in used.items() if name != "gpu_ms"},
            "gpu_s": used["gpu_ms"] / 1000,
        }
        for who, used in sorted(read(counters).items())
    ]


def _table(rows: list[Row]) -> Table:
    """All days added up, the largest tenant first."""
    sums: dict[tuple[str, str, str], Counter[str]] = {}
    for row in rows:
        who = (str(row["tenant"]), str(row["model"]), str(row["class"]))
        sums.setdefault(who, Counter()).update({name: float(row[name]) for name in _COLUMNS})  # pyright: ignore[reportArgumentType]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in KEYS[1:]:
        table.add_column(name)
    for name in ("calls", *_COLUMNS[1:]):
        table.add_column(name.removesuffix("_tokens").replace("gpu_s", "GPU s"), justify="right", no_wrap=True)
    weight: Counter[str] = Counter()
    for (tenant, _, _), used in sums.items():
        weight[tenant] += used["gpu_s"]
    for who, used in sorted(sums.items(), key=lambda item: (-weight[item[0][0]], item[0])):
        table.add_row(*who, *(f"{used[name]:,.0f}" for name in _COLUMNS[:-1]), f"{used['gpu_s']:,.1f}")
    return table


def _date(text: str, option: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r}: a day looks like 2026-11-01") from None
