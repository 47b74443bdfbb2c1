"""What is foreseen of recorded calls: by models that never saw their task, and kept in a file."""

from __future__ import annotations

import csv
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from maestro_agents.core import Observation, ServiceClass, Status
from maestro_agents.errors import ConfigError
from maestro_agents.predict.backtest import examples_of
from maestro_agents.predict.length import Example
from maestro_agents.predict.rest import rest_of
from maestro_agents.predict.traces import Call
from maestro_agents.simulator import foresight
from maestro_agents.simulator.foresight import foresee, read_foreseen, write_foreseen
from maestro_agents.simulator.sessions import Foresight, sessions

Row = dict[str, Any]
TASKS = 48


def rows_of(tasks: int, apps: Iterable[str] = ("support",)) -> list[Row]:
    """Sessions of two kinds: a short first prompt leads to two calls, a long one to six."""
    rng = random.Random(1)
    return [
        {
            "app": app,
            "session_id": f"s{task}",
            "task_id": f"t{task}",
            "call_index": n,
            "role": "agent",
            "model": "m",
            "input_tokens": (5_000 if task % 2 else 500) + 100 * n + rng.randint(0, 50),
            "output_tokens": rng.randint(80, 120),
            "parents": "",
        }
        for app in apps
        for task in range(tasks)
        for n in range(6 if task % 2 else 2)
    ]


