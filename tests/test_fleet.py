"""fleet.toml: what it means, and what a wrong one says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import Fleet, Launch, load_fleet, write_fleet

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


def load(text: str, folder: Path) -> Fleet:
    path = folder / "fleet.toml"
    path.write_text(text)
    return load_fleet(path)


def test_an_adopted_engine(tmp_path: Path) -> None:
    """A server that runs already is named by its URL; what is not said has a plain default."""
    fleet = load(
        """
        pool = "p1"
        [redis]
        url = "redis://127.0.0.1:6379/0"
        [[engine]]
        id = "a"
        model = "tiny"
        url = "http://127.0.0.1:8101/v1/"
        kv_tokens = 1000
        kv_bytes_per_token = 1024
        """,
        tmp_path,
    )
    assert fleet == Fleet(
        pool="p1",
        redis_url="redis://127.0.0.1:6379/0",
        engines=(
            EngineSpec(
                engine_id="a",
                url="http://127.0.0.1:8101/v1",
                model="tiny",
                slots=16,
                kv_bytes=1_024_000,
                kv_bytes_per_token=1024,
                kv_block_tokens=16,
            ),
        ),
    )


def test_a_launched_engine(tmp_path: Path) -> None:
    """An engine to launch keeps its launch; its URL follows from its port, or is open until it runs."""
    fleet = load(
        """
        [[engine]]
        id = "a"
        model = "tiny"
        [engine.launch]
        kind = "emulator"
        port = 8101
        [[engine]]
        id = "b"
        model = "tiny"
        slots = 4
        [engine.launch]
        kind = "vllm"
        model_path = "org/model"
        args = ["--enforce-eager"]
        cpu_core = 0
        """,
        tmp_path,
    )
    assert [e.url for e in fleet.engines] == ["http://127.0.0.1:8101/v1", ""]
    assert fleet.launches["b"] == Launch(kind="vllm", model_path="org/model", args=("--enforce-eager",), cpu_core=0)
    with pytest.raises(ConfigError, match="engine 'b' is to be launched and has no address yet"):
        fleet.running()
    assert fleet.adopt({"b": "http://127.0.0.1:9/v1"}).running()[1].url == "http://127.0.0.1:9/v1"


def test_kv_size_of_a_launched_model_comes_from_its_configuration(tmp_path: Path) -> None:
    """A model folder, meant from the fleet file's own folder, says what a token costs."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA_8B))
    fleet = load(
        """
        [[engine]]
        id = "a"
        model = "llama"
        [engine.launch]
        kind = "vllm"
        model_path = "llama"
        kv_cache_memory_bytes = 268435456
        """,
        tmp_path,
    )
    (spec,) = fleet.engines
    assert (spec.kv_bytes_per_token, spec.kv_bytes) == (131_072, 268_435_456)
    assert fleet.launches["a"].model_path == str(tmp_path / "llama")


@pytest.mark.parametrize(
    ("args", "config", "expected"),
    [
        ("[]", {}, (131_072, 16, 0, 0)),
        ('["--tensor-parallel-size", "2"]', {}, (65_536, 16, 0, 0)),
        ('["-tp", "4", "--kv-cache-dtype=fp8"]', {}, (16_384, 16, 0, 0)),
        ('["--block_size=32"]', {}, (131_072, 32, 0, 0)),
        ("[]", {"model_type": "mistral", "sliding_window": 512}, (131_072, 16, 512, 131_072)),
        (
            '["--disable-hybrid-kv-cache-manager"]',
            {"model_type": "mistral", "sliding_window": 512},
            (131_072, 16, 0, 0),
        ),
    ],
)
def test_kv_memory_of_a_launched_model_is_as_vllm_is_started(
    tmp_path: Path, args: str, config: dict[str, object], expected: tuple[int, ...]
) -> None:
    """The flags that change what a token takes, or in what blocks, are read from the launch's own command line."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA_8B, **config}))
    fleet = load(
        f'[[engine]]\nid = "a"\nmodel = "m"\n[engine.launch]\nkind = "vllm"\nmodel_path = "model"\nargs = {args}\n',
        tmp_path,
    )
    (e,) = fleet.engines
    assert (e.kv_bytes_per_token, e.kv_block_tokens, e.kv_window_tokens, e.kv_window_bytes_per_token) == expected


def test_a_model_whose_memory_is_not_worked_out_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """The error names the line, the folder and the key; the size said in the file helps."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA_8B, "attn_layer_period": 8}))
    text = '[[engine]]\nid = "a"\nmodel = "m"\n{}[engine.launch]\nkind = "vllm"\nmodel_path = "model"\n'
    with pytest.raises(ConfigError, match=r"fleet.toml:6: .*attn_layer_period .*: set kv_bytes_per_token yourself"):
        load(text.format(""), tmp_path)
    (spec,) = load(text.format("kv_bytes_per_token = 4096\n"), tmp_path).engines
    assert spec.kv_bytes_per_token == 4096


