"""`maestro predict`: the predictor of output lengths, trained, measured, watched and explained.

Each sub-command's work is in a module of its own, imported when it is called.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from maestro_agents.errors import ConfigError
from maestro_agents.ports import Queue

predict_app = typer.Typer(
    no_args_is_help=True,
    help="The predictor of output lengths: train it, measure it, watch it, and ask it why.",
)

Json = Annotated[bool, typer.Option("--json", help="Everything as JSON on stdout, each seed's own figures included.")]


@predict_app.command("eval")
def evaluate_trace(
    trace: Annotated[Path, typer.Argument(help="Recorded calls, one JSON line each, plain or gzipped.")],
    test: Annotated[
        Path | None, typer.Option("--test", help="Test on all of this trace, train on all of the first.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="How TRACE is split: `task`, the only fair way.")] = "task",
    seeds: Annotated[int, typer.Option(min=1, help="Splits and trainings to average over: seeds 0, 1, ...")] = 5,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only this predictor; repeat for more. Default: all.")
    ] = None,
    cold_start: Annotated[
        bool, typer.Option("--cold-start", help="Also leave each app out and show it 0, 1, 2, 5, 10 tasks.")
    ] = False,
    no_reservations: Annotated[
        bool, typer.Option("--no-reservations", help="Leave out what each way to reserve KV memory would cost.")
    ] = False,
    predictions_out: Annotated[
        Path | None, typer.Option("--predictions-out", help="Write every test row's predictions (JSON lines, .gz).")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw calibration, predicted against actual, reservations (PNG).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every predictor on part of the tasks, test it on the others. Example: maestro predict eval calls.jsonl.gz

    No task is on both sides. Tables show the error in tokens, Kendall's tau and how often the answer stayed below p90, beside
    medians, Magnus's random forest and the Maestro paper's LightGBM (extra `eval`). Intervals come from resampled tasks.
    """
    if split != "task":
        raise ConfigError(f"--split {split!r}: only `task` is fair, since calls of one task are alike")
    for path in (predictions_out, plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
    from maestro_agents.cli.predict import cold, evaluate, plots, tables
    from maestro_agents.cli.predict import reservations as kv
    from maestro_agents.predict.traces import read_calls

    names, left_out = evaluate.chosen(only or [])
    calls = read_calls(trace)
    other = read_calls(test) if test else None
    errors = Console(stderr=True, highlight=False)
    if left_out:
        errors.print(left_out, markup=False)
    parts = list(evaluate.splits(calls, seeds, other))
    with _progress(errors) as steps:
        scored = [evaluate.score(part, names, steps("predictors", len(parts) * len(names))) for part in parts]
        found = evaluate.tables(scored)
        if not no_reservations:
            found["reservations"] = kv.summary(
                [kv.study(s, steps("reservations", len(parts) * kv.FOLDS)) for s in scored]
            )
        if cold_start:
            found["cold_start"] = cold.measure(calls, names, steps("cold start", len({c.app for c in calls})))
    if predictions_out:
        evaluate.write_predictions(predictions_out, scored)
    if plot:
        plots.draw(plot, scored, found)
    found |= {"trace": trace.name, "test": test.name if test else None, "split": "test file" if test else split}
    if as_json:
        print(json.dumps(found))
    else:
        tables.show(found)


Redis = Annotated[str | None, typer.Option("--redis-url", help="Default: MAESTRO_REDIS_URL or maestro.toml.")]
Pool = Annotated[str | None, typer.Option("--pool", help="Default: MAESTRO_POOL, else `default`.")]
OneJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@predict_app.command("train")
def train_trace(
    trace: Annotated[Path, typer.Argument(help="Recorded calls, one JSON line each, plain or gzipped.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The model's file; its card is written to FILE.md.")] = Path(
        "maestro.model"
    ),
    seed: Annotated[int, typer.Option(help="Of folds, samples and trees: the same seed gives the same model.")] = 0,
    data: Annotated[str, typer.Option("--data", help="What the card says of the data: where from, licence.")] = "",
    as_json: OneJson = False,
) -> None:
    """Train a model on recorded calls and write it, with its card. Example: maestro predict train calls.jsonl.gz -o my.model

    `maestro scheduler` trains on its pool's own traffic by itself; this is for a model to begin with. Of two models `maestro
    predict eval` says which is better, on tasks that neither saw.
    """
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}")
    from maestro_agents.cli.predict import train

    errors = Console(stderr=True, highlight=False)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=errors) as progress:
        bar = progress.add_task("reading", total=1.0)
        model, seconds = train.trained(
            trace,
            seed=seed,
            data=data,
            progress=lambda what, share: progress.update(bar, description=what, completed=share),
        )
        size = train.written(model, out)
    found = {"file": str(out), "seconds": round(seconds, 1), **train.facts(model, size)}
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:>16}  {train.shown(value)}")


