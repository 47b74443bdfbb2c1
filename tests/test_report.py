"""`maestro report`: from a program that was really run in mode observe to the figures, and from bad input to one clear line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

from maestro_agents.cli import main, report
from maestro_agents.cli.report_figures import Material, bootstrap, final_runs, gained, measured, read_files
from maestro_agents.core import Observation, RunEnd, ServiceClass, Status
from maestro_agents.queue.redis import RedisQueue
from maestro_langgraph import maestro
from tests.stub_openai import StubServer, managed, stub_servers
from tests.test_replay import T0, first_come, seen_in, world

RUNS = 12


def two_calls(url: str) -> Any:
    """A graph of two calls, one after the other."""
    llm = ChatOpenAI(model="stub", base_url=url, api_key="k", max_retries=0)

    def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("first", ask)
    graph.add_node("second", ask)
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    graph.add_edge("second", END)
    return graph.compile()


def serve(app: Any, runs: int) -> None:
    for n in range(runs):
        with maestro.options(service_class="batch" if n % 3 else "interactive", deadline_s=20):
            app.invoke({"messages": [("user", f"question {n}")]})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What MAESTRO_EVENTS wrote of a real program: 12 runs only observed, then 12 that Maestro served."""
    folder = tmp_path_factory.mktemp("recorded")
    events = folder / "events.jsonl"
    with stub_servers(2) as servers:
        app = two_calls(servers[0].url)
        with managed(folder, {}, mode="observe", events=events):
            serve(maestro.wrap(app), RUNS)
        _served_by(servers[0], 2 * RUNS)
        with managed(folder, {"a": servers[0].url, "b": servers[1].url}, events=events):
            serve(maestro.wrap(app), RUNS)
    return events


def _served_by(server: StubServer, n: int) -> None:
    assert len(server.requests) == n, "observed calls go where they were going"


def cli(*words: str | Path) -> None:
    """A command that ends well."""
    with pytest.raises(SystemExit) as e:
        main([str(word) for word in words])
    assert e.value.code == 0


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """The report as JSON."""
    cli("report", *words, "--json")
    return json.loads(capsys.readouterr().out)


def write(path: Path, entries: list[Observation | RunEnd]) -> Path:
    """As the events file is written."""
    lines = [{"kind": "run" if isinstance(e, RunEnd) else "stage", **json.loads(e.encode())} for e in entries]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def busy(**options: Any) -> list[Observation | RunEnd]:
    """A record of engines that were too few."""
    was = world(1, rate_per_s=3.0, slots=3)
    return seen_in(was, first_come(was), **options)


# -- of a real program -----------------------------------------------------------------------------------------------------
def test_a_program_that_really_ran_is_counted(recorded, capsys):
    """Runs and calls of each side and class, their roles and tokens, as many as were made."""
    seen = told(capsys, recorded)["measured"]
    assert (seen["runs"], seen["calls"], seen["runs_without_end"]) == (2 * RUNS, 4 * RUNS, 0)
    for side in ("observed", "managed"):
        sides = [c[side] for c in seen["classes"].values()]
        assert [s["runs"] for s in sides] == [4, 8]
        assert [s["in_time"] for s in sides] == [4, 8]
        assert [s["calls"] for s in sides] == [8, 16]
    assert seen["managed_share"] == 0.5
    assert {(r["role"].rpartition(":")[2], r["class"]): r["calls"] for r in seen["roles"]} == {
        ("first", "batch"): 16, ("second", "batch"): 16, ("first", "interactive"): 8, ("second", "interactive"): 8,
    }  # fmt: skip
    assert all(r["output_tokens"] > 0 and r["latency_s"]["p50"] > 0 and not r["errors"] for r in seen["roles"])


def test_what_only_one_side_did_is_replayed_as_that_side(recorded, tmp_path, capsys):
    """Of observed runs the estimate is what Maestro would do; of managed ones, what it did."""
    lines = recorded.read_text().splitlines(keepends=True)
    for was, wanted in (("fcfs", True), ("maestro", False)):
        mine = tmp_path / f"{was}.jsonl"
        mine.write_text("".join(line for line in lines if ('"observed":true' in line) is wanted))
        gain = told(capsys, mine)["gain"]
        assert gain["was"] == was
        assert sum(c["observed"]["runs"] for c in gain["classes"].values()) == RUNS


def test_the_page_says_it_in_words(recorded, tmp_path, capsys):
    """For people: the tables, the estimate in one sentence a class, and what was assumed."""
    picture = tmp_path / "report.png"
    cli("report", recorded, "-o", picture)
    page = capsys.readouterr().out
    assert f"{2 * RUNS} runs, {4 * RUNS} calls" in page
    assert "interactive runs in time: 4/4 observed, about 4/4 under Maestro" in page
    assert "the replay's own error on what was observed" in page
    assert "Assumed:" in page
    assert picture.stat().st_size > 10_000


