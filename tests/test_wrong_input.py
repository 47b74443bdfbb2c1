"""What people get wrong: each mistake is one clear line that says what to do, and never a traceback.

The command line is called in this process; apps are real graphs on an emulated engine. A command that cannot do its work
ends with status 2; `maestro doctor` looks at everything and ends with status 1.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import openai._base_client as sdk
import pytest
from langgraph.graph.state import CompiledStateGraph

from maestro_agents.cli import main
from maestro_agents.client import Client
from maestro_agents.core import EngineSpec, Ticket
from maestro_agents.errors import ConfigError, MaestroError, WireError
from maestro_agents.settings import Settings
from maestro_langgraph import gate, maestro, quiet
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from sample_workflows.one_call import graph
from tests.stub_openai import StubServer, dead_url, managed, stub_servers

NO_REDIS = "redis://127.0.0.1:1/0"
"""Nobody listens on port 1."""

ENGINE = '[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\n'

Run = Callable[..., tuple[int, str, str]]
Answers = Callable[..., list[str]]


def words_of(value: list[str] | str) -> str:
    """The command line that names a case."""
    return " ".join(value) if isinstance(value, list) else ""


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """An engine that answers at once."""
    with Emulator(EmulatorConfig(models=(EmulatedModel(name="tiny"),), speed=100)) as engine:
        yield engine


@pytest.fixture(scope="module")
def stub() -> Iterator[StubServer]:
    """The caller's own provider, which remembers what it was asked."""
    with stub_servers(1) as (server,):
        yield server


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    """Run a program and return what its runs answer. One loop for all: LangChain shares connections between models."""
    with asyncio.Runner() as runner:

        async def ask(program: CompiledStateGraph[Any, Any, Any, Any], runs: int) -> list[str]:
            return [(await program.ainvoke({"question": "Is anybody there?"}))["answer"] for _ in range(runs)]

        def run_it(program: CompiledStateGraph[Any, Any, Any, Any], runs: int = 1) -> list[str]:
            return runner.run(ask(program, runs))

        yield run_it


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call ``maestro WORDS...`` and return status, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """What Maestro told the app's log; the process is put back afterwards."""
    quiet._warned.clear()
    caplog.set_level(logging.WARNING, logger="maestro")
    with managed(tmp_path, {}):
        yield lambda: [r.getMessage() for r in caplog.records if r.name.startswith("maestro")]


def refused(said: tuple[int, str, str], says: str) -> None:
    """Status 2, nothing on stdout but progress, and exactly one line of error that holds ``says``."""
    status, _, err = said
    assert status == 2, said
    assert "Traceback" not in err
    assert err.startswith("maestro: "), said
    assert says in err
    assert err.count("\n") == 1, f"more than one line: {err}"


def app(url: str, model: str = "tiny", **options: Any) -> CompiledStateGraph[Any, Any, Any, Any]:
    """The smallest sample, decorated."""

    @maestro(**options)
    def build() -> Any:
        return graph(model, url, max_tokens=3).compile()

    return build()


# -- the command line ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "says"),
    [
        pytest.param(
            ["scheduler", "--fleet", "fleet.toml", "--redis-url", NO_REDIS],
            "127.0.0.1:1/0 does not answer: ConnectionError: Error 111 connecting to 127.0.0.1:1. Connect call failed ('127.0.0.1', 1). Start it, or let `maestro up`",
            id="scheduler",
        ),
        pytest.param(["top", "--once", "--redis-url", NO_REDIS], "Redis cannot be reached. Check MAESTRO_", id="top"),
        pytest.param(["queue", "ls", "--redis-url", NO_REDIS], "Run `maestro doctor`", id="queue ls"),
        pytest.param(["queue", "show", "a", "--redis-url", NO_REDIS], "Run `maestro doctor`", id="queue show"),
        pytest.param(
            ["queue", "cancel", "a", "--yes", "--redis-url", NO_REDIS], "Run `maestro doctor`", id="queue cancel"
        ),
        pytest.param(["up", "fleet.toml", "--redis-url", NO_REDIS], "Start it, or name none", id="up"),
        pytest.param(["switch", "off", "--redis-url", NO_REDIS], "Apps keep the last switch they saw", id="switch"),
    ],
)
def test_no_redis_at_the_url(run: Run, words: list[str], says: str) -> None:
    """Whoever needs Redis and finds none says so, and how to get on."""
    Path("fleet.toml").write_text(ENGINE)
    said = run(*words)
    refused((said[0], said[1], said[2].replace("Error 61", "Error 111")), says)