def test_a_fleet_that_was_written_is_read_back(tmp_path: Path) -> None:
    """What `maestro up` hands to its scheduler is the fleet as it runs."""
    fleet = Fleet(
        pool="p",
        redis_url="redis://127.0.0.1:1/0",
        engines=(
            EngineSpec(
                engine_id="a",
                url="http://127.0.0.1:1/v1",
                model="m",
                kv_bytes=10,
                kv_bytes_per_token=2,
                kv_block_tokens=32,
                kv_window_tokens=100,
                kv_window_bytes_per_token=1,
                slots=3,
            ),
            EngineSpec(engine_id="b", url="http://127.0.0.1:2/v1", model='odd "name"', max_model_len=9),
        ),
    )
    write_fleet(fleet, tmp_path / "fleet.toml")
    assert load_fleet(tmp_path / "fleet.toml") == fleet


ENGINE = '[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://h:1/v1"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "1: the fleet has no engine: add an [[engine]] with id, model and url"),
        ("[[engine]\n", "1: not valid TOML: "),
        (ENGINE + "colour = 1\n", "5: unknown key 'colour': known here are id, model, url,"),
        (
            ENGINE + '[engine.launch]\nkind = "emulator"\nprot = 1\n',
            "7: unknown key 'prot': known here are kind, port,",
        ),
        ("[redis]\nport = 1\n" + ENGINE, "2: unknown key 'port': known here are url"),
        (ENGINE + '[[engine]]\nid = "b"\nurl = "http://h:2"\n', "5: engine.model is missing: add model = …"),
        (ENGINE + '[[engine]]\n# no id\nmodel = "m"\n', "5: engine.id is missing: add id = …"),
        (ENGINE + "slots = -1\n", "5: slots = -1: input should be greater than 0"),
        (ENGINE + "slots = 0\n", "5: slots = 0: input should be greater than 0"),
        (ENGINE + 'slots = "4"\n', "5: slots = '4': input should be a valid integer"),
        (
            ENGINE + "\nkv_bytes_per_token = -5\n",
            "6: kv_bytes_per_token = -5: input should be greater than or equal to 0",
        ),
        (
            ENGINE + "kv_bytes_per_token = 5\nkv_window_bytes_per_token = 6\n",
            "6: kv_window_bytes_per_token is a part of kv_bytes_per_token, which is less: say both",
        ),
        (ENGINE + ENGINE, "6: engine id 'a' is taken by line 2: ids are unique in a fleet"),
        (
            '[[engine]]\nid = "a"\nmodel = "m"\n',
            "1: engine 'a' has neither url nor launch: give the url of a running server or [engine.launch]",
        ),
        (ENGINE.replace("http:", "ftp:"), "4: url = 'ftp://h:1/v1': an engine's url looks like http://"),
        (ENGINE + '[engine.launch]\nkind = "sglang"\n', "6: kind = 'sglang': input should be 'emulator' or 'vllm'"),
        (
            ENGINE + 'launch = { kind = "vllm", port = -1 }\n',
            "5: port = -1: input should be greater than or equal to 0",
        ),
        ('[redis]\nurl = "http://x"\n' + ENGINE, "2: url = 'http://x': a Redis URL starts with redis://"),
        ('pool = "a b"\n' + ENGINE, "1: pool = 'a b': string should match pattern"),
        (
            ENGINE + '[engine.launch]\nkind = "vllm"\nargs = [\n  "--a=b", # [\n  "c = d",\n]\nport = "x"\n',
            "11: port = 'x': input should be a valid integer",
        ),
    ],
)
def test_a_wrong_fleet_says_its_line_and_what_to_do(tmp_path: Path, text: str, says: str) -> None:
    """Every error is one line: file, line, what is wrong, what would be right."""
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path)
    message = str(caught.value)
    assert message.removeprefix(f"{tmp_path}/fleet.toml:").startswith(says)
    assert "\n" not in message


def test_a_fleet_file_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path is an error of configuration."""
    with pytest.raises(ConfigError, match=r"none\.toml: there is no such file"):
        load_fleet(tmp_path / "none.toml")


def test_a_cluster_says_how_far_its_engines_are(tmp_path: Path) -> None:
    """``rtt_s`` reaches the engines of the cluster, also through a file that was written; a cluster is described once."""
    near = '[[cluster]]\nname = "near"\nrtt_s = 0.001\n'
    engine = '[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\ncluster = "near"\n'
    fleet = load(near + engine, tmp_path)
    assert fleet.engines[0].rtt_s == 0.001
    write_fleet(fleet, tmp_path / "written.toml")
    assert load_fleet(tmp_path / "written.toml") == fleet
    with pytest.raises(ConfigError, match=r"toml:5: cluster 'near' is described twice"):
        load(near + near + engine, tmp_path)
    with pytest.raises(ConfigError, match=r"toml:8: cluster 'near' is not described"):
        load(near.replace("near", "far") + engine, tmp_path)
