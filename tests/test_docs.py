"""The docs say what is: links lead somewhere, examples are real, and what is read from the code is current."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from packaging.requirements import Requirement

from maestro_agents import fleet
from maestro_agents.cli import COMMANDS, build_app, main
from maestro_agents.fleet import load_fleet
from maestro_agents.settings import OTHER_ENV, Settings
from maestro_agents.simulator.hardware import load_sim_fleet

ROOT = Path(__file__).resolve().parent.parent
PAGES = {p.relative_to(ROOT).as_posix(): p for p in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]}

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`(maestro [a-z][^`]*)`")

every_page = pytest.mark.parametrize("page", PAGES)


def blocks(language: str) -> Iterator[Any]:
    """Every fenced block of a language, named by its page and place."""
    for name, page in PAGES.items():
        found = [m[2] for m in BLOCK.finditer(page.read_text()) if m[1] == language]
        yield from (pytest.param(text, id=f"{name}-{n}") for n, text in enumerate(found, 1))


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@every_page
def test_every_link_leads_somewhere(page: str) -> None:
    """Files are there, headings too; no page leads out of the checkout."""
    lost: list[str] = []
    for link in LINK.findall(BLOCK.sub("", PAGES[page].read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_the_index_names_every_page() -> None:
    """No page of the docs is found by accident only."""
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert [name for name in sorted(pages) if f"({name})" not in index] == []


@pytest.mark.parametrize("source", list(blocks("python")))
def test_python_compiles(source: str) -> None:
    """Every Python example is Python, and imports only what is there."""
    compile(source, "example", "exec")
    for line in re.findall(r"^from maestro_\w+ import .+$", source, re.MULTILINE):
        exec(line, {})


@pytest.mark.parametrize("text", list(blocks("toml")))
def test_toml_loads(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every fleet file is a fleet, every maestro.toml holds settings."""
    monkeypatch.chdir(tmp_path)
    if "[[engine]]" in text:
        Path("fleet.toml").write_text(text)
        assert load_fleet("fleet.toml").engines
    elif "[[gpu]]" in text:
        Path("fleet.toml").write_text(text)
        assert load_sim_fleet("fleet.toml").engines
    else:
        Path("maestro.toml").write_text(text)
        Settings.load()
        assert Settings.origins()


# -- commands ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def command_line() -> Any:
    """The parser of the command line."""
    return typer.main.get_command(build_app([entry.name for entry in COMMANDS]))


def wrong_words(line: str, command: Any) -> list[str]:
    """The words of a command line that its parser does not know; values are not looked at."""
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index("--")] if "--" in words else words  # behind it stands somebody else's command
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        name = words.pop(0)
        if name not in command.commands:
            return [name]
        command = command.commands[name]
    known = {opt for p in command.params for opt in p.opts} | {"--help"}
    return [w for w in words if w.startswith("-") and w.partition("=")[0] not in known]


def shown_commands(text: str) -> Iterator[str]:
    """Every ``maestro ...`` that a page shows: in console blocks, and as code in a sentence."""
    for m in BLOCK.finditer(text):
        if m[1] in ("console", "bash", "sh"):
            yield from re.findall(r"^\$ (?:\S+=\S+ )*(?:\S*/)?(maestro .*)$", m[2], re.MULTILINE)
            yield from re.findall(r"&& (?:\S*/)?(maestro [^&\n]*)", m[2])
    for code in INLINE.findall(BLOCK.sub("", text)):
        yield from alternatives(code)


def alternatives(code: str) -> list[str]:
    """``maestro bench a|b`` is two commands; dots are no words."""
    plain = code.replace("...", "").replace("…", "")
    choice = re.search(r"(\w+(?:\|\w+)+)", plain)
    return [plain.replace(choice[1], word) for word in choice[1].split("|")] if choice else [plain]


@every_page
def test_every_command_shown_exists(page: str, command_line: Any) -> None:
    """Command, sub-command and options of each are the parser's own."""
    wrong = {line: wrong_words(line, command_line) for line in shown_commands(PAGES[page].read_text())}
    assert {line: words for line, words in wrong.items() if words} == {}


