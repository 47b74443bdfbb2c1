"""Workloads: files that come back as they were, and what a composition promises of recorded sessions."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents.cli import main
from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError
from maestro_agents.simulator import sessions as recorded
from maestro_agents.simulator.compose import (
    BRANCHES,
    JOINED,
    MIXES,
    TASK_SHARE,
    Arrivals,
    Burst,
    Mix,
    arrival_times,
    compose,
    fan_out,
    flooded,
    read_arrivals,
    tuning_half,
)
from maestro_agents.simulator.sessions import Session, sessions
from maestro_agents.simulator.workload import (
    FORMAT,
    REFERENCE,
    Foreseen,
    Run,
    Stage,
    Workload,
    kind_of,
    read,
    sample,
    stretched,
    unloaded_s,
    work_s,
    write,
)

COLUMNS = (
    "app", "session_id", "task_id", "call_index", "role", "prev_role", "model", "input_tokens", "output_tokens", "parents",
    "start_s", "end_s",
)  # fmt: skip
APPS = ("tau2_airline", "tau_airline_v1", "ai_hospital", "moatless_v1", "captain_agent")
MIX = Mix(apps={"*": 1, "fanout_captain_agent": 1}, interactive={"moatless_v1": 0.4})


def rows(tasks: int = 60) -> list[dict[str, Any]]:
    """A trace of five apps: growing dialogues; the first one is timed, and the second solves the same tasks."""
    rng = random.Random(7)
    found: list[dict[str, Any]] = []
    for app in APPS:
        for task in range(tasks):
            task_id = f"airline_{task}" if "airline" in app else f"{app}_{task}"
            for session in range(2):
                length, now_s, read_tokens = rng.randint(2, 9), 0.0, rng.randint(200, 4000)
                for i in range(length):
                    wrote = rng.randint(1, 400)
                    gap_s = rng.choice((0.0, 0.0, 1.5, 700.0))
                    start_s = now_s + gap_s if i else 0.0
                    now_s = start_s + wrote * 0.02
                    timed = app == APPS[0]
                    found.append({
                        "app": app, "session_id": f"{task}/{session}", "task_id": task_id, "call_index": i,
                        "role": ("user", "agent")[i % 2], "prev_role": "", "model": "gpt", "input_tokens": read_tokens,
                        "output_tokens": wrote, "parents": i - 1 if i else "-",
                        "start_s": f"{start_s:.3f}" if timed else "", "end_s": f"{now_s:.3f}" if timed else "",
                    })  # fmt: skip
                    read_tokens += wrote + rng.randint(0, 50)
    return found


def written(path: Path, trace: Sequence[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(trace)
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("trace") / "sessions.csv.gz", rows())


@pytest.fixture(scope="module")
def of(trace: Path) -> list[Session]:
    return sessions(trace)


@pytest.fixture
def workload(of: list[Session]) -> Workload:
    return compose(of, mix=MIX, rate_per_s=0.5, window_s=600)


# -- files ------------------------------------------------------------------------------------------------------------

amounts = st.floats(0, 1e9, allow_subnormal=False)
words = st.text(min_size=1, max_size=12)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Any workload that a file can hold."""
    foreseen = st.builds(
        Foreseen, **{f.name: amounts for f in dataclasses.fields(Foreseen) if f.name != "basis"}, basis=words
    )
    kinds: list[tuple[Stage, ...]] = []
    for _ in range(draw(st.integers(1, 3))):
        made: list[Stage] = []
        for i in range(draw(st.integers(1, 5))):
            prompt_tokens = draw(st.integers(0, 10**6))
            shares = draw(st.integers(-1, i - 1))
            made.append(
                Stage(
                    role=draw(words),
                    model=draw(words),
                    prompt_tokens=prompt_tokens,
                    output_tokens=draw(st.integers(0, 10**6)),
                    after=tuple(draw(st.lists(st.integers(0, i - 1), unique=True))) if i else (),
                    gap_s=draw(amounts),
                    shares=shares,
                    shared_tokens=draw(st.integers(0, prompt_tokens)) if shares >= 0 else 0,
                    visit=draw(st.integers(0, 9)),
                    foreseen=draw(st.none() | foreseen),
                )
            )
        kinds.append(tuple(made))
    at = sorted(draw(st.lists(st.floats(0, 99, allow_subnormal=False), max_size=6)))
    return Workload(
        name=draw(words),
        runs=tuple(
            Run(
                run_id=f"r{i}",
                app=draw(words),
                session=draw(words),
                at_s=at_s,
                service_class=draw(st.sampled_from(ServiceClass)),
                deadline_s=draw(st.floats(0.001, 1e6)),
                stages=draw(st.sampled_from(kinds)),
                tenant=draw(st.just("default") | words),
                end_gap_s=draw(amounts),
            )
            for i, at_s in enumerate(at)
        ),
        warmup_s=draw(st.floats(0, 100)),
        window_s=100.0,
        horizon_s=draw(st.floats(100, 1e6)),
        source=draw(st.text(max_size=20)),
    )


