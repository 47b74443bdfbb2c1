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
KINDS = ("app", "scheduler", "engine", "redis", "node")
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def load(name: str) -> Any:
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


def failover(name: str) -> str:
    """Gaps between two leaders, and what was lost or done twice, by how the leader went."""
    result = load(name)
    ways = {"kill": "kill -9", "stop": "stopped, woken later", "term": "ended in order"}
    body = [
        [
            ways[r["fault"]], str(r["trials"]), f"{r['ok']} / {r['runs']}",
            f"{r['gap_median_s']:.2f} s", f"{r['gap_longest_s']:.2f} s", str(r["fast_in_gap"]), f"{r['lost']} / {r['stages']}",
            "not told" if r["asked_twice"] is None else str(r["asked_twice"]), str(r["deposed_grants"]), "yes" if r["kept"] else "**no**",
        ]
        for r in result["summary"]
    ]  # fmt: skip
    head = ["the leader", "times", "runs completed", "gap p50", "longest", "fast path meanwhile"]
    table = rows([*head, "stages lost", "asked twice", "grants of a deposed leader", "kept"], body)
    return (
        f"{table}\n\nLabel: `{result['label']}`. {result['schedulers']} schedulers, lease {result['lease_s']:g} s, leadership period "
        f"{result['period_s']:g} s. Raw trials: `docs/results/{name}.json`."
    )


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


