"""What a model's tokens cost in KV memory, against models worked out by hand, and what a stage reserves of it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.core import EngineSpec, EngineState, Prediction, Ticket, covered_tokens, kv_need_bytes
from maestro_agents.errors import ConfigError, WireError
from maestro_agents.policy import admission
from maestro_agents.predict.memory import KvShape
from maestro_serving.processes import EngineProcess, free_port
from maestro_serving.vllm import VllmProbe, vllm_command

KIB = 1024
LLAMA_3_1_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
QWEN3_8B: Mapping[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "max_window_layers": 36,
    "use_sliding_window": False,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V2_LITE: Mapping[str, Any] = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_size": 2048,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
MISTRAL_7B_V0_1: Mapping[str, Any] = {**LLAMA_3_1_8B, "model_type": "mistral", "sliding_window": 4096}
GEMMA_3_27B: Mapping[str, Any] = {
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "hidden_size": 5376,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
    "vision_config": {"num_hidden_layers": 27},
}
GEMMA_2_9B: Mapping[str, Any] = {
    "model_type": "gemma2",
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "hidden_size": 3584,
    "sliding_window": 4096,
    "torch_dtype": "float32",
}
GPT_OSS_20B: Mapping[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_size": 2880,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 2 (key, value) x 32 layers x 8 KV heads x 128 (4096 / 32) x 2 bytes
        pytest.param(LLAMA_3_1_8B, 128 * KIB, id="Llama-3.1-8B"),
        # 2 x 36 x 8 x 128 x 2; its window is switched off
        pytest.param(QWEN3_8B, 144 * KIB, id="Qwen3-8B"),
        # latent: 27 layers x (512 + 64) x 2 bytes, no heads and no factor 2
        pytest.param(DEEPSEEK_V2_LITE, 27 * 576 * 2, id="DeepSeek-V2-Lite"),
        # 61 x (512 + 64) x 2
        pytest.param({**DEEPSEEK_V2_LITE, "num_hidden_layers": 61}, 70_272, id="DeepSeek-V3"),
        # as Llama: a window does not make a token cheaper, it makes the old ones go
        pytest.param(MISTRAL_7B_V0_1, 128 * KIB, id="Mistral-7B-v0.1"),
        # 2 x 62 x 16 x 128 x 2
        pytest.param(GEMMA_3_27B, 507_904, id="Gemma-3-27B"),
        # 2 x 42 x 8 x 256 x 2: a float32 checkpoint is served in 16 bits
        pytest.param(GEMMA_2_9B, 336 * KIB, id="Gemma-2-9B"),
        # 2 x 24 x 8 x 64 x 2 (no dtype said: bfloat16)
        pytest.param(GPT_OSS_20B, 48 * KIB, id="gpt-oss-20b"),
        # every head its own: 2 x 32 x 32 x 128 x 2
        pytest.param({**LLAMA_3_1_8B, "num_key_value_heads": None}, 512 * KIB, id="multi-head"),
        # one for all: 2 x 32 x 1 x 128 x 2
        pytest.param({**LLAMA_3_1_8B, "num_key_value_heads": None, "multi_query": True}, 16 * KIB, id="multi-query"),
        pytest.param({**LLAMA_3_1_8B, "head_dim": 64}, 64 * KIB, id="head dimension said"),
        pytest.param({"model_type": "llava", "text_config": dict(LLAMA_3_1_8B)}, 128 * KIB, id="a model that sees"),
        # the last 10 of 30 layers read an earlier layer's: 2 x 20 x 2 x 256 x 2
        pytest.param(
            {**GEMMA_2_9B, "num_hidden_layers": 30, "num_key_value_heads": 2, "num_kv_shared_layers": 10},
            40 * KIB,
            id="shared KV layers",
        ),
    ],
)
def test_bytes_of_one_token(config: Mapping[str, Any], expected: int) -> None:
    """Worked out by hand for each model."""
    assert KvShape.from_config(config).bytes_per_token == expected


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        pytest.param(LLAMA_3_1_8B, {"tensor_parallel": 2}, 64 * KIB, id="4 of 8 heads each"),
        pytest.param(LLAMA_3_1_8B, {"tensor_parallel": 8}, 16 * KIB, id="one head each"),
        pytest.param(LLAMA_3_1_8B, {"tensor_parallel": 16}, 16 * KIB, id="a head is on two GPUs"),
        pytest.param(DEEPSEEK_V2_LITE, {"tensor_parallel": 8}, 31_104, id="latent: all of it on every GPU"),
        pytest.param(LLAMA_3_1_8B, {"kv_cache_dtype": "fp8"}, 64 * KIB, id="fp8"),
        pytest.param(DEEPSEEK_V2_LITE, {"kv_cache_dtype": "fp8_e4m3"}, 27 * 576, id="latent in fp8"),
        pytest.param(LLAMA_3_1_8B, {"dtype": "float32"}, 256 * KIB, id="served in 32 bits"),
        pytest.param(
            {**LLAMA_3_1_8B, "quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}},
            {},
            64 * KIB,
            id="the checkpoint asks for 8 bits",
        ),
        pytest.param(
            {**LLAMA_3_1_8B, "quantization_config": {"quant_method": "awq", "bits": 4}},
            {},
            128 * KIB,
            id="quantized weights alone change nothing",
        ),
    ],
)
def test_bytes_of_one_token_on_one_gpu_as_vllm_is_started(
    config: Mapping[str, Any], flags: Mapping[str, Any], expected: int
) -> None:
    """KV heads are split over GPUs, and repeated where there are too few; a smaller number type takes less."""
    assert KvShape.from_config(config, **flags).bytes_per_token == expected


@pytest.mark.parametrize(
    ("config", "layers", "window", "tokens", "expected"),
    [
        # below the window all is kept: 1,000 tokens are 63 blocks of 16
        (MISTRAL_7B_V0_1, (0, 32), 4096, 1_000, 63 * 16 * 128 * KIB),
        # beyond it ceil(4095 / 16) + 1 = 257 blocks, however long the text
        (MISTRAL_7B_V0_1, (0, 32), 4096, 30_000, 257 * 16 * 128 * KIB),
        # layers 6, 12, ..., 60 are full: 10. A layer's token: 2 x 16 x 128 x 2 = 8 KiB. 32,768 tokens are 2,048 blocks;
        # the other 52 keep ceil(1023 / 16) + 1 = 65
        (GEMMA_3_27B, (10, 52), 1024, 32_768, (10 * 2_048 + 52 * 65) * 16 * 8 * KIB),
        # every second layer is full; a layer's token: 2 x 8 x 256 x 2 = 8 KiB
        (GEMMA_2_9B, (21, 21), 4096, 8_192, (21 * 512 + 21 * 257) * 16 * 8 * KIB),
        # a layer's token: 2 x 8 x 64 x 2 = 2 KiB; a window of 128 is 9 blocks
        (GPT_OSS_20B, (12, 12), 128, 4_096, (12 * 256 + 12 * 9) * 16 * 2 * KIB),
        # Qwen2 with its window on: from layer 21 on
        (
            {
                **QWEN3_8B,
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4096,
                "max_window_layers": 21,
            },
            (21, 15),
            4096,
            8_192,
            (21 * 512 + 15 * 257) * 16 * 4 * KIB,
        ),
        # a window in a model type that is not known is not believed
        ({**MISTRAL_7B_V0_1, "model_type": "novel"}, (32, 0), 0, 8_192, 8_192 * 128 * KIB),
        ({**MISTRAL_7B_V0_1, "sliding_window": None}, (32, 0), 0, 8_192, 8_192 * 128 * KIB),
    ],
)
def test_layers_with_a_window_keep_no_more_than_it(
    config: Mapping[str, Any], layers: tuple[int, int], window: int, tokens: int, expected: int
) -> None:
    """What a request holds is worked out per layer, in whole blocks."""
    shape = KvShape.from_config(config)
    assert (shape.full_layers, shape.window_layers, shape.window_tokens) == (*layers, window)
    assert shape.bytes_for(tokens) == expected


def test_the_full_layers_of_gemma_4_have_a_shape_of_their_own() -> None:
    """Global heads are fewer and larger: 2 x 2 heads x 512 x 2 bytes in 5 layers, 2 x 8 x 256 x 2 in 25 with a window."""
    shape = KvShape.from_config(
        {
            "model_type": "gemma4",
            "text_config": {
                "model_type": "gemma4_text",
                "num_hidden_layers": 30,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "hidden_size": 2816,
                "global_head_dim": 512,
                "num_global_key_value_heads": 2,
                "attention_k_eq_v": True,
                "sliding_window": 1024,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
                "dtype": "bfloat16",
            },
        }
    )
    assert (shape.bytes_per_token, shape.window_bytes_per_token) == (5 * 4 * KIB + 25 * 8 * KIB, 25 * 8 * KIB)


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        ({}, {}, "num_hidden_layers is missing"),
        (
            {**LLAMA_3_1_8B, "num_attention_heads": None, "num_key_value_heads": None},
            {},
            "num_attention_heads is missing",
        ),
        ({**LLAMA_3_1_8B, "hidden_size": None}, {}, "hidden_size is missing"),
        ({**DEEPSEEK_V2_LITE, "qk_rope_head_dim": None}, {}, "qk_rope_head_dim is missing"),
        ({**LLAMA_3_1_8B, "num_hidden_layers": "many"}, {}, "num_hidden_layers = 'many' is no positive whole number"),
        ({**LLAMA_3_1_8B, "num_hidden_layers": -1}, {}, "num_hidden_layers = -1 is no positive whole number"),
        ({**LLAMA_3_1_8B, "torch_dtype": "int3"}, {}, "unknown dtype 'int3'"),
        (LLAMA_3_1_8B, {"kv_cache_dtype": "nvfp4"}, "unknown dtype 'nvfp4'"),
        # Qwen3-Next: three of four layers are linear attention
        (
            {**QWEN3_8B, "layer_types": ["linear_attention", "full_attention"] * 18},
            {},
            "layer_types with 'linear_attention'",
        ),
        (
            {**LLAMA_3_1_8B, "model_type": "jamba", "attn_layer_period": 8},
            {},
            "attn_layer_period (layers that keep a state",
        ),
        ({**LLAMA_3_1_8B, "hybrid_override_pattern": "M-M*"}, {}, "hybrid_override_pattern (layers that keep a state"),
        ({**DEEPSEEK_V2_LITE, "index_head_dim": 128}, {}, "index_head_dim (layers with a KV layout of their own)"),
        ({**LLAMA_3_1_8B, "is_encoder_decoder": True}, {}, "is_encoder_decoder"),
    ],
)
def test_a_configuration_that_does_not_say_is_refused(
    config: Mapping[str, Any], flags: Mapping[str, Any], says: str
) -> None:
    """No size is guessed: the error names the key and tells the user to set the size."""
    with pytest.raises(ConfigError) as caught:
        KvShape.from_config(config, **flags)
    assert says in str(caught.value)
    assert str(caught.value).endswith("set kv_bytes_per_token yourself")


def test_heads_that_no_vllm_could_split_are_refused() -> None:
    """8 heads over 3 GPUs: vLLM would not start either."""
    with pytest.raises(ConfigError, match="8 KV heads cannot be shared by tensor_parallel = 3 GPUs"):
        KvShape.from_config(LLAMA_3_1_8B, tensor_parallel=3)


# -- reservations ------------------------------------------------------------------------------------------------------
SPEC = EngineSpec(engine_id="e", url="u", model="m", kv_bytes_per_token=10, kv_block_tokens=16)


def ticket(prompt_tokens: int, **more: Any) -> Ticket:
    return Ticket(stage_id="s", client_id="c", model="m", prompt_tokens=prompt_tokens, **more)


def test_a_reservation_is_rounded_up_to_blocks() -> None:
    """100 prompt tokens and 50.2 predicted ones are 151: ten blocks of 16."""
    assert kv_need_bytes(ticket(100), 50.2, SPEC) == 160 * 10
    assert kv_need_bytes(ticket(100), 60, SPEC) == 160 * 10
    assert kv_need_bytes(ticket(100), 61, SPEC) == 176 * 10


def test_choices_share_the_prompt_and_write_on_their_own() -> None:
    """Three answers of 40 tokens to 100: six full blocks are shared, each has ceil((4 + 40) / 16) = 3 of its own."""
    assert kv_need_bytes(ticket(100, choices=3), 40, SPEC) == (6 + 3 * 3) * 16 * 10
    assert covered_tokens(ticket(100, choices=3), 40, SPEC) == 120
    assert covered_tokens(ticket(100, choices=3, max_tokens=7), 40, SPEC) == 21


def test_a_window_bounds_a_reservation() -> None:
    """Of 200 blocks, the windowed part of 6 bytes keeps ceil(99 / 16) + 1 = 8, the rest of 4 bytes all; so per choice."""
    spec = dataclasses.replace(SPEC, kv_window_tokens=100, kv_window_bytes_per_token=6)
    assert kv_need_bytes(ticket(3000), 200, spec) == 16 * (200 * 4 + 8 * 6)
    assert kv_need_bytes(ticket(3000, choices=2), 200, spec) == 16 * ((187 + 2 * 13) * 4 + 16 * 6)
    assert kv_need_bytes(ticket(32), 32, spec) == 16 * 4 * 10  # shorter than the window


def test_the_engine_bounds_what_is_reserved() -> None:
    """Nothing is promised beyond the longest request that the engine takes."""
    spec = dataclasses.replace(SPEC, max_model_len=1_000)
    assert kv_need_bytes(ticket(900), 5_000, spec) == 1_008 * 10  # 63 blocks
    assert kv_need_bytes(ticket(5_000), 5_000, spec) == 1_008 * 10


def test_blocks_are_what_a_token_by_token_count_needs() -> None:
    """For any prompt, answer and block size: as many blocks as filling them one token after the other takes."""
    rng = random.Random(0)
    for _ in range(200):
        size, prompt, out, choices = (
            rng.choice((1, 16, 128)),
            rng.randint(0, 400),
            rng.randint(0, 400),
            rng.randint(1, 4),
        )
        spec = dataclasses.replace(SPEC, kv_block_tokens=size, kv_bytes_per_token=1)
        blocks = {("shared", at // size) for at in range(prompt // size * size)}
        for choice in range(choices):
            blocks |= {(str(choice), at // size) for at in range(prompt // size * size, prompt + out)}
        assert spec.kv_bytes_of(prompt, out, choices) == len(blocks) * size


def test_memory_said_in_tokens_means_requests_of_the_greatest_length() -> None:
    """vLLM's count: with a window its tokens are cheaper than the first ones, and never counted as more than they hold."""
    assert SPEC.with_kv_tokens(1_000).kv_bytes == 10_000
    spec = dataclasses.replace(SPEC, kv_window_tokens=100, kv_window_bytes_per_token=6, max_model_len=3_200)
    assert spec.with_kv_tokens(6_400).kv_bytes == 2 * 16 * (200 * 4 + 8 * 6)


