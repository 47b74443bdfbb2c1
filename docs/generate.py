# ruff: noqa: INP001 - a script
"""Write the parts of the docs that are read from the code: ``python docs/generate.py``.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``tests/test_docs.py`` fails where one is not what
this script would write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer.main

from maestro_agents import distance, policy, scheduler, workflow
from maestro_agents.cli import COMMANDS, build_app
from maestro_agents.core import DEFAULT_DEADLINE_S, EXTEND_TOKENS
from maestro_agents.errors import ConfigError
from maestro_agents.hints import DIALECTS
from maestro_agents.policy import admission, ageing, priority
from maestro_agents.predict import live, rest, roles, trainer
from maestro_agents.predict.features import FEATURES, FEATURES_VERSION
from maestro_agents.queue import memory
from maestro_agents.settings import Settings
from maestro_agents.simulator import hardware as profiles
from maestro_serving import elastic_kv, weights

DOCS: Final = Path(__file__).resolve().parent
PART: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def hints() -> str:
    """What each dialect of hints says, and how."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, dialect in DIALECTS.items():
            words = "<br>".join(f"{field}: {where}" for field, where in dialect.words.items())
            yield f"`{name}`", dialect.server, words or "nothing", dialect.order, dialect.needs

    return table(("`hints`", "for", "says", "order", "it acts upon it with"), rows())


def settings() -> str:
    """Every setting of `maestro_agents.settings.Settings`."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, field in Settings.model_fields.items():
            default = "" if field.default is None else f"`{field.default}`"
            yield f"`MAESTRO_{name.upper()}`", f"`{name}`", default, field.description or ""

    return table(("variable", "in maestro.toml", "default", "meaning"), rows())


def constants() -> str:
    """The numbers of the policies: constants of the code, not settings."""
    deadline = DEFAULT_DEADLINE_S
    window, mix = roles.WINDOW, roles.SHRINK
    found = {
        "DOUBT": (priority.DOUBT, "`policy/priority.py`"),
        "MAX_SLACK_S": (f"{priority.MAX_SLACK_S:g} s", "`policy/priority.py`"),
        "LATE_S": (f"{priority.LATE_S:g} s", "`policy/priority.py`"),
        "TOLERATED_DEBT_S": (f"{priority.TOLERATED_DEBT_S:g} s", "`policy/priority.py`"),
        "MAX_JOIN_S": (f"{priority.MAX_JOIN_S:g} s", "`policy/priority.py`"),
        "deadline where none is named": (
            f"{deadline['interactive']:g} s interactive, {deadline['batch']:g} s batch",
            "`core.py`",
        ),
        "EXTEND_TOKENS": (f"{EXTEND_TOKENS} tokens", "`core.py`"),
        "HOLD_AFTER_S": (f"{policy.HOLD_AFTER_S:g} s", "`policy/__init__.py`"),
        "heads looked at per model and round": (scheduler.HEADS, "`scheduler.py`"),
        "longest pause between two rounds": (f"{scheduler.TICK_S:g} s", "`scheduler.py`"),
        "pause between two looks at an engine": (f"{scheduler.PROBE_S:g} s", "`scheduler.py`"),
        "failed looks until an engine is dead": (scheduler.FAILURES, "`scheduler.py`"),
        "leases until an engine that never agrees counts as idle": (f"{scheduler.DRAIN_LEASES:g}", "`scheduler.py`"),
        "window of a role": (f"{window} completions, mixed with {mix} values of the level above", "`predict/roles.py`"),
        "finished stages kept to train on": (f"{trainer.WINDOW_ROWS:,}", "`predict/trainer.py`"),
        "calls of runs that go on that are kept": (f"{rest.MAX_OPEN_CALLS:,}", "`predict/rest.py`"),
        "trained again when": (
            f"{live.RETRAIN_ROWS:,} stages are new and {live.RETRAIN_S / 60:g} minutes have passed",
            "`predict/live.py`",
        ),
        "a candidate must do better by": (f"{trainer.BETTER:.0%}", "`predict/trainer.py`"),
        "a published model is taken back when": (
            f"over {live.TRIAL_STAGES} stages its error is {live.WORSE - 1:.0%} above the former one's",
            "`predict/live.py`",
        ),
        "output tokens while nothing was seen": (
            ", ".join(map(str, roles.DEFAULT_OUTPUT_TOKENS)),
            "`predict/roles.py`",
        ),
        "p99 of a role that the fast path has not seen": (
            f"{memory.DEFAULT_P99_OUTPUT_TOKENS:g} tokens",
            "`queue/memory.py`",
        ),
        "SHRINK of what is left of a run": (f"{workflow.SHRINK:g} observations", "`workflow.py`"),
        "runs that a mean of it remembers; a median": (
            f"{workflow.WINDOW:g}; {workflow.TOOL_WINDOW}",
            "`workflow.py`",
        ),
        "observations kept": (memory.LOG_LENGTH, "`queue/memory.py`"),
    }
    return table(("what", "value", "where"), ((k, str(v), where) for k, (v, where) in found.items()))


def distances() -> str:
    """The numbers of `maestro_agents.distance`, and of an engine's return."""
    found = {
        "LOOK_S": f"{distance.LOOK_S:g} s",
        "MEASURE_S": f"{distance.MEASURE_S:g} s, up to twice that by chance",
        "KEPT_S": f"{distance.KEPT_S:g} s",
        "requests of a measurement to an engine; engines; patience": (
            f"{distance.PROBES}; {distance.ASKED}; {distance.PROBE_LIMIT_S:g} s"
        ),
        "weight of a new measurement": f"{distance.ALPHA:g}",
        "NEAR_S": f"{1e3 * distance.NEAR_S:g} ms",
        "the scheduler reads it every": f"{scheduler.DISTANCES_S:g} s",
        "RETURN_SLOTS": admission.RETURN_SLOTS,
        "RETURN_DOUBLES_S": f"{admission.RETURN_DOUBLES_S:g} s",
    }
    return table(("what", "value"), ((k, str(v)) for k, v in found.items()))