def calibrate(name: str) -> str:
    """A real engine and the emulator with its measured profile, under the same load."""
    r = load(name)
    body: list[list[str]] = []
    for side, what in (("engine", "vLLM"), ("emulator", "emulator"), ("model", "the engine model alone")):
        cells = [what, *(f"{r['sides'][side][f'{p}_s']:.2f} s" for p in ("p50", "p95"))]
        for p in ("p50", "p95"):
            ratio = r["ratios"].get(side, {}).get(p)
            cells.append(f"{ratio['ratio']:.3f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "1")
        share = r["sides"][side]["generator_cpu_share"]
        body.append([*cells, f"{share:.0%}" if share else ""])
    head = ["run completion", "p50", "p95", "ratio of p50 (95 % interval)", "ratio of p95", "load generator's core"]
    return (
        f"{rows(head, body)}\n\nLabel: `CPU-protocol-verified`. {r['engine']}; {r['repeats']} repeats in turn, "
        f"{r['sides']['engine']['runs']} runs a side; engine and emulator on core {r['engine_cores'][0]}, load generator on core "
        f"{r['generator_cores'][0]}; load average {r['load_average']:.1f}. Profile: `{r['profile']}`. Raw: `docs/results/{name}.json`."
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


def matrix(name: str) -> str:
    """Every version of the SDK and every way in: how many cells, how many as they should be."""
    body = [
        [
            t["versions"]["openai"], t["versions"]["langchain-openai"], t["way"], str(len({c["construct"] for c in t["cells"]})),
            str(len(t["modes"])), f"{t['totals']['passed']} / {t['totals']['cells']}", str(t["totals"]["skipped"]),
            str(t["totals"]["requests"]),
        ]
        for t in load(name)
    ]  # fmt: skip
    head = [
        "openai",
        "langchain-openai",
        "way in",
        "constructs",
        "modes",
        "cells as they should be",
        "left out",
        "requests",
    ]
    return f"{rows(head, body)}\n\nLabel: `emulated`. Raw cells: `docs/results/{name}.json`."


def graphs(name: str) -> str:
    """What the drawn graph told, and after how many runs the rest was there."""
    found = load(name)
    body = [
        [
            r["construct"], f"{s['nodes']} / {r['true']['nodes']}", f"{s['llm_right']}, {len(s['llm_maybe'])}, {len(s['llm_wrong'])}",
            f"{s['roles']} / {r['true']['llm']}", f"{s['tools']} / {r['true']['nodes']}",
            f"{s['edges']} / {r['true']['edges']}, {len(s['edges_spurious'])}",
            str(max(n for n in r["complete_after_runs"].values() if n is not None)), r["words"] or "-",
        ]
        for r in found["constructs"]
        if "skipped" not in r
        for s in (r["static"],)
    ]  # fmt: skip
    head = ["graph", "nodes", "LLM right, maybe, wrong", "roles", "tools", "edges, spurious", "runs until complete"]
    total = found["summary"]
    return (
        f"{rows([*head, 'what the drawing misses'], body)}\n\n{total['graphs']} graphs: nodes {total['nodes']}; LLM right "
        f"{total['llm_right']}, maybe {total['llm_maybe']}, wrong {total['llm_wrong']}; roles {total['roles']}; tools "
        f"{total['tools']}; edges {total['edges']}, spurious {total['edges_spurious']}. All complete after at most "
        f"{total['runs_at_most']} runs. Raw: `docs/results/{name}.json`."
    )


def upstream(name: str) -> str:
    """The outcomes of other people's tests."""
    found = load(name)
    body = [
        [
            f"{r['suite']} {r['version']}", str(r["tests"]), str(r["passed"]), str(r["skipped"]), str(len(r["failed"])),
            str(len(r["flaky"])), str(len(r["once"])), str(len(r["different"])),
        ]
        for r in found
    ]  # fmt: skip
    head = ["suite", "tests", "pass", "skipped", "fail by themselves", "vary by themselves", "differed once", "differ"]
    once = [f"`{t}`" for r in found for t in (*r["flaky"], *r["once"])]
    named = f" Varied or differed once: {', '.join(once)}." if once else ""
    return f"{rows(head, body)}\n\nRaw: `docs/results/{name}.json`.{named}"


def gate_faults(name: str) -> str:
    """One row a fault."""
    found = load(name)
    body = [
        [
            r["fault"],
            f"{r['same']} / {r['runs']}",
            f"{r['extra_s']:.2f} s",
            str(r["lines"]),
            "yes" if r["survived"] else "**no**",
        ]
        for r in found["faults"]
    ]
    head = ["fault of the gate", "normal results", "slower by", "lines in the log", "survived"]
    return f"{rows(head, body)}\n\nLabel: `{found['label']}`. Raw: `docs/results/{name}.json`."


def cost(name: str) -> str:
    """What an app pays without Redis."""
    r = load(name)
    body = [
        ["import, in a process that has langgraph and openai (median of 10)", f"{r['import']['import_ms']:.0f} ms"],
        ["the first `maestro.wrap`", f"{r['import']['wrap_ms']:.1f} ms"],
        ["the first call, once", f"{r['import']['first_call_ms']:.0f} ms"],
        *(
            [f"a call, {mode} (median of {c['calls']}; plain {c['plain_ms']:.2f} ms)", f"{c['added_ms']:.2f} ms"]
            for mode, c in r["call"].items()
        ),
        [f"a run in flight (of {r['memory']['maestro']['runs']})", f"{r['memory']['added_rss_bytes'] / 1024:.1f} KiB"],
        *(
            [f"resident after {look['runs']} runs", f"{look['rss_bytes'] / 2**20:.1f} MiB"]
            for look in r["leak"]["looks"]
        ),
        ["growth per run, second half of them", f"{r['leak']['late_bytes_per_run']:.0f} bytes"],
        ["the same without Maestro", f"{r['leak_plain']['late_bytes_per_run']:.0f} bytes"],
    ]
    ends = ", ".join(f"{n} {what}" for what, n in r["leak"]["ended"].items())
    return f"{rows(['what Maestro adds', ''], body)}\n\nThe runs ended: {ends}. Raw: `docs/results/{name}.json`."


def starvation(name: str) -> str:
    """Synchronous nodes under ainvoke."""
    r = load(name)
    body = [
        [c["case"], f"{c['all_s']:.2f} s", "-" if c["known_at_once"] is None else str(c["known_at_once"])]
        for c in r["cases"]
    ]
    return (
        f"{rows(['', 'all answered after', 'calls known at once'], body)}\n\n{r['runs']} runs of one call begin at once; one "
        f"alone takes {r['ideal_s']:.2f} s. The loop's own pool: {r['threads_of_the_loop']} threads. Label: `{r['label']}`."
    )


def observe(name: str) -> str:
    """What the report promised and what Maestro kept, by seed (``NAME-seed-N.json``)."""
    found = [load(path.stem) for path in sorted(HERE.glob(f"{name}-seed-*.json"))]
    body: list[list[str]] = []
    for r in found:
        ways = {
            "observed": r["observed"], "replayed first come first served": r["told"]["replayed"],
            "promised": r["told"]["promised"], "promised, engines mute": r["untold"]["promised"], "kept": r["kept"],
        }  # fmt: skip
        for way, classes in ways.items():
            cells = [f"{c['in_time']} / {c['runs']}, {c['p95_s']:.1f} s" for c in classes.values()]
            error = {"promised": r["told"], "promised, engines mute": r["untold"]}.get(way)
            body.append([str(r["seed"]), way, *cells, f"{error['gain']['error']:.1%}" if error else ""])
    costs = ", ".join(f"{r['cost']['added_ms']['p50']:.2f}" for r in found)
    head = ["seed", "", "interactive in time, p95", "batch in time, p95", "replay's own error"]
    return (
        f"{rows(head, body)}\n\nObserving added {costs} ms to a call (medians of {found[0]['cost']['calls']} pairs, by seed). "
        f"Label: `{found[0]['label']}`. Raw: `docs/results/{name}-seed-*.json`."
    )


def remaining(name: str) -> str:
    """Error of what is said of the rest of a run, by app and measure."""
    result = load(name)
    body: list[list[str]] = []
    for r in ({"app": "**all**", **result["overall"]}, *result["apps"]):
        for n, (measure, errors) in enumerate(r["errors"].items()):
            cells = [f"{x:.{0 if x >= 100 else 1 if x >= 10 else 3}f}" for x in errors.values()]
            body.append(["" if n else r["app"], result["measures"][measure], *cells])
    head = ["app", "left", "zero", "mean of all", "mean of the app", "mean of the role", "ours"]
    asked, seeds = result["overall"]["calls_asked"], result["seeds"]
    return (
        f"{rows(head, body)}\n\n{asked} calls asked about, over {len(seeds)} splits (seeds {seeds[0]} to {seeds[-1]}). "
        f"Raw: `docs/results/{name}.json`."
    )


def share(x: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "" if x is None else f"{100 * x:.{digits}f} %"


def predict(name: str) -> str:
    """Every predictor over all test calls."""
    r = load(name)
    body: list[list[str]] = []
    for row in r["overall"]:
        below = [row["mae_below"].get(rival) for rival in ("app_role_median", "magnus_style", "magnus_plus")]
        label = f"**{row['predictor']}**" if row["predictor"] == "ours" else row["predictor"]
        body.append(
            [
                f"{label}", f"{row['mae']:.1f} ({row['mae_interval'][0]:.0f} to {row['mae_interval'][1]:.0f})", f"{row['mae_macro']:.1f}",
                *("" if b is None else share(b["share"]) for b in below),
                "" if row["tau"] is None else f"{row['tau']:.3f}", share(row["coverage_p90"]), share(row["coverage_p99"]),
            ]
        )  # fmt: skip
    head = ["predictor", "MAE (95 %)", "MAE, mean of apps", "below role median", "below Magnus", "below Magnus+", "tau", "p90 covers", "p99 covers"]  # fmt: skip
    seeds, tested = r["seeds"], r["rows"]["test"]
    calls = sum(tested) / len(tested)
    first = r["phase1"]["predictors"]
    ours = next(p for p in first if p["predictor"] == "ours")
    told = (
        f"Seeds {seeds[0]} to {seeds[-1]}, split by task; {calls:.0f} test calls on average. Phase 1 ({r['phase1']['label']}): ROC-AUC "
        f"{ours['roc_auc']:.3f}, PR-AUC {ours['pr_auc']:.3f}."
    )
    if "gain" in r["phase1"]:
        told += f" MAE without it {r['phase1']['mae_without']:.1f}, with it {r['phase1']['mae_with']:.1f}."
    return f"{rows(head, body)}\n\n{told} Raw: `docs/results/{name}.json`."


def predict_apps(name: str) -> str:
    """MAE by app, and how often p90 held."""
    r = load(name.partition("-")[0])
    shown = ("app_role_median", "magnus_style", "lightgbm_paper", "ours")
    body: list[list[str]] = []
    for app in sorted({x["app"] for x in r["apps"]}):
        mine = {x["predictor"]: x for x in r["apps"] if x["app"] == app}
        one = mine["ours"]
        body.append([app, f"{one['rows']:.0f}", *(f"{mine[p]['mae']:.1f}" for p in shown), share(one["coverage_p90"])])
    return rows(["app", "test calls", *shown, "p90 covers"], body)


def predict_cold(name: str) -> str:
    """Apps left out of training, by tasks shown."""
    r = load(name.partition("-")[0])["cold_start"]
    named = [k for k in r["macro"][0] if k != "tasks_shown"]
    body = [
        [str(line["tasks_shown"]), *("" if line[k] is None else f"{line[k]:.1f}" for k in named)] for line in r["macro"]
    ]
    each = {(x["app"], x["tasks_shown"], x["predictor"]): x["mae"] for x in r["apps"]}
    lost = [
        f"{app} after {k}"
        for app in r["left_out_apps"]
        for k in (1, 2, 5, 10)
        if each.get((app, k, "ours"), 0) > min(each.get((app, k, n), 1e9) for n in ("role_median", "model_alone"))
    ]
    tail = f"Mean of {len(r['left_out_apps'])} apps, {len(r['draws'])} draws of the shown tasks each. In single apps it is not the best of the three: {', '.join(lost) or 'nowhere'}."  # fmt: skip
    return f"{rows(['tasks shown', *named], body)}\n\n{tail}"


def predict_kv(name: str) -> str:
    """What each way to reserve KV memory keeps and never uses, and who waits on an emulated GPU."""
    r = load(name.partition("-")[0])["reservations"]
    body = [
        [
            x["policy"], share(x["total_less"]), share(x["unused_less"]), share(x["short"], 2),
            f"{x['extensions_per_call']:.2f}" if x.get("extensions_per_call") is not None else "",
        ]
        for x in r["policies"]
    ]  # fmt: skip
    gpu = [
        [
            x["policy"], str(round(x["headroom_tokens"])), share(x["waited"], 2), share(x["preempted"], 2),
            f"{x['redis_calls_per_call']:.2f}", f"{x['admission_wait_s']:.1f} s",
        ]
        for x in r["gpu"]["rows"]
    ]  # fmt: skip
    one = rows(["reservation", "total against max_model_len", "never used, against the app's largest", "short calls", "extensions a call"], body)  # fmt: skip
    two = rows(["on the emulated GPU", "headroom, tokens", "calls whose extension waited", "preempted", "Redis calls a call", "mean wait for admission"], gpu)  # fmt: skip
    grown = r.get("growth_with_headroom")
    least = "" if grown is None else f" The smallest headroom at which no more than 1 % wait: {grown['headroom_tokens']:.0f} tokens; counted as never used, {share(grown['unused_less'])} less than the app's largest."  # fmt: skip
    return f"{one}\n\n{two}\n\nByte-seconds; {share(r['timed_share'], 0)} of the test calls are timed, the others take {1000 * r['s_per_token']:.0f} ms an output token.{least} Label: `emulated`."


def features(name: str) -> str:
    """Cost of a call's numbers, of a batch of predictions, and the estimate's error."""
    r = load(name)
    body = [
        [f"{x['tokens']:,}", "seen before" if x["warm"] else "new", f"{x['p50_ms']:.2f} ms", f"{x['p99_ms']:.2f} ms", f"{x['goal_ms']:g} ms"]
        for x in r["cost"]
    ]  # fmt: skip
    p, e = r["predicting"], r["estimate"]["conversation"]["all"]
    cost = rows(["prompt, tokens", "instruction", "numbers of one call, p50", "p99", "goal of p50"], body)
    return (
        f"{cost}\n\nPredicting {p['stages']} waiting stages in the scheduler: p50 {p['p50_ms']:.1f} ms, p99 {p['p99_ms']:.1f} ms (goal of p50: "
        f"{p['goal_ms']:g} ms), of which the model {p['model_p50_ms']:.1f} ms. The estimate of a prompt's tokens over the provider's count, growing "
        f"conversations: median {e['median']:.2f}, p10 {e['p10']:.2f}, p90 {e['p90']:.2f}, mean error {share(e['mape'])} "
        f"({e['n']} calls; four bytes a token: {share(e['four_bytes_mape'])}). Raw: `docs/results/{name}.json`."
    )


# -- maestro simulate ------------------------------------------------------------------------------------------------------
MIXES = ("support", "coding", "research", "fanout")
BOUNDS = ("ours-oracle", "edf-demote-oracle", "maestro-paper-demote-oracle")


def played(name: str) -> dict[str, Any]:
    """The rows of `maestro simulate --json` by policy."""
    return {r["policy"]: r for r in load(name)["rows"]}


def percent(row: dict[str, Any], figure: str = "slo") -> str:
    """Mean and confidence interval, in percent."""
    ci = row[f"{figure}_ci"]
    if ci is None:
        return f"{100 * row[figure]:.1f}"
    return f"{100 * row[figure]:.1f} ± {100 * (ci[1] - ci[0]) / 2:.1f}"


def contention(name: str) -> str:
    """Deadlines met by policy and mix where EDF meets about 45 %."""
    found = {mix: played(f"{name}-{mix}") for mix in MIXES}
    loads = {mix: next(iter(rows.values()))["load"] for mix, rows in found.items()}
    body = [[f"**{p}**" if p == "ours" else p, *(percent(found[mix][p]) for mix in MIXES)] for p in found[MIXES[0]]]
    bound = {mix: max(found[mix][p]["slo"] for p in BOUNDS) for mix in MIXES}

    def line(what: str, value: Callable[[str], str]) -> list[str]:
        return [what, *(value(mix) for mix in MIXES)]

    def above(mix: str, other: str) -> str:
        difference = found[mix]["ours"]["slo_above"][other]
        ci = difference.get("ci") if isinstance(difference, dict) else None
        mean = difference["mean"] if isinstance(difference, dict) else difference
        return f"{100 * mean:+.1f}" + (f" [{100 * ci[0]:+.1f}, {100 * ci[1]:+.1f}]" if ci else "")

    def delay(mix: str) -> str:
        ours, fcfs = (found[mix][p]["delay_interactive_mean_s"] for p in ("ours", "fcfs"))
        return f"{100 * (1 - ours / fcfs):.1f} %" if fcfs else "-"

    def ratio(mix: str, figure: str, of: str) -> str:
        return f"{found[mix]['ours'][figure] / found[mix][of][figure]:.2f}"

    summary = rows(
        ["ours against", *MIXES],
        [
            line("edf, points (paired over seeds)", lambda m: above(m, "edf")),
            line("edf-demote, points", lambda m: above(m, "edf-demote")),
            line(
                "the bound (best of the three oracles)", lambda m: f"{100 * found[m]['ours']['slo'] / bound[m]:.1f} %"
            ),
            line("fcfs: interactive queueing delay less by", delay),
            line("fcfs: batch tokens in the window, ratio", lambda m: ratio(m, "batch_tokens_in_window", "fcfs")),
            line("fcfs-run: the same", lambda m: ratio(m, "batch_tokens_in_window", "fcfs-run")),
            line("boost: p99 run completion, ratio", lambda m: ratio(m, "completion_p99_s", "boost")),
            line("longest wait of a stage, s", lambda m: f"{found[m]['ours']['longest_wait_s']:.0f}"),
        ],
    )
    state = load(f"{name}-{MIXES[0]}")
    head = ["deadlines met, %", *(f"{mix}, load {loads[mix]:g}" for mix in MIXES)]
    runs = ", ".join(f"{found[mix]['ours']['runs']:.0f} ({mix})" for mix in MIXES)
    return (
        f"{rows(head, body)}\n\n{summary}\n\nLabel: `{state['label']}`. {state['seeds']} seeds, 95 % intervals by Student's t; runs counted per seed: {runs}; "
        f"window {state['state']['window_s'][0]:.0f} s and horizon {state['state']['horizon_s'][0]:.0f} s (support). "
        f"Raw: {', '.join(f'`docs/results/{name}-{mix}.json`' for mix in MIXES)}."
    )


def sweep(name: str) -> str:
    """Deadlines met by policy over loads, a mix a line."""
    body: list[list[str]] = []
    columns: list[str] = []
    for mix in MIXES:
        result = load(f"{name}-{mix}")
        policies = list(dict.fromkeys(r["policy"] for r in result["rows"]))
        columns = [f"{r['load']:g}" if r["burst"] is None else f"bursts to {r['burst']:g}" for r in result["rows"]]
        columns = list(dict.fromkeys(columns))
        for p in policies:
            mine = [r for r in result["rows"] if r["policy"] == p]
            body.append([mix, f"**{p}**" if p == "ours" else p, *(percent(r) for r in mine)])
    result = load(f"{name}-{MIXES[0]}")
    return f"{rows(['mix', 'deadlines met, %', *columns], body)}\n\nLabel: `{result['label']}`. {result['seeds']} seeds. Raw: `docs/results/{name}-*.json`."


def bursts(name: str) -> str:
    """Deadlines met with bursts, and without, at the same mean load."""
    result = load(name)
    body: list[list[str]] = []
    for p in dict.fromkeys(r["policy"] for r in result["rows"]):
        steady, burst = (
            next(r for r in result["rows"] if r["policy"] == p and bool(r["burst"]) is b) for b in (False, True)
        )
        late = f"{burst['completion_p99_s']:.0f}"
        body.append([f"**{p}**" if p == "ours" else p, percent(steady), percent(burst), late])
    head = ["deadlines met, %", "steady", "with bursts", "bursts: p99 completion, s"]
    return f"{rows(head, body)}\n\nLabel: `{result['label']}`. {result['seeds']} seed. Raw: `docs/results/{name}.json`."


def simulated(name: str) -> str:
    """Any one play of several policies: what differs."""
    result = load(name)
    tiers = any(r["cold_starts"] or r["wakes"] for r in result["rows"])
    flooded = "flood" in name
    body: list[list[str]] = []
    for r in result["rows"]:
        unused, used = r["kv_unused_byte_s"] / 1e12, r["kv_used_byte_s"] / 1e12
        line = [
            f"**{r['policy']}**" if r["policy"] == "ours" else r["policy"], f"{r['load']:g}", percent(r), percent(r, "slo_interactive"),
            percent(r, "slo_batch"), f"{r['completion_p95_s']:.0f} / {r['completion_p99_s']:.0f}", f"{r['delay_interactive_mean_s']:.2f}",
            f"{unused:.1f} + {used:.1f}", f"{r['jain']:.3f}", f"{r['longest_wait_s']:.0f}",
        ]  # fmt: skip
        if tiers:
            line += [f"{r['cold_starts']:.0f} / {r['wakes']:.0f}"]
        if flooded:
            line += [", ".join(f"{t['p95_s']:.0f}" for t in r["tenants"].values())]
        body.append(line)
    head = [
        "policy", "load", "met, %", "interactive", "batch", "completion p95 / p99, s", "interactive delay, s",
        "KV reserved: unused + used, TB s", "Jain", "longest wait, s",
    ]  # fmt: skip
    head += ["cold starts / wakes"] if tiers else []
    head += ["p95 by tenant, s"] if flooded else []
    return (
        f"{rows(head, body)}\n\nLabel: `{result['label']}`. {result['seeds']} seeds; window {result['state']['window_s'][0]:.0f} s, horizon "
        f"{result['state']['horizon_s'][0]:.0f} s; fleet `{result['fleet']['name']}`. Raw: `docs/results/{name}.json`."
    )


def scale(name: str) -> str:
    """Cost of a decision by size of the fleet, and of the queue."""
    result = load(name)
    parts = [
        rows(
            [what, "decisions", "us a decision", "us a stage in all"],
            [
                [f"{r[key]:,}", f"{r['decisions']:,}", f"{r['us_per_decision']:.0f}", f"{r['us_per_stage_in_all']:.0f}"]
                for r in result[series]
            ],
        )
        for series, key, what in (("fleet", "engines", "engines"), ("queue", "runs", "runs ready at once, 4 engines"))
    ]
    return "\n\n".join(parts) + f"\n\nLabel: `{result['label']}`. Raw: `docs/results/{name}.json`."


def place(name: str) -> str:
    """Models that share GPUs: each policy live, and the same played by the simulator."""
    r = load(name)
    body: list[list[str]] = []
    for row in r["rows"]:
        seconds = " / ".join(f"{row[f'completion_{q}_s']:.0f}" for q in ("p50", "p95", "p99"))
        kv = " / ".join(f"{row[f'kv_{what}_byte_s'] / 2**40:.3g}" for what in ("used", "reserved"))
        counts = " / ".join(f"{row[what]:.0f}" for what in ("cold_starts", "wakes", "sleeps", "preemptions"))
        shares = (percent(row, figure) for figure in ("slo", "slo_interactive", "slo_batch"))
        body.append(
            [row["policy"], row["played"], *shares, seconds, f"{row['delay_interactive_mean_s']:.1f} s", counts, kv]
        )
    head = ["policy", "played", "deadlines met", "interactive", "batch", "run p50 / p95 / p99 s", "mean delay"]
    table = rows([*head, "cold starts / wakes / sleeps / preempted", "KV used / reserved, TiB s"], body)
    off = "; ".join(
        f"{policy} {100 * d['slo']:+.1f} points, p50 {d['completion_p50_s']:+.1f} s, p95 {d['completion_p95_s']:+.1f} s"
        for policy, d in r["difference"].items()
    )
    checks = r["checks"].values()
    moves = [m for of in r["moves"].values() for m in of if not m["error"]]
    violations = sum(c["violations"] for c in checks)
    cost = ", the cost of the real scheduler, Redis and clocks" if r["label"] == "emulated" else ""
    counted = f"; counted by the emulated GPUs: {violations}" if r["label"] == "emulated" else ""
    return (
        f"{table}\n\nLive less simulated{cost}: {off}. "
        f"Over-commits in {sum(c['reports'] for c in checks):,} reports of the node: {sum(len(c['over']) for c in checks)}{counted}. {len(moves)} moves, each with its seconds and bytes in the "
        f"file. {r['workload']['runs']} runs, {r['workload']['stages']} calls, seed {r['seed']}. Label: `{r['label']}`. "
        f"Raw: `docs/results/{name}.json`."
    )


def clusters(name: str) -> str:
    """Clusters at a distance: each routing live, and the same played by the simulator."""
    r = load(name)
    at = r["fleet"]["clusters"]
    plays = dict(r["policies"])
    if r["outage"]:
        gone = r["outage"]
        plays[f"ours, {gone['cluster']} lost for {gone['to_s'] - gone['from_s']:g} s"] = gone
    body: list[list[str]] = []
    for policy, told in plays.items():
        for row in told["rows"]:
            seconds = " / ".join(f"{row[f'completion_{q}_s']:.1f}" for q in ("p50", "p95"))
            shares = " / ".join(f"{100 * row['shares'][c]:.0f}" for c in at)
            figures = ("slo", "slo_interactive", "slo_batch")
            met = ("-" if row[figure] is None else percent(row, figure) for figure in figures)
            body.append([policy, row["played"], *met, seconds, shares, f"{1000 * row['network_mean_s']:.1f}"])
    head = [
        "policy",
        "played",
        "deadlines met, %",
        "interactive",
        "batch",
        "run p50 / p95 s",
        f"calls to {' / '.join(at)}, %",
    ]
    measured = r["policies"][next(iter(r["policies"]))]["measured_rtt_s"]
    far = ", ".join(
        f"{c} {1000 * v['rtt_s']:g} ms (measured {1000 * measured[c]:.1f}), {v['slots']} places" for c, v in at.items()
    )
    checks = [told["checks"] for told in plays.values()]
    ended = f"{sum(c['ended'] for c in checks)} of {sum(c['runs'] for c in checks)}"
    return (
        f"{rows([*head, 'network, ms a call'], body)}\n\nClusters: {far}. Live, {ended} runs ended, "
        f"{sum(c['cut_streams'] for c in checks)} streams were cut and made anew, {sum(len(c['failed']) for c in checks)} runs failed. "
        f"{r['workload']['runs']} runs, {r['workload']['stages']} calls, seed {r['seed']}. Label: `{r['label']}`. Raw: `docs/results/{name}.json`."
    )


def clusters_why(name: str) -> str:
    """Where the first policy went, and what was predicted there: the routing table."""
    r = load(name.partition("-")[0])
    policy, told = next(iter(r["policies"].items()))
    parts = ("network_s", "wait_s", "prefill_s", "decode_s")
    body: list[list[str]] = []
    for row in told["routing"]:
        means = [f"{row['because'][p]:.3f}" if row["because"] else "-" for p in parts]
        sums = [f"{row[k]:.3f}" if row[k] is not None else "-" for k in ("predicted_s", "took_s")]
        body.append([row["cluster"], str(row["calls"]), str(row["fast"]), *means, *sums])
    head = ["cluster", "calls", "granted at once", "network s", "wait s", "prefill s", "decode s", "sum s", "took s"]
    one = [
        [
            e["stage"], e["engine"], " + ".join(f"{p.removesuffix('_s')} {e['because'][p]:.3f}" for p in parts),
            f"{e['sum']:.3f}", f"{e['took_s']:.3f}",
        ]
        for e in told["examples"]
    ]  # fmt: skip
    return (
        f"{rows(head, body)}\n\n{rows(['call', 'to', 'because', 'sum s', 'took s'], one)}\n\nOf `{policy}`: means of what was predicted of "
        "the calls that the planner granted; took: from their grant to the last token."
    )


def gateway(name: str) -> str:
    """What the gateway adds to a call."""
    r = load(name)
    body: list[list[str]] = []
    for kind, what in (("whole", "whole answer"), ("first token", "first token of a stream")):
        found = r["latency"][kind]
        both = [
            " / ".join(f"{found[way][q]:.2f}" for q in ("p50", "p99")) + " ms" for way in ("direct_ms", "gateway_ms")
        ]
        added = [
            f"{x['ms']:.2f} ms ({x['interval_ms'][0]:.2f} to {x['interval_ms'][1]:.2f})"
            for x in found["added_ms"].values()
        ]
        body.append([what, *both, *added])
    alike = r["same"]
    return (
        f"{rows(['', 'direct p50 / p99', 'gateway p50 / p99', 'added p50 (95 %)', 'added p99 (95 %)'], body)}\n\n{r['latency']['pairs']} pairs in turn; "
        f"intervals by bootstrap of the pairs. The same sample app, {alike['runs']} runs: results as straight to the engine "
        f"{alike['as_direct']['gateway']} through the gateway, {alike['as_direct']['decorator']} through the decorator, alike by both "
        f"{alike['decorator_as_gateway']}. Label: `{r['label']}`. Raw: `docs/results/{name}.json`."
    )


def gateway_streams(name: str) -> str:
    """Waves of streams through one gateway process."""
    r = load(name.partition("-")[0])
    many = r["streams"]
    body = [
        [
            str(n), f"{w['completed']} / {w['streams']}", str(w["open_at_most"]),
            " / ".join(f"{w[at]['rss_bytes'] / 2**20:.1f}" for at in ("before", "peak", "after")),
            " / ".join(str(w[at]["files"]) for at in ("before", "peak", "after")),
        ]
        for n, w in enumerate(many["waves"], 1)
    ]  # fmt: skip
    head = [
        "wave",
        "streams that ended",
        "open at most",
        "RSS before / most / after, MiB",
        "open files before / most / after",
    ]
    grown = ", ".join(f"{x / 2**20:+.1f}" for x in many["grown_bytes_by_wave"])
    return f"{rows(head, body)}\n\nMemory after a wave, less that after the one before: {grown} MiB. Label: `{r['label']}`."


def ray(name: str) -> str:
    """A machine of a Ray cluster dies under load: the worst of all trials by what was killed."""
    r = load(name)
    killed = {"raylet": "the raylet", "machine": "the raylet and all that it ran"}
    body: list[list[str]] = []
    for s in r["summary"]:
        worst = ("processes_gone_s", "away_s", "moved_s", "serves_s")
        seconds = ["never" if s[x] is None else f"{s[x]:.1f} s" for x in worst]
        cut = f"{s['cut_streams']} / {s['failed']}"
        body.append([killed[s["kind"]], str(s["trials"]), f"{s['ok']} / {s['runs']}", cut, str(s["lost"]), *seconds])
    head = ["kill -9 of", "times", "runs completed", "streams cut (SDK's error) / failed otherwise"]
    table = rows(
        [*head, "stages or runs lost", "its processes gone", "out of the fleet", "placed anew", "serves again"], body
    )

    def free(of: str) -> str:
        found = [t["resources"][of]["free"].get("GPU", 0.0) for t in r["trials"]]
        total = [t["resources"][of]["total"].get("GPU", 0.0) for t in r["trials"]]
        return " or ".join(sorted({f"{f:g} of {t:g}" for f, t in zip(found, total, strict=True)}))

    return (
        f"{table}\n\nSeconds from the kill, worst trial. {r['nodes']} nodes on {r['machines']} machines. GPUs free, as Ray counts them: before "
        f"{free('before')}, once the node was placed anew {free('moved')}, with a new machine {free('replaced')}. Engines at {r['speed']:g} times the "
        f"hardware's speed. Label: `{r['label']}`. Raw trials: `docs/results/{name}.json`."
    )


TABLES: dict[str, Callable[[str], str]] = {
    "ray": ray,
    "clusters": clusters,
    "clusters-busy": clusters,
    "clusters-why": clusters_why,
    "gateway": gateway,
    "gateway-streams": gateway_streams,
    "place": place,
    "place-vllm": place,
    "simulate-contention": contention,
    "simulate-loads": sweep,
    "simulate-bursts": bursts,
    "simulate-flood": simulated,
    "simulate-calm": simulated,
    "simulate-kv": simulated,
    "simulate-models": simulated,
    "simulate-clusters": simulated,
    "scale": scale,
    "features": features,
    "predict": predict,
    "predict-apps": predict_apps,
    "predict-cold": predict_cold,
    "predict-kv": predict_kv,
    "remaining": remaining,
    "matrix": matrix,
    "matrix-ways": matrix,
    "graphs": graphs,
    "upstream": upstream,
    "gate-faults": gate_faults,
    "cost": cost,
    "starvation": starvation,
    "observe": observe,
    "overhead": overhead,
    "order-vllm": order,
    "faults-vllm": faults,
    "failover": failover,
    "calibrate-vllm": calibrate,
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
