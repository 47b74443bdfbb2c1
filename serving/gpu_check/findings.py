"""What was measured, what was not and why, and what it means: as JSON, as a table, and as entries of the GPU profiles."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

GB = 1_000_000_000

MODELS = {
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-70b": 70_553_706_496,
}
"""Parameters, as in simulator/profiles/models.toml; two bytes each."""

KINDS = {
    "A100-SXM4-80GB": "a100-80g",
    "A100-SXM4-40GB": "a100-40g",
    "H100 80GB HBM3": "h100-80g",
    "H200": "h200-141g",
    "L4": "l4-24g",
}
"""Ends of the names that drivers give their GPUs, and the GPUs' tables in simulator/profiles/gpus.toml."""

WAYS = {
    "wake from sleep level 1": "pinned host -> HBM",
    "sleep at level 1": "HBM -> pinned host",
    "reload, files in the page cache": "page cache -> host",
    "reload, files on disk": "disk -> host",
}
"""What a model's weights go through, and the measurement that says how fast. Bytes only: servers start, allocate and warm up besides."""


@dataclass
class Findings:
    """Collects measurements. What fails is noted with its cause and stops nothing."""

    device: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    say: Callable[[str], None] = print

    def moved(self, what: str, size: int, seconds: Sequence[float], note: str = "") -> None:
        """``size`` bytes went from here to there, once for each of ``seconds``."""
        median_s = statistics.median(seconds)
        rate = size / median_s / GB
        line = {"what": what, "bytes": size, "seconds": [round(s, 6) for s in seconds], "gb_per_s": round(rate, 3)}
        self.results.append({**line, **({"note": note} if note else {})})
        self.say(f"{what:<44} {size / GB:8.3f} GB {median_s:9.4f} s {rate:9.2f} GB/s  {note}".rstrip())

    def value(self, what: str, value: float, unit: str, note: str = "") -> None:
        """Anything else that is a number."""
        self.results.append({"what": what, "value": value, "unit": unit, **({"note": note} if note else {})})
        self.say(f"{what:<44} {value:11.4g} {unit}  {note}".rstrip())

    def skip(self, what: str, why: str) -> None:
        """It could not be measured."""
        self.not_measured.append({"what": what, "why": why})
        self.say(f"{what:<44} not measured: {why}")

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measure it; where that raises, say so and go on."""
        try:
            measure()
        except Exception as e:
            self.skip(what, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}")

    def rate(self, what: str) -> float | None:
        """Bytes a second of the largest move of that name."""
        found = [r for r in self.results if r["what"] == what and "gb_per_s" in r]
        return max(found, key=lambda r: r["bytes"])["gb_per_s"] * GB if found else None

    # -- what it means -------------------------------------------------------------------------------------------------
    def wake_s(self) -> dict[str, dict[str, float | None]]:
        """Seconds for the weights of a model to go each way, by `MODELS` and `WAYS`; None where the way was not measured."""
        rates = {way: self.rate(what) for way, what in WAYS.items()}
        return {
            model: {way: round(2 * n / rate, 2) if rate else None for way, rate in rates.items()}
            for model, n in MODELS.items()
        }

    def to_json(self) -> dict[str, Any]:
        label = "GPU-verified" if self.device else "no GPU: the host's part only"
        return {
            "label": label,
            "date": time.strftime("%Y-%m-%d"),
            "device": self.device,
            "host": {"cpus": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release()},
            "results": self.results,
            "not_measured": self.not_measured,
            "wake_s": self.wake_s(),
        }

    def table(self) -> str:
        """What it means, to be read."""
        lines = [f"{'seconds for the weights of':<36}" + "".join(f"{m:>15}" for m in MODELS)]
        seconds = self.wake_s()
        for way in WAYS:
            cells = [seconds[m][way] for m in MODELS]
            lines.append(f"{way:<36}" + "".join(f"{'-' if s is None else format(s, '.2f'):>15}" for s in cells))
        lines.append(
            f"{'(bytes / speed; -: not measured)':<36}" + "".join(f"{2 * n / GB:>12.1f} GB" for n in MODELS.values())
        )
        return "\n".join(lines)

    def profile(self) -> str:
        """The entries of simulator/profiles/gpus.toml and tiers.toml that these measurements replace, and no others."""
        name = (self.device or {}).get("name", "")
        kind = next((k for end, k in KINDS.items() if name.endswith(end)), "")
        said = f"measured {time.strftime('%Y-%m-%d')} by serving/gpu_check on {name or 'a machine without a GPU'}"
        up, down = self.rate("pinned host -> HBM"), self.rate("HBM -> pinned host")
        both = self.rate("pinned host -> HBM, all GPUs together")
        link = {"host_link_bytes_per_s": min(up, down) if up and down else None, "host_memory_bytes_per_s": both}
        disk = {"host_bytes_per_s": self.rate("page cache -> host"), "disk_bytes_per_s": self.rate("disk -> host")}
        lines: list[str] = []
        for file, head, entries in (
            ("gpus.toml", f"[gpu.{kind or 'NEW'}]", link),
            ("tiers.toml", "[start]", disk),
        ):
            known = [f"{key} = {value:.3g}" for key, value in entries.items() if value]
            lost = [f"# {key}: not measured" for key, value in entries.items() if not value]
            lines += [f"# profiles/{file}", head, *known, *lost, f"# add to source: {', '.join(entries)}: {said}", ""]
        if name and not kind:
            lines.insert(0, f"# {name} has no table yet: [gpu.NEW] needs the other keys of a table, too")
        return "\n".join(lines)