@pytest.mark.parametrize("name", ["w.jsonl", "w.jsonl.gz"])
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Any workload comes back from its file equal in every field."""
    path = tmp_path_factory.mktemp("round") / name

    @settings(max_examples=60, deadline=None)
    @given(workload=workloads())
    def comes_back(workload: Workload) -> None:
        write(workload, path)
        assert read(path) == workload
        assert kind_of(path) == "workload"

    comes_back()


def test_the_same_workload_has_the_same_bytes(of: list[Session], tmp_path: Path) -> None:
    """Composing and writing twice gives one and the same file; another seed another one."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(compose(of, mix=MIX, rate_per_s=0.5, seed=seed), tmp_path / f"{name}.jsonl.gz")
    one, two, other = ((tmp_path / f"{name}.jsonl.gz").read_bytes() for name in "abc")
    assert one == two != other
    assert one[4:8] == b"\x00\x00\x00\x00"  # gzip's own time


def test_runs_of_one_session_hold_their_stages_once(of: list[Session], tmp_path: Path) -> None:
    """A run that repeats a session refers to the first, and both share one object after reading."""
    write(compose(of, mix=MIX, rate_per_s=1), path := tmp_path / "w.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    repeated = next(line for line in lines if "as" in line)
    runs = {run.run_id: run for run in read(path).runs}
    assert runs[repeated["id"]].stages is runs[repeated["as"]].stages


def edited(path: Path, number: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the object of one line of a workload file."""
    lines = path.read_text().splitlines()
    fields = json.loads(lines[number - 1])
    change(fields)
    path.write_text("\n".join([*lines[: number - 1], json.dumps(fields), *lines[number:]]) + "\n")


def stage(at: int, entry: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        fields["stages"][at][entry] = value

    return change


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (1, lambda f: f.update(maestro_workload=FORMAT + 1), "update maestro-agents"),
        (1, lambda f: f.update(window_s=0), "line 1: warmup_s <= window_s"),
        (1, lambda f: f.update(horizon_s=None), "line 1: horizon_s is None"),
        (1, lambda f: f.update(models=[]), "line 2: unknown model 0"),
        (1, lambda f: f.update(roles=[1]), "line 1: roles is no list of texts"),
        (2, lambda f: f.update(at=float("nan")), "line 2: NaN"),
        (2, lambda f: f.update(at=float("inf")), "line 2: Infinity"),
        (2, lambda f: f.update(at=1e6), "line 2: it arrives at 1000000.0"),
        (2, lambda f: f.update(deadline=-1), "line 2: deadline is -1"),
        (2, lambda f: f.update(deadline=0), "line 2: deadline is 0"),
        (2, lambda f: f.update(stages=[]), "line 2: a run has a list of stages"),
        (2, lambda f: f.update({"class": "gold"}), "line 2: class is 'gold'"),
        (2, lambda f: f.pop("app"), "line 2: app is None"),
        (2, stage(0, 0, 99), "line 2: unknown role 99"),
        (2, stage(0, 1, -1), "line 2: unknown model -1"),
        (2, stage(0, 2, -5), "line 2: prompt tokens of stage 0 is -5"),
        (2, stage(0, 3, 1.5), "line 2: output tokens of stage 0 is 1.5"),
        (2, stage(0, 3, True), "line 2: output tokens of stage 0 is True"),
        (2, stage(1, 5, [1]), "line 2: stage 1 comes after stage 1"),
        (2, stage(1, 5, 7), "line 2: stage 1 comes after stage 7"),
        (2, stage(1, 6, -0.5), "line 2: gap of stage 1 is -0.5"),
        (2, lambda f: f["stages"][1].append(0), "line 2: stage 1 is no array of 7, 9"),
        (2, lambda f: f["stages"][1].__setitem__(slice(7, None), [1, 0]), "line 2: stage 1 shares its beginning"),
        (2, lambda f: f["stages"][1].__setitem__(slice(7, None), [0, 10**6]), "line 2: stage 1 shares 1000000 tokens"),
        (3, lambda f: f.update(id="r0"), "line 3: run 'r0' stands twice"),
        (3, lambda f: f.update({"as": "r7"}), "line 3: it does the same as run 'r7'"),
        (4, lambda f: f.update(at=0.0), "line 4: it arrives at 0.0"),
    ],
)
def test_a_wrong_line_is_named(workload: Workload, tmp_path: Path, number: int, change: Any, said: str) -> None:
    """One error that says which line is wrong, and how."""
    path = tmp_path / "w.jsonl"
    write(dataclasses.replace(workload, runs=workload.runs[:5]), path)
    edited(path, number, change)
    with pytest.raises(ConfigError, match=r"w\.jsonl") as caught:
        read(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_off_is_refused(workload: Workload, tmp_path: Path) -> None:
    """Cut between lines, within a line, or within gzip: no workload with fewer runs comes of it."""
    write(workload, plain := tmp_path / "w.jsonl")
    lines = plain.read_bytes().splitlines(keepends=True)
    plain.write_bytes(b"".join(lines[:9]))
    with pytest.raises(ConfigError, match=f"after line 9 with 8 of {len(workload.runs)} runs"):
        read(plain)
    plain.write_bytes(b"".join(lines[:9])[:-20])
    with pytest.raises(ConfigError, match="line 9: no JSON"):
        read(plain)
    write(workload, zipped := tmp_path / "w.jsonl.gz")
    zipped.write_bytes(zipped.read_bytes()[:-2000])
    with pytest.raises(ConfigError, match="broken after line"):
        read(zipped)


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"[1]\n", b'{"a": 1}\n', b"a,b\n1,2\n", b"\xff\xfe\n", b"\x1f\x8bxx"]
)
def test_what_is_no_workload_is_refused(tmp_path: Path, content: bytes) -> None:
    """Neither read nor taken for anything else."""
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="x"):
        read(path)
    with pytest.raises(ConfigError, match="x"):
        kind_of(path)


def test_a_number_that_is_not_finite_is_not_written(workload: Workload, tmp_path: Path) -> None:
    """Nor does a file begin to exist."""
    broken = dataclasses.replace(workload, horizon_s=float("inf"))
    with pytest.raises(ConfigError, match="not finite"):
        write(broken, tmp_path / "w.jsonl")
    assert not list(tmp_path.iterdir())


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_both_kinds_of_trace_give_the_same_sessions(tmp_path: Path) -> None:
    """The CSV and the JSON lines of the same calls are the same sessions, gaps that were drawn included."""
    trace = [r for r in rows(6) if r["app"] in APPS[:3]]
    lines = [
        {
            **{name: r[name] for name in COLUMNS if name not in {"prev_role", "parents", "start_s", "end_s"}},
            "parents": [] if r["parents"] == "-" else [r["parents"]],
            "ts_start": 1e9 + float(r["start_s"]) if r["start_s"] else None,
            "ts_end": 1e9 + float(r["end_s"]) if r["end_s"] else None,
        }
        for r in trace
    ]
    calls = tmp_path / "calls.jsonl"
    calls.write_text("\n".join(map(json.dumps, lines)))
    table = written(tmp_path / "s.csv", trace)
    assert (kind_of(calls), kind_of(table)) == ("calls", "sessions")
    assert sessions(calls) == sessions(table)


def test_gaps_are_measured_where_they_can_be(of: list[Session]) -> None:
    """A timed gap is what was recorded, a minute at most; the others are drawn from those, of their kind."""
    measured = {c.gap_s for s in of for c in s.calls if c.timed and c.after}
    assert measured == {0.0, 1.5, recorded.MAX_GAP_S}
    drawn = Counter(c.gap_s for s in of for c in s.calls if not c.timed and c.after)
    assert set(drawn) == measured
    assert drawn[0.0] > drawn[1.5]
    assert all(c.gap_s == 0.0 for s in of for c in s.calls if not c.after)


def test_untimed_calls_of_a_trace_without_times_have_no_gap(tmp_path: Path) -> None:
    """Nothing is made up where nothing was measured."""
    found = sessions(written(tmp_path / "s.csv", [r for r in rows(3) if r["app"] != APPS[0]]))
    assert {c.gap_s for s in found for c in s.calls} == {0.0}


def test_a_conversation_shares_what_it_said_before(of: list[Session]) -> None:
    """A stage shares the last prompt of its role and its answer, less one token, where its own prompt is as long; else none."""
    for session in of[:50]:
        made = recorded.stages(session, lambda _: "small")
        for i, s in enumerate(made):
            before = [j for j in range(i) if made[j].role == s.role]
            assert s.visit == len(before)
            if not before or made[before[-1]].prompt_tokens > s.prompt_tokens:
                assert (s.shares, s.shared_tokens) == (-1, 0)
            else:
                last = made[before[-1]]
                assert s.shares == before[-1]
                assert s.shared_tokens == min(last.prompt_tokens + last.output_tokens, s.prompt_tokens - 1)


def test_a_prompt_that_is_sent_again_has_one_new_token() -> None:
    """What is computed at all is never nothing."""
    call = recorded.Call(role="r", prompt_tokens=500, output_tokens=9, after=(), gap_s=0, timed=False)
    again = dataclasses.replace(call, after=(0,))
    made = recorded.stages(Session(app="a", session_id="s", task_id="t", calls=(call, again)), str)
    assert [(s.shares, s.shared_tokens) for s in made] == [(-1, 0), (0, 499)]


def test_a_gap_is_drawn_from_those_of_its_kind(tmp_path: Path) -> None:
    """An agent that calls again had tools to wait for; the next agent's turn comes sooner."""
    base = {"app": "a", "task_id": "t", "model": "m", "input_tokens": 9, "output_tokens": 1, "parents": ""}
    roles, starts = ("x", "x", "y", "y", "x"), (0.0, 3.0, 4.5, 7.5, 9.0)  # each takes a second: 2 s again, 0.5 s next
    timed = [
        {**base, "session_id": "1", "call_index": i, "role": r, "start_s": at, "end_s": at + 1}
        for i, (r, at) in enumerate(zip(roles, starts, strict=True))
    ]
    untimed = [{**base, "session_id": "2", "call_index": i, "role": r} for i, r in enumerate(roles)]
    found = sessions(written(tmp_path / "s.csv", [*timed, *untimed]))
    assert [[c.gap_s for c in s.calls] for s in found] == [[0.0, 2.0, 0.5, 2.0, 0.5]] * 2
    assert [[c.timed for c in s.calls] for s in found] == [[True] * 5, [False] * 5]


def test_unknown_parents_are_the_call_before(tmp_path: Path) -> None:
    """Where nothing is said a run is a chain; several parents are all waited for; `-` begins with the session."""
    base = {
        "app": "a",
        "session_id": "s",
        "task_id": "t",
        "role": "r",
        "model": "m",
        "input_tokens": 9,
        "output_tokens": 1,
    }
    named = ("-", "", "-", "1 2", "77")
    found = sessions(
        written(tmp_path / "s.csv", [{**base, "call_index": i, "parents": p} for i, p in enumerate(named)])
    )
    assert [c.after for c in found[0].calls] == [(), (0,), (), (1, 2), (3,)]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("input_tokens", "-3", "line 4: input_tokens is '-3'"),
        ("output_tokens", "nan", "line 4: output_tokens is 'nan'"),
        ("call_index", "", "line 4: it has no call_index"),
        ("role", "", "line 4: it has no role"),
        ("start_s", "inf", "line 4: start_s is 'inf'"),
        ("parents", "x", "line 4: parents is 'x'"),
        ("parents", "5", "names itself or a later call"),
        ("call_index", "1", "a call_index twice"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, field: str, value: str, said: str) -> None:
    """One error that says which row is wrong, and how."""
    trace = next([r for r in rows(2) if r["session_id"] == s and r["app"] == APPS[1]] for s in ("0/0",))
    trace = [{**trace[0], "call_index": i, "parents": "-"} for i in range(6)]
    trace[2] |= {field: value}
    with pytest.raises(ConfigError) as caught:
        sessions(written(tmp_path / "s.csv", trace))
    assert said in str(caught.value)


def test_a_trace_without_a_column_is_refused(tmp_path: Path) -> None:
    """The missing columns are named."""
    path = tmp_path / "s.csv"
    path.write_text("app,session_id,input_tokens\na,b,1\n")
    with pytest.raises(ConfigError, match="no column task_id, call_index, role, model, output_tokens"):
        sessions(path)


# -- composition ------------------------------------------------------------------------------------------------------


def test_reported_and_tuning_seeds_share_no_task(of: list[Session]) -> None:
    """A task that policies were tuned on is in no reported workload, not in another app that solves it either."""
    task = {(s.app, s.session_id): s.task_id for s in of}
    drawn: dict[bool, set[str]] = {False: set(), True: set()}
    for seed in (0, 1, 99, 100, 101, 250):
        for run in compose(of, mix=MIX, rate_per_s=0.2, seed=seed).runs:
            app = run.app.removeprefix("fanout_")
            drawn[seed >= 100] |= {task[app, session] for session in run.session.split(JOINED)}
    assert not drawn[False] & drawn[True]
    assert all(tuning_half(t) for t in drawn[True])
    assert not any(tuning_half(t) for t in drawn[False])
    assert len(drawn[False] | drawn[True]) > 0.9 * len(set(task.values()))
    assert [tuning_half(t) for t in ("airline_0", "airline_1", "airline_2")] == [
        False,
        False,
        True,
    ]  # else what was tuned saw other tasks


def test_a_mix_for_tuning_takes_no_reported_seed(of: list[Session]) -> None:
    """And every other mix takes both."""
    with pytest.raises(ConfigError, match="its seeds begin at 100"):
        compose(of, mix=MIXES["tune-a"], rate_per_s=1, seed=99)
    assert compose(of, mix=MIXES["tune-a"], rate_per_s=1, seed=100).runs
    assert compose(of, mix=MIXES["support"], rate_per_s=1, seed=100).runs


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 199), rate=st.floats(0.02, 2), burst=st.none() | st.floats(0, 5))
def test_every_arrival_is_kept_and_the_rate_holds(
    of: list[Session], seed: int, rate: float, burst: float | None
) -> None:
    """So many runs as the rate promises, in order, in the window, with names of their own; a burst keeps the mean."""
    bursts = () if burst is None else (Burst(at_s=100, for_s=60, factor=burst),)
    found = compose(of, mix=MIX, rate_per_s=rate, seed=seed, window_s=600, bursts=bursts)
    assert len(found.runs) == round(rate * 600)
    at = [run.at_s for run in found.runs]
    assert at == sorted(at)
    assert 0 <= at[0] <= at[-1] < found.window_s
    assert len({run.run_id for run in found.runs}) == len(at)


