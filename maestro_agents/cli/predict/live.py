"""`maestro predict status`, `explain` and `rollback`: the predictor of a running pool, and why it says what it says."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from maestro_agents.cli.snapshot import PAGE, entries, named
from maestro_agents.core import WIRE_VERSION, Observation, Ticket
from maestro_agents.errors import ConfigError, MaestroError
from maestro_agents.ports import Queue
from maestro_agents.predict import trainer
from maestro_agents.predict.features import FEATURE_NAMES, FEATURES, usable
from maestro_agents.predict.length import HEADS, LengthModel
from maestro_agents.predict.live import RETRAIN_ROWS, RETRAIN_S, Learner, default_model, version_of
from maestro_agents.predict.roles import STATISTICS, Estimate, Stage

SHOWN: Final = 15
"""Columns on the screen; the others are added up in one line."""

MEANINGS: Final[Mapping[str, str]] = {
    **{f.name: f.meaning for f in FEATURES},
    **dict.fromkeys(STATISTICS, "online statistics (tokens; `_n`: how many answers)"),
    "role_key_code": "which role on which model it is",
    "last_share_log": "what the last message is of the whole prompt",
    "words_all": "its words, as weighed in all roles",
    "words_role": "its words, as weighed in this role",
    "words_short": "its words, as weighed for a short answer",
    "short_p": "chance of a short answer or a tool call (phase 1)",
}


# -- status --------------------------------------------------------------------------------------------------------------
async def status(queue: Queue) -> dict[str, Any]:
    """What the leader last told of its predictor, and the models that are kept. Raises `ConfigError` where it told nothing."""
    told = await queue.predictor_status()
    if not told:
        raise ConfigError(
            "no scheduler of this pool has told how it predicts: is `maestro scheduler` (or `maestro up`) running, "
            "and is this its pool (`--pool`)?"
        )
    try:
        found: dict[str, Any] = json.loads(told)
    except ValueError:
        raise ConfigError("what the scheduler told of its predictor is no JSON: is it of another version?") from None
    return {**found, "models": list(await queue.models())}


def status_view(found: Mapping[str, Any]) -> RenderableType:
    """A status for the terminal."""
    since = _moment(found.get("since_s", 0.0))
    rows = found.get("trained_rows", 0)
    head = Text.assemble("predicting by ", (str(found.get("version", "?")), "bold"), f" since {since}" if since else "")
    if rows:
        head.append(f", trained on {rows:,} stages ({found.get('trained_at') or 'no date'})")
    return Group(head, *map(Text, _lines(found)), Text(""), _roles(found), *_rest(found), *_prefix(found))


def _lines(found: Mapping[str, Any]) -> list[str]:
    kept: list[str] = found.get("models") or []
    lines = _training(found)
    if found.get("retrain"):
        lines[0] += f"; trained again at {RETRAIN_ROWS:,}, {RETRAIN_S / 60:g} minutes apart at least"
    else:
        lines[0] += "; never trained again here (MAESTRO_RETRAIN=off)"
    lines += [
        f"{_moment(r['at_s'])}: {r['from']} was worse than {r['to']}, which predicts again" for r in found["rollbacks"]
    ]
    if kept:
        lines.append(f"kept: {', '.join(kept)} (`maestro predict rollback VERSION`)")
    if found.get("trouble"):
        lines.append(f"trouble: {found['trouble']}")
    return lines


def _training(found: Mapping[str, Any]) -> list[str]:
    """What one of the two models is trained on, and what became of that."""
    window = f"window: {found.get('window_rows', 0):,} stages of {found.get('window_roles', 0):,} roles"
    lines = [f"{window}, {found.get('new_rows', 0):,} of them new"]
    if (v := found.get("last_training")) is not None:
        ours = f"error {v['mae']:.1f} tokens, the median's {v['median_mae']:.1f}"
        if v.get("current_mae") is not None:
            ours += f", the former model's {v['current_mae']:.1f}"
        fate = f"not used: {v['against']}" if v.get("against") else "published"
        lines.append(f"last training: {v['rows']:,} stages, {v['seconds']:.0f} s; {ours}; {fate}")
    if (t := found.get("trial")) is not None and t.get("n"):
        lines.append(
            f"beside {t['former']}: error {t['mae']:.1f} tokens, not {t['former_mae']:.1f} (last {t['n']} stages)"
        )
    return lines


def _roles(found: Mapping[str, Any]) -> RenderableType:
    rows: Sequence[Mapping[str, Any]] = found.get("roles") or []
    if not rows and not found.get("trained_rows"):
        return Text("There is no model: online statistics predict alone.", style="dim")
    if not rows:
        return Text("No stage has ended since that the model could be held against.", style="dim")
    return _errors(rows, "median")


def _rest(found: Mapping[str, Any]) -> list[RenderableType]:
    """The second model: what runs still write after a call."""
    rest: Mapping[str, Any] = found.get("rest") or {}
    if not rest.get("window_rows") and not rest.get("trained_rows"):
        return []
    head = Text("\nwhat a run still writes after a call, by ")
    if not rest.get("trained_rows"):
        return [head.append("what such stages were mostly followed by (no model yet)"), *map(Text, _training(rest))]
    head.append(str(rest.get("version", "?")), "bold")
    head.append(f", trained on {rest['trained_rows']:,} stages ({rest.get('trained_at') or 'no date'})")
    rows: Sequence[Mapping[str, Any]] = rest.get("roles") or []
    table = _errors(rows, "workflow") if rows else Text("No run has ended since that it could be held against.", "dim")
    return [head, *map(Text, _training(rest)), Text(""), table]


def _errors(rows: Sequence[Mapping[str, Any]], other: str) -> RenderableType:
    """Errors by role beside those of what would be used instead."""
    table = _table("role", "model", ">n", ">error", f">{other}'s", ">below p90", "used")
    for r in rows:
        table.add_row(
            *(str(r["role"]), str(r["model"]), f"{r['n']:.0f}", f"{r['mae_said']:.1f}", f"{r[f'mae_{other}']:.1f}"),
            f"{r['covered_p90']:.0%}",
            Text(str(r["uses"]), style="" if r["uses"] == "model" else "yellow"),
        )
    return table


def _prefix(found: Mapping[str, Any]) -> list[RenderableType]:
    engines: Mapping[str, Mapping[str, float]] = found.get("prefix") or {}
    seen = {e: s for e, s in engines.items() if s.get("completions")}
    if not seen:
        return []
    table = _table("engine", ">stages", ">prefix hit, tokens", ">error of the guess")
    for engine_id, s in sorted(seen.items()):
        table.add_row(
            engine_id, f"{s['completions']:.0f}", f"{s['mean_cached_tokens']:.1f}", f"{s['mean_error_tokens']:.1f}"
        )
    return [Text(""), table]


# -- rollback ------------------------------------------------------------------------------------------------------------
async def roll_back(queue: Queue, version: str) -> str:
    """Make a model that is kept the pool's again; "" for the one before. Returns its version. Raises `ConfigError`."""
    kept = list(await queue.models())
    if not version and len(kept) < 2:
        raise ConfigError("there is no former model in this pool's Redis: nothing was published after another")
    chosen = version or kept[1]
    if not await queue.publish_model(chosen, card="", data=None, epoch=None):
        raise ConfigError(f"no model {chosen!r} is kept: there are {', '.join(kept) or 'none'}")
    return chosen