def test_the_log_in_redis_and_the_file_are_one_record(recorded, redis_url, capsys):
    """What stands in both is counted once."""
    entries = read_files([recorded]).entries

    async def fill() -> None:
        queue = RedisQueue(redis_url, pool="report-test")
        for e in entries[:20]:
            await (queue.end_run(e) if isinstance(e, RunEnd) else queue.observe(e))
        await queue.close()

    asyncio.run(fill())
    alone = told(capsys, "--redis-url", redis_url, "--pool", "report-test")
    assert alone["measured"]["calls"] == sum(isinstance(e, Observation) for e in entries[:20])
    both = told(capsys, recorded, "--redis-url", redis_url, "--pool", "report-test")
    assert both["read"]["doubled"] == 20
    assert both["measured"]["calls"] == 4 * RUNS


def test_the_events_file_of_the_settings_is_the_default(recorded, monkeypatch, capsys):
    """Where the app wrote is where the report reads."""
    monkeypatch.setenv("MAESTRO_EVENTS", str(recorded))
    assert told(capsys)["measured"]["runs"] == 2 * RUNS


# -- figures ---------------------------------------------------------------------------------------------------------------
def test_a_fleet_that_was_too_small_has_something_to_gain(tmp_path, capsys):
    """More interactive runs in time, said with the replay's own error, which is small here."""
    found = told(capsys, write(tmp_path / "e.jsonl", busy()))
    gain = found["gain"]
    interactive = gain["classes"]["interactive"]
    assert interactive["maestro"]["in_time"] > interactive["observed"]["in_time"]
    assert gain["trusted"]
    assert gain["error"] < 0.02
    assert gain["waited_share"] > 0.2


def test_a_replay_that_is_off_says_that_it_is_not_to_be_trusted(tmp_path, capsys):
    """With slots that are not the engines', what happened does not come out again: the page says so."""
    file = write(tmp_path / "e.jsonl", busy())
    cli("report", file)
    assert "NOT TO BE TRUSTED" not in capsys.readouterr().out
    cli("report", file, "--slots", "1")
    assert "NOT TO BE TRUSTED" in capsys.readouterr().out


def test_engines_that_were_never_full_have_nothing_to_gain(tmp_path, capsys):
    """Where nobody waited the page does not promise anything."""
    was = world(rate_per_s=0.05)
    cli("report", write(tmp_path / "e.jsonl", seen_in(was, first_come(was))))
    assert "nothing to gain" in capsys.readouterr().out


def test_in_flight_adds_up_to_the_time_that_calls_took():
    """The columns are means over equal stretches: times their width, they are all the calls' seconds."""
    entries = busy()
    flight = measured(entries)["in_flight"]
    took = sum(e.finished_at_s - e.pushed_at_s for e in entries if isinstance(e, Observation))
    assert sum(flight["mean"]) * flight["bucket_s"] == pytest.approx(took, rel=1e-3)
    assert flight["peak"] >= max(flight["mean"])


def test_the_interval_holds_the_difference_and_is_the_same_twice():
    """Equal sides differ by nothing within it; sides that differ much, by more."""
    same = bootstrap([1, 0] * 50, [1, 0] * 50, lambda v: sum(v) / len(v))
    assert same["low"] < 0 < same["high"]
    assert same["value"] == 0
    apart = bootstrap([1] * 45 + [0] * 5, [1] * 5 + [0] * 45, lambda v: sum(v) / len(v))
    assert apart["value"] == pytest.approx(0.8)
    assert 0.5 < apart["low"] < 0.8 < apart["high"] < 1
    assert apart == bootstrap([1] * 45 + [0] * 5, [1] * 5 + [0] * 45, lambda v: sum(v) / len(v))


def test_managed_and_observed_runs_side_by_side_are_compared_with_an_interval(tmp_path, capsys):
    """A rollout of some percent is a live comparison: the difference comes with its interval and the method."""
    entries = busy()
    twin = [
        dataclasses.replace(e, stage_id=f"m{e.stage_id}", run_id=f"m{e.run_id}", observed=False)
        if isinstance(e, Observation)
        else dataclasses.replace(e, run_id=f"m{e.run_id}", observed=False, ended_at_s=e.started_at_s + 1.0)
        for e in entries
    ]
    file = write(tmp_path / "e.jsonl", [*entries, *twin])
    found = told(capsys, file)["measured"]["classes"]["interactive"]
    share = found["difference"]["in_time_share"]
    assert share["low"] > 0
    assert share["value"] == pytest.approx(1 - found["observed"]["in_time"] / found["observed"]["runs"])
    cli("report", file)
    assert "bootstrap" in capsys.readouterr().out


def test_since_keeps_the_runs_of_the_last_while(tmp_path, capsys):
    """Counted from the newest record, so that yesterday's file can be read today; a run is kept whole or not at all."""
    entries = busy()
    runs = [e for e in entries if isinstance(e, RunEnd)]
    since_s = max(e.ended_at_s for e in runs) - runs[20].started_at_s + 0.01
    wanted = {e.run_id for e in runs[20:]}
    found = told(capsys, write(tmp_path / "e.jsonl", entries), "--since", f"{since_s:.2f}s")
    assert found["measured"]["runs"] == len(wanted)
    assert found["measured"]["calls"] == 7 * len(wanted)