def watched() -> str:
    """The numbers of `maestro_agents.policy.ageing`."""
    found = {
        "a block of time, at first; at last": f"{ageing.SAMPLE_S:g} s; {ageing.LONGEST_S:g} s",
        "blocks kept; before anything is said": f"{ageing.MOST}; {ageing.LEAST}",
        "level of the test": f"{ageing.ALPHA:g}",
        "confidence of the slope's interval": f"{ageing.CONFIDENCE:.0%}",
        "least rise of the floor from third to third": f"{ageing.FLOOR_RISES:.0%} of what the slope comes to",
        "least growth of the later half": f"{ageing.STEADY:.0%} of the earlier one's",
        "how long a trend is believed to go on": f"{ageing.FARSIGHT:g} times the time watched",
        "EARLY_S": f"{ageing.EARLY_S / 3600:g} h",
        "MARGIN; MARGIN_S": f"{ageing.MARGIN:g} restarts; {ageing.MARGIN_S / 60:g} min",
        "a restart that nobody has measured": f"{ageing.RESTART_S:g} s",
    }
    return table(("what", "value"), iter(found.items()))


def commands() -> str:
    """Every command and its options, from the command line's own parser."""
    root = typer.main.get_command(build_app([entry.name for entry in COMMANDS]))
    examples = {entry.name: entry.example for entry in COMMANDS}
    parts: list[str] = []
    for words, command in walk(root, ("maestro",)):
        if words == ("maestro",):
            continue
        parts += [f"## `{' '.join(words)}`", ""]
        parts += [" ".join((command.help or "").split()), ""]
        if len(words) == 2:
            parts += ["```console", f"$ {examples[words[1]]}", "```", ""]
        rows = [option(p) for p in command.params if p.name != "help"]
        if rows:
            parts += [table(("option", "default", "meaning"), iter(rows)), ""]
    return "\n".join(parts).rstrip()


def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and all below it, with the words that call each."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*words, name))


def option(parameter: Any) -> tuple[str, str, str]:
    """One line of a command's table."""
    is_argument = parameter.param_type_name == "argument"
    name = parameter.name.upper() if is_argument else ", ".join(parameter.opts)
    default = parameter.default
    plain = (
        default is None or default is False or callable(default) or not isinstance(default, str | int | float | Path)
    )
    shown = "required" if parameter.required else "" if plain else f"`{default}`"
    return f"`{name}`", shown, " ".join((parameter.help or "").split())


