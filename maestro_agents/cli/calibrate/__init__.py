"""`maestro calibrate`: measure an engine, write its profile; and hold the emulator with that profile to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import json
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from maestro_agents.errors import ConfigError, MaestroError
from maestro_agents.simulator.calibration import COSTS, Calibration, read_calibration

if TYPE_CHECKING:
    from maestro_agents.cli.calibrate.check import Compared
    from maestro_agents.cli.calibrate.measure import Fit
    from maestro_serving.load import Described, LoadClient

NOISY: Final = 0.05
"""Repeats of one burst that differ by this, in the median of all bursts, are worth a warning."""

TOO_NOISY: Final = 0.25
"""From here on nothing is written."""

_START_LIMIT_S: Final = 60.0


def run(
    url: Annotated[str, typer.Argument(help="A running vLLM server that nobody else uses, say http://127.0.0.1:8000.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Compare the emulator that has this profile with the engine, on another load."),
    ] = False,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="The profile's file, written or checked. Default: MODEL.toml.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Which model, where the server has several.")] = "",
    api_key: Annotated[str, typer.Option("--api-key", envvar="VLLM_API_KEY", help="Key that /v1 asks for.")] = "",
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="How often each burst is played.")] = 7,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Of --check: how often each side serves.")] = 5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --check: of its runs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON on stdout.")] = False,
) -> None:
    """Measure an engine and write its profile. Example: maestro calibrate http://127.0.0.1:8000 --profile mine.toml

    `maestro emulate --profile mine.toml` is then such an engine. With --check: is it? The same runs, of lengths and moments that
    were not fitted, on both in turn. Put engine and this command on cores of their own (taskset), and keep the machine quiet.
    """
    from maestro_serving.load import LoadClient

    if profile is not None and profile.suffix != ".toml":
        raise ConfigError(f"--profile {profile}: its name ends in .toml")

    async def body() -> None:
        async with LoadClient(url, model=model, api_key=api_key) as client:
            said = await client.describe()
            path = profile or Path(f"{said.model.replace('/', '-')}.toml")
            if check:
                await _check(client, said, path, repeats, seed, as_json=as_json)
            else:
                await _measure(client, said, path, rounds, as_json=as_json)

    asyncio.run(body())


# -- measuring ---------------------------------------------------------------------------------------------------------
async def _measure(client: LoadClient, said: Described, path: Path, rounds: int, *, as_json: bool) -> None:
    from maestro_agents.cli.calibrate import measure
    from maestro_serving.load import cores_of

    _writable(path)
    with _progress() as progress:
        task = progress.add_task("sizes", total=None)
        sizes = await measure.find_sizes(client, said)
        plan = measure.bursts(sizes)
        progress.update(task, description="bursts", total=rounds * len(plan))
        took = await measure.play(client, plan, rounds, lambda: progress.advance(task))
        cached = await measure.prefix_hit(client, sizes)
    found = measure.fit(sizes, plan, took)
    machine = _machine(cores_of(client.base))
    if found.spread > TOO_NOISY:
        raise ConfigError(
            f"the machine is too noisy: repeats of one measurement differ by {found.spread:.0%} (load average "
            f"{machine['load_average']}). Nothing was written. Stop what else runs, or give engine and client cores of their own"
        )
    calibration = Calibration(
        profile=found.profile,
        model=said.model,
        engine=f"vLLM {said.version}",
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
        how=f"{len(plan)} bursts x {rounds} rounds, streamed; {_on(machine)}; load average {machine['load_average']}",
        latency_s=found.latency_s,
        prefix_cache=cached,
        residuals=found.residuals,
    )
    _write(path, calibration)
    if as_json:
        print(
            json.dumps(
                {**dataclasses.asdict(calibration), "spread": found.spread, "outliers": found.outliers, **machine}
            )
        )
    else:
        _tell(calibration, found, path)
    if found.spread > NOISY:
        _warn(
            f"noisy: repeats of one measurement differ by {found.spread:.0%}. On a quiet machine the profile would be better"
        )


def _writable(path: Path) -> None:
    """Raise `ConfigError` before anything is measured in vain, and where a file is there that is no profile."""
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--profile {path}: there is no folder {path.parent}")
    if path.exists():
        read_calibration(path)


def _write(path: Path, calibration: Calibration) -> None:
    path.write_text(calibration.toml(), encoding="utf-8")


def _tell(calibration: Calibration, found: Fit, path: Path) -> None:
    p = calibration.profile
    bursts = Table("burst", "measured", "profile", "off", "spread", title=f"{calibration.model}, {calibration.engine}")
    for one in calibration.residuals:
        bursts.add_row(
            one.what,
            f"{one.measured_s * 1e3:.1f} ms",
            f"{one.fitted_s * 1e3:.1f} ms",
            f"{one.off:+.1%}",
            f"{one.spread:.1%}",
        )
    costs = Table("profile", "value")
    for name in COSTS:
        costs.add_row(name, f"{getattr(p, name) * 1e3:.4g} ms")
    for name in ("max_num_seqs", "step_tokens", "block_size", "num_blocks", "max_model_len", "scheduling"):
        costs.add_row(name, str(getattr(p, name)))
    costs.add_row("latency (not in the profile)", f"{calibration.latency_s * 1e3:.4g} ms")
    costs.add_row("prefix cache", "yes" if calibration.prefix_cache else "no")
    console = Console()
    console.print(bursts)
    console.print(costs)
    for what, took_s, median_s in found.outliers:
        console.print(
            f"outlier: {what} took {took_s * 1e3:.1f} ms once, {median_s * 1e3:.1f} ms in the median", markup=False
        )
    print(f"written: {path} ({calibration.how})")


# -- checking ----------------------------------------------------------------------------------------------------------
async def _check(client: LoadClient, said: Described, path: Path, repeats: int, seed: int, *, as_json: bool) -> None:
    from maestro_agents.cli.calibrate import check
    from maestro_serving.load import cores_of

    calibration = _known(path, client.base)
    if calibration.model != said.model:
        raise ConfigError(
            f"{path} is a profile of {calibration.model!r}, the engine serves {said.model!r}: name its own by --profile"
        )
    cores = cores_of(client.base)
    profile = calibration.profile
    if 0 < said.max_model_len < profile.max_model_len:
        raise ConfigError(
            f"{path}: measured with max_model_len {profile.max_model_len}, the engine has {said.max_model_len} now: measure again"
        )
    async with _emulator(path, said.model, cores) as emulator:
        machine = _machine(cores) | {"emulator_cores": cores_of(emulator.base)}
        with _progress() as progress:
            task = progress.add_task("repeats", total=2 * repeats)
            compared = await check.compare(
                [("engine", client), ("emulator", emulator)], profile, repeats, seed, lambda: progress.advance(task)
            )
    machine["load_average_after"] = _load_average()
    ratios = {name: compared.ratios(name, "engine") for name in ("emulator", "model")}
    within = all(abs(r["ratio"] - 1) <= check.GOAL for r in ratios["emulator"].values())
    if as_json:
        sides = {name: compared.side(name) for name in compared.passes}
        print(
            json.dumps(
                {
                    "model": said.model, "engine": f"vLLM {said.version}", "profile": str(path), "measured": calibration.date,
                    "repeats": repeats, "seed": seed, "load": check.LOAD, "sides": sides, "ratios": ratios, "goal": check.GOAL,
                    "within": within, **machine,
                }
            )
        )  # fmt: skip
    else:
        _compare_table(compared, ratios, machine)
    if not within:
        _warn(
            f"the emulator is more than {check.GOAL:.0%} off: see which bursts the profile's file says are off, or measure again"
        )
        raise typer.Exit(1)


def _known(path: Path, url: str) -> Calibration:
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such profile. Measure it first: maestro calibrate {url} --profile {path}"
        )
    return read_calibration(path)


def _compare_table(compared: Compared, ratios: dict[str, Any], machine: dict[str, Any]) -> None:
    table = Table("side", "runs", "p50", "p95", "generator's CPU", "latest start")
    for name in compared.passes:
        side = compared.side(name)
        own = (f"{side['generator_cpu_share']:.0%}", f"{side['generator_late_s'] * 1e3:.0f} ms")
        table.add_row(
            name,
            str(side["runs"]),
            f"{side['p50_s']:.3f} s",
            f"{side['p95_s']:.3f} s",
            *(own if name != "model" else ()),
        )
    shares = Table("to the engine", "all runs", "mean of repeats", "95 % interval")
    for name, found in ratios.items():
        for quantile, r in found.items():
            interval = f"{r['low']:.3f} - {r['high']:.3f}"
            shares.add_row(f"{name}, {quantile}", f"{r['ratio']:.3f}", f"{r['mean']:.3f}", interval)
    console = Console()
    console.print(table)
    console.print(shares)
    console.print(
        "Run completion. model: the profile on a virtual clock, without a server. "
        f"{_on(machine)}, emulator on {_cores(machine['emulator_cores'])}; load average {machine['load_average']} before, "
        f"{machine['load_average_after']} after.",
        markup=False,
    )


@asynccontextmanager
async def _emulator(path: Path, model: str, cores: Sequence[int]) -> AsyncGenerator[LoadClient]:
    """`maestro emulate` with this profile, in a process of its own on these cores (any, where none is named)."""
    from maestro_agents import guard
    from maestro_serving.load import LoadClient
    from maestro_serving.processes import free_port

    port = free_port()
    argv = [
        sys.executable,
        "-m",
        "maestro_agents.cli",
        "emulate",
        "--profile",
        str(path),
        "--model",
        model,
        "--port",
        str(port),
    ]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    with tempfile.TemporaryDirectory(prefix="maestro-calibrate-") as folder:
        log = Path(folder, "emulator.log")
        process = guard.spawn(argv, log=log, env=env, grace_s=2.0)
        try:
            if cores:
                os.sched_setaffinity(process.pid, cores)
            async with LoadClient(f"http://127.0.0.1:{port}", model=model) as client:
                await _up(client, process, log)
                yield client
        finally:
            await asyncio.to_thread(process.stop)


async def _up(client: LoadClient, process: Any, log: Path) -> None:
    give_up_s = asyncio.get_running_loop().time() + _START_LIMIT_S
    while True:
        with contextlib.suppress(MaestroError):
            await client.describe()
            return
        if not process.alive() or asyncio.get_running_loop().time() > give_up_s:
            raise ConfigError(f"the emulator did not start: {_end(log)}")
        await asyncio.sleep(0.1)


def _end(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-300:]


# -- the machine -------------------------------------------------------------------------------------------------------
def _machine(engine_cores: Sequence[int]) -> dict[str, Any]:
    return {
        "engine_cores": tuple(engine_cores),
        "generator_cores": tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        "cpus": os.cpu_count(),
        "load_average": _load_average(),
    }


def _load_average() -> float:
    return round(os.getloadavg()[0], 2)


def _on(machine: dict[str, Any]) -> str:
    return f"engine on {_cores(machine['engine_cores'])}, load generator on {_cores(machine['generator_cores'])}"


def _cores(cores: Sequence[int]) -> str:
    return f"core {','.join(map(str, cores))}" if cores else "cores unknown"


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def _warn(line: str) -> None:
    typer.secho(f"maestro: {line}", fg=typer.colors.YELLOW, err=True)