def test_the_check_of_commands_can_fail(command_line: Any) -> None:
    """A command, a sub-command and an option that do not exist are found; values and comments are left alone."""
    assert wrong_words("maestro downn", command_line) == ["downn"]
    assert wrong_words("maestro queue rm x", command_line) == ["rm"]
    assert wrong_words("maestro top --onec --pool x", command_line) == ["--onec"]
    assert wrong_words("maestro demo --input FILE.jsonl   # yours", command_line) == []
    assert list(shown_commands("```console\n$ A=1 .venv/bin/maestro demo\n```\nand `maestro queue ls|show`")) == [
        "maestro demo",
        "maestro queue ls",
        "maestro queue show",
    ]


def test_commands_page_names_what_help_names(capsys: pytest.CaptureFixture[str], command_line: Any) -> None:
    """Every option that ``--help`` shows stands on the page under its command, and no other."""
    sections = dict(
        re.findall(r"^## `(maestro [^`]+)`\n(.*?)(?=^## |\Z)", page_text("commands.md"), re.MULTILINE | re.DOTALL)
    )

    def walk(path: tuple[str, ...], command: Any) -> Iterator[tuple[str, ...]]:
        yield path
        for name, below in getattr(command, "commands", {}).items():
            yield from walk((*path, name), below)

    paths = [path for e in COMMANDS for path in walk((e.name,), command_line.commands[e.name])]
    assert set(sections) == {f"maestro {' '.join(path)}" for path in paths}
    for path in paths:
        with pytest.raises(SystemExit):
            main([*path, "--help"])
        helped = set(re.findall(r"^\s+(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
        assert set(re.findall(r"`(--[a-z-]+)`", sections[f"maestro {' '.join(path)}"])) >= helped, path
        assert helped >= set(re.findall(r"^\| `(--[a-z-]+)`", sections[f"maestro {' '.join(path)}"], re.MULTILINE)), (
            path
        )


# -- read from the code --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """``docs/generate.py``."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_text(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@every_page
def test_generated_parts_are_current(page: str, generator: ModuleType) -> None:
    """What the page says of settings, commands, numbers and packages is what `python docs/generate.py` writes."""
    text = PAGES[page].read_text()
    assert generator.generated(text) == text, "run: python docs/generate.py"


def test_the_generated_parts_are_there() -> None:
    """Each of the parts has a page."""
    parts = re.findall(r"<!-- generated: (\w+) -->", "".join(p.read_text() for p in PAGES.values()))
    assert sorted(parts) == [
        "ageing",
        "commands",
        "constants",
        "dependencies",
        "distances",
        "features",
        "hardware",
        "hints",
        "levels",
        "moves",
        "settings",
    ]


def test_every_variable_has_its_line() -> None:
    """Settings by their table, the others by a line of their own."""
    page = page_text("settings.md")
    named = set(re.findall(r"^\| `(MAESTRO_\w+)` \|", page, re.MULTILINE))
    assert named == {f"MAESTRO_{name.upper()}" for name in Settings.model_fields} | OTHER_ENV


def test_every_key_of_a_fleet_file_has_its_line() -> None:
    """In the order of the file's shape, with the tables that they belong to."""
    rows = re.findall(
        r"^\| (?:`(\[+[\w.]+\]+)` )?`(\w+)` \|", page_text("settings.md").split("## fleet.toml")[1], re.MULTILINE
    )
    found: dict[str, list[str]] = {}
    place = ""
    for head, key in rows:
        place = head.strip("[]") or place
        found.setdefault(place, []).append(key)
    shape: Mapping[tuple[str, ...], Mapping[str, Any]] = fleet._KEYS
    wanted = {".".join(where): sorted(k for k in keys if (*where, k) not in shape) for where, keys in shape.items()}
    assert {where: sorted(keys) for where, keys in found.items()} == wanted


def test_every_dependency_has_a_reason() -> None:
    """pyproject.toml says, beside each package, why it comes along; the page repeats it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| `([^`]+)` \| .+? \| (.+) \|$", page_text("dependencies.md"), re.MULTILINE)
    assert [Requirement(text).name for text, _ in rows] == [Requirement(t).name for t in project["dependencies"]]
    assert all(reason.strip() for _, reason in rows)
