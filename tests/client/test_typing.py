"""What type checkers make of a user's program, and that what runs is what they are told."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import lookalike
from lookalike import AsyncClient, Client

PROGRAM = Path(__file__).with_name("users_program.py")


def test_mypy_knows_every_answer(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    assert resources.files(lookalike).joinpath("py.typed").is_file()
    shutil.copy(PROGRAM, tmp_path)  # away from the checkout, whose folder would count as the program's own
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path / 'cache'}", PROGRAM.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(lookalike.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout == "Success: no issues found in 1 source file\n"


def test_answers_are_the_generators_and_coroutines_that_are_promised() -> None:
    with Client("127.0.0.1:1") as client:
        for stream in (client.verify_stream([]), client.list_galleries()):
            assert inspect.isgenerator(stream)
            stream.close()

    async def ask() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            for stream in (client.verify_stream([]), client.list_galleries()):
                assert inspect.isasyncgen(stream)
                await stream.aclose()
            for answer in (client.get_model(), client.embed_batch([]), client.search_matches("shop", b"")):
                assert inspect.iscoroutine(answer)
                answer.close()

    asyncio.run(ask())
