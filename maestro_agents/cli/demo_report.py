"""What the demo found, as numbers, a table and a picture: pure functions of the runs of two passes.

Everything is counted from `RunResult`s, which ``--events`` writes one JSON line each, so anybody can count again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from maestro_agents.cli.snapshot import percentile
from maestro_agents.core import ServiceClass

TITLES: Final[Mapping[str, str]] = {"fcfs": "First come, first served", "ours": "Maestro"}
"""How the passes are called where people read them, by their policy."""

LABEL: Final = "emulated engine"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What became of one run of one pass."""

    policy: str
    index: int
    service_class: ServiceClass
    #: Seconds since the pass began.
    arrived_s: float
    took_s: float
    deadline_s: float
    #: "" where the run answered, else what the app saw.
    error: str = ""
    #: Seconds that each of its LLM calls waited in Maestro's queue.
    waits_s: tuple[float, ...] = ()

    @property
    def done(self) -> bool:
        return not self.error

    @property
    def met(self) -> bool:
        return self.done and self.took_s <= self.deadline_s

    def with_waits(self, waits_s: Sequence[float]) -> RunResult:
        return dataclasses.replace(self, waits_s=tuple(waits_s))

    def encode(self) -> str:
        """As one line of the events file."""
        body = dataclasses.asdict(self)
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in body.items()}
        waits = [round(w, 4) for w in self.waits_s]
        return json.dumps({**rounded, "waits_s": waits, "done": self.done, "met": self.met})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSummary:
    """One pass and service class, counted. NaN where nothing was there to count."""

    runs: int
    done: int
    met: int
    completion_p50_s: float
    completion_p95_s: float
    wait_p50_s: float
    wait_p95_s: float

    def to_json(self) -> dict[str, Any]:
        body = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in body.items()}


def summarise(results: Sequence[RunResult], policy: str, service_class: ServiceClass) -> ClassSummary:
    """Count one class of one pass: completion over runs that are done, waits over all their calls."""
    mine = [r for r in results if r.policy == policy and r.service_class is service_class]
    took = [r.took_s for r in mine if r.done]
    waits = [w for r in mine for w in r.waits_s]
    return ClassSummary(
        runs=len(mine),
        done=len(took),
        met=sum(r.met for r in mine),
        completion_p50_s=percentile(took, 0.5),
        completion_p95_s=percentile(took, 0.95),
        wait_p50_s=percentile(waits, 0.5),
        wait_p95_s=percentile(waits, 0.95),
    )


def comparison(results: Sequence[RunResult]) -> dict[str, dict[str, ClassSummary]]:
    """Policy -> service class -> summary, in the order of `TITLES`."""
    return {p: {c.value: summarise(results, p, c) for c in ServiceClass} for p in TITLES}


_ROWS: Final[tuple[tuple[str, Callable[[ClassSummary], str]], ...]] = (
    ("deadlines met", lambda s: f"{s.met} of {s.runs} ({s.met / s.runs:.0%})" if s.runs else "-"),
    ("runs completed", lambda s: f"{s.done} of {s.runs}"),
    ("run completion p50", lambda s: _seconds(s.completion_p50_s)),
    ("run completion p95", lambda s: _seconds(s.completion_p95_s)),
    ("wait per call p50", lambda s: _seconds(s.wait_p50_s)),
    ("wait per call p95", lambda s: _seconds(s.wait_p95_s)),
)


def table(results: Sequence[RunResult], deadlines_s: Mapping[ServiceClass, float]) -> Table:
    """The one table at the end."""
    found = comparison(results)
    shown = Table(title=f"The same work twice ({LABEL})", title_justify="left", title_style="bold")
    shown.add_column("")
    for title in TITLES.values():
        shown.add_column(title, justify="right")
    for c in ServiceClass:
        shown.add_section()
        shown.add_row(f"[bold]{c.value}[/] (deadline {deadlines_s[c]:g} s)")
        for name, text in _ROWS:
            shown.add_row(f"  {name}", *(text(found[p][c.value]) for p in TITLES))
    return shown


def picture(results: Sequence[RunResult], deadlines_s: Mapping[ServiceClass, float], path: Path) -> None:
    """Draw both passes side by side: every run as a dot above the moment it arrived, and what that adds up to."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {ServiceClass.INTERACTIVE: "#0b6e99", ServiceClass.BATCH: "#b8860b"}
    found = comparison(results)
    figure: Any
    axes: Any
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.6), sharey=True, sharex=True, layout="constrained")
    for axis, (policy, title) in zip(axes, TITLES.items(), strict=True):
        for c, colour in colours.items():
            runs = [r for r in results if r.policy == policy and r.service_class is c and r.done]
            s = found[policy][c.value]
            axis.scatter(
                [r.arrived_s for r in runs],
                [r.took_s for r in runs],
                s=42,
                marker="o" if c is ServiceClass.INTERACTIVE else "s",
                facecolors=[colour if r.met else "none" for r in runs],
                edgecolors=colour,
                label=f"{c.value}: {s.met} of {s.runs} in time; completion p50 {_seconds(s.completion_p50_s)}, "
                f"p95 {_seconds(s.completion_p95_s)}; wait per call p95 {_seconds(s.wait_p95_s)}",
            )
        limit_s = deadlines_s[ServiceClass.INTERACTIVE]
        axis.axhline(limit_s, color=colours[ServiceClass.INTERACTIVE], linewidth=1, linestyle="--")
        axis.annotate(
            f"interactive deadline {limit_s:g} s",
            (1.0, limit_s),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=colours[ServiceClass.INTERACTIVE],
        )
        met = found[policy][ServiceClass.INTERACTIVE.value]
        share = f"{met.met / met.runs:.0%}" if met.runs else "-"
        axis.set_title(f"{title}\n{share} of interactive runs in time", fontsize=14, fontweight="bold", loc="left")
        axis.set_xlabel("moment of arrival (s)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("run completion (s)")
    axes[0].set_ylim(bottom=0)
    figure.suptitle(
        f"The same runs, arriving at the same moments, on the same two engines. {LABEL.capitalize()}, not a GPU.  "
        f"Filled: in time.  Hollow: late (batch has {deadlines_s[ServiceClass.BATCH]:g} s).",
        fontsize=10,
        color="#222222",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"