def test_deadlines_are_of_the_app_and_class_alone(of: list[Session]) -> None:
    """The same in every run of app and class, whatever the seed, the rate and the half of the tasks."""
    deadlines: defaultdict[tuple[str, str], set[float]] = defaultdict(set)
    for seed, rate in ((0, 1.0), (1, 0.3), (100, 1.0)):
        for run in compose(of, mix=MIX, rate_per_s=rate, seed=seed).runs:
            deadlines[run.app, run.service_class].add(run.deadline_s)
    assert len(deadlines) == len(APPS) + 2  # one app in both classes, and its fan-outs of another
    assert all(len(found) == 1 for found in deadlines.values())
    of_app = [unloaded_s(recorded.stages(s, str)) for s in of if s.app == "ai_hospital"]
    (deadline_s,) = deadlines["ai_hospital", "interactive"]
    assert sum(3 * t <= deadline_s for t in of_app) == pytest.approx(len(of_app) / 2, abs=1)
    (person,), (nobody,) = deadlines["moatless_v1", "interactive"], deadlines["moatless_v1", "batch"]
    assert nobody == pytest.approx(2 * person, abs=0.01)


def test_the_horizon_lets_every_run_meet_its_deadline(workload: Workload) -> None:
    """Play goes on for the longest deadline after the last possible arrival."""
    assert workload.horizon_s == workload.window_s + max(run.deadline_s for run in workload.runs)


