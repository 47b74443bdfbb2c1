"""`maestro calibrate`: an engine's profile is recovered, written, read again, and held to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import statistics
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents.cli import main
from maestro_agents.cli.calibrate import check, measure
from maestro_agents.errors import ConfigError
from maestro_agents.simulator.calibration import COSTS, Calibration, Residual, amounts, burst_s, read_calibration
from maestro_agents.simulator.engine import EngineProfile, Scheduling
from maestro_agents.simulator.hardware import load_sim_fleet, named_profile
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from maestro_serving.load import LoadClient, Sizes

KNOWN = EngineProfile(
    base_s=0.006,
    prefill_s_per_token=0.0005,
    decode_s_per_seq=0.001,
    kv_read_s_per_token=1e-5,
    max_num_seqs=4,
    block_size=16,
    num_blocks=256,
    max_model_len=192,
)
CALIBRATION = Calibration(
    profile=dataclasses.replace(KNOWN, request_s=0.001, scheduling=Scheduling.FCFS),
    model="tiny",
    engine='vLLM 0.32.0 "x"',
    date="2026-11-21",
    how="two bursts",
    latency_s=0.002,
    prefix_cache=True,
    residuals=(Residual(what="prompt of 16 tokens", measured_s=0.02, fitted_s=0.021, spread=0.01),),
)


def emulating(profile: EngineProfile = KNOWN, **more) -> Emulator:
    """An emulator of one model, `tiny`."""
    return Emulator(EmulatorConfig(models=(EmulatedModel(name="tiny", profile=profile),), **more))


def played(profile: EngineProfile, plan: list[measure.Burst], latency_s: float = 0.0) -> dict[str, list[float]]:
    """What a perfect engine of this profile would take, three times."""
    return {
        b.what: [burst_s(profile, b.requests) - (burst_s(profile, b.less) if b.less else -latency_s)] * 3 for b in plan
    }


# -- the fit -----------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12),
    st.sampled_from([16, 2048]),
)
def test_a_burst_takes_its_amounts_times_the_costs(requests, step_tokens):
    """The seconds of any burst are the sum of what `amounts` counts, each times its cost: the fit may be linear."""
    profile = dataclasses.replace(KNOWN, request_s=0.002, step_tokens=step_tokens)
    found = amounts(profile, requests)
    assert sum(n * getattr(profile, name) for name, n in found.items()) == pytest.approx(burst_s(profile, requests))


@pytest.mark.parametrize(
    "sizes", [KNOWN, dataclasses.replace(KNOWN, max_num_seqs=48, max_model_len=2048, step_tokens=512)]
)
def test_exact_measurements_give_the_exact_profile(sizes):
    """Without noise every cost and the latency are found, and nothing is left over."""
    known = dataclasses.replace(sizes, request_s=0.002)
    plan = measure.bursts(known)
    found = measure.fit(dataclasses.replace(sizes, base_s=1.0), plan, played(known, plan, latency_s=0.004))
    for name in COSTS:
        assert getattr(found.profile, name) == pytest.approx(getattr(known, name), rel=1e-6, abs=1e-12)
    assert found.latency_s == pytest.approx(0.004)
    assert max(abs(one.off) for one in found.residuals) < 1e-6
    assert found.outliers == ()


def test_one_disturbed_round_changes_nothing_and_is_reported():
    """A round in which everything took three times as long is an outlier of every burst, and the profile the same."""
    plan = measure.bursts(KNOWN)
    took = {what: [*seconds, 3 * seconds[0]] for what, seconds in played(KNOWN, plan).items()}
    found = measure.fit(KNOWN, plan, took)
    assert found.profile.base_s == pytest.approx(KNOWN.base_s)
    assert len(found.outliers) == len(plan)


def test_answers_that_take_no_time_are_an_error():
    """Where longer answers did not take longer, there is nothing to fit."""
    plan = measure.bursts(KNOWN)
    with pytest.raises(ConfigError, match="too noisy"):
        measure.fit(KNOWN, plan, {b.what: [-0.1, 0.1, -0.1] for b in plan})


# -- an emulator as the engine -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduling", Scheduling)
async def test_the_sizes_of_an_engine_are_found(scheduling):
    """How many run at once, how its KV memory is laid out, and in which order it takes those that wait."""
    known = dataclasses.replace(KNOWN, scheduling=scheduling, decode_s_per_seq=0.0, max_num_seqs=5)
    with emulating(known) as engine:
        async with LoadClient(engine.url) as client:
            found = await measure.find_sizes(client, await client.describe())
    for name in ("max_num_seqs", "step_tokens", "block_size", "num_blocks", "max_model_len", "scheduling"):
        assert getattr(found, name) == getattr(known, name)


@pytest.mark.slow
def test_the_profile_of_an_emulator_is_recovered(tmp_path, capsys):
    """Measured through HTTP, bursts take what they take by the profile that it has; how closely is for a quiet machine."""
    with emulating() as engine:
        main_ok(["calibrate", engine.url, "--profile", str(tmp_path / "p.toml"), "--rounds", "3", "--json"])
    told = json.loads(capsys.readouterr().out)
    found = read_calibration(tmp_path / "p.toml")
    assert found.model == told["model"] == "tiny"
    assert "0.32.0" in found.engine
    # What repeats differ by is what the machine's other work may have added.
    loose = 0.25 + 2 * told["spread"]
    for requests in ([(16, 40)], [(16, 40)] * 4, [(100, 40)] * 4, [(100, 1)]):
        assert burst_s(found.profile, requests) == pytest.approx(burst_s(KNOWN, requests), rel=loose)
    assert statistics.median(abs(one.off) for one in found.residuals) < loose


@pytest.fixture
def small_load(monkeypatch):
    """A check of seconds."""
    monkeypatch.setattr(check, "WINDOW_S", 1.0)
    monkeypatch.setattr(check, "LEAST_RUNS", 10)


@pytest.mark.slow
def test_an_emulator_agrees_with_itself(tmp_path, capsys, small_load):
    """--check of an engine that is an emulator of the very profile finds nothing like a factor, and says on what it rests."""
    path = tmp_path / "p.toml"
    path.write_text(dataclasses.replace(CALIBRATION, profile=KNOWN.faster(2)).toml())
    with emulating(KNOWN.faster(2)) as engine:
        with contextlib.suppress(SystemExit):  # on a busy machine they may be further apart than they promise
            main(["calibrate", engine.url, "--check", "--profile", str(path), "--repeats", "2", "--json"])
    told = json.loads(capsys.readouterr().out)
    for side in ("engine", "emulator"):
        assert told["sides"][side]["runs"] == 20
        assert len(told["sides"][side]["repeats"]) == 2
        assert 0 < told["sides"][side]["generator_cpu_share"] < 1
    for ratio in told["ratios"]["emulator"].values():
        assert ratio["low"] <= ratio["mean"] <= ratio["high"]
        assert 0.6 < ratio["ratio"] < 1.6
    assert told["engine_cores"]
    assert told["emulator_cores"] == told["engine_cores"]


@pytest.mark.slow
def test_a_profile_that_is_too_fast_is_found_out(tmp_path, capsys, small_load):
    """An engine that is half as fast as its profile says makes --check fail: exit status 1, ratios below one."""
    path = tmp_path / "p.toml"
    path.write_text(dataclasses.replace(CALIBRATION, profile=KNOWN.faster(2)).toml())
    with emulating(KNOWN) as engine, pytest.raises(SystemExit) as ended:
        main(["calibrate", engine.url, "--check", "--profile", str(path), "--repeats", "2", "--json"])
    assert ended.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["within"]
    assert told["ratios"]["emulator"]["p50"]["ratio"] < 0.85


def test_the_load_of_a_check_is_the_same_for_the_same_seed():
    """Runs depend on profile and seed alone, fit the engine, and are half urgent."""
    runs = check.load(KNOWN, 3)
    assert runs == check.load(KNOWN, 3)
    assert runs != check.load(KNOWN, 4)
    calls = [c for run in runs for step in run.steps for c in step.calls]
    assert all(c.prompt_tokens + c.output_tokens <= KNOWN.max_model_len for c in calls)
    assert 0.2 < statistics.fmean(c.priority < 0 for c in calls) < 0.8


def test_the_model_alone_serves_every_run_of_a_check():
    """On the virtual clock each run takes at least its pauses and the steps of its longest calls."""
    runs = check.load(KNOWN, 0)
    for run, took_s in zip(runs, check.simulated(KNOWN, runs), strict=True):
        least_s = sum(s.pause_s + max(c.output_tokens for c in s.calls) * KNOWN.base_s for s in run.steps)
        assert took_s > least_s


# -- the file ----------------------------------------------------------------------------------------------------------
def test_a_profile_is_read_as_it_was_written(tmp_path):
    """The file holds everything: what was measured, how, and what was left over."""
    path = tmp_path / "p.toml"
    path.write_text(CALIBRATION.toml())
    assert read_calibration(path) == CALIBRATION
    assert named_profile(str(path)) == CALIBRATION.profile


def test_a_fleet_file_takes_a_measured_profile_beside_it(tmp_path):
    """`[engine.launch] profile` may be a file, meant from the fleet file's own folder."""
    (tmp_path / "p.toml").write_text(CALIBRATION.toml())
    (tmp_path / "fleet.toml").write_text(
        '[[engine]]\nid = "a"\nmodel = "tiny"\nslots = 4\n[engine.launch]\nkind = "emulator"\nprofile = "p.toml"\n'
    )
    (engine,) = load_sim_fleet(tmp_path / "fleet.toml").engines
    assert engine.profile == CALIBRATION.profile


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("base_s = 0.006", "base_s = -1", r"p.toml:\d+: .*base_s must be positive"),
        ("base_s = 0.006", "", r"p.toml:\d+: base_s must be there and a float, got None"),
        ("base_s = 0.006", 'base_s = "fast"', "base_s must be there and a float, got 'fast'"),
        ("block_size = 16", "block_size = 1.5", "block_size must be there and a int"),
        ('scheduling = "fcfs"', 'scheduling = "lifo"', "scheduling must be one of fcfs, priority"),
        ("[profile]", "[profile]\nwarp = 9", "a profile has no 'warp'"),
        ("[calibration]", "[other]", r"no \[calibration\]: not a profile that `maestro calibrate` wrote"),
    ],
)
def test_a_damaged_profile_is_one_clear_line(tmp_path, was, now, said):
    """Each says the file, the line and what is wrong with it."""
    path = tmp_path / "p.toml"
    assert was in CALIBRATION.toml()
    path.write_text(CALIBRATION.toml().replace(was, now))
    with pytest.raises(ConfigError, match=said):
        read_calibration(path)


