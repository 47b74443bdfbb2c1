"""The Kubernetes manifests: held to the API's schemas, and to the commands, ports and files that they name."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from maestro_agents.cli import build_app
from maestro_agents.fleet import load_fleet
from maestro_agents.settings import ENV_PREFIX, OTHER_ENV, Settings
from maestro_serving.hosts import load_host

HERE = Path(__file__).resolve().parent.parent / "serving" / "deploy" / "kubernetes"

pytestmark = pytest.mark.skipif(not HERE.is_dir(), reason="the manifests lie in a checkout only")

VERSIONS = ("1.29.0", "1.31.0", kubernetes_validate.latest_version())


def objects() -> list[dict[str, Any]]:
    """Every object of the files that the kustomization names."""
    names = yaml.safe_load((HERE / "kustomization.yaml").read_text())["resources"]
    return [o for name in names for o in yaml.safe_load_all((HERE / name).read_text())]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [o for o in objects() if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """What runs: name and pod spec."""
    for o in objects():
        if "template" in o.get("spec", {}):
            yield o["metadata"]["name"], o["spec"]["template"]["spec"]


def of_ours() -> Iterator[tuple[str, dict[str, Any]]]:
    """Containers that run a command of Maestro."""
    for name, pod in pods():
        for container in pod["containers"]:
            if container["image"].startswith("maestro-"):
                yield name, container


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("of", objects() if HERE.is_dir() else [], ids=lambda o: f"{o['kind']}-{o['metadata']['name']}")
def test_every_object_is_one_of_the_api(of: dict[str, Any], version: str) -> None:
    """In the versions of Kubernetes named here, unknown keys refused."""
    kubernetes_validate.validate(of, version, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    """A misspelled key is found, so that the test above can fail."""
    wrong = named("Deployment", "scheduler")
    wrong["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_every_file_is_in_the_kustomization() -> None:
    """A manifest that nobody applies is one that nobody keeps."""
    said = set(yaml.safe_load((HERE / "kustomization.yaml").read_text())["resources"])
    assert said == {f.name for f in HERE.glob("*.yaml")} - {"kustomization.yaml"}


def test_every_container_runs_a_command_that_exists() -> None:
    """With options that the command knows, and values that they take."""
    ran = set()
    for _, container in of_ours():
        name, *args = container["args"]
        ran.add(name)
        whole: Any = typer.main.get_command(build_app([name]))
        command = whole.commands[name]
        command.make_context(name, [a.replace("$(NODE_NAME)", "gpu-1") for a in args], resilient_parsing=False)
    assert ran == {"scheduler", "node", "gateway"}


def test_every_variable_is_a_setting() -> None:
    """``MAESTRO_*`` that nothing reads would be a misspelled one."""
    known = {ENV_PREFIX + n.upper() for n in Settings.model_fields} | OTHER_ENV
    said = {e["name"] for _, c in of_ours() for e in c.get("env", ()) if e["name"].startswith(ENV_PREFIX)}
    assert said
    assert said <= known


def test_probes_ask_for_ports_and_paths_that_are_served() -> None:
    """Named ports exist on their container, and are the ones that its command listens on."""
    for name, c in of_ours():
        ports = {p["name"]: p["containerPort"] for p in c["ports"]}
        for probe in (c["readinessProbe"], c["livenessProbe"]):
            asked = probe["httpGet"]
            listening = " ".join(c["args"])
            assert re.search(rf"\b{ports[asked['port']]}\b", listening), name
            assert asked["path"] in ({"/health", "/ready"} if name == "gateway" else {"/healthz", "/readyz"})


def test_only_proxy_and_metrics_of_a_node_are_open() -> None:
    """Engines and their admin endpoints are on the pod's loopback, and no policy opens another port of it."""
    pod = dict(pods())["node"]
    assert not pod.get("hostNetwork")
    (container,) = pod["containers"]
    assert [p["name"] for p in container["ports"]] == ["proxy", "metrics"]
    assert "0.0.0.0:9000" in container["args"]
    everybody = named("NetworkPolicy", "nobody-unless-named")["spec"]
    assert everybody == {"podSelector": {}, "policyTypes": ["Ingress"]}
    rules = named("NetworkPolicy", "node")["spec"]["ingress"]
    assert [[p["port"] for p in r["ports"]] for r in rules] == [["proxy"], ["metrics"]]
    assert all(r["from"] for r in rules)


def test_redis_is_open_to_those_who_need_it_alone() -> None:
    """Scheduler, nodes, gateway, and client pods that say so; the gateway's own callers are not among them."""
    (rule,) = named("NetworkPolicy", "redis")["spec"]["ingress"]
    assert [p["port"] for p in rule["ports"]] == ["redis"]
    ours, clients = rule["from"]
    assert ours["podSelector"]["matchExpressions"][0]["values"] == ["scheduler", "node", "gateway"]
    assert clients["podSelector"]["matchLabels"] == {"maestro/client": "true"}


def test_no_pod_may_more_than_it_must() -> None:
    """No token of Kubernetes, no new privileges, no capabilities; only the node agent writes to its machine."""
    for name, pod in pods():
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for c in pod["containers"]:
            limits = c["securityContext"]
            assert limits["allowPrivilegeEscalation"] is False
            assert limits["capabilities"] == {"drop": ["ALL"]}
            assert limits.get("readOnlyRootFilesystem", False) is (name != "node"), name
            assert c["resources"]["requests"]
            assert c["resources"]["limits"]["memory"]


def test_a_secret_is_named_and_never_written() -> None:
    """Passwords and the key come from secrets, which nobody keeps in a repository."""
    assert not [o for o in objects() if o["kind"] == "Secret"]
    for name, c in of_ours():
        (url,) = [e for e in c["env"] if e["name"] == "MAESTRO_REDIS_URL"]
        assert url["valueFrom"]["secretKeyRef"] == {"name": "maestro-redis", "key": f"{name}-url"}


def test_the_fleet_file_makes_a_node_of_every_machine(tmp_path: Path) -> None:
    """Tables of node "*" are about whatever ``--node`` says; the scheduler needs no list of machines."""
    (tmp_path / "fleet.toml").write_text(_with_models(tmp_path))
    assert load_fleet(tmp_path / "fleet.toml").nodes == ()
    host = load_host(tmp_path / "fleet.toml", "gpu-1", tmp_path / "state")
    assert [g.gpu_id for g in host.gpus] == ["gpu-1.0"]
    assert {e.spec.model for e in host.engines} == {"chat", "code"}
    assert list(host.at_start) == ["chat.gpu-1.0"]


def test_gpus_of_a_node_are_asked_for_as_the_fleet_file_says(tmp_path: Path) -> None:
    """The DaemonSet's GPUs are those of the [[gpu]] table."""
    (tmp_path / "fleet.toml").write_text(_with_models(tmp_path))
    host = load_host(tmp_path / "fleet.toml", "gpu-1", tmp_path / "state")
    (container,) = dict(pods())["node"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(len(host.gpus))


def _with_models(folder: Path) -> str:
    """The manifests' fleet file, its models in a folder here."""
    for name in ("chat", "code"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"\0" * 1000)
    return (HERE / "fleet.toml").read_text().replace("/models/", f"{folder}/")
