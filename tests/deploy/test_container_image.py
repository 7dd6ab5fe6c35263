"""What the Dockerfile promises, read from its text: no image is built here."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from embedding.errors import InvalidInput
from lookalike.cli import app
from service.settings import Settings
from service.settings_sources import OF_OTHERS, PREFIX
from service.tls import certificates

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path("deploy/requirements.py")
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Keyword and arguments of each instruction, in order; comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    logical = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(keyword, rest.strip()) for keyword, _, rest in (line.partition(" ") for line in logical)]


@pytest.fixture(scope="module")
def dockerfile() -> list[Instruction]:
    return instructions((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def serving(dockerfile: list[Instruction]) -> list[Instruction]:
    """Instructions of the last stage, which is the image."""
    start = max(at for at, (keyword, _) in enumerate(dockerfile) if keyword == "FROM")
    return dockerfile[start:]


def only(stage: list[Instruction], keyword: str) -> str:
    (rest,) = [rest for name, rest in stage if name == keyword]
    return rest


def accepted(arguments: list[str]) -> typer.Context:
    """The context of the subcommand once the real command line has parsed its arguments; it does not run."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), arguments)
    return command.make_context(name, rest)


def test_the_server_runs_as_a_numeric_user_that_is_not_root(serving: list[Instruction]) -> None:
    user, group = only(serving, "USER").split(":")
    assert int(user) >= 10_000
    assert int(group) >= 10_000
    keywords = [keyword for keyword, _ in serving]
    assert "RUN" not in keywords[keywords.index("USER") :], "a later step would fail for want of root"


def test_the_process_is_the_server_itself_and_receives_sigterm(serving: list[Instruction]) -> None:
    assert json.loads(only(serving, "ENTRYPOINT")) == ["lookalike"], "shell form would put a shell in front"
    assert "STOPSIGNAL" not in [keyword for keyword, _ in serving]


def test_the_command_line_accepts_the_command_of_the_image(serving: list[Instruction]) -> None:
    parameters = accepted(json.loads(only(serving, "CMD"))).params
    assert parameters["host"] == "0.0.0.0", "a loopback address cannot be reached from outside a container"
    assert str(parameters["port"]) == only(serving, "EXPOSE")
    assert str(parameters["data"]) == only(serving, "VOLUME")


def test_the_image_does_not_choose_plain_text_and_every_documented_run_says_what_it_wants(
    serving: list[Instruction], tmp_path: Path
) -> None:
    assert not [rest for _, rest in serving if "insecure" in rest.lower()]
    parameters = accepted(json.loads(only(serving, "CMD"))).params
    names = ("host", "insecure", "tls_certificate", "tls_key", "tls_client_ca")
    named = {name: parameters[name] for name in names if parameters[name] is not None}
    with pytest.raises(InvalidInput, match="--insecure"):
        certificates(Settings(bundle=tmp_path, galleries=tmp_path, **named))
    documentation = (ROOT / "docs" / "deployment.md").read_text()
    runs = [block for block in documentation.split("```") if "docker run --detach" in block]
    assert len(runs) == 3
    for run in runs:
        words = shlex.split(run.replace("\\\n", " "))
        given = {word.partition("=")[0] for word in words if word.startswith("LOOKALIKE_")}
        (published,) = [words[at + 1] for at, word in enumerate(words) if word == "--publish"]
        assert "LOOKALIKE_INSECURE" in given or {"LOOKALIKE_TLS_CERTIFICATE", "LOOKALIKE_TLS_KEY"} <= given
        assert published.startswith("127.0.0.1:") == ("LOOKALIKE_INSECURE" in given)
        assert given <= variables()


def variables() -> set[str]:
    """Those that servers and commands read."""
    return {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | OF_OTHERS


def test_the_health_check_asks_the_port_that_is_served(serving: list[Instruction]) -> None:
    program, *arguments = json.loads(only(serving, "HEALTHCHECK").partition(" CMD ")[2])
    assert program == "lookalike"
    assert accepted(arguments).params["target"] == f"127.0.0.1:{only(serving, 'EXPOSE')}"


def test_the_build_sees_all_that_serves_and_nothing_that_trains() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "files are named to come in, not to stay out"
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folders = {f"{folder}/" for folder in (*wheel["packages"], *wheel["force-include"])} - {"training/"}
    assert admitted == folders | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", str(REQUIREMENTS)}
    assert all((ROOT / name).exists() for name in admitted)


def test_what_is_installed_is_what_serves_fastest_under_the_constraints(dockerfile: list[Instruction]) -> None:
    commands = [shlex.split(rest) for keyword, rest in dockerfile if keyword == "RUN"]
    assert ["python", "requirements.py", "serve", "onnx", "<", "pyproject.toml", ">", "requirements.txt"] in commands
    online = [words for words in commands if words[:2] == ["pip", "install"]]
    assert "requirements.txt" in online[-1]
    assert all("--constraint" in words and "constraints.txt" in words for words in online)


def test_the_requirements_are_those_of_the_extra_and_of_the_extras_it_names() -> None:
    pyproject = """
        [project]
        name = "toy"
        dependencies = ["base>=1"]
        [project.optional-dependencies]
        one = ["a>=1", "shared"]
        two = ["b[fast]>=2", "shared"]
        all = ["toy[one, two]", "c"]
        other = ["d"]
    """
    for extras, expected in (
        (["all"], ["a>=1", "b[fast]>=2", "base>=1", "c", "shared"]),
        (["one", "other"], ["a>=1", "base>=1", "d", "shared"]),
    ):
        command = [sys.executable, ROOT / REQUIREMENTS, *extras]
        printed = subprocess.run(command, input=pyproject, capture_output=True, text=True, check=True).stdout
        assert printed.splitlines() == expected


def test_the_constraints_fit_the_builds_of_every_pytorch_index() -> None:
    """`==2.14.1` accepts 2.14.1, 2.14.1+cpu and 2.14.1+cu130; with a local version it would accept one alone."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    ours = [pin for pin in pins if pin.startswith(("torch==", "torchvision=="))]
    assert len(ours) == 2
    assert not [pin for pin in ours if "+" in pin]


def test_every_build_argument_is_documented(dockerfile: list[Instruction]) -> None:
    documentation = (ROOT / "docs" / "deployment.md").read_text()
    arguments = {rest.partition("=")[0] for keyword, rest in dockerfile if keyword == "ARG"}
    assert arguments
    assert [name for name in arguments if f"`{name}`" not in documentation] == []
