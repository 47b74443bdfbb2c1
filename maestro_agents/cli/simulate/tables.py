"""The table, the picture and the JSON of `maestro simulate`: means over seeds with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import special

from maestro_agents.cli.simulate.plays import Play, Played

CONFIDENCE: Final = 0.95
WIDTH: Final = 180
"""Columns that the whole table takes."""

_TIB: Final = 2**40


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the mean lies with 95 % confidence, by Student's t; None of less than two values."""
    if len(values) < 2:
        return None
    half = float(special.stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2))
    half *= statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    return middle - half, middle + half


def rows(done: Mapping[Play, Played]) -> list[dict[str, Any]]:
    """A row for each policy and load: the mean of each figure over the seeds, and its interval (``FIGURE_ci``).

    ``slo_above``: by how much its SLO attainment is above each other policy's at the same load, seed by seed.
    """
    of: dict[tuple[str, float, float], list[tuple[Play, Played]]] = {}
    for play, result in done.items():
        of.setdefault((play.policy, play.load, play.burst), []).append((play, result))
    return [
        _row(policy, load, burst, each)
        | {
            "slo_above": {
                other: _difference(each, pairs)
                for (other, at, to), pairs in of.items()
                if other != policy and (at, to) == (load, burst)
            }
        }
        for (policy, load, burst), each in of.items()
    ]


def _row(policy: str, load: float, burst: float, each: Sequence[tuple[Play, Played]]) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": policy, "load": load, "burst": burst or None, "seeds": len(each)}
    results = [result for _, result in each]
    own = [_all_figures(result) for result in results]
    for name in own[0]:
        values = [figures[name] for figures in own if not math.isnan(figures[name])]
        row[name] = statistics.fmean(values) if values else None
        row[f"{name}_ci"] = interval(values)
    names = dict.fromkeys(name for result in results for name in result.tenants)
    row["tenants"] = {
        name: {
            figure: statistics.fmean(result.tenants[name][figure] for result in results if name in result.tenants)
            for figure in ("runs", "slo", "p95_s")
        }
        for name in names
    }
    row["by_seed"] = [
        {"seed": play.seed, **{k: None if math.isnan(v) else v for k, v in figures.items()}}
        for (play, _), figures in zip(each, own, strict=True)
    ]
    return row


def _all_figures(result: Played) -> dict[str, float]:
    figures = dict(result.figures)
    return figures | {
        "warmup_s": result.warmup_s,
        "window_s": result.window_s,
        "horizon_s": result.horizon_s,
        "wall_s": result.wall_s,
        "decisions_per_s": figures["grants"] / result.wall_s,
        "stages_per_wall_minute": 60 * figures["stages"] / result.wall_s,
    }


def _difference(each: Sequence[tuple[Play, Played]], others: Sequence[tuple[Play, Played]]) -> dict[str, Any]:
    theirs = {play.seed: result.figures["slo"] for play, result in others}
    by = [result.figures["slo"] - theirs[play.seed] for play, result in each if play.seed in theirs]
    by = [value for value in by if not math.isnan(value)]
    return {"mean": statistics.fmean(by) if by else None, "ci": interval(by)}


