"""The other commands: train, evaluate, model, serve, health; and how the command line as a whole behaves."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from rich.console import Console
from typer.main import get_command

from embedding.bundle import MANIFEST, Bundle, learned_metrics
from lookalike import Client
from lookalike.__main__ import main
from lookalike.cli import SHOWN, app
from tests.cli.conftest import Run
from tests.processes import serving
from tests.service.harness import MARGIN, connected, make_bundle, png
from training.monitor import Report
from training.progress import TrainingDisplay

REPORT = Report(
    step=1, loss=1, active_fraction=1, d_ap=1, d_an=1, spread=1, learning_rate=1, images=1, seconds=1, cpu_seconds=1
)


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_help_is_printed_without_importing_anything_heavy() -> None:
    program = (
        "import sys; from lookalike.__main__ import main; main(['--help']);"
        "heavy = {'torch', 'faiss', 'PIL', 'pydantic', 'pyarrow', 'sklearn', 'matplotlib', 'service', 'training'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = python(program)
    assert out.splitlines()[-1] == "[]"
    for command in (
        *(
            "train",
            "evaluate",
            "compare",
            "one-shot",
            "gallery",
            "serve",
            "verify",
            "search",
            "batch-search",
            "calibrate",
            "feedback",
            "model",
            "demo",
        ),
    ):
        assert f"  {command} " in out


def test_an_output_that_takes_no_unicode_is_written(run: Run, target: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "für ☃.png").write_bytes(png(0))
    run("gallery", "create", name, "--target", target)
    run("gallery", "add", name, tmp_path / "images", "--target", target)
    for option, shown in (("--json", "f\\u00fcr \\u2603.png"), ("", "f\\xfcr \\u2603.png")):
        command = [sys.executable, "-m", "lookalike", "gallery", "list", name, "--target", target, option]
        ended = subprocess.run(
            [argument for argument in command if argument],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=True,
        )
        assert shown in ended.stdout.decode("ascii")


@pytest.mark.parametrize("arguments", [[], ["feedback"], ["gallery"], ["model"], ["one-shot"]])
def test_a_group_alone_prints_its_help(run: Run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert "Commands:" in ran.out


@pytest.mark.parametrize(
    "arguments", [["verfy"], ["verify", "a"], ["verify", "a", "b", "--nonsense"], ["search", "a", "-k", "x"]]
)
def test_misuse_is_one_line_that_names_the_help(run: Run, arguments: list[str]) -> None:
    run(*arguments).failed_with("--help")


def test_an_option_that_goes_before_the_command_is_told_so(run: Run) -> None:
    run("gallery", "list", "--tls").failed_with("`lookalike --tls … gallery list …`")
    run("verify", "a", "b", "--api-key-file=key").failed_with("before the command")
    assert "before the command" not in run("verify", "a", "b", "--nonsense").err
    assert "before the command" not in run("--nonsense").err


@pytest.mark.parametrize("command", [[], ["gallery", "add"], ["batch-search"]])
def test_help_has_a_short_name(run: Run, command: list[str]) -> None:
    ran = run(*command, "-h")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == run(*command, "--help").out
    assert "[[" not in ran.out


@pytest.mark.parametrize("command", SHOWN)
def test_the_example_in_a_commands_help_is_one(run: Run, command: str) -> None:
    (line,) = [line.strip() for line in run(command, "--help").out.splitlines() if line.startswith("    lookalike ")]
    words = line.split()[1:]
    assert words[0] == command
    parsed = get_command(app).commands[command].make_context(command, words[1:])  # type: ignore[attr-defined]
    assert parsed.params


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version").out == f"lookalike {version('lookalike')}\n"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("lookalike batch", ["batch-search"]), ("lookalike gallery snap", ["snapshot", "snapshots"])],
)
def test_a_shell_completes_commands(typed: str, completed: list[str]) -> None:
    asked = {"_LOOKALIKE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-c", "from lookalike.__main__ import main; main()"]
    ended = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == completed


def test_a_module_of_ours_that_is_missing_is_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lookalike.cli.local", None)
    with pytest.raises(ModuleNotFoundError):  # that is a bug, and shows as one
        main(["verify", __file__, __file__, "--bundle", "x"])


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("typer", ["--help"], "serve"),
        ("torch", ["train", "digits", "--out", "x"], "train"),
        pytest.param("torch", ["serve", "--bundle", "x"], "serve", marks=pytest.mark.slow),
        pytest.param("tomli_w", ["demo"], "serve,train", marks=pytest.mark.slow),
        pytest.param("faiss", ["verify", __file__, __file__, "--bundle", "x"], "serve", marks=pytest.mark.slow),
    ],
)
def test_a_missing_extra_is_named(module: str, arguments: list[str], extra: str) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None\nfrom lookalike.__main__ import main\nsys.exit(main({arguments}))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == (
        f"lookalike: this command needs {module}: install lookalike's extra {extra}, in its checkout by "
        f"pip install -c constraints.txt '.[{extra}]'\n"
    )


class TestModelShow:
    def test_a_bundle_and_the_server_that_runs_it_say_the_same(self, run: Run, bundle: Bundle, target: str) -> None:
        here = json.loads(run("model", "show", bundle.path, "--json").out)
        there = json.loads(run("model", "show", "--target", target, "--json").out)
        assert here.pop("active") is False
        assert there.pop("active") is True
        assert (here.pop("loaded"), there.pop("loaded")) == (False, True)
        assert here == there

    def test_the_server_of_the_environment_is_asked_where_no_bundle_is_given(
        self, run: Run, bundle: Bundle, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        other = make_bundle(tmp_path / "other", seed=1)
        monkeypatch.setenv("LOOKALIKE_TARGET", target)
        assert json.loads(run("model", "show", "--json").out)["id"] == bundle.name
        assert json.loads(run("model", "show", other.path, "--json").out)["id"] == other.name

    def test_for_people(self, run: Run, bundle: Bundle) -> None:
        out = run("model", "show", bundle.path).out
        for words in (bundle.name, bundle.fingerprint, f"{MARGIN:.4f}", "strict", "0.1250", "20 identities"):
            assert words in out

    def test_what_the_loss_learned_stands_next_to_the_learned_margin(self, run: Run, tmp_path: Path) -> None:
        bundle = make_bundle(tmp_path / "toy", seed=2, metrics=learned_metrics({"boundary β": 1.0625}))
        lines = run("model", "show", bundle.path).out.splitlines()
        margin = next(row for row, line in enumerate(lines) if "learned margin" in line)
        assert "learned by the loss: boundary β" in lines[margin + 1]
        assert "1.0625" in lines[margin + 1]

    def test_bad_input(self, run: Run, tmp_path: Path) -> None:
        run("model", "show").failed_with("--target")
        run("model", "show", tmp_path).failed_with("no bundle")
        bundle = make_bundle(tmp_path / "toy", seed=2)
        manifest = bundle.path / MANIFEST
        manifest.write_text(manifest.read_text().replace("toy", "boy"))
        run("model", "show", bundle.path).failed_with("truncated or edited")


class TestModelSwap:
    def test_what_a_server_could_answer_with(self, run: Run, bundle: Bundle, target: str) -> None:
        out = run("model", "list", "--target", target).out
        assert bundle.name in out
        assert "active" in out
        (model,) = json.loads(run("model", "list", "--target", target, "--json").out)
        assert (model["id"], model["active"], model["calibrations"]) == (bundle.name, True, [3])
        assert run("model", "activate", bundle.name, "--dry-run", "--target", target).out.endswith("would answer\n")
        assert "calibration 3, answers" in run("model", "activate", bundle.name, "--target", target).out
        run("model", "activate", "nobody", "--target", target).failed_with("nobody", bundle.name, "--models")
        run("model", "deactivate", bundle.name, "--target", target).failed_with("activate another")


class TestTrain:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("steps = 200", "stepz = 200", "training.stepz"),
            ("steps = 200", "steps = 0", "training.steps"),
            ('source = "digits"', 'source = "nonsense"', "data"),
            ("[loss]", "[loss", "TOML"),
        ],
    )
    def test_a_bad_recipe_is_named_in_one_line(self, run: Run, tmp_path: Path, old: str, new: str, words: str) -> None:
        recipe = Path(__file__).parents[2] / "recipes" / "digits.toml"
        text = recipe.read_text()
        assert old in text
        (tmp_path / "bad.toml").write_text(text.replace(old, new))
        run("train", "bad.toml", "--out", "bundle").failed_with(words)
        assert not Path("bundle").exists()

    def test_recipes_are_found_by_name(self, run: Run) -> None:
        run("train", "digts", "--out", "bundle").failed_with("digits", "omniglot")

    def test_a_bundle_is_not_replaced_unasked(self, run: Run, bundle: Bundle) -> None:
        run("train", "digits", "--out", bundle.path).failed_with("exists", "--overwrite")
        Path("mine").mkdir()
        Path("mine/file").touch()
        said = run("train", "digits", "--out", "mine")
        said.failed_with("exists")
        assert "--overwrite" not in said.err, "what is no bundle is never replaced"

    def test_absent_data_names_the_option_and_the_variable(self, run: Run) -> None:
        run("train", "omniglot", "--out", "bundle").failed_with("--data", "LOOKALIKE_DATA")


class TestEvaluate:
    def test_prints_every_measure(self, run: Run, bundle: Bundle, pictures: Path) -> None:
        (pictures / "loose.png").unlink()
        out = run("evaluate", bundle.path, pictures).out
        for words in ("recall@1", "identities"):
            assert words in out
        assert json.loads(run("evaluate", bundle.path, pictures, "--json").out)["images"] == 6

    def test_bad_input(self, run: Run, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        run("evaluate", bundle.path, tmp_path / "empty").failed_with("empty")
        run("evaluate", bundle.path, tmp_path / "none").failed_with("none")


class TestOneShot:
    def test_runs_are_drawn_and_scored(self, run: Run, bundle: Bundle, tmp_path: Path) -> None:
        for alphabet, character, drawing in np.ndindex(2, 3, 2):
            file = tmp_path / f"all/alphabet{alphabet}/character{character}/{drawing}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 40 * (1 + character) + drawing).save(file)
        drawn = run("one-shot", "draw", tmp_path / "all", "--out", tmp_path / "runs", "--ways", 3, "--runs", 2)
        assert drawn.out == f"wrote 2 runs of 3 ways to {tmp_path / 'runs'}\n"
        scored = json.loads(run("one-shot", "score", bundle.path, tmp_path / "runs", "--json").out)
        assert set(scored["run_errors"]) == {"run01", "run02"}
        assert scored["error"] == np.mean(list(scored["run_errors"].values()))
        assert "3-way error" in run("one-shot", "score", bundle.path, tmp_path / "runs").out
        run("one-shot", "draw", tmp_path / "all", "--out", tmp_path / "runs", "--ways", 3).failed_with("exists")
        run("one-shot", "draw", tmp_path / "all", "--out", tmp_path / "more").failed_with("ask for fewer ways")
        run("one-shot", "score", bundle.path, tmp_path / "all").failed_with("class_labels.txt")


class TestHealth:
    def test_tells_by_its_exit_code(self, run: Run, target: str) -> None:
        assert run("health", "--target", target).code == 0
        ran = run("health", "--target", "127.0.0.1:1", "--timeout", "0.3")
        assert ran.code == 1
        assert ran.out.count("\n") == 1


class TestServe:
    def test_says_where_it_serves_and_stops_when_told(self, bundle: Bundle, tmp_path: Path) -> None:
        with serving(bundle.path, tmp_path / "galleries", log=tmp_path / "log") as (server, address):
            with Client(address) as client:
                assert client.is_serving()
            with connected(address) as stubs:
                watch = health_pb2_grpc.HealthStub(stubs.channel).Watch(health_pb2.HealthCheckRequest())
                assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
                server.terminate()
                assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
                assert server.wait(30) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()

    def test_bad_input(
        self, run: Run, bundle: Bundle, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The log is configured for a process of its own; here it is to stay out of the output.
        quiet = structlog.ReturnLoggerFactory()
        monkeypatch.setattr("service.telemetry.logs.configure", lambda **_: structlog.configure(logger_factory=quiet))
        port = target.rpartition(":")[2]
        run("serve", "--bundle", bundle.path, "--port", "70000").failed_with("port")
        run("serve", "--bundle", bundle.path, "--data", tmp_path / "g", "--port", port).failed_with("in use")
        run("serve", "--bundle", tmp_path / "none", "--data", tmp_path / "g", "--port", "0").failed_with("no bundle")


class TestSeveralProcesses:
    """Started by torchrun, each process ends with the same error; the first of a machine says it."""

    @pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
    def test_an_error_is_said_once(self, run: Run, monkeypatch: pytest.MonkeyPatch, rank: str, lines: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr("logging.disable", lambda _: None)
        failed = run("train", "absent.toml", "--out", "out")
        assert (failed.code, failed.out, failed.err.count("\n")) == (2, "", lines)


class TestOutput:
    """Bars are for terminals that move their cursor; all others get lines."""

    @pytest.mark.parametrize(("term", "is_drawn"), [("xterm", True), ("dumb", False)])
    def test_a_bar_is_drawn_on_a_terminal_that_can_show_it(
        self, monkeypatch: pytest.MonkeyPatch, term: str, is_drawn: bool
    ) -> None:
        monkeypatch.setenv("TERM", term)
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "rb", buffering=0) as terminal, os.fdopen(theirs, "w") as output:
            with TrainingDisplay(Console(file=output)) as display:
                display.start(done=0, total=2)
                display.report(REPORT)
            output.flush()
            shown = terminal.read(4096)
        assert (b"\x1b[?25l" in shown, b"step 1/2" in shown) == (is_drawn, not is_drawn)

    def test_colours_in_a_pipe_bring_no_bars_and_no_breaks(
        self, run: Run, bundle: Bundle, pictures: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        here = ["--bundle", bundle.path, "--data", "galleries"]
        out = run("verify", pictures / "loose.png", pictures / "loose.png", *here).out
        assert out.startswith("\x1b[1;32mMATCH\x1b[0m")
        assert out.count("\n") == 2
        run("gallery", "create", "g", *here)
        assert run("gallery", "add", "g", pictures, *here).err == ""