def dependencies() -> str:
    """What pyproject.toml asks for, each with the reason that stands beside it."""
    text = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.split("\ndependencies = [\n")[1].split("\n]\n")[0].splitlines()

    def rows() -> Iterator[tuple[str, ...]]:
        for line in listed:
            requirement, _, reason = line.strip().partition("#")
            name, _, marker = requirement.strip().rstrip(",").strip('"').partition(";")
            yield f"`{name.strip()}`", f"`{marker.strip()}`" if marker else "everywhere", reason.strip()

    return table(("requirement", "where", "reason"), rows())


def features() -> str:
    """What the client tells the scheduler of a call, number by number."""

    def rows() -> Iterator[tuple[str, ...]]:
        for at, f in enumerate(FEATURES):
            yield str(at), f"`{f.name}`", f.unit, f.meaning, "yes" if f.traced else "no"

    return f"Version {FEATURES_VERSION}.\n\n" + table(("", "feature", "unit", "meaning", "in traces"), rows())


def hardware() -> str:
    """The profiles of GPUs and models, where they come from, and how far they are from what others measured."""
    every = [serve for model in profiles.models().values() for serve in everywhere(model)]
    return "\n\n".join(
        (
            "## GPUs",
            table(
                ("kind", "GPU", "memory", "bandwidth", "bfloat16", "reached in prefill", "basis", "source"),
                (
                    (
                        f"`{g.kind}`",
                        g.name,
                        f"{g.hbm_mib / 1024:.0f} GiB",
                        f"{g.bandwidth_bytes_per_s / 1e12:.2f} TB/s",
                        f"{g.flops / 1e12:.0f} TFLOP/s",
                        f"{g.prefill_mfu:.0%}",
                        g.basis,
                        g.source,
                    )
                    for g in profiles.gpus().values()
                ),
            ),
            "## Models",
            table(
                ("profile", "model", "weights", "KV of a token", "longest", "source"),
                (
                    (
                        f"`{m.profile}`",
                        m.name,
                        f"{m.weight_bytes / 1e9:.1f} GB",
                        f"{m.kv().bytes_per_token:,} bytes",
                        f"{m.max_tokens:,} tokens",
                        m.source,
                    )
                    for m in profiles.models().values()
                ),
            ),
            "## Models on GPUs",
            "The step is one of 32 decoding requests of 1,000 tokens. Off: from published decode steps of the very same, mean and largest.",
            table(
                ("model", "GPUs", "basis", "step", "prefill", "KV", "off"),
                (
                    (
                        f"`{s.model.profile}`",
                        f"{s.tensor_parallel} x `{s.gpu.kind}`",
                        s.basis,
                        f"{1e3 * profiles.step_s(s.profile, decoding=32, context_tokens=1000):.1f} ms",
                        f"{1 / s.profile.prefill_s_per_token:,.0f} tokens/s",
                        f"{s.profile.kv_tokens:,} tokens",
                        off([share for _, share in s.off])
                        or ("see the benchmarks" if s.basis == "published" else "unchecked"),
                    )
                    for s in every
                ),
            ),
            "## Bringing a model",
            "Seconds from sleep (level 1), from level 2, and to start a server whose files are in the page cache, on disk, on the network; and to put it to sleep.",
            table(
                ("model", "GPUs", "basis", "sleeping", "level 2", "page cache", "disk", "network", "to sleep"),
                (
                    (
                        f"`{s.model.profile}`",
                        f"{s.tensor_parallel} x `{s.gpu.kind}`",
                        s.tiers.basis,
                        *(
                            f"{seconds:.1f}"
                            for seconds in (
                                s.tiers.from_sleeping_s,
                                s.tiers.reload_s,
                                s.tiers.from_host_s,
                                s.tiers.from_disk_s,
                                s.tiers.from_remote_s,
                                s.tiers.to_sleeping_s,
                            )
                        ),
                    )
                    for s in every
                ),
            ),
            "## Against what was published",
            table(
                ("what", "off: mean, largest", "fitted to it", "source"),
                (step_row(entry) for entry in profiles.published("step")),
            ),
            table(
                ("requests at once", "published", "simulated", "off", "source"),
                (run_row(entry) for entry in profiles.published("run")),
            ),
        )
    )


