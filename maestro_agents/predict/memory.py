"""What a token costs in KV memory, read from a model's own configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from maestro_agents.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_BYTES: Final = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """KV cache bytes of one token, from a Hugging Face ``config.json``.

    ``2 (key and value) x layers x KV heads x head dimension x bytes per number``. Models with latent attention
    (DeepSeek) keep one compressed vector per layer instead. Layers with a sliding window are counted in full, which
    errs on the safe side. Raises `ConfigError` where the configuration does not say.
    """
    text = cast("Mapping[str, Any]", config.get("text_config", config))  # a model that also sees keeps the rest here
    dtype = str(
        text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    )
    number_bytes = _BYTES.get(dtype.removeprefix("torch."))
    if number_bytes is None:
        raise ConfigError(f"config.json: unknown dtype {dtype!r}: set kv_bytes_per_token yourself")
    try:
        layers = int(text["num_hidden_layers"])
        if text.get("kv_lora_rank"):
            return layers * (int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])) * number_bytes
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"config.json: {e} is missing or no number: set kv_bytes_per_token yourself") from e
    return 2 * layers * kv_heads * head_dim * number_bytes
