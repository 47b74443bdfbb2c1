"""How fast each engine really is, learned from completions: seconds per prompt token and per output token, the latter by
how many other stages the engine serves beside it.

Exponentially weighted least squares of ``service_s = a x prompt_tokens + (b + c x beside) x output_tokens``, with the engine's
declared speeds as a prior worth a few observations. Prompt tokens that came from its prefix cache do not count, nor does a
choice that was written beside another. Different GPUs and parallelism variants are simply different engines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from maestro_agents.core import EngineSpec, Observation, Status

FORGET: Final = 0.98
PRIOR_WEIGHT: Final = 3.0
PRIOR_PROMPT_TOKENS: Final = 500.0
PRIOR_OUTPUT_TOKENS: Final = 100.0


class Speed(NamedTuple):
    """Seconds per token: of the prompt, of the output of a stage alone, and what each stage beside it adds to the latter."""

    prefill: float
    decode: float
    beside: float
    #: Stages that usually run beside one.
    usual: float

    @property
    def usual_decode(self) -> float:
        """Seconds per output token as it usually is."""
        return self.decode + self.beside * self.usual


@dataclass(slots=True)
class _Sums:
    """Of the products of (prompt tokens, output tokens, output tokens x beside, seconds)."""

    pp: float = 0.0
    po: float = 0.0
    pn: float = 0.0
    oo: float = 0.0
    on: float = 0.0
    nn: float = 0.0
    ps: float = 0.0
    os: float = 0.0
    ns: float = 0.0
    weight: float = 0.0
    beside: float = 0.0
    speed: Speed | None = None


@dataclass(slots=True)
class EngineSpeeds:
    """Learned speeds by engine id."""

    _sums: dict[str, _Sums] = field(default_factory=dict[str, _Sums])

    def observe(self, o: Observation, *, beside: int = 0, network_s: float = 0.0) -> None:
        """Take a finished stage, how many others its engine had, and what of its time was the network's: routing adds that itself."""
        served_s = o.service_s - min(network_s, 0.9 * o.service_s)
        if o.status is Status.DONE and o.output_tokens > 0 and served_s > 0:
            self.add(o.engine_id, max(0, o.prompt_tokens - o.cached_tokens), o.choice_tokens, served_s, beside)

    def add(self, engine_id: str, prompt_tokens: int, output_tokens: int, service_s: float, beside: int) -> None:
        """Take what one stage took: ``prompt_tokens`` that had to be computed."""
        s = self._sums.setdefault(engine_id, _Sums())
        p, o = float(prompt_tokens), float(output_tokens)
        n = o * max(0, beside)
        k = FORGET
        s.pp, s.po, s.pn = k * s.pp + p * p, k * s.po + p * o, k * s.pn + p * n
        s.oo, s.on, s.nn = k * s.oo + o * o, k * s.on + o * n, k * s.nn + n * n
        s.ps, s.os, s.ns = k * s.ps + p * service_s, k * s.os + o * service_s, k * s.ns + n * service_s
        s.weight, s.beside = k * s.weight + 1.0, k * s.beside + max(0, beside)
        s.speed = None

    def of(self, spec: EngineSpec) -> Speed:
        """What is known of an engine."""
        s = self._sums.setdefault(spec.engine_id, _Sums())
        if s.speed is None:
            s.speed = _solved(s, spec)
        return s.speed


def _solved(s: _Sums, spec: EngineSpec) -> Speed:
    """The least squares, pulled towards what the engine's spec says: a full engine decodes half as fast as an idle one.

    Collinear traffic can push a coefficient below zero; speeds are not negative.
    """
    declared = (spec.prefill_s_per_token, spec.decode_s_per_token, spec.decode_s_per_token / (2.0 * spec.slots))
    many = max(1.0, spec.slots / 2.0)
    weights = (PRIOR_PROMPT_TOKENS**2, PRIOR_OUTPUT_TOKENS**2, (PRIOR_OUTPUT_TOKENS * many) ** 2)
    wp, wo, wn = (PRIOR_WEIGHT * w for w in weights)
    rows = [
        [s.pp + wp, s.po, s.pn, s.ps + wp * declared[0]],
        [s.po, s.oo + wo, s.on, s.os + wo * declared[1]],
        [s.pn, s.on, s.nn + wn, s.ns + wn * declared[2]],
    ]
    for i in range(3):  # positive definite by the prior: no pivoting
        for j in range(3):
            if j != i:
                share = rows[j][i] / rows[i][i]
                rows[j] = [y - share * x for x, y in zip(rows[i], rows[j], strict=True)]
    prefill, decode, beside = (row[3] / row[i] for i, row in enumerate(rows))
    usual = s.beside / s.weight if s.weight else 0.0
    return Speed(max(prefill, 0.0), max(decode, 1e-6), max(beside, 0.0), usual)