def test_sessions_are_reused_evenly(of: list[Session]) -> None:
    """Within an app no task is drawn twice more than another, nor is any session of it."""
    found = compose(of, mix=Mix(apps={"*": 1}), rate_per_s=2, seed=5)
    task = {(s.app, s.session_id): s.task_id for s in of}
    for app in APPS:
        uses = Counter(run.session for run in found.runs if run.app == app)
        tasks = Counter(task[app, run.session] for run in found.runs if run.app == app)
        assert max(tasks.values()) - min(tasks.values()) <= 1
        assert max(uses.values()) - min(uses.values()) <= 1
        assert len(uses) == sum(s.app == app and not tuning_half(s.task_id) for s in of)


def test_a_rare_app_is_not_repeated_over_and_over(of: list[Session]) -> None:
    """However heavy an app weighs, its tasks make no more than their share of the runs where others can fill in."""
    rare = [s for s in of if s.app != "moatless_v1" or s.task_id in {f"moatless_v1_{i}" for i in range(8)}]
    found = compose(rare, mix=Mix(apps={"moatless_v1": 50, "*": 1}), rate_per_s=2, seed=0)
    tasks = Counter(s.task_id for s in rare if s.app == "moatless_v1" and not tuning_half(s.task_id))
    share = sum(run.app == "moatless_v1" for run in found.runs) / len(found.runs)
    assert share == pytest.approx(TASK_SHARE * len(tasks), abs=0.01)


