"""Profiles of GPUs and models: where they come from, that they fit, how far they are from what was published; and fleets of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from maestro_agents.errors import ConfigError
from maestro_agents.fleet import load_fleet
from maestro_agents.simulator import hardware
from maestro_agents.simulator.hardware import Served, SimFleet, gpus, load_sim_fleet, models, published, serve

DEPLOY = Path(__file__).resolve().parent.parent / "serving" / "deploy"
STEP_TOLERANCE = 0.11
"""Of a profile's decode step, against a published one."""
RUN_TOLERANCE = 0.3
"""Of the tokens per second of a whole simulated benchmark, against a published one."""


def everything() -> list[Served]:
    """Every model on every GPU that can hold it."""
    found: list[Served] = []
    for model in models().values():
        for gpu in gpus().values():
            try:
                found.append(serve(model, gpu))
            except ConfigError:
                assert model.weight_bytes > 4 * gpu.usable_bytes  # at eight GPUs, half of them for KV and the rest
    return found


def on(model: str, gpu: str, tensor_parallel: int = 0) -> Served:
    return serve(models()[model], gpus()[gpu], tensor_parallel=tensor_parallel)


def name(served: Served) -> str:
    return f"{served.model.profile}@{served.gpu.kind}x{served.tensor_parallel}"


def load(text: str, folder: Path) -> SimFleet:
    path = folder / "fleet.toml"
    path.write_text(text)
    return load_sim_fleet(path)


