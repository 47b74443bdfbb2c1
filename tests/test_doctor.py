"""`maestro doctor`: what is broken is found, named, and answered with something to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from maestro_agents.cli import doctor, main
from maestro_agents.cli.doctor import Finding
from maestro_agents.core import EngineSpec
from maestro_agents.queue import embedded
from maestro_agents.settings import Settings
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig


def one(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def spec(url: str, **more: object) -> EngineSpec:
    return EngineSpec.decode({"engine_id": "a", "url": url, "model": "tiny", **more})


def test_an_old_python_is_broken() -> None:
    """The version is told, and the one that is needed."""
    assert one(doctor.check_python()).status == "ok"
    old = one(doctor.check_python((3, 10, 4)))
    assert (old.status, old.detail) == ("broken", "3.10.4 is too old")
    assert "3.11" in old.remedy


def test_supported_packages_are_counted_and_extras_left_out() -> None:
    """What is as it should be is one line; packages of other platforms and of extras are nobody's business."""
    wanted = ["httpx>=0.1", "rich", "nothing-like-this; extra == 'dev'", "nor-this; sys_platform == 'nowhere'"]
    assert one(doctor.check_packages(wanted)).detail == "2 packages in supported versions"


@pytest.mark.parametrize(
    ("wanted", "detail"),
    [
        ("openai<1.50", "is not supported: <1.50 is"),
        ("langchain-core>=99", "is not supported: >=99 is"),
        ("no-such-distribution-here>=1", "is not installed"),
    ],
)
def test_an_unsupported_or_missing_package_is_broken(wanted: str, detail: str) -> None:
    """One line names the package, its version and the range; the remedy is a command."""
    found = one(doctor.check_packages([wanted, "rich"]))
    assert found.status == "broken"
    assert found.detail.endswith(detail)
    assert found.remedy == f"python3 -m pip install '{wanted}'"


def test_settings_are_told_with_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each setting comes from is said; what nothing reads is noted; what is wrong is broken."""
    monkeypatch.setenv("MAESTRO_POOL", "p")
    monkeypatch.setenv("MAESTRO_POOOL", "p")
    settings, (misspelled, told) = doctor.check_settings()
    assert settings
    assert (misspelled.status, misspelled.detail) == ("note", "MAESTRO_POOOL is set, but nothing reads it")
    assert told.detail == "pool from MAESTRO_POOL"
    monkeypatch.setenv("MAESTRO_MODE", "loud")
    settings, (_, wrong) = doctor.check_settings()
    assert settings is None
    assert wrong.status == "broken"
    assert wrong.detail.startswith("MAESTRO_MODE: mode = 'loud'")


def test_redis_is_asked(redis_url: str) -> None:
    """A Redis that answers tells its version and how far it is."""
    found = one(doctor.check_redis(redis_url))
    assert found.status in ("ok", "note")  # "note": a loaded machine answers late
    assert redis_url in found.detail
    assert " ms" in found.detail


def test_no_redis_where_one_should_be_is_broken() -> None:
    """A wrong URL is one line and something to do."""
    found = one(doctor.check_redis(f"redis://127.0.0.1:{closed_port()}/0"))
    assert found.status == "broken"
    assert "does not answer" in found.detail
    assert "maestro up" in found.remedy


def test_an_old_redis_is_broken_and_a_far_one_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts need 6.2, and each call pays for the way to Redis."""
    info = embedded.RedisInfo(version="6.0.16", process_id=1, latency_s=0.0001)
    monkeypatch.setattr(doctor, "reach", lambda _: info)
    assert one(doctor.check_redis("redis://h/0")).status == "broken"
    far = embedded.RedisInfo(version="7.2.0", process_id=1, latency_s=0.02)
    monkeypatch.setattr(doctor, "reach", lambda _: far)
    found = one(doctor.check_redis("redis://h/0"))
    assert (found.status, found.detail) == ("note", "7.2.0 at redis://h/0, PING 20.00 ms")


def test_no_redis_anywhere_says_what_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any Redis Maestro still orders one process's calls; that is noted, not broken."""
    monkeypatch.setattr(doctor, "find_server", lambda: None)
    assert one(doctor.check_redis(None)).status == "note"


def test_engines_are_asked_what_they_serve() -> None:
    """An engine that serves the named model is fine; another model, no answer and a missing key are each told."""
    with Emulator(EmulatorConfig(models=(EmulatedModel(name="tiny"), EmulatedModel(name="big")))) as engine:
        fine, other, key = doctor.check_engines(
            [
                spec(engine.url),
                spec(engine.url, model="huge"),
                spec(engine.url, api_key_env="NO_SUCH_KEY_HERE"),
            ]
        )
    assert (fine.status, fine.detail) == ("ok", f"{engine.url} serves tiny")
    assert (other.status, other.detail) == ("broken", f"{engine.url} serves tiny, big, not 'huge'")
    assert (key.status, key.remedy) == ("broken", "export NO_SUCH_KEY_HERE=…")
    dead = one(doctor.check_engines([spec(f"http://127.0.0.1:{closed_port()}/v1")]))
    assert dead.status == "broken"
    assert "does not answer" in dead.detail


def test_an_engine_that_wants_a_key_says_so() -> None:
    """A refused request names the setting that would help."""
    with Emulator(EmulatorConfig(api_key="secret")) as engine:
        found = one(doctor.check_engines([spec(engine.url)]))
    assert found.status == "broken"
    assert "api_key_env" in found.detail


def test_a_fleet_that_nobody_published_is_broken(redis_url: str, pool: str) -> None:
    """Joined to a Redis in which no scheduler works: every call would go its own way, and that is said."""
    _, findings = doctor.check_fleet(None, Settings.load(redis_url=redis_url, pool=pool))
    assert one(findings).status == "broken"
    assert "maestro scheduler" in one(findings).remedy


def test_the_seam_is_checked() -> None:
    """The SDK of this environment is one that the gate knows."""
    assert one(doctor.check_seam()).status == "ok"


def test_the_command_tells_all_as_json_and_by_its_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Status 1 and ``"ok": false`` when something is broken, 0 and true when nothing is."""
    with Emulator() as engine:
        fleet = tmp_path / "fleet.toml"
        fleet.write_text(f'[[engine]]\nid = "a"\nmodel = "tiny"\nurl = "{engine.url}"\n')
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--json", "--fleet", str(fleet)])
        told = json.loads(capsys.readouterr().out)
        assert (ended.value.code, told["ok"]) == (0, True)
        fleet.write_text(fleet.read_text().replace("tiny", "huge"))
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--json", "--fleet", str(fleet)])
        told = json.loads(capsys.readouterr().out)
    assert (ended.value.code, told["ok"]) == (1, False)
    assert [c["name"] for c in told["checks"] if c["status"] == "broken"] == ["engine a"]


def test_the_table_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For people: the finding, the remedy, and one closing line."""
    monkeypatch.setenv("MAESTRO_REDIS_URL", f"redis://127.0.0.1:{closed_port()}/0")
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert "→ start it" in out
    assert "Something is broken." in out