def test_another_rate_plays_the_same_runs(of: list[Session]) -> None:
    """At a higher rate the same runs come in the same order, sooner, and more follow."""
    few = compose(of, mix=MIX, rate_per_s=0.2, seed=1)
    many = compose(of, mix=MIX, rate_per_s=0.4, seed=1)
    assert len(few.runs) * 2 == len(many.runs)
    for a, b in zip(few.runs, many.runs, strict=False):
        assert dataclasses.replace(a, at_s=0, tenant="") == dataclasses.replace(b, at_s=0, tenant="")


def test_recorded_arrivals_keep_their_rhythm() -> None:
    """A stretch of the recording, scaled: the longest silence stays as much longer than the mean as it was."""
    recording = Arrivals(name="r", at=(0.0, 1.0, 2.0, 12.0, 13.0, 14.0))
    at = arrival_times(60, 600.0, random.Random(1), recording)
    silences = [b - a for a, b in pairwise(at)]
    assert max(silences) / min(silences) == pytest.approx(10.0, rel=1e-3)
    assert at[0] == 0.0
    assert 600.0 - max(silences) - 1e-3 <= at[-1] < 600.0


def test_a_burst_brings_its_factor_of_the_mean(of: list[Session]) -> None:
    """In its time the rate is the factor times the mean of the whole window, outside evenly less."""
    found = compose(of, mix=MIX, rate_per_s=5, window_s=3600, bursts=[Burst(at_s=1800, for_s=600, factor=2)])
    within = sum(1800 <= run.at_s < 2400 for run in found.runs)
    before = sum(run.at_s < 1800 for run in found.runs)
    assert within / 600 == pytest.approx(10.0, rel=0.05)
    assert before / 1800 == pytest.approx(5 * (3600 - 1200) / 3000, rel=0.05)