def everywhere(model: profiles.Model) -> Iterator[profiles.Served]:
    """A model on each kind of GPU that can hold it."""
    for gpu in profiles.gpus().values():
        try:
            yield profiles.serve(model, gpu)
        except ConfigError:
            continue


def off(shares: list[float]) -> str:
    """Mean and largest of relative differences, without their signs."""
    sizes = [abs(share) for share in shares]
    return f"{sum(sizes) / len(sizes):.0%}, {max(sizes):.0%}" if sizes else ""


def about(entry: Any) -> profiles.Served:
    """The profile of what a published entry is about."""
    model, gpu = profiles.models()[entry["model"]], profiles.gpus()[entry["gpu"]]
    return profiles.serve(model, gpu, tensor_parallel=entry["tensor_parallel"])


def step_row(entry: Any) -> tuple[str, ...]:
    """One published series of decode steps."""
    profile, context = about(entry).profile, entry["context_tokens"]
    shares = [
        profiles.step_s(profile, decoding=decoding, context_tokens=context) / seconds - 1
        for decoding, seconds in zip(entry["decoding"], entry["seconds"], strict=True)
    ]
    what = f"`{entry['model']}` on {entry['tensor_parallel']} x `{entry['gpu']}`, {', '.join(map(str, entry['decoding']))} decoding"
    return what, off(shares), "yes" if entry.get("calibrates") else "no", entry["source"]


def run_row(entry: Any) -> tuple[str, ...]:
    """One published benchmark, and what the simulated engine makes of it."""
    sizes = {key: entry[key] for key in ("requests", "prompt_tokens", "output_tokens")}
    own, seen = profiles.burst_tokens_per_s(about(entry).profile, **sizes), entry["tokens_per_s"]
    what = f"{entry['requests']} of {entry['prompt_tokens']} + {entry['output_tokens']} tokens, `{entry['model']}` on `{entry['gpu']}`"
    return what, f"{seen:,} tokens/s", f"{own:,.0f} tokens/s", f"{own / seen - 1:+.0%}", entry["source"]


def levels() -> str:
    """What a GPU does as its KV memory runs short."""
    does = {
        "normal": f"budgets may come to the GPU's factor times the KV memory, {elastic_kv.MAX_FACTOR:g} at most",
        "tight": "they may come to the KV memory: nothing new is promised that is not there",
        "paused": "and nothing new is granted on this GPU; what runs has the rest",
        "preempting": f"and the cheapest work is preempted, until {elastic_kv.LEAVE['preempting']:.0%} are in use",
    }

    def rows() -> Iterator[tuple[str, ...]]:
        for level, what in does.items():
            bounds = (f"{at[level]:.0%}" if level in at else "" for at in (elastic_kv.ENTER, elastic_kv.LEAVE))
            yield f"`{level}`", *bounds, what

    return table(("level", "from", "until below", "what is done"), rows())


def moves() -> str:
    """What each move between tiers does (`maestro_serving.weights.DOES`)."""
    words = {
        "fetch": "nothing yet: bring the weights to the node yourself",
        "read": "the files are read, which brings them into the page cache",
        "forget": "the page cache lets go of them",
        "start": "a server starts; it counts once it has answered a request",
        "sleep 1": "`/sleep?level=1`: weights go to host memory",
        "sleep 2": "`/sleep?level=2`: weights are dropped, the server lives",
        "wake": "`/wake_up`; from level 2 in three steps; it counts once it has answered a request",
        "stop": "the server ends; its files are brought into the page cache",
        "stop, forget": "the server ends, and the page cache lets go of its files",
    }

    def rows() -> Iterator[tuple[str, ...]]:
        for (was, to), does in weights.DOES.items():
            carries = "the weights" if weights.carried(was, to, 1) else "nothing"
            yield f"`{was}`", f"`{to}`", words[does], carries

    return table(("from", "to", "what is done", "bytes moved"), rows())


PARTS: Final = {
    "settings": settings,
    "moves": moves,
    "levels": levels,
    "constants": constants,
    "ageing": watched,
    "distances": distances,
    "commands": commands,
    "dependencies": dependencies,
    "features": features,
    "hardware": hardware,
    "hints": hints,
}


def generated(text: str) -> str:
    """The same page with its generated parts as they should be."""
    return PART.sub(lambda m: f"{m[1]}\n{PARTS[m[2]]()}\n\n{m[3]}", text)


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")
