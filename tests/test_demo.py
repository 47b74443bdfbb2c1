"""`maestro demo`: its workload, its counting, and (slow) the whole of it."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from maestro_agents import client
from maestro_agents.cli import demo, demo_input, demo_report
from maestro_agents.cli.demo_report import RunResult
from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CALLS = ROOT.parent / "shared" / "data" / "traces" / "calls.jsonl.gz"
CUSTOMER_APPS = ("tau2_retail", "tau_airline_v1")


# -- messages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"message": "late"}', "late"),
        ('{"input_text": " late \\n"}', "late"),
        ('{"text": "late", "id": 7}', "late"),
        ('"late"', "late"),
        ("My parcel is late", "My parcel is late"),
        ("17 of 20 are broken", "17 of 20 are broken"),
        (
            '{"messages": [{"role": "user", "content": "late"}, {"role": "assistant", "content": "sorry"}]}',
            "late",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "late"}, {"type": "image"}]}]}', "late"),
    ],
)
def test_every_shape_of_line_gives_its_message(tmp_path, line, message):
    """JSON objects, OpenAI conversations, JSON strings and plain text are all understood."""
    path = tmp_path / "in.jsonl"
    path.write_text(line + "\n")
    assert demo_input.read_messages(path, limit=10).texts == (message,)


def test_bad_lines_are_counted_and_the_first_is_named_by_its_number(tmp_path):
    """Blank lines are no lines; a bad one does not stop the reading."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\n{"message": "a"}\n{"message": \n["b"]\n{"text": ""}\n\xff\xfe\n"c"\n')
    found = demo_input.read_messages(path, limit=10)
    assert found.texts == ("a", "c")
    assert (found.bad, found.first_bad) == (4, "line 3: not JSON")


def test_a_gzip_file_is_unpacked_and_read_no_further_than_needed(tmp_path):
    """The first messages suffice: what stands behind them is not looked at."""
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(b'"a"\n"b"\n{bad\n'))
    assert demo_input.read_messages(path, limit=2) == demo_input.Messages(texts=("a", "b"), bad=0, first_bad="")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no message in it"), (b'{"no": 1}\n', "no message in it .line 1: no message in it"), (None, "No such file")],
)
def test_a_file_without_messages_is_one_clear_line(tmp_path, content, says):
    """Empty, useless or missing: the error names the file and what is wrong."""
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--input .*in.jsonl: {says}"):
        demo_input.read_messages(path, limit=10)