@pytest.mark.parametrize(
    "bursts",
    [
        [Burst(at_s=0, for_s=500, factor=2)],
        [Burst(at_s=500, for_s=200, factor=2)],
        [Burst(at_s=0, for_s=100, factor=2), Burst(at_s=50, for_s=100, factor=2)],
        [Burst(at_s=-1, for_s=100, factor=2)],
    ],
)
def test_bursts_that_cannot_be_are_refused(of: list[Session], bursts: list[Burst]) -> None:
    """More than all runs, beyond the window, one in another."""
    with pytest.raises(ConfigError, match="bursts must lie apart"):
        compose(of, mix=MIX, rate_per_s=1, window_s=600, bursts=bursts)


def test_long_sessions_are_left_out_and_counted(of: list[Session]) -> None:
    """No run has a prompt and answer longer than the model takes, and the source says how many sessions that cost."""
    found = compose(of, mix=MIX, rate_per_s=1, max_model_tokens=4000)
    assert max(s.prompt_tokens + s.output_tokens for run in found.runs for s in run.stages) <= 4000
    out = sum(s.longest > 4000 for s in of)
    assert 0 < out < len(of)
    assert f"{out} of {len(of)} sessions left out" in found.source


def test_a_fan_out_runs_its_branches_beside_each_other(workload: Workload) -> None:
    """Between a planner's call and a joining one each of 2 to 6 sessions of different tasks waits for nothing but its own."""
    fans = [run for run in workload.runs if run.app == "fanout_captain_agent"]
    assert fans
    for run in fans:
        first, *inner, last = run.stages
        begun = [s for s in inner if s.after == (0,)]
        assert BRANCHES[0] <= len(begun) <= BRANCHES[1]
        assert len(begun) == len(run.session.split(JOINED)) - 1 == len(set(last.after))
        assert len({name.split("/")[0] for name in run.session.split(JOINED)}) == len(begun) + 1
        assert first.after == ()
        assert last.prompt_tokens == first.prompt_tokens + sum(run.stages[i].output_tokens for i in last.after)
        assert unloaded_s(run.stages) < sum(s.gap_s for s in run.stages) + work_s(run.stages)