@pytest.mark.parametrize("words", [["top", "--once"], ["queue", "ls"], ["queue", "show", "a"], ["switch"]])
def test_no_redis_named(run: Run, words: list[str]) -> None:
    """Without a URL there is nothing to look at, and the line says where one comes from."""
    refused(run(*words), "which Redis? Set MAESTRO_REDIS_URL or --redis-url (`maestro up` prints it)")


@pytest.mark.parametrize(
    "words",
    [
        ["scheduler", "--fleet", "fleet.toml"],
        ["top", "--once"],
        ["queue", "ls"],
        ["queue", "show", "a"],
        ["up", "fleet.toml"],
    ],
    ids=words_of,
)
def test_a_url_that_is_none_of_a_redis(run: Run, words: list[str]) -> None:
    """A wrong scheme is answered with the right ones and an example."""
    Path("fleet.toml").write_text(ENGINE)
    says = "a Redis URL starts with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://, e.g. redis://127.0.0.1:6379/0"
    refused(run(*words, "--redis-url", "http://127.0.0.1:6379"), says)


@pytest.mark.parametrize("command", ["scheduler --fleet", "up"])
def test_an_unknown_policy(run: Run, command: str) -> None:
    """The policies that there are are named, before anything is started or asked."""
    Path("fleet.toml").write_text(ENGINE)
    said = run(*command.split(), "fleet.toml", "--redis-url", NO_REDIS, "--policy", "lifo")
    refused(said, "there is no policy 'lifo': known are ours, fcfs, fcfs-run, edf, edf-demote, llf,")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("[[engine]\n", "fleet.toml:1: not valid TOML", id="syntax"),
        pytest.param(ENGINE + "slot = 3\n", "fleet.toml:5: unknown key 'slot': known here are id, model", id="key"),
        pytest.param(ENGINE + ENGINE, "fleet.toml:6: engine id 'a' is taken by line 2", id="duplicate"),
        pytest.param(ENGINE + "slots = -1\n", "fleet.toml:5: slots = -1: input should be greater than 0", id="slots"),
        pytest.param(ENGINE + "kv_bytes = -1\n", "fleet.toml:5: kv_bytes = -1: input should be", id="KV bytes"),
        pytest.param(ENGINE + "kv_tokens = -1\n", "fleet.toml:5: kv_tokens = -1: input should be", id="KV tokens"),
        pytest.param(
            '[[engine]]\nid = "a"\nmodel = "m"\n',
            "fleet.toml:1: engine 'a' has neither url nor launch: give the url of a running server or [engine.launch]",
            id="no address",
        ),
        pytest.param("", "fleet.toml:1: the fleet has no engine: add an [[engine]]", id="empty"),
        pytest.param(
            None, "fleet.toml: there is no such file: name another, or write one with an [[engine]]", id="missing"
        ),
    ],
)
@pytest.mark.parametrize("words", [["up", "fleet.toml"], ["scheduler", "--fleet", "fleet.toml"]])
def test_a_bad_fleet_file(run: Run, words: list[str], text: str | None, says: str) -> None:
    """The line of the file, what is wrong with it, and what would be right."""
    if text is not None:
        Path("fleet.toml").write_text(text)
    refused(run(*words, "--redis-url", NO_REDIS), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mode = on\n", "maestro.toml:1: not valid TOML"),
        ("\nmax_wait = 3\n", "maestro.toml:2: there is no setting 'max_wait': did you mean max_wait_s?"),
        ("max_queue = -5\n", "maestro.toml:1: max_queue = -5: input should be greater than or equal to 1"),
        ('service_class = "bulk"\n', "maestro.toml:1: service_class = 'bulk': input should be 'interactive' or"),
    ],
)
def test_a_bad_maestro_toml(run: Run, text: str, says: str) -> None:
    """The line of the file, what is wrong with it, and what would be right."""
    Path("maestro.toml").write_text(text)
    refused(run("queue", "ls"), says)