def write_trace(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as out:
        table = csv.DictWriter(out, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


class Trained(NamedTuple):
    """What is foreseen in a trace, and in the same one where the last call of session s1 wrote a hundred times as much."""

    before: Foresight
    after: Foresight
    #: Shares that the first was told to have come to.
    told: list[float]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("foresight")
    rows = rows_of(TASKS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(foresight, "FOLDS", 2)  # half the training
        told: list[float] = []
        before = foresee(write_trace(folder / "a.csv", rows), progress=lambda _, share: told.append(share))
        last = next(r for r in reversed(rows) if r["session_id"] == "s1")
        last["output_tokens"] *= 100
        return Trained(before, foresee(write_trace(folder / "b.csv", rows)), told)


def test_every_call_of_every_session_is_foreseen(trained: Trained) -> None:
    """Each session has as many as it has calls, all numbers finite, quantiles in their order."""
    said = trained.before
    assert {key: len(found) for key, found in said.items()} == {
        ("support", f"s{t}"): 6 if t % 2 else 2 for t in range(TASKS)
    }
    for f in (f for found in said.values() for f in found):
        assert all(math.isfinite(x) for x in astuple(f) if not isinstance(x, str))
        assert f.output_tokens_p50 <= f.output_tokens_p90 <= f.output_tokens_p99
        assert f.basis.startswith("model")


def test_what_is_foreseen_of_a_task_was_never_learned_from_it(trained: Trained) -> None:
    """What a call wrote changes nothing that is foreseen of its own run, and something of other tasks."""
    before, after, _ = trained
    assert after["support", "s1"] == before["support", "s1"]
    assert after != before


def test_the_rest_of_a_run_is_foreseen_from_what_its_prompt_looks_like(trained: Trained) -> None:
    """The same role at the same visit: a run that begins with the long prompt has more to go."""
    said = trained.before
    first = [[said["support", f"s{t}"][0].output_tokens for t in range(kind, TASKS, 2)] for kind in (0, 1)]
    assert statistics.median(first[0]) < 200
    assert statistics.median(first[1]) > 300


def test_a_task_of_several_apps_is_held_out_in_all_of_them(tmp_path: Path) -> None:
    """What one app's run of a task wrote changes nothing that is foreseen of another app's run of it."""
    rows = rows_of(4, ("one", "two"))
    before = foresee(write_trace(tmp_path / "a.csv", rows))
    for row in rows:
        row["output_tokens"] *= 100 if (row["app"], row["task_id"]) == ("two", "t1") else 1
    after = foresee(write_trace(tmp_path / "b.csv", rows))
    assert after["one", "s1"] == before["one", "s1"]
    assert after["one", "s0"] != before["one", "s0"]


def test_a_trace_too_small_to_train_on_is_foreseen_from_statistics(tmp_path: Path) -> None:
    """A handful of calls: what is said rests on the role's other answers."""
    said = foresee(write_trace(tmp_path / "few.csv", rows_of(4)))
    assert all(f.basis.startswith("role") for found in said.values() for f in found)


def test_texts_are_found_by_app_session_and_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace without texts and the calls that tell them are read together; numbers stay the trace's."""
    trace = write_trace(tmp_path / "few.csv", rows_of(4))
    texts = tmp_path / "calls.jsonl"
    texts.write_text(
        '{"app": "support", "session_id": "s1", "task_id": "t1", "call_index": 1, "role": "agent", "model": "m", '
        '"input_tokens": 1, "output_tokens": 1, "input_text": "Hello", "token_source": "usage"}\n'
    )
    looked: list[Call] = []

    def spy(calls: Sequence[Call], *, seed: int, ratios: Sequence[float]) -> list[Example]:
        looked.extend(calls)
        return examples_of(calls, seed=seed, ratios=ratios)

    monkeypatch.setattr(foresight, "examples_of", spy)
    foresee(trace, texts)
    assert [(c.session_id, c.call_index, c.input_text) for c in looked if c.input_text] == [("s1", 1, "Hello")]
    assert all(c.input_tokens >= 500 for c in looked)
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        foresee(trace, tmp_path / "gone.jsonl")


def test_the_same_trace_and_seed_give_the_same_bytes_and_are_read_back(tmp_path: Path) -> None:
    """Twice foreseen and written, one content; reading gives what was written."""
    trace = write_trace(tmp_path / "few.csv", rows_of(4))
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_foreseen(foresee(trace), tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert read_foreseen(tmp_path / "a.jsonl.gz", sessions(trace)) == foresee(trace)


def test_a_file_of_another_trace_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    """The error names the file and says that it is made again once removed."""
    trace = write_trace(tmp_path / "few.csv", rows_of(4))
    other = write_trace(tmp_path / "other.csv", rows_of(6))
    kept = tmp_path / "kept.jsonl"
    write_foreseen(foresee(trace), kept)
    with pytest.raises(ConfigError, match=r"kept\.jsonl was made of another trace"):
        read_foreseen(kept, sessions(other))
    kept.write_text(kept.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"kept\.jsonl, line 5"):
        read_foreseen(kept, sessions(trace))


def test_progress_is_told_from_nothing_to_all(trained: Trained) -> None:
    """Shares never fall, and end at one."""
    assert trained.told == sorted(trained.told)
    assert trained.told[0] == 0.0
    assert trained.told[-1] == 1.0


def test_siblings_are_no_part_of_each_others_rest() -> None:
    """Of a planner, a branch of two calls beside one of one, and a join, each counts only what begins once it has ended."""

    def call(at_s: float, until_s: float, tokens: int) -> Observation:
        return Observation(
            stage_id=f"{at_s}-{until_s}",
            run_id="r",
            workflow="w",
            role="a",
            node="a",
            model="m",
            engine_id="e",
            service_class=ServiceClass.BATCH,
            tenant="t",
            status=Status.DONE,
            output_tokens=tokens,
            pushed_at_s=at_s,
            granted_at_s=at_s,
            finished_at_s=until_s,
        )

    planner, short, long = call(0.0, 1.0, 1), call(1.0, 2.0, 10), call(1.0, 4.0, 100)
    further, join = call(2.0, 3.0, 1_000), call(4.0, 5.0, 10_000)
    rests = rest_of([planner, short, long, further, join])
    assert rests == [(4, 11_110), (2, 11_000), (1, 10_000), (1, 10_000), (0, 0)]