def test_a_broken_gzip_file_is_one_clear_line(tmp_path):
    """What only looks like gzip, and what was cut in the middle, are both told."""
    whole = gzip.compress(b'{"message": "a"}\n' * 1_000)
    for content in (b"not gzip", whole[: len(whole) // 2]):
        path = tmp_path / "in.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"--input .*in\.jsonl\.gz: "):
            demo_input.read_messages(path, limit=10_000)


# -- arrivals ------------------------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_arrivals_and_another_gives_others():
    """Both passes, and everybody's machine, see the same workload."""
    one = demo_input.arrivals(demo_input.MESSAGES, runs=40, seed=1)
    assert one == demo_input.arrivals(demo_input.MESSAGES, runs=40, seed=1)
    assert one != demo_input.arrivals(demo_input.MESSAGES, runs=40, seed=2)


def test_arrivals_come_in_order_in_both_classes_and_use_every_message_in_turn():
    """Moments never go back, and messages start again when they are used up."""
    found = demo_input.arrivals(("a", "b", "c"), runs=60, seed=3)
    assert [a.at_s for a in found] == sorted(a.at_s for a in found)
    assert [a.message for a in found[:4]] == ["a", "b", "c", "a"]
    assert {a.service_class for a in found} == set(ServiceClass)


def test_bursts_are_denser_than_calm_phases_by_their_rates():
    """Over a long time each phase has as many arrivals as its rate says."""
    counts = [0, 0]
    found = demo_input.arrivals(("a",), runs=20_000, seed=4)
    for a in found:
        counts[int(a.at_s / demo_input.PHASE_S) % 2] += 1
    cycles = found[-1].at_s / (2 * demo_input.PHASE_S)
    for count, rate in zip(counts, (demo_input.BURST_PER_S, demo_input.CALM_PER_S), strict=True):
        assert count / (cycles * demo_input.PHASE_S) == pytest.approx(rate, rel=0.05)


def test_emulated_lengths_are_the_same_for_the_same_prompt():
    """Both passes ask for the same answers; another prompt has another length."""
    assert demo.length_of("draft", "a") == demo.length_of("draft", "a")
    assert demo.length_of("draft", "a") != demo.length_of("draft", "b")
    assert demo.length_of("classify", "a")["min_tokens"] >= 1


# -- counting ------------------------------------------------------------------------------------------------------------
def result(policy: str, index: int, took_s: float, **changes: object) -> RunResult:
    """One run; an interactive one where nothing else is said."""
    given = {"service_class": ServiceClass.INTERACTIVE, "arrived_s": float(index), "deadline_s": 8.0, **changes}
    return RunResult(policy=policy, index=index, took_s=took_s, **given)  # type: ignore[arg-type]


RESULTS = (
    result("fcfs", 0, 4.0, waits_s=(0.0, 1.0)),
    result("fcfs", 1, 12.0, waits_s=(3.0, 5.0)),
    result("fcfs", 2, 3.0, error="Boom: no engine"),
    result("fcfs", 3, 30.0, service_class=ServiceClass.BATCH, deadline_s=90.0),
    result("ours", 0, 4.0),
    result("ours", 1, 8.0),
    result("ours", 2, 5.0),
    result("ours", 3, 40.0, service_class=ServiceClass.BATCH, deadline_s=90.0),
)
DEADLINES_S = {ServiceClass.INTERACTIVE: 8.0, ServiceClass.BATCH: 90.0}


def test_a_deadline_is_met_by_a_run_that_answered_in_time():
    """On the dot is in time; a run that failed early is not."""
    assert [r.met for r in RESULTS] == [True, False, False, True, True, True, True, True]


def test_summaries_count_completion_over_done_runs_and_waits_over_all_calls():
    """The failed run counts as one of the runs, but its time is no completion."""
    s = demo_report.summarise(RESULTS, "fcfs", ServiceClass.INTERACTIVE)
    assert (s.runs, s.done, s.met) == (3, 2, 1)
    assert (s.completion_p50_s, s.completion_p95_s) == (4.0, 12.0)
    assert (s.wait_p50_s, s.wait_p95_s) == (1.0, 5.0)
    assert demo_report.summarise(RESULTS, "ours", ServiceClass.INTERACTIVE).to_json()["wait_p50_s"] is None


def test_the_table_shows_both_passes_beside_each_other_and_says_emulated():
    """One row per figure, one column per pass."""
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(demo_report.table(RESULTS, DEADLINES_S))
    text = console.export_text()
    row = next(line for line in text.split("\n") if "deadlines met" in line)
    assert "1 of 3 (33%)" in row
    assert "3 of 3 (100%)" in row
    assert "emulated engine" in text


def test_the_events_can_be_counted_again():
    """Each line holds what the table was counted from."""
    lines = [json.loads(r.encode()) for r in RESULTS]
    met = sum(e["took_s"] <= e["deadline_s"] and not e["error"] for e in lines if e["policy"] == "fcfs")
    assert met == 2
    assert lines[1]["waits_s"] == [3.0, 5.0]


@pytest.mark.parametrize("results", [RESULTS, RESULTS[:1]])
def test_the_picture_is_a_png_even_when_a_pass_is_empty(tmp_path, results):
    """A class or pass without a run is left blank, not an error."""
    demo_report.picture(results, DEADLINES_S, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# -- the whole of it -----------------------------------------------------------------------------------------------------
def maestro(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The command as a user starts it, in a session of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "OPENAI_"))}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), str(ROOT / "serving")])
    return subprocess.Popen(
        [sys.executable, "-m", "maestro_agents.cli", *words],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def customers(tmp_path) -> Path:
    """Sixty messages of real customers, as a user would hand them over, with one line that is none."""
    if not CALLS.is_file():
        pytest.skip(f"the traces are not beside the repository ({CALLS})")
    texts: list[str] = []
    with gzip.open(CALLS, "rt", encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            said_by_user = row["role"] == "agent" and row["prev_role"] == "user_sim"
            if row["app"] in CUSTOMER_APPS and said_by_user and row["input_text"].strip():
                texts.append(row["input_text"])
    path = tmp_path / "customers.jsonl"
    lines = [json.dumps({"input_text": t}) for t in texts[:: len(texts) // 60]]
    path.write_text("\n".join(["{broken", *lines]) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_serves_real_customers_twice_and_its_figures_can_be_counted_again(tmp_path, customers):
    """Every run of both passes ends with an answer, and the events give the same figures as the JSON."""
    words = ("--runs", "8", "--seed", "7", "--json", "--events", "events.jsonl", "--png", "out.png")
    with maestro("demo", "--input", str(customers), *words, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "1 lines left out, the first: line 1: not JSON" in " ".join(err.split())
    found = json.loads(out)
    assert (found["label"], found["runs"], found["messages"]) == ("emulated engine", 8, 8)
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for policy, classes in found["policies"].items():
        mine = [e for e in events if e["policy"] == policy]
        assert len(mine) == sum(c["done"] for c in classes.values()) == 8
        assert all(len(e["waits_s"]) == 7 for e in mine)
        for name, c in classes.items():
            of_class = [e for e in mine if e["service_class"] == name]
            assert c["met"] == sum(e["took_s"] <= e["deadline_s"] for e in of_class)
    fcfs, ours = ([e for e in events if e["policy"] == p] for p in ("fcfs", "ours"))
    assert [e["service_class"] for e in fcfs] == [e["service_class"] for e in ours]


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_all_it_started(tmp_path):
    """Exit status 130, one word, no Redis left behind."""
    with maestro("demo", cwd=tmp_path) as process:
        assert process.stdout is not None
        said = ""
        while "Queue:" not in said:
            line = process.stdout.readline()
            assert line, "the demo ended by itself"
            said += line
        port = int(said.split("127.0.0.1:")[1].split("/")[0])
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.strip().endswith("Stopped.")
    assert "Traceback" not in err
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_without_any_redis_the_demo_runs_in_one_process_and_says_so(tmp_path, monkeypatch, capsys):
    """No server on PATH, none bundled: the queue is in memory, and both passes still complete."""
    monkeypatch.setattr(demo, "find_server", lambda: None)
    monkeypatch.setattr(client, "_overrides", {})
    demo.run(runs=4, png=tmp_path / "out.png", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert "inside this process" in found["redis"]
    assert [sum(c["done"] for c in classes.values()) for classes in found["policies"].values()] == [4, 4]


def test_keep_without_any_redis_is_refused(monkeypatch):
    """There would be nothing that others could join."""
    monkeypatch.setattr(demo, "find_server", lambda: None)
    with pytest.raises(ConfigError, match="--keep needs a Redis"):
        demo.run(keep=True)


def test_a_picture_that_has_no_folder_is_told_before_anything_starts(tmp_path):
    """Nobody waits a minute to learn of a typing error."""
    with pytest.raises(ConfigError, match="there is no folder"):
        demo.run(png=tmp_path / "nowhere" / "demo.png")