# -- what may be wrong -------------------------------------------------------------------------------------------------
def main_ok(words: list[str]) -> None:
    """Run the command, which ends well."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in {0, None}


def said_by(capsys, *words: str) -> str:
    """The one line on stderr of a command that fails."""
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_an_address_where_nobody_listens_is_named(capsys):
    """Wrong port, wrong words: the line says which address it was."""
    assert "nobody answers at http://127.0.0.1:9" in said_by(capsys, "http://127.0.0.1:9/v1")
    assert "is no server's address" in said_by(capsys, "ftp://127.0.0.1")


def test_an_engine_with_a_key_asks_for_it(capsys, monkeypatch):
    """401 becomes a line that names the option."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with emulating(api_key="s3cret") as engine:
        assert "--api-key or VLLM_API_KEY" in said_by(capsys, engine.url)
        assert "there is no such profile" in said_by(
            capsys, engine.url, "--api-key", "s3cret", "--check", "--profile", "/tmp/none.toml"
        )


def test_an_engine_that_sleeps_is_not_waited_for(capsys):
    """A sleeping vLLM takes requests and keeps them: its metrics tell, and nothing is sent."""
    with emulating(dev_mode=True) as engine:
        base = engine.url.removesuffix("/v1")
        urllib.request.urlopen(urllib.request.Request(f"{base}/sleep?level=1", method="POST"), timeout=20).read()
        assert "sleeps: wake it" in said_by(capsys, engine.url)