@predict_app.command("status")
def show_status(redis_url: Redis = None, pool: Pool = None, as_json: OneJson = False) -> None:
    """Show which model a pool predicts by, and how well it does in each role. Example: maestro predict status

    `error` is that of what was said of a role's last stages (some 50), in tokens; beside it what the running median would have
    missed. Where the model does worse than that, the median is used, and the last column says so. `below p90`: the share of
    answers that stayed below the p90, 90 % if all is well. Then the same of the second model, which says what a run still writes
    after a call: beside it what such calls were mostly followed by.
    """
    from maestro_agents.cli.monitor import with_queue
    from maestro_agents.cli.predict import live

    async def look(queue: Queue, *_: object) -> None:
        found = await live.status(queue)
        if as_json:
            print(json.dumps(found))
        else:
            live.show(live.status_view(found))

    with_queue(redis_url, pool, look)


@predict_app.command("explain")
def explain_stage(
    stage: Annotated[str, typer.Argument(help="The beginning of a stage id, as `maestro queue ls` prints it.")] = "",
    ticket: Annotated[
        Path | None, typer.Option("--ticket", help="A ticket from a file: what `maestro queue show --json` prints.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A model's file. Default: the pool's, else the one that ships.")
    ] = None,
    head: Annotated[str, typer.Option("--head", help="Which answer to explain: p50, p90, p99 or mean.")] = "p50",
    redis_url: Redis = None,
    pool: Pool = None,
    as_json: OneJson = False,
) -> None:
    """Say why a stage is predicted to be as long as it is. Example: maestro predict explain 3f2a --redis-url redis://127.0.0.1

    Begins with the length of a call that nothing is known of; each column multiplies it (SHAP values of XGBoost itself), and all
    of them give what the model says. Statistics come from the pool's observation log, of what had ended before the stage did.
    Without a Redis, --ticket and --model explain a file by a file.
    """
    if bool(stage) is (ticket is not None):
        raise ConfigError("which stage? Give the beginning of its id, or --ticket FILE")
    from maestro_agents.cli.monitor import with_queue
    from maestro_agents.cli.predict import live
    from maestro_agents.settings import Settings

    async def look(queue: Queue | None, *_: object) -> None:
        found = await live.explain(queue, stage, ticket=ticket, model=model, head=head)
        if as_json:
            print(json.dumps(found.to_json()))
        else:
            live.show(live.explained_view(found))

    if ticket is not None and Settings.load(redis_url=redis_url).redis_url is None:
        asyncio.run(look(None))
    else:
        with_queue(redis_url, pool, look)


@predict_app.command("rollback")
def roll_back(
    version: Annotated[str, typer.Argument(help="A model that is kept. Default: the one before.")] = "",
    redis_url: Redis = None,
    pool: Pool = None,
    as_json: OneJson = False,
) -> None:
    """Let a pool predict by a former model again. Example: maestro predict rollback

    All its schedulers take it over within seconds. A later training that does better replaces it: MAESTRO_RETRAIN=off ends that.
    """
    from maestro_agents.cli.monitor import with_queue
    from maestro_agents.cli.predict import live

    async def act(queue: Queue, *_: object) -> None:
        chosen = await live.roll_back(queue, version)
        print(json.dumps({"version": chosen}) if as_json else f"{chosen} predicts from now on.")

    with_queue(redis_url, pool, act)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on stderr: give a part's name and number of steps, get what to call after each."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        bars: dict[str, TaskID] = {}

        def steps(part: str, total: int) -> Callable[[], None]:
            bar = bars[part] = bars[part] if part in bars else progress.add_task(part, total=total)
            return lambda: progress.advance(bar)

        yield steps
