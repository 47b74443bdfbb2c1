"""`maestro predict train`, `status`, `explain` and `rollback`, as a user runs them: what they print, and what they say to wrong input."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from maestro_agents.cli import main
from maestro_agents.cli.predict import live as view
from maestro_agents.cli.predict.train import card_page
from maestro_agents.core import Ticket
from maestro_agents.predict import live
from maestro_agents.predict.length import LengthModel, train
from maestro_agents.predict.live import Learner
from maestro_agents.predict.trainer import example
from maestro_agents.queue.redis import RedisQueue
from tests.test_predict_eval import rows as trace_rows
from tests.test_trainer import ENGINE, NOW_S, ROWS, ended, newer, rows_of, tended, vector, world


@pytest.fixture(scope="module")
def model() -> LengthModel:
    """A model of the test's world."""
    return train([example(row) for row in rows_of(world(ROWS))], version="good", trained_at="long ago", data="made up")


@pytest.fixture
def model_file(model: LengthModel, tmp_path: Path) -> Path:
    """The same as a file."""
    path = tmp_path / "good.model"
    path.write_bytes(model.encode())
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A recorded trace."""
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(map(json.dumps, trace_rows())))
    return path


@pytest.fixture
def on_redis(redis_url: str, pool: str) -> Callable[[Callable[[RedisQueue], Awaitable[Any]]], Any]:
    """Do something with this test's pool."""

    def do(what: Callable[[RedisQueue], Awaitable[Any]]) -> Any:
        async def session() -> Any:
            queue = RedisQueue(redis_url, pool=pool)
            try:
                return await what(queue)
            finally:
                await queue.close()

        return asyncio.run(session())

    return do