def state(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Horizon and slack: what figures of an overload stand and fall with."""

    def span(name: str) -> list[float] | None:
        values = [row[name] for row in found if row[name] is not None]
        return [min(values), max(values)] if values else None

    return {name: span(name) for name in ("warmup_s", "window_s", "horizon_s", "slack_interactive", "slack_batch")}


# -- the table -----------------------------------------------------------------------------------------------------------
HEAD: Final = (
    "policy", "load", "SLO %", "inter-\nactive", "batch", "run s\np50/95/99", "slow-\ndown", "delay s\nmean/p95/p99", "longest\ns",
    "KV TiB s\nused/reserved", "cold/wake/\npreempt", "Jain", "stages\n/s", "tokens\n/s", "batch\nMtok", "dec/s",
)  # fmt: skip
_CUT: Final = 8
"""Where the table is cut in two on a screen that is too narrow for it."""


def show(found: Mapping[str, Any]) -> None:
    """One table, and below it what it stands on."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    whole = range(2, len(HEAD))
    for columns in (whole,) if console.width >= WIDTH else (whole[: _CUT - 2], whole[_CUT - 2 :]):
        console.print(_table(found, columns))
    for line in notes(found):
        console.print(line, markup=False)


def _table(found: Mapping[str, Any], columns: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=f"{found['workload']['name']} on {found['fleet']['name']}: {found['label']}")
    for name in (*HEAD[:2], *(HEAD[n] for n in columns)):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    last = None
    for row in sorted(found["rows"], key=lambda r: (r["burst"] or 0.0, r["load"])):
        if last not in {None, (row["load"], row["burst"])}:
            table.add_section()
        last = row["load"], row["burst"]
        shown = cells(row)
        table.add_row(*shown[:2], *(shown[n] for n in columns))
    return table


def cells(row: Mapping[str, Any]) -> list[str]:
    """What the table shows of a row, by `HEAD`."""
    return [
        row["policy"],
        f"{row['load']:g}" + (f" to {row['burst']:g}" if row["burst"] else ""),
        *(_share(row, name) for name in ("slo", "slo_interactive", "slo_batch")),
        _several(row, "completion_{}_s", ("p50", "p95", "p99"), ".0f"),
        _number(row["slowdown_mean"], ".2f"),
        _several(row, "delay_interactive_{}_s", ("mean", "p95", "p99"), ".1f"),
        _number(row["longest_wait_s"], ".0f"),
        f"{row['kv_used_byte_s'] / _TIB:.3g}/{row['kv_reserved_byte_s'] / _TIB:.3g}",
        "/".join(f"{row[name]:.0f}" for name in ("cold_starts", "wakes", "preemptions")),
        _number(row["jain"], ".3f"),
        _number(row["stages_per_s"], ".1f"),
        f"{row['output_tokens_per_s']:,.0f}",
        f"{row['batch_tokens_in_window'] / 1e6:.3f}",
        f"{row['decisions_per_s']:,.0f}",
    ]


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the figures stand on, in lines."""
    told, label = found["state"], found["label"]
    speed, seeds = found["saturated_work_s_per_s"], found["seeds"]
    models = ", ".join(f"{n} x {m}" for m, n in found["fleet"]["models"].items())
    slack = [_span(told[f"slack_{name}"], ".1f") for name in ("interactive", "batch")]
    return [
        f"Everything here is {label}. Seeds: {seeds}; +- is 95 % of the mean, by Student's t.",
        f"Load 1: what the fleet does when saturated under FCFS (by run), {speed:.3g} s of the reference's work a second.",
        f"Horizon: runs arrive in {_span(told['window_s'])} s; those of the first {_span(told['warmup_s'])} s are not counted.",
        f"Play stops at {_span(told['horizon_s'])} s; what has not ended then has missed its deadline.",
        f"Slack: deadlines are {slack[0]} (interactive) and {slack[1]} (batch) times what a run, the median, takes alone here.",
        "run: from arrival to end; delay: from ready to grant, of interactive stages; longest: the wait of any stage.",
        "Jain: of the tenants' SLO attainments; dec/s: grants a second of this computer's time.",
        f"Workload: {found['workload']['source']}",
        f"Fleet: {found['fleet']['engines']} engines ({models}) on {found['fleet']['gpus']} GPUs",
    ]


def _span(values: Sequence[float] | None, form: str = ",.0f") -> str:
    if not values:
        return "-"
    low, high = (format(v, form) for v in values)
    return low if low == high else f"{low} to {high}"


def _share(row: Mapping[str, Any], name: str) -> str:
    value, ci = row[name], row[f"{name}_ci"]
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" +-{50 * (ci[1] - ci[0]):.1f}" if ci else "")


def _several(row: Mapping[str, Any], name: str, parts: Sequence[str], form: str) -> str:
    return "/".join(_number(row[name.format(part)], form) for part in parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# -- the picture ---------------------------------------------------------------------------------------------------------
def draw(path: Path, found: Mapping[str, Any]) -> None:
    """SLO attainment against load, a line per policy with its interval; bursts as points. The file's kind is by its name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5), sharey=True, layout="constrained")
    policies = list(dict.fromkeys(row["policy"] for row in found["rows"]))
    for axis, name in zip(axes, ("slo", "slo_interactive", "slo_batch"), strict=True):
        for color, policy in enumerate(policies):
            own = [row for row in found["rows"] if row["policy"] == policy and row[name] is not None]
            steady = sorted((row for row in own if not row["burst"]), key=lambda row: row["load"])
            loads = [row["load"] for row in steady]
            axis.plot(loads, [row[name] for row in steady], "-o", color=f"C{color}", markersize=3, label=policy)
            if all(row[f"{name}_ci"] for row in steady):
                ends = zip(*(row[f"{name}_ci"] for row in steady), strict=True)
                axis.fill_between(loads, *ends, color=f"C{color}", alpha=0.15, linewidth=0)
            for row in own:
                if row["burst"]:
                    ci = row[f"{name}_ci"] or (row[name], row[name])
                    off = 0.004 * (color - (len(policies) - 1) / 2)
                    spread = [[row[name] - ci[0]], [ci[1] - row[name]]]
                    axis.errorbar([row["load"] + off], [row[name]], spread, fmt="*", color=f"C{color}", capsize=2)
        axis.set(title={"slo": "all runs"}.get(name, name.removeprefix("slo_")), xlabel="load", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("SLO attainment")
    axes[0].legend(fontsize=8)
    burst = " (*: with bursts)" if any(row["burst"] for row in found["rows"]) else ""
    figure.suptitle(
        f"{found['workload']['name']} on {found['fleet']['name']}, {found['seeds']} seeds, {found['label']}{burst}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