@pytest.mark.parametrize("wrong", [{"kv_block_tokens": 0}, {"kv_window_bytes_per_token": 11}, {"kv_window_tokens": -1}])
def test_an_engine_whose_memory_makes_no_sense_cannot_be_built(wrong: Mapping[str, int]) -> None:
    """A block of nothing, a part larger than the whole, a negative window."""
    with pytest.raises(WireError, match="engine e: "):
        dataclasses.replace(SPEC, **wrong)


def test_one_function_chooses_how_much_output_is_reserved() -> None:
    """A reservation is the prompt and what the policy (ours: `reserved_output_tokens`) says, for each choice."""
    prediction = Prediction(
        output_tokens_mean=30,
        output_tokens_p50=20,
        output_tokens_p90=80,
        output_tokens_p99=200,
        service_s=1,
        remaining_s=0,
    )
    for t in (ticket(100), ticket(100, choices=4), ticket(100, max_tokens=10), ticket(100, streams=True)):
        out = admission.reserved_output_tokens(t, prediction)
        assert out in (20, 80, 200)
        assert admission.reservation_bytes(t, out, EngineState(spec=SPEC)) == kv_need_bytes(t, out, SPEC)


# -- a real vLLM -------------------------------------------------------------------------------------------------------
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("overrides", [{}, {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 32}])
async def test_a_real_vllm_makes_as_many_tokens_of_its_memory(tmp_path: Path, overrides: Mapping[str, int]) -> None:
    """KV memory of 64 MiB over what we say a token takes is the number of tokens that vLLM says it has room for."""
    program, model = shutil.which(os.environ.get("MAESTRO_VLLM") or "vllm"), os.environ.get("MAESTRO_VLLM_MODEL")
    if program is None or model is None:
        pytest.skip("set MAESTRO_VLLM=/path/bin/vllm and MAESTRO_VLLM_MODEL=/path/to/tiny")
    port = free_port()
    command = vllm_command(
        program=program, model=model, served_model="m", port=port, max_model_len=2048, kv_cache_memory_bytes=64 << 20,
        cpu_core=(os.cpu_count() or 1) - 1,
        args=("--load-format", "dummy", "--hf-overrides", json.dumps(overrides)),
    )  # fmt: skip
    process = EngineProcess("vllm", command, url=f"http://127.0.0.1:{port}/v1", log=tmp_path / "vllm.log")
    await process.start()
    probe = VllmProbe()
    try:
        health = await probe.probe(EngineSpec(engine_id="a", url=process.url, model="m"))
    finally:
        await probe.close()
        await process.stop()
    config = json.loads((Path(model) / "config.json").read_text()) | overrides
    shape = KvShape.from_config(config, block_tokens=health.kv_block_tokens)
    assert health.kv_tokens * shape.bytes_per_token == pytest.approx(64 << 20, abs=shape.bytes_for(1))