@pytest.fixture
def maestro(redis_url: str, pool: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run ``maestro predict ...`` on this test's pool; what it printed."""

    def run(*words: object) -> str:
        return done(capsys, *words, "--redis-url", redis_url, "--pool", pool)

    return run


def done(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command printed that ended well."""
    with pytest.raises(SystemExit) as end:
        main(["predict", *map(str, words)])
    assert end.value.code == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one red line that a command ends with; status 2."""
    with pytest.raises(SystemExit) as end:
        main(["predict", *map(str, words)])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("maestro: ")
    return said


# -- train ---------------------------------------------------------------------------------------------------------------
def test_train_writes_a_model_that_can_be_read_and_its_card(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File, card beside it, figures as JSON; the same seed gives the same model."""
    out = tmp_path / "my.model"
    told = json.loads(done(capsys, "train", trace, "-o", out, "--data", "made up, no licence", "--json"))
    found = LengthModel.decode(out.read_bytes())
    assert told["rows"] == found.card.rows == 360
    assert told["bytes"] == out.stat().st_size
    assert told["metrics"]["mae_tokens"] > 0
    page = (tmp_path / "my.model.md").read_text()
    assert page == card_page(found, told["bytes"])
    for part in ("made up, no licence", "360 calls of 40 tasks", "| shop | 120 |", "Its limits"):
        assert part in page
    assert "360" in done(capsys, "train", trace, "-o", tmp_path / "again.model")
    again = LengthModel.decode((tmp_path / "again.model").read_bytes())
    assert again.card.metrics == found.card.metrics
    assert list(tmp_path.glob("*.part")) == []


def test_train_says_what_is_wrong_with_its_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there, an empty one, one of too few calls, a folder that is not there."""
    empty, few = tmp_path / "empty.jsonl", tmp_path / "few.jsonl"
    empty.write_text("")
    few.write_text("\n".join(map(json.dumps, list(trace_rows())[:12])))
    assert "No such file" in refused(capsys, "train", tmp_path / "none.jsonl")
    assert "holds no calls" in refused(capsys, "train", empty)
    assert "12 finished stages are too few" in refused(capsys, "train", few, "-o", tmp_path / "x.model")
    assert "there is no folder" in refused(capsys, "train", few, "-o", tmp_path / "no" / "x.model")
    assert not (tmp_path / "x.model").exists()


# -- status --------------------------------------------------------------------------------------------------------------
def test_status_says_which_model_predicts_and_how_well_in_each_role(
    model: LengthModel, on_redis: Any, maestro: Callable[..., str]
) -> None:
    """Version, error beside the running median's, coverage, what is used: from what the leader told."""
    learner = Learner(model)
    learner.observe(world(200, seed=7))
    on_redis(lambda queue: tended(learner, queue))
    told = json.loads(maestro("status", "--json"))
    (role,) = told["roles"]
    assert (told["version"], role["role"], role["uses"]) == ("good", "app:writer", "model")
    assert role["mae_said"] < role["mae_median"]
    assert 0.7 < role["covered_p90"] <= 1
    shown = maestro("status")
    for part in ("predicting by good", "app:writer", "200 stages of 1 roles", "model"):
        assert part in shown


def test_status_tells_what_became_of_models() -> None:
    """Trainings, the comparison with the former model, rollbacks, trouble and prefix hits each have a line."""
    learner = Learner()
    learner.trouble = "no memory left"
    learner.lengths.trial = live.Trial(
        former=learner.predictor, version="old", data=None, n=10, error=100.0, former_error=200.0
    )
    learner.rollbacks.append({"at_s": NOW_S, "from": "new", "to": "old"})
    prefix = {"a": {"completions": 3.0, "mean_cached_tokens": 10.0, "mean_error_tokens": 2.5}}
    found = {**learner.status(), "prefix": prefix, "models": ["old", "new"]}
    verdict = {
        "rows": 900,
        "seconds": 4.0,
        "mae": 20.0,
        "median_mae": 10.0,
        "current_mae": 11.0,
        "against": "it is worse",
    }
    found["last_training"] = verdict
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(view.status_view(found))
    shown = console.export_text()
    for part in (
        "predicting by statistics",
        "error 10.0 tokens, not 20.0",
        "new was worse than old",
        "trouble: no memory left",
        "not used: it is worse",
        "kept: old, new",
        "2.5",
        "There is no model",
    ):
        assert part in shown


def test_status_of_a_pool_without_a_scheduler_says_so(
    redis_url: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no Redis is named at all."""
    assert "is `maestro scheduler`" in refused(capsys, "status", "--redis-url", redis_url, "--pool", pool)
    assert "which Redis?" in refused(capsys, "status")


# -- explain -------------------------------------------------------------------------------------------------------------
def waiting(asked: int, stage_id: str = "waits-1") -> Ticket:
    features = vector(prompt_tokens=100, last_asked_words=asked)
    return Ticket(stage_id=stage_id, client_id="c", model="m", role="app:writer", prompt_tokens=100, features=features)


def test_explain_names_the_column_that_matters_and_its_factors_multiply_to_what_is_said(
    model: LengthModel, on_redis: Any, maestro: Callable[..., str], model_file: Path
) -> None:
    """For a waiting stage and for a finished one, whose statistics are those before it ended."""

    async def fill(queue: RedisQueue) -> None:
        for o in [*world(30, seed=8), ended(160, 700, n=99), *world(30, start=200, seed=8)]:
            await queue.observe(o)
        await queue.announce(waiting(160), None, now_s=NOW_S)
        await queue.publish_model("good", card="{}", data=model.encode(), epoch=0)
        await queue.lead("s", ttl_s=10, now_s=NOW_S)
        await queue.publish([ENGINE], p99={}, epoch=1, valid_until_s=NOW_S)

    on_redis(fill)
    for stage, learned, wrote in (("waits", 61, None), ("s99", 30, 700)):
        told = json.loads(maestro("explain", stage, "--json"))
        assert (told["statistics_from"], told["output_tokens"]) == (learned, wrote)
        assert told["columns"][0]["name"] == "last_asked_words"
        assert told["columns"][0]["value"] == 160
        product = math.prod(c["factor"] for c in told["columns"])
        assert (told["base_tokens"] + 1) * product == pytest.approx(told["raw_tokens"] + 1, rel=1e-3)
        assert 300 < told["estimate"]["p50"] < 1_200
    shown = maestro("explain", "waits", "--head", "p90", "--model", model_file)
    for part in ("stage waits-1, p90 of the length, model good", "last_asked_words", "others", "Calibrated by 61"):
        assert part in shown
    assert json.loads(maestro("explain", "s99", "--head", "mean", "--json"))["raw_tokens"] > 300


def test_explain_needs_no_redis_for_a_ticket_in_a_file(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ticket as Redis has it, or as `maestro queue show --json` prints it."""
    for i, text in enumerate(
        (waiting(5).encode(), json.dumps({**json.loads(waiting(5).encode()), "limit_at_s": None}))
    ):
        path = tmp_path / f"{i}.json"
        path.write_text(text)
        told = json.loads(done(capsys, "explain", "--ticket", path, "--model", model_file, "--json"))
        assert told["stage_id"] == "waits-1"
        assert told["raw_tokens"] < 100


def test_explain_says_what_is_wrong_with_its_input(
    model_file: Path, model: LengthModel, tmp_path: Path, redis_url: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown stage, a head or a ticket that is none, a model that is damaged, newer or not there, features of no use."""
    there = ("--redis-url", redis_url, "--pool", pool)
    ticket, bad, old = tmp_path / "t.json", tmp_path / "bad", tmp_path / "old.json"
    ticket.write_text(waiting(5).encode())
    old.write_text(waiting(5).evolve(features=(9.0, 1.0)).encode())
    bad.write_bytes(b"no model")
    (tmp_path / "newer").write_bytes(newer(model))
    assert "no stage 'nobody'" in refused(capsys, "explain", "nobody", "--model", model_file, *there)
    assert "which stage?" in refused(capsys, "explain", *there)
    assert "which stage?" in refused(capsys, "explain", "s", "--ticket", ticket)
    assert "no head 'p42'" in refused(capsys, "explain", "s", "--head", "p42", "--model", model_file, *there)
    assert "cannot be read" in refused(capsys, "explain", "--ticket", ticket, "--model", bad)
    assert "newer than" in refused(capsys, "explain", "--ticket", ticket, "--model", tmp_path / "newer")
    assert "No such file" in refused(capsys, "explain", "--ticket", ticket, "--model", tmp_path / "none")
    assert "No such file" in refused(capsys, "explain", "--ticket", tmp_path / "none", "--model", model_file)
    assert "holds no ticket" in refused(capsys, "explain", "--ticket", bad, "--model", model_file)
    assert "from statistics alone" in refused(capsys, "explain", "--ticket", old, "--model", model_file)


def test_without_any_model_there_is_nothing_to_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said what to do."""
    monkeypatch.setattr(view, "default_model", lambda: None)
    ticket = tmp_path / "t.json"
    ticket.write_text(waiting(5).encode())
    assert "--model FILE" in refused(capsys, "explain", "--ticket", ticket)


# -- rollback ------------------------------------------------------------------------------------------------------------
def test_rollback_lets_a_former_model_rule_again(
    on_redis: Any, maestro: Callable[..., str], redis_url: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before, or the one that is named; what is not kept is refused with what is."""
    there = ("--redis-url", redis_url, "--pool", pool)
    assert "no former model" in refused(capsys, "rollback", *there)

    async def fill(queue: RedisQueue) -> None:
        for version in ("v1", "v2"):
            await queue.publish_model(version, card="{}", data=b"x", epoch=0)

    on_redis(fill)
    assert json.loads(maestro("rollback", "--json")) == {"version": "v1"}
    assert on_redis(lambda queue: queue.model("")) == ("v1", b"x")
    assert "v2 predicts" in maestro("rollback", "v2")
    assert "there are v2, v1" in refused(capsys, "rollback", "v9", *there)
