"""`maestro simulate`: policies side by side, from files to a table; and from bad input to one clear line."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from maestro_agents.cli import main
from maestro_agents.cli.simulate import parsed_loads
from maestro_agents.cli.simulate.plays import Given, saturated_work_per_s, shuffled, workload_of
from maestro_agents.cli.simulate.tables import interval
from maestro_agents.errors import ConfigError
from maestro_agents.policy import POLICIES
from maestro_agents.simulator.workload import Workload, read, sample, work_s, write
from tests import scorer
from tests.test_score import assert_same

FLEET = """
[[gpu]]
kind = "a100-80g"
models = ["small"]

[[model]]
name = "small"
profile = "llama-3.1-8b"
slots = 4
"""
COLUMNS = (
    "app", "session_id", "task_id", "call_index", "role", "prev_role", "model", "input_tokens", "output_tokens", "parents",
    "start_s", "end_s",
)  # fmt: skip
TIMED = {"warmup_s", "window_s", "horizon_s", "wall_s", "decisions_per_s", "stages_per_wall_minute", "seed"}
"""What the figures of a play do not come from its events."""

Simulate = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet of one small engine, a trace of short dialogues, and a workload."""
    folder = tmp_path_factory.mktemp("simulate")
    (folder / "fleet.toml").write_text(FLEET)
    rng = random.Random(3)
    with gzip.open(folder / "sessions.csv.gz", "wt", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for task in range(200):
            app = ("tau2_airline", "moatless_v1")[task % 2]
            read_tokens = rng.randint(100, 900)
            for i in range(rng.randint(1, 4)):
                wrote = rng.randint(20, 300)
                table.writerow({
                    "app": app, "session_id": f"s{task}", "task_id": f"{app}{task}", "call_index": i, "role": "agent",
                    "prev_role": "", "model": "gpt", "input_tokens": read_tokens, "output_tokens": wrote,
                    "parents": i - 1 if i else "-", "start_s": "", "end_s": "",
                })  # fmt: skip
                read_tokens += wrote + 20
    given = Given(workload=folder / "sessions.csv.gz", fleet=folder / "fleet.toml", window_s=60.0)
    write(workload_of(given, 0, 1.0, 0.0, saturated_work_per_s(given, 0)), folder / "w.jsonl.gz")
    return folder


def done(*words: str) -> None:
    """The command, which ends well."""
    with pytest.raises(SystemExit) as end:
        main(["simulate", *words])
    assert end.value.code == 0


@pytest.fixture
def simulate(folder: Path, capsys: pytest.CaptureFixture[str]) -> Simulate:
    """The command with ``--json``, in this process alone."""

    def call(what: str, *options: str) -> Any:
        named = [] if "--fleet" in options else ["--fleet", str(folder / "fleet.toml")]
        done(str(folder / what), *named, "--jobs", "1", "--json", *options)
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command says of input that it refuses."""

    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["simulate", *words])
        assert end.value.code == 2
        said = capsys.readouterr().err.strip()
        assert "Traceback" not in said
        return said.splitlines()[-1]

    return call


# -- what comes out -----------------------------------------------------------------------------------------------------
def test_every_policy_plays_a_trace(simulate: Simulate) -> None:
    """Each policy by its name, on a workload composed of recorded sessions, gives a row with every figure."""
    options = [word for name in POLICIES for word in ("--policy", name)]
    found = simulate("sessions.csv.gz", *options, "--load", "1.0", "--seeds", "1", "--window", "40")
    assert [row["policy"] for row in found["rows"]] == list(POLICIES)
    assert {row["stages"] for row in found["rows"]} == {found["rows"][0]["stages"]}
    for row in found["rows"]:
        assert 0 <= row["slo"] <= 1
        assert row["unended"] == 0
        assert row["slowdown_mean"] >= 1
        assert row["kv_reserved_byte_s"] > 0
        assert row["decisions_per_s"] > 0
    assert found["label"] == "emulated"


def test_a_row_is_the_mean_over_its_seeds_with_students_interval(simulate: Simulate) -> None:
    """``slo`` is the mean of the seeds, ``slo_ci`` what SciPy calls the t interval, and differences are taken seed by seed."""
    found = simulate("w.jsonl.gz", "--policy", "fcfs", "--policy", "ours", "--load", "1.2", "--seeds", "3")
    fcfs, ours = found["rows"]
    values = [seed["completion_p50_s"] for seed in ours["by_seed"]]
    assert len(set(values)) == 3
    assert ours["completion_p50_s"] == pytest.approx(sum(values) / 3)
    expected = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert ours["completion_p50_s_ci"] == pytest.approx(expected)
    differences = [a["slo"] - b["slo"] for a, b in zip(ours["by_seed"], fcfs["by_seed"], strict=True)]
    assert ours["slo_above"]["fcfs"]["mean"] == pytest.approx(sum(differences) / 3)
    assert interval([0.5]) is None


def test_an_independent_script_counts_every_figure_of_the_table(simulate: Simulate, tmp_path: Path) -> None:
    """--events-out holds all plays; what a script that knows nothing of ours counts in it is what the rows say."""
    out = tmp_path / "events.jsonl.gz"
    found = simulate(
        "w.jsonl.gz", "--policy", "edf", "--policy", "ours", "--load", "0.7,1.3", "--burst", "2", "--seeds", "2",
        "--events-out", str(out),
    )  # fmt: skip
    plays = {
        (row["policy"], row["load"], row["burst"] or 0.0, seed["seed"]): seed
        for row in found["rows"]
        for seed in row["by_seed"]
    }
    seen = 0
    for head, events in scorer.plays(out):
        counted, _ = scorer.figures(head, events)
        own = plays[head["policy"], head["load"], head["burst"], head["seed"]]
        assert_same({k: float("nan") if v is None else v for k, v in own.items() if k not in TIMED}, counted)
        seen += 1
    assert seen == len(plays) == 12


def test_the_same_input_gives_the_same_events_byte_for_byte(simulate: Simulate, tmp_path: Path) -> None:
    """Twice the same, and in two processes as in one: the files of events are equal; another seed's is not."""
    files = [tmp_path / f"{n}.jsonl.gz" for n in range(4)]
    for path, more in zip(files, ([], [], ["--jobs", "2"], ["--first-seed", "5"]), strict=True):
        simulate(
            "w.jsonl.gz", "--policy", "ours", "--load", "0.9,1.1", "--seeds", "1", "--events-out", str(path), *more
        )
    first, *others = [path.read_bytes() for path in files]
    assert first == others[0] == others[1]
    assert first != others[2]
    assert sorted(tmp_path.iterdir()) == files  # nothing else is left


def test_load_is_offered_work_over_what_the_fleet_does_when_saturated(folder: Path) -> None:
    """A workload of load 0.8 offers exactly 0.8 of the measured work a second, stretched from a file or composed of a trace."""
    for name in ("w.jsonl.gz", "sessions.csv.gz"):
        given = Given(workload=folder / name, fleet=folder / "fleet.toml", window_s=300.0)
        per_s = saturated_work_per_s(given, 0)
        made = workload_of(given, 0, 0.8, 0.0, per_s)
        offered = sum(work_s(run.stages) for run in made.runs) / made.window_s
        assert offered == pytest.approx(0.8 * per_s)
    assert made.window_s == pytest.approx(300.0, rel=0.5)


def test_bursts_keep_the_mean_and_reach_their_load(folder: Path) -> None:
    """With --burst the same runs arrive, of which those in the burst come as often as a load of 2 has it."""
    given = Given(workload=folder / "sessions.csv.gz", fleet=folder / "fleet.toml", window_s=600.0)
    per_s = saturated_work_per_s(given, 0)
    steady, burst = (workload_of(given, 0, 0.8, to, per_s) for to in (0.0, 2.0))
    assert [run.run_id for run in steady.runs] == [run.run_id for run in burst.runs]
    assert steady.window_s == burst.window_s
    window_s = burst.window_s
    inside = [run for run in burst.runs if window_s / 2 <= run.at_s < window_s / 2 + window_s / 6]
    assert len(inside) / len(burst.runs) == pytest.approx(2.0 / 0.8 / 6, rel=0.15)
    assert all(a.at_s <= b.at_s < window_s for a, b in zip(burst.runs, burst.runs[1:], strict=False))


def test_seeds_of_a_workload_file_are_other_orders_of_its_runs() -> None:
    """Seed 0 is the file itself; another one has the same runs at the same moments, in another order."""
    first = sample()
    other = shuffled(first, 1)
    assert shuffled(first, 0) == first
    assert [run.at_s for run in other.runs] == [run.at_s for run in first.runs]
    assert sorted(run.run_id for run in other.runs) == sorted(run.run_id for run in first.runs)
    assert [run.run_id for run in other.runs] != [run.run_id for run in first.runs]


def test_horizon_and_slack_are_stated_with_the_figures(
    folder: Path, capsys: pytest.CaptureFixture[str], simulate: Simulate
) -> None:
    """Under the table and in the JSON: when play stops, how loose deadlines are, and that all of it is emulated."""
    found = simulate("w.jsonl.gz", "--policy", "fcfs", "--load", "0.5", "--seeds", "1")
    assert found["state"]["horizon_s"][0] > found["state"]["window_s"][0] > found["state"]["warmup_s"][0]
    assert found["state"]["slack_batch"][0] > found["state"]["slack_interactive"][0] > 1
    words = ["--fleet", str(folder / "fleet.toml"), "--policy", "fcfs", "--load", "0.5", "--seeds", "1", "--jobs", "1"]
    done(str(folder / "w.jsonl.gz"), *words)
    said = " ".join(capsys.readouterr().out.split())
    for words in ("emulated", "Horizon:", "Slack:", "fcfs", "play stops at", "inter-", "Jain"):
        assert words.lower() in said.lower()


def test_without_arguments_the_workload_of_the_package_is_played(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither file is needed to see a table: four emulated A100 play the sample."""
    done("--policy", "fcfs", "--load", "1", "--seeds", "1", "--jobs", "1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["workload"]["file"] is None
    assert found["fleet"]["engines"] == 4
    assert found["rows"][0]["slo"] > 0.5


def test_pictures_and_a_trace_to_look_at_are_written(simulate: Simulate, tmp_path: Path) -> None:
    """--plot draws with and without intervals, --trace-out writes JSON that Perfetto opens."""
    simulate(
        "w.jsonl.gz", "--policy", "fcfs", "--load", "0.8,1", "--burst", "1.5", "--seeds", "2", "--plot", str(tmp_path / "p.png")
    )  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "t.json.gz"
    simulate("w.jsonl.gz", "--policy", "ours", "--load", "0.8", "--seeds", "1", "--trace-out", str(out))
    assert {event["ph"] for event in json.loads(gzip.decompress(out.read_bytes()))["traceEvents"]} >= set("XCMbe")


def test_a_flood_and_an_outage_come_beyond_the_load(simulate: Simulate) -> None:
    """A tenant that floods sends its runs three times, the others as many as before; a lost cluster's stages are made again."""
    common = ["--policy", "ours", "--load", "0.8", "--seeds", "1"]
    plain, flood = (simulate("w.jsonl.gz", *common, *more)["rows"][0] for more in ([], ["--flood", "tenant-1:3"]))
    for name, tenant in plain["tenants"].items():
        if name != "tenant-1":
            assert flood["tenants"][name]["runs"] == tenant["runs"]
    assert flood["tenants"]["tenant-1"]["runs"] > 2 * plain["tenants"]["tenant-1"]["runs"]
    lost = simulate("w.jsonl.gz", *common, "--outage", "local:20:25")["rows"][0]
    assert lost["requeues"] > plain["requeues"] == 0
    assert lost["longest_wait_s"] >= 5


def test_predictions_of_a_trace_are_made_once_and_kept(simulate: Simulate, folder: Path, tmp_path: Path) -> None:
    """--foreseen makes the file where there is none and reads it from then on; stages then bring what was foreseen of them."""
    kept = tmp_path / "foreseen.jsonl.gz"
    common = ["--policy", "ours", "--load", "1.2", "--seeds", "1", "--window", "60"]
    learning = simulate("sessions.csv.gz", *common)["rows"][0]
    made = simulate("sessions.csv.gz", *common, "--foreseen", str(kept))["rows"][0]
    written_at = kept.stat().st_mtime_ns
    again = simulate("sessions.csv.gz", *common, "--foreseen", str(kept))["rows"][0]
    assert kept.stat().st_mtime_ns == written_at
    assert again["completion_p95_s"] == made["completion_p95_s"]
    assert made["kv_reserved_byte_s"] != learning["kv_reserved_byte_s"]
    given = Given(workload=folder / "sessions.csv.gz", fleet=folder / "fleet.toml", window_s=60.0, foreseen=kept)
    assert all(stage.foreseen for run in workload_of(given, 0, 1.2, 0.0, 5.0).runs for stage in run.stages)


def test_models_that_share_gpus_come_and_go(simulate: Simulate, tmp_path: Path) -> None:
    """A fleet that runs one of its two models at the start brings the other when a workload asks for it."""
    two = FLEET + '\n[[model]]\nname = "other"\nprofile = "qwen3-14b"\nslots = 4\n'
    (tmp_path / "two.toml").write_text(two.replace('models = ["small"]', 'host_ram_gb = 100\nmodels = ["small"]'))
    found = simulate(
        "sessions.csv.gz", "--fleet", str(tmp_path / "two.toml"), "--policy", "ours", "--load", "0.5", "--seeds", "1",
        "--window", "60", "--events-out", str(tmp_path / "e.jsonl"),
    )  # fmt: skip
    row = found["rows"][0]
    assert found["fleet"]["models"] == {"small": 1, "other": 0}
    assert row["cold_starts"] + row["wakes"] >= 1
    ((head, events),) = scorer.plays(tmp_path / "e.jsonl")
    assert {e["model"] for e in events["ready"]} == {"small", "other"}
    assert scorer.figures(head, events)[0]["cold_starts"] == row["cold_starts"]


# -- a user's own policy ------------------------------------------------------------------------------------------------
def test_a_users_own_policy_is_a_function_in_a_file(simulate: Simulate, tmp_path: Path) -> None:
    """FILE.py:NAME plays beside ours: one that copies FCFS does what FCFS does, and a whole Policy may be named too."""
    own = tmp_path / "mine.py"
    own.write_text(
        "from maestro_agents.policy import Policy, routing\n"
        "def order(ticket, prediction, now_s):\n    return ticket.pushed_at_s\n"
        "whole = Policy(order=order, cost=routing.round_robin)\n"
    )
    options = ["--policy", "fcfs", "--policy", f"{own}:order", "--policy", f"{own}:whole"]
    fcfs, copied, whole = simulate("w.jsonl.gz", *options, "--load", "1.3", "--seeds", "1")["rows"]
    assert copied["policy"] == f"{own}:order"
    assert copied["completion_p95_s"] == fcfs["completion_p95_s"] == whole["completion_p95_s"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def other(): pass", "has no 'order'"),
        ("order = 3", "has no function 'order'"),
        ("def order(ticket, prediction, now_s):\n    return 1 / 0", "ZeroDivisionError"),
        ("def order(ticket, prediction, now_s):\n    return None", "returned None"),
        ("def order(ticket):\n    return 0.0", "TypeError"),
        ("import nowhere_at_all", "nowhere_at_all"),
        ("def order(:", "SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_users_policy_is_told_as_theirs(
    refused: Callable[..., str], folder: Path, tmp_path: Path, code: str, says: str
) -> None:
    """One line with the file, the line or the error, and what an order is; never our traceback."""
    own = tmp_path / f"mine{abs(hash(code))}.py"
    own.write_text(code)
    files = [str(folder / "w.jsonl.gz"), "--fleet", str(folder / "fleet.toml")]
    said = refused(*files, "--policy", f"{own}:order", "--load", "1", "--seeds", "1", "--jobs", "1")
    assert says in said
    assert own.name in said


# -- wrong input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--policy", "fastest"], "no policy 'fastest': name one of ours, fcfs,"),
        (["--policy", "nowhere.py:order"], "there is no file nowhere.py"),
        (["--policy", "mine.py"], "which of its functions?"),
        (["--load", "1.2:0.5:0.1"], "FROM:TO:STEP"),
        (["--load", "0.5:1.2:0"], "FROM:TO:STEP"),
        (["--load", "0.5:1.2"], "FROM:TO:STEP"),
        (["--load", "nan"], "FROM:TO:STEP"),
        (["--load", "0"], "FROM:TO:STEP"),
        (["--load", "much"], "FROM:TO:STEP"),
        (["--burst", "0.5"], "bursts go from a mean load of 0.8"),
        (["--mix", "nothing"], "take one of support"),
        (["--tenants", "a=0"], "NAME=WEIGHT"),
        (["--flood", "tenant-1"], "TENANT:FACTOR"),
        (["--flood", "nobody:3", "--load", "1", "--seeds", "1", "--jobs", "1"], "cannot flood"),
        (["--outage", "local:9:3"], "CLUSTER:FROM:TO"),
        (["--outage", "elsewhere:3:9"], "there is no cluster 'elsewhere', only local"),
        (["--plot", "no/folder/p.png"], "there is no folder"),
        (["--plot", "p.doc"], "ends in .png"),
        (["--window", "0"], "seconds, from 1 on"),
        (["--trace-out", "t.json"], "--trace-out shows one play"),
        (["--calls", "calls.jsonl"], "are for a trace"),
        (["--fleet", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_wrong_options_are_one_line_that_says_what_is_right(
    refused: Callable[..., str], folder: Path, words: list[str], says: str
) -> None:
    """A name that is not there, a range that has nothing in it, a folder that is missing: each says what to give."""
    fleet = [] if "--fleet" in words else ["--fleet", str(folder / "fleet.toml")]
    assert says in refused(str(folder / "w.jsonl.gz"), *fleet, *words)


def test_a_fleet_without_the_workloads_model_is_told_which(
    refused: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    """Which models run nowhere, and which ones the fleet has."""
    (tmp_path / "other.toml").write_text(FLEET.replace('"small"', '"large"'))
    said = refused(str(folder / "w.jsonl.gz"), "--fleet", str(tmp_path / "other.toml"))
    assert "'small' run" in said
    assert "which has large" in said


def test_what_is_no_workload_is_told_so(refused: Callable[..., str], tmp_path: Path) -> None:
    """A file of something else is named with what was expected; one that is missing, too."""
    (tmp_path / "prose.txt").write_text("It was the best of times.\n")
    assert "begins no workload and no trace" in refused(str(tmp_path / "prose.txt"))
    assert "Name a workload or a trace" in refused(str(tmp_path / "missing.jsonl"))


def test_a_call_that_is_too_long_for_the_fleet_is_told_before_playing(
    refused: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    """A workload whose prompt fits no engine of its model is refused with both numbers."""
    import dataclasses

    first: Workload = read(folder / "w.jsonl.gz")
    run = first.runs[0]
    long = dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], prompt_tokens=10**7),))
    write(dataclasses.replace(first, runs=(long, *first.runs[1:])), tmp_path / "long.jsonl")
    said = refused(str(tmp_path / "long.jsonl"), "--fleet", str(folder / "fleet.toml"))
    assert f"run {run.run_id} has a call of" in said


def test_loads_are_a_range_or_a_list() -> None:
    """0.5:1.2:0.1 has eight values, both ends among them; a list keeps its order."""
    assert parsed_loads("0.5:1.2:0.1") == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]
    assert parsed_loads("1.1,0.4") == [1.1, 0.4]
    with pytest.raises(ConfigError):
        parsed_loads("0.1:9:0.00001")