def complaint(text: str, folder: Path) -> str:
    """What a wrong fleet file is told."""
    with pytest.raises(ConfigError) as caught:
        load(text, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(str(folder) + "/")


# -- profiles ----------------------------------------------------------------------------------------------------------
def test_the_gpus_and_models_that_users_ask_for_are_there() -> None:
    """Four GPUs, and models from 8B to 70B of two families."""
    assert {"a100-80g", "h100-80g", "h200-141g", "l4-24g"} <= set(gpus())
    assert {"llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b", "qwen3-8b", "qwen3-14b", "qwen3-32b"} <= set(models())


@pytest.mark.parametrize("served", everything(), ids=name)
def test_every_profile_says_where_it_comes_from(served: Served) -> None:
    """Basis and source are there; published means that somebody published a number of this very model, GPU and parallelism."""
    seen = [e for kind in ("step", "run") for e in published(kind) if hardware._about(e, *key(served))]
    assert served.basis == ("published" if seen else "derived")
    for source in (served.source, served.tiers.source, served.gpu.source, served.model.source):
        assert len(source) > 20
    assert all(len(e["source"]) > 20 for e in seen)


def key(served: Served) -> tuple[hardware.Model, hardware.Gpu, int]:
    return served.model, served.gpu, served.tensor_parallel


@pytest.mark.parametrize("served", everything(), ids=name)
def test_everything_fits_its_gpu(served: Served) -> None:
    """Weights, server and KV together stay within what vLLM takes of the GPU, and some request fits."""
    taken = served.weight_bytes + served.server_bytes + served.kv_bytes
    assert taken <= served.gpu.usable_bytes < served.gpu.hbm_mib * 2**20
    spec = served.spec("e")
    assert served.kv_bytes == served.profile.kv_tokens * spec.kv_bytes_per_token
    assert served.profile.max_model_len <= served.profile.kv_tokens
    assert spec.kv_bytes_of(served.profile.max_model_len, 0) <= spec.kv_bytes
    assert (spec.slots, spec.max_model_len) == (served.profile.max_num_seqs, served.profile.max_model_len)


def test_kv_memory_is_counted_from_the_configuration() -> None:
    """2 x layers x KV heads x head dimension x 2 bytes, split over the GPUs."""
    assert models()["llama-3.1-8b"].kv().bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert models()["qwen2.5-7b"].kv().bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert models()["llama-3.1-70b"].kv(4).bytes_per_token == 2 * 80 * 2 * 128 * 2


@pytest.mark.parametrize("model", models())
def test_a_better_gpu_is_faster(model: str) -> None:
    """H200 decodes faster than H100, H100 than A100, A100 than L4, at the same parallelism; prefill is ordered alike."""
    order = [on(model, kind, 8).profile for kind in ("h200-141g", "h100-80g", "a100-80g")]
    if model != "llama-3.1-70b":
        order.append(on(model, "l4-24g", 8).profile)
    steps = [hardware.step_s(p, decoding=32, context_tokens=1000) for p in order]
    assert steps == sorted(steps)
    assert len(set(steps)) == len(steps)
    prefills = [p.prefill_s_per_token for p in order]
    assert prefills == sorted(prefills)


@pytest.mark.parametrize("gpu", ["h200-141g", "h100-80g", "a100-80g"])
def test_a_larger_model_is_slower(gpu: str) -> None:
    """On the same GPUs each of 8B, 14B, 32B and 70B takes longer than the one before, in every part."""
    sizes = [on(m, gpu, 4) for m in ("llama-3.1-8b", "qwen3-14b", "qwen3-32b", "llama-3.1-70b")]
    for small, large in itertools.pairwise(sizes):
        for part in ("base_s", "prefill_s_per_token", "decode_s_per_seq", "kv_read_s_per_token"):
            assert getattr(small.profile, part) < getattr(large.profile, part)
        assert small.tiers.from_host_s < large.tiers.from_host_s


# -- against what was published ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", published("step"), ids=lambda e: f"{e['model']}@{e['gpu']}x{e['tensor_parallel']}")
def test_decode_steps_are_near_published_ones(entry: dict[str, object]) -> None:
    """Each step of each published series, those that the constants were fitted to and those that they never saw."""
    served = on(str(entry["model"]), str(entry["gpu"]), int(str(entry["tensor_parallel"])))
    assert served.off
    assert all(abs(off) <= STEP_TOLERANCE for _, off in served.off), served.off


def test_the_constants_do_not_only_fit_what_they_were_fitted_to() -> None:
    """There are published steps of other GPUs that had no part in the fit, and they agree as well."""
    others = [e for e in published("step") if not e.get("calibrates")]
    assert {e["gpu"] for e in others} == {"a100-40g", "a100-80g"}


@pytest.mark.parametrize(
    "entry", published("run"), ids=lambda e: f"{e['model']}@{e['gpu']}:{e['prompt_tokens']}+{e['output_tokens']}"
)
def test_whole_benchmarks_come_out_near_published_ones(entry: dict[str, object]) -> None:
    """The engine model with the profile, given the benchmark's requests, makes about as many tokens a second."""
    requests, prompt, output = (int(str(entry[k])) for k in ("requests", "prompt_tokens", "output_tokens"))
    served = on(str(entry["model"]), str(entry["gpu"]), int(str(entry["tensor_parallel"])))
    own = hardware.burst_tokens_per_s(served.profile, requests=requests, prompt_tokens=prompt, output_tokens=output)
    assert own == pytest.approx(float(str(entry["tokens_per_s"])), rel=RUN_TOLERANCE)


def test_sleep_and_wake_are_near_published_ones() -> None:
    """61 GB on one A100 wake in 2.87 s and sleep in 2.78 s (vLLM blog); Qwen3-8B has its own published times."""
    a100 = gpus()["a100-80g"]
    coder = hardware.Model(
        profile="coder", name="", parameters=30_530_000_000, max_tokens=1, layers=1, config={}, source=""
    )
    found = hardware.tiers(coder, a100, 1)
    assert found.from_sleeping_s == pytest.approx(2.87, rel=0.05)
    assert found.to_sleeping_s == pytest.approx(2.78, rel=0.05)
    assert found.from_host_s == pytest.approx(47.4, rel=0.05)
    seen = on("qwen3-8b", "a100-80g").tiers
    assert (seen.from_sleeping_s, seen.to_sleeping_s, seen.reload_s, seen.basis) == (2.19, 10.57, 6.53, "published")


@pytest.mark.parametrize("served", everything(), ids=name)
def test_farther_tiers_take_longer(served: Served) -> None:
    """Sleeping is nearer than dropped weights, then come page cache, disk and network."""
    t = served.tiers
    way = [t.from_sleeping_s, t.reload_s, t.from_host_s, t.from_disk_s, t.from_remote_s]
    assert way == sorted(way)
    assert 0 < t.discard_s < t.to_sleeping_s


def test_profiles_have_names() -> None:
    """An emulated engine can be any model on any GPU; a wrong name is told the right ones."""
    assert hardware.named_profile("llama-3.1-8b@h100-80g") == on("llama-3.1-8b", "h100-80g").profile
    assert hardware.named_profile("cpu-tiny").max_num_seqs == 16
    with pytest.raises(ConfigError, match="no profile 'h100': known are cpu-tiny, gpu, and MODEL@GPU"):
        hardware.named_profile("h100")


def test_what_does_not_fit_is_refused() -> None:
    """70B on one H100 is refused, and so is more KV than there is; the message says what would help."""
    with pytest.raises(ConfigError, match="tensor_parallel"):
        on("llama-3.1-70b", "h100-80g", 1)
    with pytest.raises(ConfigError, match="leaves"):
        serve(models()["llama-3.1-8b"], gpus()["l4-24g"], kv_bytes=10**11)


# -- fleets ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(DEPLOY.glob("fleet.sim*.toml")), ids=lambda p: p.name)
def test_the_example_fleets_load(path: Path) -> None:
    """Each example has engines at the start, and no GPU holds more than it has."""
    fleet = load_sim_fleet(path)
    assert fleet.engines
    assert len({e.spec.engine_id for e in fleet.engines}) == len(fleet.engines)
    taken = dict.fromkeys(fleet.gpus, 0)
    for engine in fleet.engines:
        served = engine.served
        assert served is not None
        assert engine.spec.model in fleet.models
        for gpu in engine.gpus:
            assert fleet.gpus[gpu].kind == served.gpu.kind
            taken[gpu] += served.weight_bytes + served.server_bytes + served.kv_bytes
    assert all(taken[gpu] <= fleet.gpus[gpu].usable_bytes for gpu in taken)
    assert {g for n in fleet.nodes.values() for g in n.gpus} == set(fleet.gpus)


def test_the_examples_are_what_they_are_called() -> None:
    """Four engines of 24 slots; eight models on four GPUs; 1, 20 and 80 ms; 64 GPUs in three clusters; three kinds of GPU."""
    four = load_sim_fleet(DEPLOY / "fleet.sim-4xa100.toml")
    assert [e.spec.slots for e in four.engines] == [24] * 4
    eight = load_sim_fleet(DEPLOY / "fleet.sim-8models-4gpus.toml")
    assert (len(eight.models), len(eight.gpus)) == (8, 4)
    three = load_sim_fleet(DEPLOY / "fleet.sim-3clusters.toml")
    assert [c.rtt_s for c in three.clusters.values()] == [0.001, 0.02, 0.08]
    assert {(e.spec.cluster, e.spec.rtt_s) for e in three.engines} == {("near", 0.001), ("region", 0.02), ("far", 0.08)}
    large = load_sim_fleet(DEPLOY / "fleet.sim-64.toml")
    assert (len(large.gpus), len(large.clusters)) == (64, 3)
    assert {len(e.gpus) for e in large.engines} == {1, 4}
    mixed = load_sim_fleet(DEPLOY / "fleet.sim-mixed.toml")
    assert {g.kind for g in mixed.gpus.values()} == {"a100-80g", "h100-80g", "l4-24g"}


def test_models_share_a_gpu(tmp_path: Path) -> None:
    """Two models on one GPU: each has its weights and half of what is left as KV; names of profiles need no [[model]]."""
    fleet = load('[[gpu]]\nkind = "a100-80g"\nmodels = ["llama-3.1-8b", "qwen3-14b"]\n', tmp_path)
    first, second = (e.served for e in fleet.engines)
    assert first is not None
    assert second is not None
    assert first.kv_bytes == pytest.approx(second.kv_bytes, rel=0.001)
    taken = sum(s.weight_bytes + s.server_bytes + s.kv_bytes for s in (first, second))
    assert taken == pytest.approx(first.gpu.usable_bytes, rel=0.001)
    assert fleet.clusters["local"].rtt_s == 0


def test_a_model_that_needs_several_gpus_gets_them(tmp_path: Path) -> None:
    """70B takes four of eight H100 where nobody says how many: two engines, no GPU twice."""
    fleet = load('[[gpu]]\nkind = "h100-80g"\ncount = 8\nmodels = ["llama-3.1-70b"]\n', tmp_path)
    assert [len(e.gpus) for e in fleet.engines] == [4, 4]
    assert len({g for e in fleet.engines for g in e.gpus}) == 8


def test_a_live_fleet_of_emulated_engines_can_be_simulated() -> None:
    """Each engine is on a GPU of its own, with the profile and the slots that its file says."""
    fleet = load_sim_fleet(DEPLOY / "fleet.emulated.toml")
    assert [e.spec.engine_id for e in fleet.engines] == ["a", "b"]
    assert len({e.gpus for e in fleet.engines}) == len(fleet.gpus) == 2
    for engine in fleet.engines:
        assert engine.spec.slots == engine.profile.max_num_seqs == 8
        assert engine.spec.kv_bytes > 0


WRONG = {
    "an unknown GPU": ('[[gpu]]\nkind = "a100"\n', "fleet.toml:2: unknown GPU 'a100': known are a100-80g"),
    "an unknown model": ('[[gpu]]\nkind = "l4-24g"\nmodels = ["gpt"]\n', "fleet.toml:3: unknown model 'gpt': add [[model]]"),
    "an unknown profile": (
        '[[gpu]]\nkind = "l4-24g"\n[[model]]\nname = "x"\nprofile = "gpt"\n',
        "fleet.toml:5: unknown profile 'gpt': known are llama-3.1-8b",
    ),
    "a model too large": (
        '[[gpu]]\nkind = "a100-80g"\nmodels = ["m"]\n[[model]]\nname = "m"\nprofile = "llama-3.1-70b"\ntensor_parallel = 1\n',
        "fleet.toml:3: llama-3.1-70b (141 GB) on 1 x a100-80g leaves 0.0 GB",
    ),
    "a model that no GPU can hold": (
        '[[gpu]]\nkind = "l4-24g"\n[[model]]\nname = "m"\nprofile = "qwen3-32b"\n',
        "fleet.toml:3: model 'm' fits no GPU of this fleet",
    ),
    "too many models": (
        '[[gpu]]\nkind = "l4-24g"\nmodels = ["llama-3.1-8b", "qwen3-8b"]\n',
        "fleet.toml:3: llama-3.1-8b and qwen3-8b leave nothing of 22.2 GB for KV",
    ),
    "GPUs that do not add up": (
        '[[gpu]]\nkind = "h100-80g"\ncount = 6\nmodels = ["llama-3.1-70b"]\n',
        "fleet.toml:4: llama-3.1-70b takes 4 GPUs: count = 6 is no multiple",
    ),
    "a cluster nobody described": (
        '[[cluster]]\nname = "near"\nrtt_s = 0.001\n[[gpu]]\nkind = "l4-24g"\ncluster = "far"\n',
        "fleet.toml:6: cluster 'far' is not described: add [[cluster]]",
    ),
    "a misspelled key": ('[[gpu]]\nkind = "l4-24g"\nmodel = ["x"]\n', "fleet.toml:3: unknown key 'model': known here are kind, count"),
    "a model twice": ('[[gpu]]\nkind = "a100-80g"\nmodels = ["qwen3-8b", "qwen3-8b"]\n', "fleet.toml:3: a model is named twice"),
    "engines and GPUs": (
        '[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\n[[gpu]]\nkind = "l4-24g"\n',
        "fleet.toml:5: a fleet has either [[engine]] or [[gpu]]",
    ),
    "a live engine of unknown speed": (
        '[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\n',
        "fleet.toml:1: how fast is engine 'a'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_fleet_is_told_where_and_what(text: str, says: str, tmp_path: Path) -> None:
    """One line: the file's line, what is wrong, what to do."""
    assert complaint(text, tmp_path).startswith(says)


def test_a_fleet_of_gpus_is_live_too() -> None:
    """To `maestro up` a file of GPUs says which nodes there are; its engines are known once these run."""
    fleet = load_fleet(DEPLOY / "fleet.sim-4xa100.toml")
    assert fleet.engines == ()
    assert fleet.nodes == tuple(load_sim_fleet(DEPLOY / "fleet.sim-4xa100.toml").nodes)
