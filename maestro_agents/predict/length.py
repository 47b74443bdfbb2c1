"""How long an answer will be: two phases of XGBoost, trained on what finished stages wrote.

After the paper (arXiv 2606.12950), whose models are LightGBM; these are XGBoost's. Phase 1 says whether a call answers
shortly or by a tool call; isotonic regression makes that a probability. Phase 2, which is told it, regresses log(1 + output
tokens): three quantiles (p50, p90, p99) and the mean. Both look at

* what the client says of its call (`features`), identity of role, agent, model and instruction as categories of the model file;
* what online statistics know of its role (`roles.STATISTICS`): that is how a model is of use to an app it never saw;
* what a linear model reads in its words (`Words`): ridge regression on the hashed n-grams of the sketch.

Every row that teaches is predicted by models that never saw its task (`FOLDS`), for the probability, the words and the
calibration alike. Half of the rows are *cold*: their identities are hidden and their statistics begin anew after some sessions,
so that the model learns what to do where little is known.

The only module that imports XGBoost. The scheduler's side only: the client never loads it.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import random
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import xgboost as xgb
from scipy.optimize import isotonic_regression
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import lsmr  # pyright: ignore[reportUnknownVariableType]

from maestro_agents.errors import ModelUnusable
from maestro_agents.predict.features import FEATURE_NAMES, FEATURES_VERSION, SKETCH_BUCKETS, SKETCH_IDS, UNKNOWN
from maestro_agents.predict.roles import DEFAULT_OUTPUT_TOKENS, STATISTICS, RoleStatistics, Stage, levels

Array = npt.NDArray[np.float64]
Progress = Callable[[str, float], None]
"""(what is being done, share of the whole that is done)."""

FORMAT: Final = 1
"""Of the model file. A newer one is refused (`ModelUnusable`)."""

FOLDS: Final = 4
HEADS: Final[Mapping[str, float]] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
WORDS_NOISE: Final = 0.05
"""Spread of what is added to the words' numbers in training. The same words are weighed a little differently by each fold and by
the final regression; without it trees cut right beside the values of the folds that they saw.
"""

COLD_WEIGHT: Final = 0.3
"""Weight of a cold row; the same row counts 1 as it was."""

MIN_ROWS: Final = 50
"""Rows below which nothing is trained."""

THREADS: Final = 2
"""Models that are trained at a time."""
_RIDGE: Final = 3.0
_WORDS_ROLE_ROWS: Final = 60
"""Rows of a role from which on its words get weights of their own."""

_SHARED: Final[Mapping[str, Any]] = {
    "tree_method": "hist",
    "subsample": 0.8,
    "colsample_bytree": 0.4,
    "nthread": 1,
    "verbosity": 0,
}
_TREES: Final[Mapping[str, tuple[int, Mapping[str, Any]]]] = {
    "short": (100, {"objective": "binary:logistic", "eta": 0.12, "max_depth": 6, "min_child_weight": 3}),
    "p50": (150, {"objective": "reg:quantileerror", "eta": 0.1, "max_depth": 8, "min_child_weight": 10}),
    "p90": (80, {"objective": "reg:quantileerror", "eta": 0.12, "max_depth": 6, "min_child_weight": 10}),
    "p99": (60, {"objective": "reg:quantileerror", "eta": 0.1, "max_depth": 4, "min_child_weight": 10}),
    "mean": (80, {"objective": "reg:gamma", "eta": 0.12, "max_depth": 6, "min_child_weight": 5}),
}
"""Trees of each model, and what they are grown by (XGBoost's names)."""

DERIVED: Final = ("role_key_code", "last_share_log", "words_all", "words_role", "words_short")
COLUMNS: Final = (*FEATURE_NAMES[1:], *STATISTICS, *DERIVED, "short_p")
"""What each column of the models' input is."""

_BASE: Final = len(FEATURE_NAMES) - 1
_STATS_AT: Final = slice(_BASE, _BASE + len(STATISTICS))
_CODE_AT: Final = _BASE + len(STATISTICS)
_WORDS_AT: Final = slice(_CODE_AT + 2, _CODE_AT + 5)
_SHORT_AT: Final = len(COLUMNS) - 1


def _columns(belongs: Callable[[str], bool]) -> list[int]:
    return [i for i, name in enumerate(COLUMNS[:_BASE]) if belongs(name)]


_LOGGED_AT: Final = _columns(lambda n: n.endswith(("_tokens", "_bytes", "_words", "_lines")))
_IDENTITY_AT: Final = _columns(lambda n: n.endswith("_id"))
_TEXT_AT: Final = _columns(lambda n: n.startswith(("instruction_", "last_")) and n != "last_tokens")
_HISTORY_AT: Final = _columns(lambda n: n.startswith(("run_", "node_last", "node_mean", "node_count", "previous_role")))
_PROMPT_AT: Final = COLUMNS.index("prompt_tokens")
_LAST_AT: Final = COLUMNS.index("last_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A finished stage, as the trainer sees it: a `roles.Stage` and what came of it."""

    model: str
    role: str
    visit: int
    prompt_tokens: int
    features: tuple[float, ...]
    sketch: str
    output_tokens: int
    #: The phase-1 label: it answered by a tool call; where no tools are told of, in at most `traces.SHORT_TOKENS`.
    short: bool
    #: Rows of one group (a task, a run) are never on both sides of a fold.
    group: str
    #: One run. Its rows are in the order in which they ended.
    session: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model file says of itself."""

    version: str
    trained_at: str
    data: str
    rows: int
    tasks: int
    variant: str = "ours"
    format: int = FORMAT
    features_version: int = FEATURES_VERSION
    seed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    #: Rows of each role on each model (``model|role``) that it was trained on.
    roles: Mapping[str, int] = field(default_factory=dict[str, int])
    #: Rows of each agent.
    apps: Mapping[str, int] = field(default_factory=dict[str, int])


# -- words ---------------------------------------------------------------------------------------------------------------
def _ids(sketch: str) -> npt.NDArray[np.uint16]:
    """`features.sketch_ids`, quicker."""
    try:
        ids = np.frombuffer(base64.b64decode(sketch), dtype="<u2")
    except ValueError:
        return _NO_IDS
    return ids if len(ids) and len(ids) <= SKETCH_IDS and ids.max() < SKETCH_BUCKETS else _NO_IDS


_NO_IDS: Final = np.zeros(0, dtype="<u2")


def _matrix(sketches: Iterable[str]) -> csr_matrix:
    """Rows of hashed n-grams, each of length one; a sketch that is none is an empty row."""
    rows = [_ids(sketch) for sketch in sketches]
    lengths = np.array([len(ids) for ids in rows])
    data = np.repeat(1.0 / np.sqrt(np.maximum(lengths, 1)), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([_NO_IDS, *rows]).astype(np.int32)
    return csr_matrix((data, ids, starts), shape=(len(rows), SKETCH_BUCKETS))


def _ridge(words: csr_matrix, target: Array) -> npt.NDArray[np.float32]:
    """Weights of a ridge regression without intercept, by LSMR."""
    solve: Callable[..., Any] = cast("Any", lsmr)  # SciPy's stubs know its parameters by name only
    return np.asarray(solve(words, target, damp=math.sqrt(_RIDGE), maxiter=40)[0], dtype=np.float32)


@dataclass
class Words:
    """What the words of a call say of its length: linear weights of hashed n-grams, for all roles and for each."""

    every: npt.NDArray[np.float32]
    short: npt.NDArray[np.float32]
    roles: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict[str, npt.NDArray[np.float32]])

    @classmethod
    def train(cls, words: csr_matrix, residual: Array, short: Array, roles: Sequence[str]) -> Words:
        """``residual``: log length less what the role's statistics expect; ``short``: the label less the role's share."""
        found = cls(every=_ridge(words, residual), short=_ridge(words, short))
        rows: defaultdict[str, list[int]] = defaultdict(list)
        for i, role in enumerate(roles):
            rows[role].append(i)
        for role, at in rows.items():
            if len(at) >= _WORDS_ROLE_ROWS:
                found.roles[role] = _ridge(cast("csr_matrix", words[at]), residual[at])
        return found

    def told(self, words: csr_matrix, roles: Sequence[str]) -> Array:
        """Three numbers a row: by all roles, by its own (NaN where there is none), and of a short answer."""
        out = np.full((len(roles), 3), np.nan)
        out[:, 0] = words @ self.every
        out[:, 2] = words @ self.short
        parts: Any = words
        ids, starts, data = parts.indices, parts.indptr, parts.data
        for i, role in enumerate(roles):
            if (weights := self.roles.get(role)) is not None:
                row = slice(starts[i], starts[i + 1])
                out[i, 1] = weights[ids[row]] @ data[row]
        return out


# -- the input of the models ---------------------------------------------------------------------------------------------
def _numbers(stages: Sequence[Stage], statistics: Sequence[tuple[float, ...]], codes: Mapping[str, int]) -> Array:
    """The models' input without words and without phase 1, of stages whose features are `usable`."""
    out = np.full((len(stages), len(COLUMNS)), np.nan)
    told = np.array([s.features for s in stages], dtype=np.float64)[:, 1:]
    told[:, _PROMPT_AT] = [s.prompt_tokens for s in stages]
    told[told == UNKNOWN] = np.nan
    told[:, _LOGGED_AT] = np.log1p(np.maximum(told[:, _LOGGED_AT], 0))
    out[:, :_BASE] = told
    out[:, _STATS_AT] = statistics
    out[:, _CODE_AT] = [codes.get(f"{s.model}|{s.role}", math.nan) for s in stages]
    unknown = np.flatnonzero(np.isnan(out[:, _CODE_AT]))
    out[unknown[:, None], _IDENTITY_AT] = np.nan  # what was never seen says nothing: the row is read as a cold one
    out[:, _CODE_AT + 1] = told[:, _LAST_AT] - told[:, _PROMPT_AT]
    return out


def _expected(statistics: Sequence[tuple[float, ...]]) -> Array:
    """The log length that statistics expect: the median of each level, shrunk to that of the one above. What a
    call's words are asked is by how much it differs from that.
    """
    table = np.array(statistics).reshape(len(statistics), len(STATISTICS))
    at = {name: i for i, name in enumerate(STATISTICS)}
    out = np.full(len(statistics), math.log1p(DEFAULT_OUTPUT_TOKENS[1]))
    for level in ("agent", "role", "role_model", "visit"):
        n, median = table[:, at[f"{level}_n"]], table[:, at[f"{level}_p50_log"]]
        out = np.where(n > 0, (n * np.nan_to_num(median) + _LEVEL_SHRINK * out) / (n + _LEVEL_SHRINK), out)
    return out


_LEVEL_SHRINK: Final = 2.0


def _replay(examples: Sequence[Example], *, cold: bool, rng: random.Random) -> list[tuple[float, ...]]:
    """What statistics knew before each example, had the sessions come in a random order. ``cold``: they begin anew for an
    agent after one to forty of its sessions.
    """
    by_session: defaultdict[str, list[int]] = defaultdict(list)
    for i, e in enumerate(examples):
        by_session[e.session].append(i)
    sessions = list(by_session.values())
    rng.shuffle(sessions)
    known: defaultdict[str, RoleStatistics] = defaultdict(RoleStatistics)
    left: dict[str, int] = {}
    told: list[tuple[float, ...]] = [()] * len(examples)
    for rows in sessions:
        agent = examples[rows[0]].role.partition(":")[0]
        if cold:
            left[agent] = left.get(agent, 1) - 1
            if left[agent] <= 0:
                left[agent] = rng.choice((1, 2, 3, 6, 11, 40))
                known[agent] = RoleStatistics()
        statistics = known[agent]
        for i in rows:
            told[i] = statistics.told(examples[i])
        for i in rows:
            statistics.add(examples[i], examples[i].output_tokens)
    return told


# -- the model -----------------------------------------------------------------------------------------------------------
class Lengths:
    """What a model says of some stages; arrays of one entry a stage. Quantiles are of log(1 + tokens), not calibrated."""

    __slots__ = ("logs", "mean", "short_p")

    def __init__(self, logs: Mapping[str, Array], mean: Array, short_p: Array) -> None:
        self.logs = logs
        self.mean = mean
        self.short_p = short_p


class LengthModel:
    """A trained model: predicts in batches, explains, and travels as one file."""

    def __init__(
        self,
        card: Card,
        boosters: Mapping[str, xgb.Booster],
        words: Words,
        isotonic: tuple[Array, Array],
        residuals: Mapping[str, Mapping[str, Sequence[float]]],
    ) -> None:
        self.card = card
        self.boosters = boosters
        self.words = words
        self.isotonic = isotonic
        #: level (`roles.levels`) -> head -> what the truth was above the prediction, in logs, of rows it had not seen.
        self.residuals = residuals
        self.codes = {role: i for i, role in enumerate(sorted(card.roles))}
        #: Just trained: the fold of each example, and what models that never saw its task say of it. Not in the file.
        self.held_out: tuple[npt.NDArray[np.int64], Lengths] | None = None

    def _input(self, stages: Sequence[Stage], statistics: Sequence[tuple[float, ...]]) -> Array:
        matrix = _numbers(stages, statistics, self.codes)
        if self.card.variant not in _WORDLESS:
            roles = [f"|{s.role}" for s in stages]
            matrix[:, _WORDS_AT] = self.words.told(_matrix(s.sketch for s in stages), roles)
        _mask(matrix, self.card.variant)
        if "short" in self.boosters:
            raw = np.asarray(self.boosters["short"].inplace_predict(matrix[:, :_SHORT_AT]), dtype=np.float64)
            matrix[:, _SHORT_AT] = np.interp(raw, *self.isotonic)
        return matrix

    def predict(self, stages: Sequence[Stage], statistics: Sequence[tuple[float, ...]]) -> Lengths:
        """Predict stages, each with what `RoleStatistics.told` says of it."""
        matrix = self._input(stages, statistics)
        first = _pool().submit(_said, self.boosters["p50"], matrix)  # as many trees as all the others
        logs = {h: _said(self.boosters[h], matrix) for h in HEADS if h != "p50"}
        mean = _said(self.boosters["mean"], matrix)
        return Lengths({"p50": first.result(), **logs}, mean, matrix[:, _SHORT_AT])

    def explain(self, stage: Stage, statistics: tuple[float, ...], head: str = "p50") -> dict[str, float]:
        """SHAP contributions (XGBoost's own, exact for trees) to a stage's log length by column, and the ``bias``. They add up."""
        matrix = self._input([stage], [statistics])
        row = np.asarray(self.boosters[head].predict(xgb.DMatrix(matrix), pred_contribs=True), dtype=np.float64)[0]
        return dict(zip((*COLUMNS, "bias"), (float(x) for x in row), strict=True))

    # -- as a file ---------------------------------------------------------------------------------------------------
    def encode(self) -> bytes:
        """As one file: a zip of the card (JSON), the boosters (XGBoost's UBJSON) and the arrays (NumPy's npz)."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
            z.writestr("card.json", json.dumps(asdict(self.card), indent=1, sort_keys=True))
            for name, booster in self.boosters.items():
                z.writestr(f"{name}.ubj", bytes(booster.save_raw("ubj")))
            arrays = io.BytesIO()
            roles = {f"role:{k}": v.astype(np.float16) for k, v in self.words.roles.items()}
            np.savez(arrays, x=self.isotonic[0], y=self.isotonic[1], every=self.words.every.astype(np.float16),
                     short=self.words.short.astype(np.float16), **cast("dict[str, Any]", roles))  # fmt: skip
            z.writestr("arrays.npz", arrays.getvalue())
            z.writestr("residuals.json", json.dumps(self.residuals, separators=(",", ":")))
        return out.getvalue()

    @classmethod
    def decode(cls, data: bytes, name: str = "the model") -> LengthModel:
        """Read a file of `encode`. Raises `ModelUnusable` for one that is damaged, newer, or of other features."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as z:
                said: dict[str, Any] = json.loads(z.read("card.json"))
                if int(said["format"]) > FORMAT:
                    raise ModelUnusable(
                        f"{name} has format {said['format']}, newer than {FORMAT}: upgrade maestro-agents"
                    )
                if int(said["features_version"]) != FEATURES_VERSION:
                    raise ModelUnusable(
                        f"{name} was trained on features of version {said['features_version']}, these are {FEATURES_VERSION}: "
                        "train it again (`maestro predict train`)"
                    )
                card = Card(**{k: v for k, v in said.items() if k in Card.__dataclass_fields__})
                boosters: dict[str, xgb.Booster] = {}
                for entry in z.namelist():
                    if entry.endswith(".ubj"):
                        booster = xgb.Booster()
                        booster.load_model(bytearray(z.read(entry)))
                        booster.set_param({"nthread": 1})
                        boosters[entry.removesuffix(".ubj")] = booster
                with np.load(io.BytesIO(z.read("arrays.npz")), allow_pickle=False) as a:
                    arrays = {k: a[k] for k in a.files}
                residuals = json.loads(z.read("residuals.json"))
            roles = {k[5:]: v.astype(np.float32) for k, v in arrays.items() if k.startswith("role:")}
            words = Words(arrays["every"].astype(np.float32), arrays["short"].astype(np.float32), roles)
            if missing := {*HEADS, "mean"} - boosters.keys():
                raise ModelUnusable(
                    f"{name} has no {', '.join(sorted(missing))}: train it again (`maestro predict train`)"
                )
        except ModelUnusable:
            raise
        except Exception as e:  # a damaged file fails in as many ways as there are libraries that read it
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise ModelUnusable(f"{name} cannot be read ({reason}): train it again (`maestro predict train`)") from e
        return cls(card, boosters, words, (arrays["x"], arrays["y"]), residuals)


_REST: Final = "rest.model"


def joined(lengths: bytes, rest: bytes) -> bytes:
    """One file of two models, either of them empty for none: the first's, with the second as one more entry of its zip.

    Who knows of one model reads the first (`LengthModel.decode`); a file of the second alone is none to them.
    """
    if not rest:
        return lengths
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        if lengths:
            with zipfile.ZipFile(io.BytesIO(lengths)) as first:
                for entry in first.infolist():
                    z.writestr(entry, first.read(entry))
        z.writestr(zipfile.ZipInfo(_REST), rest)  # compressed already
    return out.getvalue()


def split(data: bytes) -> tuple[bytes, bytes]:
    """The two files of `joined`. What is no zip is the first, for whoever decodes it to say so."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            if _REST not in z.namelist():
                return data, b""
            rest = z.read(_REST)
            out = io.BytesIO()
            entries = [e for e in z.infolist() if e.filename != _REST]
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as first:
                for entry in entries:
                    first.writestr(entry, z.read(entry))
    except Exception:  # a damaged file fails in as many ways as there are libraries that read it
        return data, b""
    return out.getvalue() if entries else b"", rest


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="maestro-predict")


def _said(booster: xgb.Booster, matrix: Array) -> Array:
    return np.asarray(booster.inplace_predict(matrix), dtype=np.float64)


def _mask(matrix: Array, variant: str) -> None:
    """Take out what a variant may not look at."""
    if variant == "no_text":
        matrix[:, _TEXT_AT] = np.nan
    elif variant == "no_history":
        matrix[:, _HISTORY_AT] = np.nan
    elif variant == "single_phase":
        matrix[:, _STATS_AT] = np.nan
    if variant in _WORDLESS:
        matrix[:, _WORDS_AT] = np.nan


_WORDLESS: Final = frozenset({"no_text", "single_phase"})


# -- training ------------------------------------------------------------------------------------------------------------
def train(
    examples: Sequence[Example],
    *,
    seed: int = 0,
    variant: str = "ours",
    data: str = "",
    version: str = "",
    trained_at: str = "",
    progress: Progress | None = None,
) -> LengthModel:
    """Train on finished stages, each run's in their order.

    ``variant``: ``ours``; ours without a part (``no_text``, ``no_history``, ``no_phase1``); or ``single_phase``, plain XGBoost on
    what the client says: no phase 1, no words, no statistics of the role. Raises `ModelUnusable` where they are fewer than `MIN_ROWS`.
    """
    if len(examples) < MIN_ROWS:
        raise ModelUnusable(f"{len(examples)} finished stages are too few to train on: {MIN_ROWS} at least")
    tell = progress or _silent
    rng = random.Random(seed)
    tell("statistics", 0.0)
    counts = Counter(f"{e.model}|{e.role}" for e in examples)
    roles = {k: n for k, n in counts.items() if n >= 10}
    codes = {role: i for i, role in enumerate(sorted(roles))}
    warm, cold = (_replay(examples, cold=c, rng=rng) for c in (False, True))
    y = np.array([e.output_tokens for e in examples], dtype=np.float64)
    target = np.log1p(y)
    short = np.array([e.short for e in examples], dtype=np.float64)
    fold = _folds([e.group for e in examples], rng)
    role_names = [f"|{e.role}" for e in examples]
    use_words = variant not in _WORDLESS
    two_phases = variant not in {"no_phase1", "single_phase"}

    tell("words", 0.05)
    sketches = _matrix(e.sketch for e in examples)
    residual = target - _expected(warm)
    share = _role_means(short, role_names)
    words_oof = np.full((len(examples), 3), np.nan)
    words = Words(np.zeros(SKETCH_BUCKETS, np.float32), np.zeros(SKETCH_BUCKETS, np.float32))
    if use_words:
        for k in range(FOLDS):
            seen, other = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            fitted = Words.train(
                cast("csr_matrix", sketches[seen]), residual[seen], (short - share)[seen], [role_names[i] for i in seen]
            )
            words_oof[other] = fitted.told(cast("csr_matrix", sketches[other]), [role_names[i] for i in other])
        words = Words.train(sketches, residual, short - share, role_names)

    def matrix(statistics: Sequence[tuple[float, ...]], *, hide: bool) -> Array:
        found = _numbers(examples, statistics, codes)
        found[:, _WORDS_AT] = words_oof + noise.normal(0.0, WORDS_NOISE, words_oof.shape)
        _mask(found, variant)
        if hide:
            found[:, _IDENTITY_AT] = np.nan
            found[:, _CODE_AT] = np.nan
            found[:, _WORDS_AT.start + 1] = np.nan
        return found

    noise = np.random.default_rng(seed)
    n = len(examples)
    weight = np.repeat([1.0, COLD_WEIGHT], n)
    both = np.concatenate([matrix(warm, hide=False), matrix(cold, hide=True)])
    twice = np.concatenate([fold, fold])
    labels = {
        "short": np.tile(short, 2),
        "mean": np.tile(np.maximum(y, 1.0), 2),
        **dict.fromkeys(HEADS, np.tile(target, 2)),
    }
    names = ["short", *HEADS, "mean"] if two_phases else [*HEADS, "mean"]
    done = 0

    def grow(name: str, rows: xgb.QuantileDMatrix) -> xgb.Booster:
        nonlocal done
        tell(f"trees of {name}", 0.1 + 0.9 * done / (len(names) * (FOLDS + 1) - FOLDS))
        done += 1
        count, how = _TREES[name]
        extra = {"quantile_alpha": HEADS[name]} if name in HEADS else {}
        return xgb.train({**_SHARED, **how, **extra, "seed": seed}, rows, count)

    def part(
        fold_: int, heads: Sequence[str], width: int
    ) -> tuple[npt.NDArray[np.bool_], dict[str, xgb.Booster], dict[str, Array]]:
        """Train heads without the rows of a fold (-1: with all). Also which rows those are, and what is said of them."""
        other = twice == fold_
        matrix_ = xgb.QuantileDMatrix(both[~other, :width], nthread=1)
        grown: dict[str, xgb.Booster] = {}
        said: dict[str, Array] = {}
        for name in heads:
            if name == "mean" and fold_ >= 0:
                continue
            matrix_.set_label(labels[name][~other])
            matrix_.set_weight(weight[~other])
            grown[name] = grow(name, matrix_)
            if fold_ >= 0:
                said[name] = _said(grown[name], both[other, :width])
        return other, grown, said

    def phase(heads: Sequence[str], width: int) -> dict[str, Array]:
        """Train heads on all rows, into ``boosters``; what models that never saw a row's task say of it."""
        out = {name: np.full(2 * n, np.nan) for name in heads}
        with ThreadPoolExecutor(
            THREADS
        ) as pool:  # one thread a model: threads inside one wait for each other at every tree
            for other, grown, said in pool.map(functools.partial(part, heads=heads, width=width), (-1, *range(FOLDS))):
                if not said:
                    boosters.update(grown)
                for name, values in said.items():
                    out[name][other] = values
        return out

    boosters: dict[str, xgb.Booster] = {}
    isotonic = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    metrics: dict[str, float] = {}
    if two_phases:
        raw = phase(["short"], _SHORT_AT)["short"]
        isotonic = _isotonic(raw[:n], short)
        both[:, _SHORT_AT] = np.interp(raw, *isotonic)
        metrics["short_brier"] = float(np.mean((both[:n, _SHORT_AT] - short) ** 2))
    logs = phase([*HEADS, "mean"], len(COLUMNS))
    above = {name: target - found[:n] for name, found in logs.items() if name in HEADS}
    metrics["mae_tokens"] = float(np.mean(np.abs(np.expm1(logs["p50"][:n]) - y)))
    tell("done", 1.0)
    apps = Counter(e.role.partition(":")[0] for e in examples)
    card = Card(
        version=version or f"{trained_at or 'untitled'}",
        trained_at=trained_at,
        data=data,
        rows=n,
        tasks=len({e.group for e in examples}),
        variant=variant,
        seed=seed,
        metrics=metrics,
        roles=roles,
        apps=dict(apps),
    )
    model = LengthModel(card, boosters, words, isotonic, _residuals(examples, above, rng))
    unseen = {name: logs[name][:n] for name in HEADS}
    model.held_out = fold, Lengths(unseen, np.expm1(unseen["p50"]), both[:n, _SHORT_AT])
    return model


def _silent(what: str, share: float) -> None:
    """Nobody watches."""


def _folds(groups: Sequence[str], rng: random.Random) -> npt.NDArray[np.int64]:
    """A fold for each row, the same for all of its group."""
    names = sorted(set(groups))
    rng.shuffle(names)
    fold = {name: i % FOLDS for i, name in enumerate(names)}
    return np.array([fold[g] for g in groups])


def _role_means(values: Array, roles: Sequence[str]) -> Array:
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for value, role in zip(values, roles, strict=True):
        sums[role][0] += float(value)
        sums[role][1] += 1
    return np.array([sums[role][0] / sums[role][1] for role in roles])


def _isotonic(score: Array, label: Array) -> tuple[Array, Array]:
    """Points of the increasing step curve that is nearest to the labels (pool adjacent violators), thinned for the file."""
    order = np.argsort(score, kind="stable")
    x, fitted = score[order], np.asarray(isotonic_regression(label[order]).x, dtype=np.float64)
    keep = np.unique(np.concatenate([[0, len(x) - 1], np.linspace(0, len(x) - 1, 200).astype(int)]))
    return x[keep], np.clip(fitted[keep], 0.001, 0.999)


_KEPT: Final = 200
"""Residuals of one level that go into the file."""


def _residuals(
    examples: Sequence[Example], above: Mapping[str, Array], rng: random.Random
) -> dict[str, dict[str, list[float]]]:
    """Of every level with a few rows: an even sample of its ordered residuals, head by head."""
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for i, e in enumerate(examples):
        for level in levels(e)[:-1]:
            rows[level].append(i)
    out: dict[str, dict[str, list[float]]] = {}
    for level, at in rows.items():
        if len(at) < 5:
            continue
        picked = at if len(at) <= _KEPT else rng.sample(at, _KEPT)
        out[level] = {head: [round(float(r), 4) for r in values[picked]] for head, values in above.items()}
    return out