def test_a_maestro_toml_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that MAESTRO_CONFIG names must exist."""
    monkeypatch.setenv("MAESTRO_CONFIG", "mine.toml")
    refused(run("queue", "ls"), "mine.toml: there is no such file")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MODE", "loud", "mode = 'loud': input should be 'on', 'observe' or 'off'"),
        ("ROLLOUT", "110", "rollout = '110': input should be less than or equal to 100"),
        ("ROLLOUT", "half", "rollout = 'half': input should be a valid number"),
        ("ON_OUTAGE", "fail", "on_outage = 'fail': input should be 'open', 'closed' or 'original_url'"),
        ("DEADLINE_S", "-20", "deadline_s = '-20': input should be greater than 0"),
        ("MAX_WAIT_S", "0", "max_wait_s = '0': input should be greater than 0"),
        ("LEASE_S", "soon", "lease_s = 'soon': input should be a valid number"),
        ("MAX_ATTEMPTS", "0", "max_attempts = '0': input should be greater than or equal to 1"),
        ("SERVICE_CLASS", "bulk", "service_class = 'bulk': input should be 'interactive' or 'batch'"),
        ("POOL", "my pool", "pool = 'my pool': string should match pattern"),
        ("REDIS_URL", "127.0.0.1:6379", "redis_url = '127.0.0.1:6379': a Redis URL starts with redis://"),
    ],
)
def test_a_wrong_variable(run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    """The variable is named, with its value and what it may hold."""
    monkeypatch.setenv(f"MAESTRO_{name}", value)
    refused(run("queue", "ls"), f"MAESTRO_{name}: {says}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["emulate", "--profile", "h100"], "there is no profile 'h100': known are cpu-tiny, gpu"),
        (["emulate", "--scheduling-policy", "lifo"], "there is no scheduling policy 'lifo': known are fcfs, priority"),
        (["emulate", "--model", "a", "--model", "a"], "each with a name of its own; got ['a', 'a']"),
        (["demo", "--input", "none.jsonl"], "--input none.jsonl: No such file or directory"),
        (["demo", "--input", "empty.jsonl"], "--input empty.jsonl: no message in it"),
        (["demo", "--input", "numbers.jsonl"], "--input numbers.jsonl: no message in it (line 1: no message in it)"),
        (["demo", "--input", "cut.jsonl.gz"], "--input cut.jsonl.gz: "),
        (["demo", "--input", "empty.jsonl", "--png", "no/such/place.png"], "empty.jsonl: no message in it"),
        (["demo", "--png", "no/such/place.png"], "no/such/place.png: there is no folder no/such"),
        (["switch", "--reason", "x", "--redis-url", NO_REDIS], "a reason for what? `maestro switch off --reason TEXT`"),
        (["bench", "order", "--engine", "sglang"], "--engine 'sglang': emulator or vllm"),
        (["bench", "order", "--engine", "vllm"], "MAESTRO_VLLM_MODEL must name the folder of a small model for vLLM"),
        (["bench", "faults", "--kind", "fire"], "--kind 'fire': one of app, scheduler, engine, redis"),
        (["queue", "ls", "--redis-url", NO_REDIS, "--pool", "a b"], "pool = 'a b': string should match pattern"),
    ],
    ids=words_of,
)
def test_a_wrong_argument(run: Run, words: list[str], says: str) -> None:
    """Names that do not exist, files without what should be in them."""
    Path("empty.jsonl").write_text("\n\n")
    Path("numbers.jsonl").write_text('{"n": 1}\n')
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"message": "hello"}\n' * 100)[:30])
    refused(run(*words), says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tpo"], "No such command 'tpo'"),
        (["top", "--intervl", "3"], "No such option: --intervl (Possible options: --interval)"),
        (["emulate", "--port", "-1"], "Invalid value for '--port': Input should be greater than or equal to 0"),
        (["demo", "--runs", "0"], "Invalid value for '--runs': Input should be greater than or equal to 1"),
        (["queue", "show"], "Missing argument 'stage'"),
    ],
    ids=words_of,
)
def test_a_wrong_word_on_the_command_line(run: Run, words: list[str], says: str) -> None:
    """Status 2, the usage of the command, and one line that begins with Error."""
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert says in line
    assert "Traceback" not in err
    assert "--help' for help." in err


def test_a_stage_that_nobody_knows(run: Run, redis_url: str, pool: str) -> None:
    """`queue show` and `queue cancel` say where the names of stages are to be had."""
    for words in (["queue", "show", "zz"], ["queue", "cancel", "zz", "--yes"]):
        refused(run(*words, "--redis-url", redis_url, "--pool", pool), "`maestro queue ls` names th")


def test_a_port_in_use(run: Run) -> None:
    """`maestro emulate` on a taken port says so and how to choose another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(run("emulate", "--port", str(port)), f"cannot listen on 127.0.0.1:{port}: ")


