"""The pages are true: their code runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from revolve import cli as revolve_cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    line: int
    """Of the first line inside the fence, counted from 1."""
    text: str


class Command(NamedTuple):
    where: str
    words: list[str]
    output: str | None
    """What the page shows; None if it shows nothing."""


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    found = (match for match in FENCE.finditer(text) if match[1] in languages)
    return [Block(page, text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands() -> Iterator[Command]:
    """Every call of ``revolve`` or ``adjoint`` that a page shows."""
    for page in PAGES:
        for block in blocks(page, "sh", "bash"):
            for number, line in enumerate(block.text.splitlines()):
                for part in line.split("&&"):
                    words = shlex.split(part, comments=True)
                    if words and words[0] in SCRIPTS:
                        yield Command(f"{name_of(page)}:{block.line + number}", words, None)
        for block in blocks(page, "console"):
            for entry in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                line, _, output = entry.partition("\n")
                yield Command(f"{name_of(page)}:{block.line}", shlex.split(line, comments=True), output or None)


COMMANDS = list(commands())
OF_REVOLVE = [command for command in COMMANDS if command.words[0] == "revolve"]
WITH_CODE = [page for page in PAGES if blocks(page, "python")]


def spoken(command: Command) -> str:
    return " ".join(command.words)


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, module.__dict__)


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_a_page_with_code_asserts_something(page: Path) -> None:
    assert any(line.lstrip().startswith("assert ") for b in blocks(page, "python") for line in b.text.splitlines())


class Parsed(Exception):
    """The parser was content."""


@pytest.mark.parametrize("command", COMMANDS, ids=spoken)
def test_a_command_that_a_page_shows_parses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    parse: Callable[..., Any] = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments: Any) -> None:
        raise Parsed(parse(*arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    module, _, function = SCRIPTS[command.words[0]].partition(":")
    with pytest.raises(Parsed):
        getattr(importlib.import_module(module), function)(command.words[1:])


@pytest.mark.parametrize("command", OF_REVOLVE, ids=spoken)
def test_a_revolve_command_prints_what_the_page_shows(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert revolve_cli.main(command.words[1:]) == 0, command.where
    printed = capsys.readouterr().out
    assert printed
    if command.output is not None:
        assert printed == command.output, command.where
    if "--out" in command.words:
        assert list(tmp_path.iterdir())


def test_the_readme_begins_with_the_two_commands_as_they_are() -> None:
    shown = [block.text.strip() for block in blocks(ROOT / "README.md", "sh")]
    assert shown[:2] == [
        "pip install -c constraints.txt . && adjoint demo",
        "pip install -c constraints.txt '.[test]' && pytest",
    ]


def anchors(page: Path) -> set[str]:
    """The headings of a page as a browser's address names them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith("https://"):
            continue
        goal = (page.parent / target).resolve() if target else page
        assert goal.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(goal), f"{name_of(page)} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_source_file_that_a_page_names_exists(page: Path) -> None:
    for name in re.findall(r"\b(?:revolve|adjoint|examples|benchmarks|tests)/[\w/]*\.py\b", page.read_text()):
        assert (ROOT / name).exists(), f"{name_of(page)} names {name}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize("package", ["revolve", "adjoint"])
def test_the_files_that_how_it_works_describes_exist(package: str) -> None:
    text = (ROOT / "docs" / "how_it_works.md").read_text()
    (table,) = re.findall(rf"^\| {package} \| \|\n((?:\|.*\n)*)", text, re.MULTILINE)
    described = set(re.findall(r"[\w/]+\.py", "".join(row.split("|")[1] for row in table.splitlines())))
    assert described
    assert all((ROOT / package / name).exists() for name in described), described