def test_what_was_foreseen_reaches_the_stages(of: list[Session]) -> None:
    """Each stage carries its call's prediction; in a fan-out what remains counts all branches and the join."""

    def said(at: int, length: int) -> Foreseen:
        left = length - 1 - at
        return Foreseen(
            output_tokens_mean=10, output_tokens_p50=9, output_tokens_p90=20, output_tokens_p99=30, stages=left,
            output_tokens=10 * left, prompt_tokens=100 * left, tool_s=left, ends_p=float(not left),
        )  # fmt: skip

    foreseen = {(s.app, s.session_id): [said(i, len(s.calls)) for i in range(len(s.calls))] for s in of}
    found = compose(of, mix=MIX, rate_per_s=0.5, foreseen=foreseen)
    for run in found.runs:
        last = run.stages[-1].foreseen
        assert last is not None
        assert (last.stages, last.ends_p) == (0, 1.0)
        if not run.app.startswith("fanout"):
            assert [s.foreseen for s in run.stages] == foreseen[run.app, run.session]
    call = Stage(role="a:b", model="m", prompt_tokens=100, output_tokens=5, foreseen=said(0, 2))
    chain = (call, dataclasses.replace(call, after=(0,), foreseen=said(1, 2)))
    made = fan_out("fanout_a", chain, [chain] * 4, str)
    assert [s.foreseen and s.foreseen.stages for s in made] == [9, *[5, 1] * 4, 0]
    assert [s.foreseen and s.foreseen.output_tokens for s in made] == [90, *[50, 10] * 4, 0]
    wordy = fan_out("fanout_a", chain, [[chain[0], dataclasses.replace(chain[1], output_tokens=900)]] * 4, str)
    assert [s.foreseen for s in wordy] == [s.foreseen for s in made]  # nothing that nobody could know


def test_models_share_the_work_with_a_heavy_tail(of: list[Session]) -> None:
    """Each role has one model, and the first model gets the most to do."""
    models = ("a", "b", "c")
    found = compose(of, mix=MIX, rate_per_s=1, models=models)
    of_role: defaultdict[str, set[str]] = defaultdict(set)
    work: Counter[str] = Counter()
    for run in found.runs:
        for s in run.stages:
            of_role[s.role].add(s.model)
            work[s.model] += round(work_s([s]) * 1e6)
    assert all(len(names) == 1 for names in of_role.values())
    assert set(work) == set(models)
    assert work["a"] > work["c"]


def test_a_tenant_that_floods_leaves_the_others_as_they_were(workload: Workload) -> None:
    """It sends five times its runs; every other run stays, at its moment."""
    found = flooded(workload, "tenant-2", 5)
    own = sum(run.tenant == "tenant-2" for run in workload.runs)
    assert sum(run.tenant == "tenant-2" for run in found.runs) == 5 * own
    assert [r for r in found.runs if r in set(workload.runs)] == list(workload.runs)
    assert [r.at_s for r in found.runs] == sorted(r.at_s for r in found.runs)
    with pytest.raises(ConfigError, match="cannot flood"):
        flooded(workload, "nobody", 2)


def test_a_stretched_workload_has_the_same_runs_further_apart(workload: Workload, tmp_path: Path) -> None:
    """Half the load: twice the time between arrivals, the same stages and deadlines, as much time after the window."""
    found = stretched(workload, 2.0)
    assert [r.at_s for r in found.runs] == [2 * r.at_s for r in workload.runs]
    assert [(r.stages, r.deadline_s) for r in found.runs] == [(r.stages, r.deadline_s) for r in workload.runs]
    assert (found.window_s, found.warmup_s) == (2 * workload.window_s, 2 * workload.warmup_s)
    assert found.horizon_s - found.window_s == pytest.approx(workload.horizon_s - workload.window_s)
    write(found, tmp_path / "w.jsonl")
    assert read(tmp_path / "w.jsonl") == found
    with pytest.raises(ConfigError, match="above 0"):
        stretched(workload, 0)


def test_unloaded_time_follows_the_critical_path() -> None:
    """Gaps and calls along the longest way; work counts every call, and tokens that are shared cost no prefill."""
    call = Stage(role="r", model="m", prompt_tokens=1000, output_tokens=50)
    made = (
        call,
        dataclasses.replace(call, after=(0,), gap_s=2.0),
        dataclasses.replace(call, after=(0,), shares=0, shared_tokens=900),
        dataclasses.replace(call, after=(1, 2)),
    )
    each_s, shared_s = (
        1000 * REFERENCE.prefill_s + 50 * REFERENCE.decode_s,
        100 * REFERENCE.prefill_s + 50 * REFERENCE.decode_s,
    )
    assert unloaded_s(made) == pytest.approx(3 * each_s + 2.0)
    assert work_s(made) == pytest.approx(3 * each_s + shared_s)