# -- maestro doctor ------------------------------------------------------------------------------------------------------
def checks(run: Run, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Status and the findings by name, as ``maestro doctor --json`` tells them."""
    status, out, err = run("doctor", "--json", *words)
    assert err == ""
    return status, {c["name"]: c for c in json.loads(out)["checks"]}


def test_doctor_finds_no_redis(run: Run) -> None:
    """Redis that does not answer is broken, with what to start."""
    status, found = checks(run, "--redis-url", NO_REDIS)
    assert status == 1
    assert found["redis"]["status"] == "broken"
    assert f"Redis at {NO_REDIS} does not answer" in found["redis"]["detail"]
    assert "`maestro up`" in found["redis"]["remedy"]


def test_doctor_finds_a_misspelled_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MAESTRO_ variable that nothing reads is noted; those that something reads are not."""
    monkeypatch.setenv("MAESTRO_REDIS", NO_REDIS)
    monkeypatch.setenv("MAESTRO_VLLM_MODEL", "models/tiny")
    monkeypatch.setenv("MAESTRO_SAMPLE_MODEL", "tiny")
    status, found = checks(run)
    assert status == 0
    assert found["settings"]["status"] == "ok"  # the last word on settings; the note came before it
    _, out, _ = run("doctor", "--json")
    noted = [c["detail"] for c in json.loads(out)["checks"] if c["name"] == "settings" and c["status"] == "note"]
    assert noted == ["MAESTRO_REDIS is set, but nothing reads it"]


def test_doctor_finds_engines_that_are_dead_or_serve_something_else(run: Run, emulator: Emulator) -> None:
    """An engine is asked what it serves; the remedy names the key of fleet.toml."""
    fleet = (
        f'[[engine]]\nid = "dead"\nmodel = "tiny"\nurl = "{dead_url()}"\n'
        f'[[engine]]\nid = "other"\nmodel = "huge"\nurl = "{emulator.url}"\n'
    )
    Path("fleet.toml").write_text(fleet)
    status, found = checks(run, "--fleet", "fleet.toml")
    assert status == 1
    assert "does not answer" in found["engine dead"]["detail"]
    assert found["engine dead"]["remedy"] == "start it, or correct its url in fleet.toml"
    assert found["engine other"]["detail"] == f"{emulator.url} serves tiny, not 'huge'"
    assert found["engine other"]["remedy"] == "correct model or served_model in fleet.toml"


def test_doctor_finds_a_model_that_the_fleet_lacks(run: Run, emulator: Emulator) -> None:
    """`--model` asks for what the app calls: what is not served goes past Maestro, and that is said."""
    Path("fleet.toml").write_text(f'[[engine]]\nid = "a"\nmodel = "tiny"\nurl = "{emulator.url}"\n')
    status, found = checks(run, "--fleet", "fleet.toml", "--model", "tiny", "--model", "gpt-x")
    assert status == 1
    assert found["model tiny"]["status"] == "ok"
    assert found["model gpt-x"]["status"] == "broken"
    assert "go to the app's own URL, untouched" in found["model gpt-x"]["detail"]
    assert 'call one of tiny, or add an engine with model = "gpt-x"' in found["model gpt-x"]["remedy"]
    assert checks(run, "--model", "tiny")[1]["model tiny"]["status"] == "note"


def test_doctor_finds_a_wrong_fleet_file_and_wrong_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lines as everywhere, as findings."""
    Path("fleet.toml").write_text(ENGINE + "slots = 0\n")
    status, found = checks(run, "--fleet", "fleet.toml")
    assert (status, found["fleet"]["detail"][:24]) == (1, "fleet.toml:5: slots = 0:")
    monkeypatch.setenv("MAESTRO_MODE", "loud")
    status, found = checks(run)
    assert (status, found["settings"]["status"]) == (1, "broken")


def test_doctor_finds_an_sdk_that_changed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the SDK whose seam is not as the gate needs it is broken, with what happens then."""

    def request(self: Any, kind: Any) -> None: ...

    monkeypatch.setattr(sdk.AsyncAPIClient, "request", request)
    status, found = checks(run)
    assert status == 1
    assert f"openai {openai.__version__} is not supported" in found["openai seam"]["detail"]
    assert "Calls go out unmanaged" in found["openai seam"]["detail"]
    assert "pip install" in found["openai seam"]["remedy"]


# -- in the app ----------------------------------------------------------------------------------------------------------
def test_an_app_without_its_redis_is_answered(
    warned: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, emulator: Emulator, answers: Answers
) -> None:
    """The call goes to the app's own URL, and one line of log says what is missing."""
    monkeypatch.setenv("MAESTRO_REDIS_URL", NO_REDIS)
    assert all(answers(app(emulator.url), 2))
    (line,) = warned()
    assert line.startswith("Maestro is out: Redis does not answer")
    assert "Run `maestro doctor`" in line


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("REDIS_URL", "http://127.0.0.1", "MAESTRO_REDIS_URL: redis_url = 'http://127.0.0.1': a Redis URL starts with"),
        ("MODE", "loud", "MAESTRO_MODE: mode = 'loud': input should be 'on', 'observe' or 'off'"),
        ("ROLLOUT", "-1", "MAESTRO_ROLLOUT: rollout = '-1': input should be greater than or equal to 0"),
        ("FLEET", "none.toml", "none.toml: there is no such file"),
        ("CONFIG", "none.toml", "none.toml: there is no such file"),
    ],
)
def test_an_app_with_wrong_settings_is_answered(
    warned: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    emulator: Emulator,
    answers: Answers,
    name: str,
    value: str,
    says: str,
) -> None:
    """A setting that cannot be read is told in the log, not thrown at a user's request; every call still goes out."""
    monkeypatch.setenv(f"MAESTRO_{name}", value)
    assert all(answers(app(emulator.url), 3))
    told = warned()
    assert 1 <= len(told) <= 2, "the callback and the gate each say it, once"
    assert all(says in line and "your calls go on" in line for line in told)


