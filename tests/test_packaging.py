"""The wheel, as users get it: what is in it, that it runs, and that the rules of the tree hold inside it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"maestro_agents", "maestro_langgraph", "maestro_serving"}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging"), pytest.mark.timeout(300)]


def run(*command: str | Path, **env: str) -> str:
    """What a command printed; the test fails with its output where it failed."""
    done = subprocess.run(
        [str(c) for c in command], env={**clean_env(), **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def clean_env() -> dict[str, str]:
    """No path of the checkout leads to the sources."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel in it; its dependencies are those of this environment."""
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", home)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    theirs = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # Paths only: a .pth of this environment that leads to the checkout (an editable install) is not followed.
    mine = dict.fromkeys([sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages()])
    (theirs / "dependencies.pth").write_text("\n".join(mine) + "\n")
    return home


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_three_packages_and_nothing_else(wheel: Path) -> None:
    """No generic top-level name such as `integrations` or `tests` lands in site-packages."""
    assert {n.split("/")[0] for n in names(wheel) if ".dist-info/" not in n} == PACKAGES


def test_the_wheel_holds_every_source(wheel: Path) -> None:
    """Every module, every Lua file, the model with its card, every hardware profile and every sample of the checkout travels."""
    homes = {"maestro_agents": ROOT, "maestro_langgraph": ROOT / "integrations", "maestro_serving": ROOT / "serving"}
    expected = {
        path.relative_to(home).as_posix()
        for package, home in homes.items()
        for path in (home / package).rglob("*")
        if path.suffix in (".py", ".lua", ".json", ".jsonl", ".typed", ".model", ".md", ".toml", ".gz")
    }
    folder = ROOT / "sample_workflows"
    samples = {f"maestro_agents/_samples/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}
    assert any(n.endswith(".lua") for n in expected)
    assert {"maestro_agents/predict/default.model", "maestro_agents/predict/default.model.md"} <= expected
    assert samples
    assert (expected | samples) - names(wheel) == set()


def test_the_wheel_names_its_licence_and_its_command(wheel: Path) -> None:
    """The licence text, the entry point and the extras are where tools look for them."""
    archive = zipfile.ZipFile(wheel)
    (info,) = {n.split("/")[0] for n in names(wheel) if ".dist-info/" in n}
    assert f"{info}/licenses/LICENSE" in names(wheel)
    assert "maestro = maestro_agents.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert {"dev", "eval", "matrix", "proxy", "ray", "vllm"} == {
        line.removeprefix("Provides-Extra: ") for line in metadata.splitlines() if line.startswith("Provides-Extra")
    }


def test_the_command_runs_from_the_wheel(installed: Path, wheel: Path) -> None:
    """`maestro --version` of the installed wheel tells the wheel's version, and its modules are the wheel's."""
    version = wheel.name.split("-")[1]
    assert run(installed / "bin" / "maestro", "--version").strip() == f"maestro {version}"
    where = run(
        installed / "bin" / "python",
        "-c",
        f"import {', '.join(PACKAGES)}; print(maestro_agents.__file__, maestro_langgraph.__file__, maestro_serving.__file__)",
    )
    assert all(path.startswith(str(installed)) for path in where.split())


def test_the_samples_can_be_imported_from_the_wheel(installed: Path) -> None:
    """`maestro demo` finds its sample without a checkout."""
    for sample in (ROOT / "sample_workflows").glob("[!_]*.py"):
        run(installed / "bin" / "python", "-c", f"import maestro_agents._samples.{sample.stem}")


def test_the_import_rules_hold_in_the_wheel(installed: Path) -> None:
    """The tables of test_architecture.py, against what was installed."""
    site_packages = run(
        installed / "bin" / "python",
        "-c",
        "import maestro_agents, pathlib; print(pathlib.Path(maestro_agents.__file__).parent.parent)",
    ).strip()
    out = run(
        installed / "bin" / "python",
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", installed, "--noconftest"),
        ROOT / "tests" / "test_architecture.py",
        MAESTRO_TEST_PACKAGES=site_packages,
    )
    assert " passed" in out
    assert " failed" not in out