def test_failed_and_cancelled_runs_count_as_missed(tmp_path):
    """A run that ended in an error met no deadline, in no replay either; its calls are load like any other."""
    entries = [
        dataclasses.replace(e, outcome="error") if isinstance(e, RunEnd) and n % 2 else e for n, e in enumerate(busy())
    ]
    ended = final_runs(entries)
    gain = asyncio.run(gained(entries))
    for c in ServiceClass:
        well = sum(r.outcome == "done" for r in ended if r.service_class is c)
        assert gain["classes"][c.value]["maestro"]["in_time"] <= well
    calls = [dataclasses.replace(e, status=Status.FAILED) if isinstance(e, Observation) else e for e in entries]
    assert sum(r["errors"] for r in measured(calls)["roles"]) == 280


# -- bad input -------------------------------------------------------------------------------------------------------------
def test_lines_that_are_no_records_are_left_out_and_counted(tmp_path, capsys):
    """Cut in the middle, no JSON, unknown kinds, numbers that are none: the others count, the first bad one is named."""
    file = write(tmp_path / "e.jsonl", busy())
    good = file.read_text().splitlines()
    bad = [
        good[0][:40], "{", "null", "[]", '{"kind": "stage"}', '{"kind": "run", "v": 1, "run_id": ""}', '{"kind": "dance"}',
        good[3].replace('"prompt_tokens": 100', '"prompt_tokens": "many"'),
        re.sub(r'"pushed_at_s": [0-9.]+', '"pushed_at_s": NaN', good[4]),
        good[5].replace('"status": "done"', '"status": "dun"'), "\xff",
    ]  # fmt: skip
    file.write_text("\n".join([good[0], *bad, "", *good[1:]]) + "\n", encoding="latin-1")
    found = told(capsys, file)
    assert found["read"]["bad_lines"] == len(bad)
    assert found["read"]["first_bad"].startswith("e.jsonl:2: ")
    assert (found["measured"]["runs"], found["measured"]["calls"]) == (40, 280)
    assert found["gain"]["trusted"]


@pytest.mark.parametrize(
    ("words", "content", "says"),
    [
        ((), None, "nothing to report on: name the file that MAESTRO_EVENTS wrote, or give --redis-url"),
        (("gone.jsonl",), None, "gone.jsonl: No such file"),
        (("e.jsonl",), "", "nothing was recorded: run the app with MAESTRO_MODE=observe"),
        (("e.jsonl",), "hello\n{\n", "2 lines are no records, the first e.jsonl:1"),
        (("e.jsonl", "--since", "yesterday"), "", "--since 'yesterday': a number and a unit"),
        (("e.jsonl", "--since", "0h"), "", "--since '0h'"),
        (("e.jsonl", "--fleet", "f.toml", "--slots", "4"), "", "give one of them"),
        (("e.jsonl", "--fleet", "f.toml"), "", "f.toml: there is no such file"),
        (("e.jsonl", "-o", "no/where.png"), "", "there is no folder no"),
        (("--redis-url", "redis://127.0.0.1:1/0"), None, "Redis"),
    ],
)
def test_wrong_input_is_one_clear_line(words, content, says, capsys):
    """What is wrong and what to do, on stderr, exit status 2."""
    if content is not None:
        Path("e.jsonl").write_text(content)
    with pytest.raises(SystemExit) as e:
        main(["report", *words])
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert says in error
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (lambda e: e.run_id in {"run0", "run1", "run2"}, "3 ended runs are too few"),
        (lambda e: isinstance(e, Observation), "0 ended runs are too few"),
        (lambda e: isinstance(e, RunEnd), "no call belongs to one of the runs"),
    ],
)
def test_too_little_is_measured_and_not_played_again(keep, says, tmp_path, capsys):
    """A few runs, calls without ends, ends without calls: what there is is counted, and nothing is promised."""
    entries = [e for e in busy() if keep(e)]
    file = write(tmp_path / "e.jsonl", entries)
    found = told(capsys, file)
    assert found["gain"] is None
    assert says in found["no_gain_because"]
    assert found["measured"]["calls"] == sum(isinstance(e, Observation) for e in entries)
    cli("report", file, "-o", tmp_path / "x.png")
    page = capsys.readouterr().out
    assert says in page
    assert "Nothing to draw" in page


def test_entries_in_any_order_give_the_same_report():
    """Several processes write one file: neither the measured nor the replayed depends on the order of the lines."""
    entries = busy()
    one = report.figures(Material(entries=entries))
    assert report.figures(Material(entries=entries[::-1])) == one
    assert one["measured"]["from_s"] >= T0


# -- the bench -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_maestro_keeps_what_the_report_promises(capsys):
    """On the demo's fleet: the replay gives what was observed, and what it promises of Maestro comes about."""
    cli("bench", "observe", "--runs", "24", "--calls", "50", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["told"]["gain"]["trusted"]
    kept, promised = found["kept"]["interactive"], found["told"]["promised"]["interactive"]
    assert abs(kept["in_time"] - promised["in_time"]) <= 0.4 * kept["runs"]  # few runs, on whatever machine
    assert kept["p95_s"] == pytest.approx(promised["p95_s"], rel=0.5)
    assert found["cost"]["calls"] == 50