# -- explain -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Explained:
    """Why a model says what it says of one stage."""

    stage_id: str
    version: str
    head: str
    #: By column: what it is, and its SHAP contribution to the log of the length. Largest first.
    columns: Sequence[tuple[str, float | None, float]]
    #: What is said of a stage that nothing is known of, and of this one before it is calibrated, in tokens.
    base_tokens: float
    raw_tokens: float
    estimate: Estimate
    #: What it wrote, None while it waits.
    output_tokens: int | None
    #: Finished stages that the statistics rest on.
    learned: int

    def to_json(self) -> dict[str, Any]:
        e = self.estimate
        return {
            "stage_id": self.stage_id,
            "model_version": self.version,
            "head": self.head,
            "base_tokens": self.base_tokens,
            "raw_tokens": self.raw_tokens,
            "columns": [{"name": n, "value": v, "contribution": c, "factor": math.exp(c)} for n, v, c in self.columns],
            "estimate": {
                **{name: getattr(e, name) for name in ("mean", "p50", "p90", "p99")},
                "short_p": None if math.isnan(e.short_p) else e.short_p,
                "basis": e.basis,
            },
            "output_tokens": self.output_tokens,
            "statistics_from": self.learned,
        }


async def explain(
    queue: Queue | None, stage_id: str, *, ticket: Path | None, model: Path | None, head: str
) -> Explained:
    """Explain a stage that waits, runs or has ended, or the ticket in a file. Raises `ConfigError` for what is not there."""
    if head not in {*HEADS, "mean"}:
        raise ConfigError(f"there is no head {head!r}: known are {', '.join((*HEADS, 'mean'))}")
    found = await _model(queue, model)
    learner = Learner(found)
    stage: Stage | None = None
    name, wrote = "", None
    if ticket is not None:
        asked = read_ticket(ticket)
        stage, name = asked, asked.stage_id
    elif queue is not None and (entry := named(await entries(queue), stage_id)) is not None:
        stage, name = entry.ticket, entry.ticket.stage_id
    learned = 0
    after, at = "-", ""
    while queue is not None and at != after:
        after = at
        at, page = await queue.read_log(after, PAGE)
        before = [o for o in page if isinstance(o, Observation)]
        if stage is None and (i := next((i for i, o in enumerate(before) if o.stage_id.startswith(stage_id)), -1)) >= 0:
            ended = before[i]
            stage, name, wrote = trainer.example_of(ended) or ended, ended.stage_id, ended.choice_tokens
            before, at = before[:i], after  # what came later was not known then
        learner.observe(before)
        learned += len(before)
    if stage is None:
        raise ConfigError(f"no stage {stage_id!r} in the queue or in what it remembers; `maestro queue ls` names them")
    if not usable(stage.features):
        raise ConfigError(
            f"the features of stage {name!r} are of another version, or none: it is predicted from statistics alone, "
            "and there is nothing to explain"
        )
    shap = found.explain(stage, learner.predictor.statistics.told(stage), head)
    bias = shap.pop("bias")
    values = _values(stage, learner)
    columns = sorted(((n, values.get(n), c) for n, c in shap.items()), key=lambda row: -abs(row[2]))
    less = 0.0 if head == "mean" else 1.0  # quantiles are of log(1 + tokens), the mean has a log link
    return Explained(
        stage_id=name,
        version=version_of(found),
        head=head,
        columns=columns,
        base_tokens=max(0.0, math.exp(bias) - less),
        raw_tokens=max(0.0, math.exp(bias + sum(shap.values())) - less),
        estimate=learner.predictor.estimate([stage])[0],
        output_tokens=wrote,
        learned=learned,
    )


