"""Count the figures of `maestro simulate` again: python tests/scorer.py events.jsonl.gz

Reads what ``--events-out`` wrote: for each play a line that begins ``{"maestro_events":`` and names the fields of each event, then
an event a line. The standard library alone, nothing of Maestro, and another way than the one that it checks: all events of a play
are kept, and each figure is looked up in them by itself. Prints a JSON line per play.
"""

import gzip
import json
import sys
from fractions import Fraction


def plays(path):
    """Each play of a file: its head, and its events as dicts by kind."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    head, events = None, {}
    with gzip.open(path, "rt") if zipped else open(path) as lines:
        for line in lines:
            entry = json.loads(line)
            if isinstance(entry, dict):
                if head is not None:
                    yield head, events
                head, events = entry, {kind: [] for kind in entry["fields"]}
            else:
                kind, *values = entry
                events[kind].append(dict(zip(head["fields"][kind], values, strict=True)))
    if head is not None:
        yield head, events


def rank(values, share):
    """The quantile between the neighbours of its place, reckoned exactly."""
    if not values:
        return None
    values = sorted(map(Fraction, values))
    place = (len(values) - 1) * Fraction(str(share))
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return float(values[below] * (1 - (place - below)) + values[above] * (place - below))


def average(values):
    values = [Fraction(v) for v in values]
    return float(sum(values) / len(values)) if values else None


def held(stage_id, until_s, grants, extensions):
    """Byte-seconds that a stage had reserved since its last grant."""
    last = grants[stage_id][-1]
    steps = [(last["at_s"], last["kv_bytes"])]
    steps += [(e["at_s"], e["kv_bytes"]) for e in extensions.get(stage_id, []) if last["at_s"] <= e["at_s"] <= until_s]
    total = Fraction(0)
    for (from_s, size), (to_s, _) in zip(steps, [*steps[1:], (until_s, 0)], strict=True):
        total += size * (Fraction(to_s) - Fraction(from_s))
    return total


def by_stage(events):
    found = {}
    for event in events:
        found.setdefault(event["stage"], []).append(event)
    return found


def figures(head, events):
    """Every figure of a play, and those of its tenants."""
    (close,) = events["close"]
    runs = {r["run"]: r for r in events["run"]}
    done = {d["run"]: d["at_s"] for d in events["done"]}
    ready = {r["stage"]: r for r in events["ready"]}
    grants, extensions, lost = (by_stage(events[kind]) for kind in ("grant", "extend", "requeue"))
    gone = {e["stage"]: e["at_s"] for e in events["refuse"]}
    counted = [r for r in runs.values() if r["counted"]]

    def took(run):
        return done.get(run["run"], close["at_s"]) - run["at_s"]

    def attained(some):
        some = list(some)
        met = [r for r in some if r["run"] in done and done[r["run"]] <= r["deadline_at_s"]]
        return len(met) / len(some) if some else None

    found = {"runs": len(counted), "unended": sum(r["run"] not in done for r in counted), "slo": attained(counted)}
    for who in ("interactive", "batch"):
        own = [r for r in counted if r["class"] == who]
        found[f"slo_{who}"] = attained(own)
        found[f"slack_{who}"] = rank(
            [(r["deadline_at_s"] - r["at_s"]) / r["unloaded_s"] for r in own if r["unloaded_s"] > 0], 0.5
        )
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            found[f"completion_{who}_{name}_s"] = rank([took(r) for r in own], share)
    slow = [took(r) / r["unloaded_s"] for r in counted if r["unloaded_s"] > 0]
    found["slowdown_mean"] = average(slow)

    waits = {}
    for stage_id in ready:
        began = [ready[stage_id]["at_s"], *(e["at_s"] for e in lost.get(stage_id, []))]
        ended = [g["at_s"] for g in grants.get(stage_id, [])]
        if len(ended) < len(began):
            ended.append(gone.get(stage_id, close["at_s"]))
        waits[stage_id] = [to - since for since, to in zip(began, ended, strict=True)]
    found["longest_wait_s"] = max((w for each in waits.values() for w in each), default=0.0)
    delays = []
    for stage_id, each in waits.items():
        run = runs[ready[stage_id]["run"]]
        if run["counted"] and run["class"] == "interactive":
            delays.append(sum(each))
    found["delay_interactive_mean_s"] = average(delays)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        found[f"completion_{name}_s"] = rank([took(r) for r in counted], share)
        found[f"slowdown_{name}"] = rank(slow, share)
        found[f"delay_interactive_{name}_s"] = rank(delays, share)

    reserved = used = Fraction(0)
    for e in events["end"]:
        reserved += held(e["stage"], e["at_s"], grants, extensions)
        prompt_s = Fraction(e["ended_at_s"]) - Fraction(e["started_at_s"])
        answer_s = Fraction(e["ended_at_s"]) - Fraction(e["first_token_at_s"])
        used += e["kv_bytes_per_token"] * (e["prompt_tokens"] * prompt_s + e["output_tokens"] * answer_s / 2)
    for stage_id, each in lost.items():
        for number, e in enumerate(each):
            reserved += held(stage_id, e["at_s"], {stage_id: grants[stage_id][: number + 1]}, extensions)
    found["kv_reserved_byte_s"], found["kv_used_byte_s"] = float(reserved), float(used)
    found["kv_unused_byte_s"] = float(reserved - used)

    window_s = head["window_s"]
    within = [e for e in events["end"] if e["at_s"] <= window_s]
    found["stages"] = len(events["end"])
    found["stages_per_s"] = len(within) / window_s
    found["output_tokens_per_s"] = sum(e["output_tokens"] for e in within) / window_s
    found["batch_tokens_in_window"] = sum(
        e["output_tokens"] for e in within if runs[ready[e["stage"]]["run"]]["class"] == "batch"
    )
    found["preemptions"] = sum(e["preemptions"] for e in events["end"])
    found["extensions"] = len(events["extend"])
    found["requeues"] = len(events["requeue"])
    found["refusals"] = len(events["refuse"])
    brought = [e for e in events.get("tier", []) if e["to"] == "gpu"]
    found["cold_starts"] = sum(e["from"] in {"host", "disk", "remote"} for e in brought)
    found["wakes"] = len(brought) - found["cold_starts"]
    found["plans"], found["grants"] = close["plans"], close["grants"]

    tenants = {}
    for name in sorted({r["tenant"] for r in counted}):
        own = [r for r in counted if r["tenant"] == name]
        tenants[name] = {"runs": len(own), "slo": attained(own), "p95_s": rank([took(r) for r in own], 0.95)}
    shares = [Fraction(t["slo"]) for t in tenants.values()]
    if any(shares):
        found["jain"] = float(sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares)))
    else:
        found["jain"] = 1.0 if shares else None
    return found, tenants


if __name__ == "__main__":
    for play, seen in plays(sys.argv[1]):
        counts, own = figures(play, seen)
        print(json.dumps({k: play[k] for k in ("policy", "load", "burst", "seed")} | counts | {"tenants": own}))
