"""What the tests of the command line share: a model, pictures on disk, a server, and how to run a command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from embedding.bundle import Bundle
from lookalike.__main__ import main
from tests.processes import serving
from tests.service.harness import make_bundle, png


@dataclass(frozen=True)
class Ran:
    """What a command gave back."""

    code: int
    out: str
    err: str

    def failed_with(self, *words: str) -> None:
        """Assert that it ended with one line on stderr that has these words, and with nothing on stdout."""
        assert (self.code, self.out) == (2, "")
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err


class Run(Protocol):
    def __call__(self, *arguments: object) -> Ran: ...


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("TARGET", "BUNDLE", "GALLERIES", "DATA", "HOST", "PORT"):
        monkeypatch.delenv(f"LOOKALIKE_{variable}", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "toy", seed=0)


@pytest.fixture(scope="session")
def target(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server in a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    with serving(bundle.path, folder / "galleries", log=folder / "log") as (_, address):
        yield address


@pytest.fixture(params=["server", "here"])
def where(request: pytest.FixtureRequest, bundle: Bundle, tmp_path: Path) -> list[str]:
    """Options that say who answers: each test that takes this runs against both."""
    if request.param == "server":
        return ["--target", str(request.getfixturevalue("target"))]
    return ["--bundle", str(bundle.path), "--data", str(tmp_path / "galleries")]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The id of a gallery that this test alone uses."""
    return f"g-{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two class folders with three images each, and one image in none."""
    folder = tmp_path / "pictures"
    for seed in range(6):
        path = folder / f"class-{seed % 2}" / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
    (folder / "loose.png").write_bytes(png(6))
    (folder / "notes.txt").write_text("not an image, and not named like one")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that is started in the background of a shell, or by nohup, ignores signals, as do those it starts."""
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_ups = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupts)
    signal.signal(signal.SIGHUP, hang_ups)