def test_another_model_is_refused(tmp_path, capsys):
    """A profile of another model, and a model that the server does not have, are told apart."""
    path = tmp_path / "p.toml"
    path.write_text(dataclasses.replace(CALIBRATION, model="other").toml())
    with emulating() as engine:
        line = said_by(capsys, engine.url, "--check", "--profile", str(path))
        assert "is a profile of 'other', the engine serves 'tiny'" in line
        assert "does not serve 'nope', but tiny" in said_by(capsys, engine.url, "--model", "nope")


def test_a_file_that_is_no_profile_is_not_overwritten(tmp_path, capsys):
    """Before anything is measured, and the file stays as it was."""
    path = tmp_path / "fleet.toml"
    path.write_text("[redis]\n")
    with emulating() as engine:
        assert "no [calibration]" in said_by(capsys, engine.url, "--profile", str(path))
        assert "ends in .toml" in said_by(capsys, engine.url, "--profile", str(tmp_path / "x.json"))
        assert "there is no folder" in said_by(capsys, engine.url, "--profile", str(tmp_path / "no" / "x.toml"))
    assert path.read_text() == "[redis]\n"


async def test_an_engine_that_serves_others_is_not_measured():
    """What others ask of it meanwhile would be counted as its own slowness."""
    with emulating() as engine:
        async with LoadClient(engine.url) as other, LoadClient(engine.url) as client:
            await other.describe()
            asked = asyncio.ensure_future(other.ask(Sizes(prompt_tokens=16, output_tokens=100)))
            while (await other.busy())[0] < 1:
                await asyncio.sleep(0.001)
            with pytest.raises(Exception, match="serves others"):
                await client.describe()
            await asked


async def test_a_request_has_the_sizes_that_were_asked_for():
    """As many tokens in and out as said, streamed, and nothing of a new prompt in the cache."""
    with emulating(per_request_metrics=False) as engine:
        async with LoadClient(engine.url) as client:
            said = await client.describe()
            assert (said.max_model_len, said.block_size, said.kv_tokens) == (192, 16, 256 * 16)
            prompt = client.prompt(48)
            replies = [await client.ask(Sizes(prompt_tokens=48, output_tokens=5), prompt) for _ in range(2)]
            assert all(r.sent_at_s < r.first_at_s <= r.ended_at_s for r in replies)
            assert replies[0].cached_tokens == 0
            with pytest.raises(Exception, match="answered 400"):
                await client.ask(Sizes(prompt_tokens=500, output_tokens=5))


def test_a_profile_without_a_file_is_none(tmp_path):
    """A name that ends in .toml is a file, and says so where there is none."""
    with pytest.raises(ConfigError, match="there is no such file"):
        named_profile(str(Path(tmp_path, "x.toml")))