async def _model(queue: Queue | None, path: Path | None) -> LengthModel:
    if path is not None:
        return read_model(path)
    if queue is not None and (found := await queue.model("")) is not None and found[1]:
        return LengthModel.decode(found[1], f"model {found[0]} of this pool")
    if (shipped := default_model()) is not None:
        return shipped
    raise ConfigError(
        "there is no model to explain: statistics predict alone. Name one with --model FILE (`maestro predict train`)"
    )


def read_model(path: Path) -> LengthModel:
    """A model's file. Raises `ConfigError` where it is not there, `ModelUnusable` where it cannot be used."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}. Name a file that `maestro predict train` wrote") from e
    return LengthModel.decode(data, str(path))


def read_ticket(path: Path) -> Ticket:
    """A ticket as JSON: one of Redis, or what `maestro queue show --json` prints. Raises `ConfigError`."""
    try:
        body: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(body, dict):
            raise ConfigError(f"{path} is no JSON object: give what `maestro queue show STAGE --json` prints")
        known = {str(k): v for k, v in body.items() if v is not None}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return Ticket.decode(json.dumps({"v": WIRE_VERSION, "client_id": "-", **known}))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from e
    except ConfigError:
        raise
    except (ValueError, MaestroError) as e:
        raise ConfigError(f"{path} holds no ticket ({e}): give what `maestro queue show STAGE --json` prints") from e


def _values(stage: Stage, learner: Learner) -> dict[str, float | None]:
    """What the columns are, as people read them: statistics in tokens, not in logs."""
    found: dict[str, float | None] = dict(zip(FEATURE_NAMES, stage.features, strict=True))
    found["prompt_tokens"] = stage.prompt_tokens
    for name, value in zip(STATISTICS, learner.predictor.statistics.told(stage), strict=True):
        found[name] = None if math.isnan(value) else math.expm1(value) if name.endswith("_log") else value
    return found


def explained_view(found: Explained) -> RenderableType:
    """An explanation for the terminal."""
    e = found.estimate
    what = "mean" if found.head == "mean" else f"{found.head} of the length"
    table = _table("column", ">value", ">factor", "meaning")
    for name, value, contribution in found.columns[:SHOWN]:
        shown = "-" if value is None or value == -1 else f"{value:.4g}"
        table.add_row(name, shown, f"x {math.exp(contribution):.3f}", MEANINGS.get(name, ""))
    rest = sum(c for _, _, c in found.columns[SHOWN:])
    table.add_row(f"{len(found.columns[SHOWN:])} others", "", f"x {math.exp(rest):.3f}", "")
    told = f"p50 {e.p50:.0f}, p90 {e.p90:.0f}, p99 {e.p99:.0f}, mean {e.mean:.0f} tokens, by {e.basis}"
    if not math.isnan(e.short_p):
        told += f"; short answer or tool call: {e.short_p:.0%}"
    wrote = "" if found.output_tokens is None else f" It wrote {found.output_tokens}."
    return Group(
        Text.assemble("stage ", (found.stage_id, "bold"), f", {what}, model {found.version}"),
        Text(f"{found.base_tokens:.0f} tokens for a call that nothing is known of, then:"),
        table,
        Text(f"= {found.raw_tokens:.0f} tokens by the model alone."),
        Text(f"Calibrated by {found.learned:,} finished stages: {told}.{wrote}"),
    )


# -- shared --------------------------------------------------------------------------------------------------------------
def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def _moment(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s)) if at_s else ""


def show(view: RenderableType) -> None:
    """Print it."""
    Console(highlight=False).print(view)
