"""A profile that was measured: the file that `maestro calibrate` writes, and what a burst of requests takes by the engine model.

The seconds of a burst are a sum over its steps, hence linear in the costs of `EngineProfile`: how many steps, tokens and
requests stand behind each, `amounts` counts by playing the burst on the model itself. A fit is then a linear one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from maestro_agents.simulator.engine import COSTS, Engine, EngineProfile, EngineRequest, Scheduling
from maestro_agents.tomlfile import Place, read_toml

_SIZES: Final = ("max_num_seqs", "step_tokens", "block_size", "num_blocks", "max_model_len")


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """One thing that was measured, and what the fitted profile says of it."""

    what: str
    measured_s: float
    fitted_s: float
    #: Median distance of its repeats from their median, as a share of it.
    spread: float

    @property
    def off(self) -> float:
        """Relative error of the profile."""
        return self.fitted_s / self.measured_s - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A measured profile and how it came about."""

    profile: EngineProfile
    model: str
    #: The server and its version.
    engine: str
    #: ISO date.
    date: str
    #: One line: what was played, how often, on which cores.
    how: str
    #: Seconds between a client and the model's first step and last token that do not keep the model from its work. No part of
    #: the profile: an emulator's own server takes some, a cluster's distance in a fleet file is the rest.
    latency_s: float = 0.0
    #: Whether a prompt that was sent twice was found in the prefix cache.
    prefix_cache: bool = False
    residuals: tuple[Residual, ...] = ()

    def toml(self) -> str:
        """The file."""
        p = self.profile
        lines = [
            "# A measured engine. maestro emulate --profile FILE; in a fleet file [engine.launch] profile = FILE.",
            "",
            "[calibration]",
            *(
                f"{name} = {json.dumps(getattr(self, name), ensure_ascii=False)}"
                for name in ("model", "engine", "date", "how", "prefix_cache")
            ),
            f"latency_s = {self.latency_s:.3g}",
            "",
            "# Seconds of a step, and of what is in it; see maestro_agents/simulator/engine.py.",
            "[profile]",
            *(f"{name} = {getattr(p, name):.4g}" for name in COSTS),
            *(f"{name} = {getattr(p, name)}" for name in _SIZES),
            f'scheduling = "{p.scheduling.value}"',
            "",
            "# What it was fitted to. spread: median distance of the repeats from their median.",
        ]
        for one in self.residuals:
            lines += [
                "[[fitted]]",
                f"what = {json.dumps(one.what)}",
                f"measured_s = {one.measured_s:.4g}",
                f"fitted_s = {one.fitted_s:.4g}",
                f"spread = {one.spread:.2g}",
                "",
            ]
        return "\n".join(lines).rstrip() + "\n"


def read_calibration(path: Path) -> Calibration:
    """Read what `Calibration.toml` wrote. Raises `ConfigError`, one line, with the line of the file."""
    file = read_toml(path)

    def table(name: str) -> Mapping[str, Any]:
        found = file.content.get(name)
        if not isinstance(found, dict):
            raise file.error((), f"no [{name}]: not a profile that `maestro calibrate` wrote")
        return cast("dict[str, Any]", found)

    def value(place: Place, kind: type, content: Mapping[str, Any]) -> Any:
        found = content.get(str(place[-1]))
        good = isinstance(found, kind if kind is not float else (int, float)) and not (
            kind is not bool and isinstance(found, bool)
        )
        if not good or (isinstance(found, float) and not math.isfinite(found)):
            raise file.error(place, f"{place[-1]} must be there and a {kind.__name__}, got {found!r}")
        return found

    said, measured = table("calibration"), table("profile")
    if unknown := set(measured) - {*COSTS, *_SIZES, "scheduling"}:
        raise file.error(("profile", min(unknown)), f"a profile has no {min(unknown)!r}")
    costs = {name: float(value(("profile", name), float, measured)) for name in COSTS}
    sizes = {name: value(("profile", name), int, measured) for name in _SIZES}
    scheduling = value(("profile", "scheduling"), str, measured)
    if scheduling not in set(Scheduling):
        raise file.error(("profile", "scheduling"), f"scheduling must be one of {', '.join(Scheduling)}")
    try:
        profile = EngineProfile(**costs, **sizes, scheduling=Scheduling(scheduling))
    except ValueError as e:
        raise file.error(("profile",), str(e)) from None
    fitted = file.content.get("fitted", [])
    return Calibration(
        profile=profile,
        **{name: value(("calibration", name), str, said) for name in ("model", "engine", "date", "how")},
        latency_s=float(value(("calibration", "latency_s"), float, said)),
        prefix_cache=value(("calibration", "prefix_cache"), bool, said),
        residuals=tuple(
            Residual(
                what=value(("fitted", n, "what"), str, one),
                **{
                    name: float(value(("fitted", n, name), float, one)) for name in ("measured_s", "fitted_s", "spread")
                },
            )
            for n, one in enumerate(fitted)
        ),
    )


def burst_s(profile: EngineProfile, requests: Sequence[tuple[int, int]]) -> float:
    """Seconds from the arrival of so many (prompt, output) tokens, all at once, until the last is answered."""
    engine = Engine(profile)
    for n, (prompt_tokens, output_tokens) in enumerate(requests):
        engine.submit(EngineRequest(request_id=str(n), prompt_tokens=prompt_tokens, output_tokens=output_tokens), 0.0)
    end_s = 0.0
    while engine.next_end_s < math.inf:
        end_s = max([end_s, *(record.ended_at_s for record in engine.ended(engine.next_end_s))])
    return end_s


def amounts(sizes: EngineProfile, requests: Sequence[tuple[int, int]]) -> Mapping[str, float]:
    """By cost, how often it is in the seconds of such a burst on an engine of these sizes.

    Exact: of the steps, what is in them does not depend on how long they take, since all requests are there from the first on.
    """
    unit = dataclasses.replace(sizes, **{name: float(name == "base_s") for name in COSTS})
    steps = burst_s(unit, requests)
    found = {"base_s": steps}
    for name in COSTS[1:]:
        found[name] = burst_s(dataclasses.replace(unit, **{name: 1.0}), requests) - steps
    return found