def test_a_trace_of_unknown_apps_can_be_played(of: list[Session]) -> None:
    """`everything` takes whatever apps a trace has, half of their runs interactive; other mixes say what is missing."""
    other = [dataclasses.replace(s, app="billing") for s in of]
    found = compose(other, mix=MIXES["everything"], rate_per_s=1)
    person = sum(run.service_class is ServiceClass.INTERACTIVE for run in found.runs)
    assert person / len(found.runs) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ConfigError, match="it has billing"):
        compose(other, mix=MIXES["coding"], rate_per_s=1)


@pytest.mark.parametrize(
    ("content", "said"), [("x\n1\n", "no column t_s"), ("t_s\n1\n0\n", "line 3"), ("t_s\n", "no two")]
)
def test_wrong_arrivals_are_named(tmp_path: Path, content: str, said: str) -> None:
    """No column, not in order, nothing in it."""
    (path := tmp_path / "a.csv").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_arrivals(path)


# -- the sample, the command, the recorded data ---------------------------------------------------------------------------


def test_the_sample_holds_numbers_of_what_may_ship() -> None:
    """Small, of the apps whose licence allows it, and playable: every class and fan of stages is in it."""
    found = sample()
    assert 250 <= len(found.runs) <= 350
    apps = {run.app for run in found.runs}
    assert len(apps) >= 8
    assert not apps & {"auto_code_rover", "swe_agent", "chatdev"}
    assert {run.service_class for run in found.runs} == set(ServiceClass)


def test_the_command_composes_a_file_and_describes_it(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--json` says of the composition is what it says of the file, and the table is for people."""
    arrivals = tmp_path / "a.csv"
    arrivals.write_text("t_s\n" + "\n".join(str(i * i) for i in range(50)))
    out = tmp_path / "w.jsonl.gz"
    words = [
        "workload",
        str(trace),
        "--mix",
        "everything",
        "--arrivals",
        str(arrivals),
        "--rate",
        "0.5",
        "--window",
        "600",
    ]
    words += ["--burst", "300:60:2", "--models", "a,b", "--deadlines", "2,4", "--seed", "3", "-o", str(out)]
    for extra in (["--json"], []):
        with pytest.raises(SystemExit) as ended:
            main([*words, *extra])
        assert not ended.value.code
    text = capsys.readouterr().out
    made = json.loads(text.splitlines()[0])
    assert (made["runs"], made["rate_per_s"]) == (300, 0.5)
    assert "written to" in text
    assert "tool gaps not timed" in text
    with pytest.raises(SystemExit):
        main(["workload", str(out), "--json"])
    again = json.loads(capsys.readouterr().out)
    drawn = [row.pop("drawn_gaps") for row in made["apps"]]
    assert set(drawn) == {0.0, 1.0}
    assert [row.pop("drawn_gaps") for row in again["apps"]] == [None] * len(drawn)
    assert again | {"file": made["file"]} == made


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--mix", "nothing"], "--mix 'nothing': take one of support"),
        (["--burst", "1:2"], "--burst '1:2': give AT:FOR:FACTOR"),
        (["--deadlines", "3"], "--deadlines '3': give INTERACTIVE,BATCH"),
        (["--rate", "0"], "make no run"),
        (["--rate", "nan"], "make no run"),
        (["--warmup", "9999"], "the window is the longer"),
        (["--arrivals", "missing.csv"], "missing.csv: No such file"),
        (["--mix", "tune-b"], "it is for tuning"),
        (["-o", "nowhere/w.jsonl"], "there is no folder"),
    ],
)
def test_the_command_says_what_is_wrong(
    trace: Path, capsys: pytest.CaptureFixture[str], extra: list[str], said: str
) -> None:
    """One line on stderr, exit status 2."""
    with pytest.raises(SystemExit) as ended:
        main(["workload", str(trace), *extra])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_the_recorded_traces_compose(shared_data: Path) -> None:
    """On the real sessions: every mix, both halves, no session of the model's length lost, arrivals of the recordings."""
    found = sessions(shared_data / "traces" / "sessions.csv.gz")
    arrivals = read_arrivals(shared_data / "arrivals" / "mooncake_conversation.csv.gz")
    assert len(found) > 2000
    for name, mix in MIXES.items():
        made = compose(found, mix=mix, name=name, rate_per_s=0.25, seed=100 if mix.tuning else 0, arrivals=arrivals)
        assert len(made.runs) == 900
        assert {run.app for run in made.runs} >= set(mix.apps) - {"*"}
        tasks = Counter(run.session for run in made.runs)
        assert max(tasks.values()) / len(made.runs) <= 2 * TASK_SHARE
