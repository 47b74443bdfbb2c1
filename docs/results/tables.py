"""Write the measured tables of README.md and docs/results.md from the files in this folder.

    python docs/results/tables.py            write them
    python docs/results/tables.py --check    exit 1 where a page differs from what the files say

Each file is what a `maestro bench ... --json` printed, unchanged; a page has a line ``<!-- table: NAME -->`` and one
``<!-- end -->`` around each table. Nothing between them is written by hand.
"""

# ruff: noqa: INP001
from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = ("app", "scheduler", "engine", "redis")
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def load(name: str) -> dict[str, Any]:
    """A result as it was printed."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def rows(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(r) for r in body)]
    return "\n".join(f"| {line} |" for line in lines)


def faults(name: str) -> str:
    """Worst of all trials by kind of fault. A later run of one kind (``NAME-KIND.json``) stands in place of its row."""
    result = load(name)
    later = {kind: load(f"{name}-{kind}") for kind in KINDS if (HERE / f"{name}-{kind}.json").exists()}
    found = [
        next((x for x in later.get(r["fault"], result)["summary"] if x["fault"] == r["fault"]), r)
        for r in result["summary"]
    ]
    body = [
        [
            r["fault"], str(r["trials"]), f"{r['ok']} / {r['runs']}", str(r["cut_streams"]), str(r["failed"]),
            f"{r['slowest_end_s']:.1f} s",
            "never" if r["ledger_zero_s"] is None else f"{r['ledger_zero_s']:.1f} s",
            "yes" if r["survived"] else "**no**",
        ]
        for r in found
    ]  # fmt: skip
    head = ["kill -9 of", "times", "runs completed", "streams cut (SDK's error)", "failed otherwise"]
    raw = ", ".join(f"`docs/results/{n}.json`" for n in (name, *(f"{name}-{kind}" for kind in later)))
    table = rows([*head, "last run ended after", "reservations 0 after", "survived"], body)
    return f"{table}\n\nLabel: `{result['label']}`. Lease {result['lease_s']:g} s. Raw trials: {raw}."


def order(name: str) -> str:
    """The same runs under both policies."""
    result = load(name)
    body = [
        [
            {"fcfs": "first come first served", "ours": "Maestro"}[p["policy"]], cls, f"{c['completed']} / {c['runs']}",
            f"{c['in_time']} / {c['runs']}", f"{c['p50_s']:.1f} s", f"{c['p95_s']:.1f} s",
            f"{p['tau']:.3f} ({p['tau_pairs']})",
        ]
        for p in result["policies"]
        for cls, c in p["classes"].items()
    ]  # fmt: skip
    table = rows(["order", "class", "completed", "in time", "p50", "p95", "tau (pairs)"], body)
    return (
        f"{table}\n\nInteractive p95, Maestro over first come first served: **{result['interactive_p95_ratio']:.2f}**. "
        f"Label: `{result['label']}`. Raw events: `docs/results/{name}.json`."
    )


def overhead(name: str) -> str:
    """Added milliseconds of one call."""
    r = load(name)
    body = [
        [label, f"{r[key]['p50']:.2f} ms", f"{r[key]['p99']:.2f} ms"]
        for label, key in (("plain call", "plain_ms"), ("through Maestro", "maestro_ms"), ("**added**", "added_ms"))
    ]
    parts = rows(["part of one call (timers on)", "ms"], [[k, f"{v:.3f}"] for k, v in r["parts_ms"].items()])
    fast = r["fast_path"]
    return (
        f"{rows(['', 'p50', 'p99'], body)}\n\n{parts}\n\nCPU added per call, all threads: {r['added_cpu_ms']:.2f} ms. "
        f"Granted in the push's own round trip: {fast['hits']} of {fast['grants']} ({fast['rate']:.1%}). "
        f"{r['calls']} calls each way. Raw: `docs/results/{name}.json`."
    )


def demo(name: str) -> str:
    """What `maestro demo --json` printed."""
    r = load(name)
    names = {"fcfs": "first come first served", "ours": "Maestro"}
    body = [
        [
            names[policy], cls, f"{s['met']} / {s['runs']}", f"{s['completion_p50_s']:.1f} s", f"{s['completion_p95_s']:.1f} s",
            f"{s['wait_p50_s']:.2f} s", f"{s['wait_p95_s']:.2f} s",
        ]
        for policy, classes in r["policies"].items()
        for cls, s in classes.items()
    ]  # fmt: skip
    head = ["order", "class", "deadlines met", "run p50", "run p95", "wait per call p50", "p95"]
    deadlines = ", ".join(f"{c} {d:g} s" for c, d in r["deadlines_s"].items())
    return f"{rows(head, body)}\n\nLabel: `{r['label']}`. Deadlines: {deadlines}. Seed {r['seed']}, {r['runs']} runs each way."


TABLES: dict[str, Callable[[str], str]] = {
    "overhead": overhead,
    "order-vllm": order,
    "faults-vllm": faults,
    "demo": demo,
}


def written(page: str) -> str:
    """A page with its tables as the files have them."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{TABLES[name](name)}\n<!-- end -->"

    return re.sub(r"<!-- table: ([a-z-]+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main() -> None:
    """Write, or check."""
    stale: list[str] = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (new := written(page)) != page:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: tables differ from docs/results; run `python docs/results/tables.py`")


if __name__ == "__main__":
    main()
