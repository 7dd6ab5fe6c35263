"""All documents: links lead to files and headings that are there, and each dependency has its reason."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from lookalike.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
MENTION = re.compile(r"docs/[\w/]+\.md(?:#[\w-]+)?")
"""In programs, settings and messages."""
INLINE = re.compile(r"\]\(([^)\s]+)\)")


def without_code(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, without punctuation, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", without_code(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_there(target: Path, anchor: str) -> bool:
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in INLINE.findall(without_code(document)):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            assert is_there(document.parent / path if path else document, anchor), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_nothing_is_installed_from_where_it_was_never_released(document: Path) -> None:
    for command in re.findall(r"pip install [^`\n]*", document.read_text()):
        assert not re.search(r"(?<![\w./-])lookalike(\[|\s|'|$)", command), command


COMMAND = re.compile(r"^(?:\$ )?(?:until |docker exec \w+ |torchrun .*-m )?(lookalike .*)", re.MULTILINE)


def commands(document: Path) -> list[str]:
    """Those of its blocks of code, without what the shell makes of their output."""
    blocks = re.findall(r"^```(?:sh|console)$(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = COMMAND.findall("\n".join(blocks).replace("\\\n", " "))
    return [re.split(r" \|\|? | &$| > | 2>> |; ", line)[0] for line in lines if not line.startswith("lookalike is ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_its_commands_have_the_arguments_and_options_that_it_gives_them(document: Path) -> None:
    for line in commands(document):
        context = None
        command, words = get_command(app), shlex.split(line, comments=True)[1:]
        words = [word.lower() if word.isupper() else word for word in words]  # OLD stands for the name of a gallery
        while True:
            context = command.make_context(command.name, words, parent=context)
            words = [*context._protected_args, *context.args]
            if not hasattr(command, "commands"):
                break
            command, words = command.commands[words[0]], words[1:]


def test_there_are_commands_in_the_documents() -> None:
    assert "lookalike demo" in commands(ROOT / "README.md")
    assert sum(len(commands(document)) for document in DOCUMENTS) > 70


def test_documents_that_the_code_names_are_there() -> None:
    folders = ("embedding", "training", "index", "service", "lookalike", "benchmarks", "deploy", "recipes", "proto")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*") if file.is_file()]
    texts = [file.read_text() for file in files if file.suffix in {".py", ".toml", ".yml", ".yaml", ".json", ".proto"}]
    mentions = {mention for text in texts for mention in MENTION.findall(text)}
    assert mentions
    for mention in mentions:
        path, _, anchor = mention.partition("#")
        assert is_there(ROOT / path, anchor), mention


def test_every_dependency_has_its_line_and_every_line_its_dependency() -> None:
    """In docs/design.md, by extra; what no extra has stands with the file that names it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"base": project["dependencies"], **project["optional-dependencies"]}
    wanted = {
        (name.lower(), extra)
        for extra, requirements in groups.items()
        for requirement in requirements
        if (name := re.split(r"[^\w.-]", requirement)[0]) != "lookalike"
    }
    table = (ROOT / "docs" / "design.md").read_text().partition("| dependency |")[2]
    told = set()
    for names, extras, _ in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", table, flags=re.MULTILINE):
        ours = [re.sub(r" \(.*\)", "", name).lower() for name in names.partition(";")[0].split(", ")]
        told |= {(name, extra) for name in ours for extra in extras.split(", ") if extra in groups}
    assert told == wanted