def test_configure_refuses_at_once() -> None:
    """What the code itself sets wrongly is an error where it is set."""
    with pytest.raises(ConfigError, match=r"argument: max_wait_s = -1: input should be greater than 0"):
        maestro.configure(max_wait_s=-1)
    with pytest.raises(ConfigError, match=r"there is no setting 'max_wait': did you mean max_wait_s\?"):
        maestro.configure(max_wait=3)


def test_a_model_that_the_fleet_lacks_passes_untouched(stub: StubServer, tmp_path: Path, answers: Answers) -> None:
    """It goes to the app's own URL with the app's own key, and nothing of ours in its body."""
    stub.reset()
    with managed(tmp_path, {"a": dead_url()}):
        program = maestro.wrap(graph("gpt-x", stub.url, max_tokens=3).compile())
        assert answers(program)[0].startswith("echo")
    (seen,) = stub.requests
    assert seen.body["model"] == "gpt-x"
    assert "priority" not in seen.body
    assert seen.headers["authorization"] == "Bearer none"


def test_an_sdk_that_changed_is_one_warning(
    warned: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, emulator: Emulator, answers: Answers
) -> None:
    """Where the seam is not what it was, nothing is installed: one line, and calls go out unmanaged."""
    real = sdk.AsyncAPIClient.request

    async def request(self: Any, cast_to: Any, final: Any, stream: bool = False, stream_cls: Any = None) -> Any:
        return await real(self, cast_to, final, stream=stream, stream_cls=stream_cls)

    monkeypatch.setattr(sdk.AsyncAPIClient, "request", request)
    assert all(answers(app(emulator.url)))
    (line,) = warned()
    assert f"openai {openai.__version__} is not supported" in line
    assert "calls go out unmanaged" in line
    assert Client._current is None or not Client._current._room.fleet


def test_install_twice_is_once(warned: Callable[[], list[str]]) -> None:
    """The second time changes the options only."""
    maestro.install(tenant="a")
    once = sdk.SyncAPIClient.request
    maestro.install(tenant="b")
    assert sdk.SyncAPIClient.request is once
    assert warned() == []
    maestro.uninstall()
    assert sdk.SyncAPIClient.request is not once
    assert gate.self_check() == ""


@pytest.mark.parametrize("deadline_s", [-1, 0, math.nan, math.inf, "20", True])
@pytest.mark.parametrize("where", ["decorator", "wrap", "install", "options"])
def test_a_deadline_that_is_none(where: str, deadline_s: Any) -> None:
    """Past, zero, endless or no number: refused where it is said."""
    with pytest.raises(ConfigError, match=r"^deadline_s = .*: give the seconds a run may take, more than 0$"):
        say(where, deadline_s=deadline_s)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"service_class": "bulk"}, 'service_class = \'bulk\': say "interactive" or "batch"'),
        ({"serviceclass": "batch"}, "maestro has no option 'serviceclass': did you mean service_class?"),
        ({"priority": 3}, "maestro has no option 'priority': known are service_class, deadline_s, tenant, agent,"),
        ({"tenant": ""}, "tenant = '': give a name, or leave it out"),
        ({"tenant": 7}, "tenant = 7: give a name, or leave it out"),
        ({"refuse_late": "yes"}, "refuse_late = 'yes': say True or False"),
    ],
)
@pytest.mark.parametrize("where", ["decorator", "wrap", "install", "options"])
def test_a_wrong_option(where: str, options: dict[str, Any], says: str) -> None:
    """Refused where it is said, with the names and values that there are."""
    with pytest.raises(ConfigError) as caught:
        say(where, **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def say(where: str, **options: Any) -> None:
    """Say options in one of the four places that take them."""
    match where:
        case "decorator":
            maestro(**options)
        case "wrap":
            maestro.wrap(graph("tiny", "http://127.0.0.1:1/v1").compile(), **options)
        case "install":
            maestro.install(**options)
        case _:
            with maestro.options(**options):
                pass


def test_the_decorator_on_something_that_builds_no_graph() -> None:
    """A function that forgot its return, a class, a number: named, with what to give."""

    @maestro
    def forgot() -> Any:
        graph("tiny", "http://127.0.0.1:1/v1").compile()

    @maestro
    def wrong() -> Any:
        return {"graph": 1}

    @maestro
    async def late() -> Any:
        return None

    for build in (forgot, lambda: asyncio.run(late())):
        with pytest.raises(ConfigError, match=r"is decorated with @maestro and returned nothing \(None\): return the"):
            build()
    with pytest.raises(ConfigError, match=r"returned a dict: return the graph it built"):
        wrong()
    with pytest.raises(
        ConfigError, match=r"maestro cannot wrap a int: give maestro a StateGraph, a compiled graph, or"
    ):
        maestro(3)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match=r"maestro cannot wrap nothing \(None\)"):
        maestro.wrap(None)  # type: ignore[type-var]


def test_a_negative_bound_of_the_caller_is_the_engines_to_refuse(
    warned: Callable[[], list[str]], emulator: Emulator
) -> None:
    """A call with ``max_tokens=-1`` raises the SDK's own 400, as it does without Maestro, and leaves nothing behind."""
    maestro.install()
    client = openai.OpenAI(base_url=emulator.url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=-1)
    assert warned() == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EngineSpec(engine_id="a", url="u", model="m", slots=0), "engine a: slots must be at least 1"),
        (lambda: EngineSpec(engine_id="a", url="u", model="m", kv_bytes=-1), "engine a: KV sizes cannot be negative"),
        (
            lambda: Ticket(stage_id="s", client_id="c", model="m", max_tokens=-1),
            "stage s: token counts cannot be negative",
        ),
        (
            lambda: Ticket(stage_id="s", client_id="c", model="m", deadline_at_s=math.nan),
            "stage s: a moment cannot be NaN",
        ),
        (lambda: Ticket(stage_id="", client_id="c", model="m"), "a ticket needs stage_id, client_id and model"),
    ],
)
def test_a_noun_with_a_negative_budget_cannot_be_built(make: Callable[[], object], says: str) -> None:
    """The constructor says which one and why."""
    with pytest.raises(WireError) as caught:
        make()
    assert str(caught.value) == says
    assert isinstance(caught.value, MaestroError)


def test_wrong_settings_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mistakes at a time: the first is told, on one line, and the next after it is mended."""
    monkeypatch.setenv("MAESTRO_MODE", "x")
    monkeypatch.setenv("MAESTRO_LEASE_S", "y")
    with pytest.raises(ConfigError) as caught:
        Settings.load()
    assert str(caught.value).count("\n") == 0
