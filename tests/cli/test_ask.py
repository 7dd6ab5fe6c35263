"""`verify` and `search`, answered by a server and here."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedding.bundle import Bundle
from lookalike import Client
from tests.cli.conftest import Run
from tests.service.harness import MARGIN, png


def test_verify_prints_the_decision_with_its_evidence(run: Run, where: list[str], pictures: Path) -> None:
    ran = run("verify", pictures / "loose.png", pictures / "class-0/0.png", *where)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(("MATCH", "NON-MATCH"))
    for words in ("distance", "threshold 0.2500", "probability", "FAR 1.00% (95 % upper bound 3.00%)", "FRR 20.00%"):
        assert words in ran.out


def test_verify_as_json_is_the_same_here_and_on_the_server(
    run: Run, bundle: Bundle, target: str, pictures: Path
) -> None:
    a, b = pictures / "class-0/0.png", pictures / "class-1/1.png"
    here = json.loads(run("verify", a, b, "--json", "--bundle", bundle.path).out)
    there = json.loads(run("verify", a, b, "--json", "--target", target).out)
    assert here == there
    with Client(target) as client:
        decision = client.verify(a, b)
    assert (here["distance"], here["threshold"]) == (decision.distance, MARGIN)
    assert here["is_match"] is (here["verdict"] == "match") is decision.is_match


def test_exit_code_tells_the_verdict_only_when_asked(run: Run, where: list[str], pictures: Path) -> None:
    a, b = pictures / "class-0/0.png", pictures / "class-1/1.png"
    never = ["--threshold", "0", *where]
    assert run("verify", a, b, *never).code == 0
    assert run("verify", a, b, "--exit-code", *never).code == 1
    assert run("verify", a, a, "--exit-code", *never).code == 0
    assert run("verify", a, a, "--exit-code", "--uncertain-within", "1", *never).code == 1


def test_search_lists_the_nearest_first(run: Run, where: list[str], name: str, pictures: Path) -> None:
    run("gallery", "create", name, *where)
    run("gallery", "add", name, pictures, *where)
    found = json.loads(run("search", pictures / "loose.png", "--gallery", name, "-k", 3, "--json", *where).out)
    assert len(found) == 3
    assert (found[0]["item"], found[0]["decision"]["distance"]) == (f"galleries/{name}/items/loose.png", 0.0)
    rate = ("--target-fpir", "0.063")  # of seven items 0.009 a comparison; 0.01 would be the margin
    tightened = json.loads(run("search", pictures / "loose.png", "--gallery", name, *rate, "--json", *where).out)
    assert [each["decision"]["threshold"] for each in tightened] == [0.125] * 7
    table = run("search", f"galleries/{name}/items/class-1:1.png", "--gallery", name, *where).out
    assert "class-0:0.png" in table
    assert "class-1:1.png" not in table
    assert "threshold 0.2500" in table


def test_a_number_and_all_within_the_threshold_are_not_asked_for_at_once(run: Run, where: list[str]) -> None:
    run("search", "a.png", "--gallery", "g", "--within", "-k", 3, *where).failed_with("-k", "--within")


def test_an_error_names_the_image_that_it_is_about(run: Run, where: list[str], pictures: Path, tmp_path: Path) -> None:
    good, bad = pictures / "loose.png", tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    for ran in (run("verify", good, bad, *where), run("verify", bad, good, *where)):
        assert ran.code == 2
        assert ran.err.startswith(f"lookalike: {bad}: not an image of an accepted format")


def test_options_may_come_from_the_environment(
    run: Run, target: str, bundle: Bundle, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = pictures / "loose.png"
    monkeypatch.setenv("LOOKALIKE_BUNDLE", str(bundle.path))
    assert run("verify", a, a).code == 0
    monkeypatch.setenv("LOOKALIKE_TARGET", "127.0.0.1:1")
    assert run("verify", a, a).code == 2
    assert run("verify", a, a, "--target", target).code == 0
    assert run("verify", a, a, "--bundle", bundle.path).code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"plain text", "not an image"),
        (png(1)[:60], "truncated"),
        (b"P5\n50000 50000\n255\n", "pixels"),
    ],
    ids=["empty", "text", "truncated", "huge"],
)
def test_what_is_no_image_is_refused_in_one_line(
    run: Run, where: list[str], pictures: Path, content: bytes, words: str
) -> None:
    bad = pictures / "bad.png"
    bad.write_bytes(content)
    run("verify", pictures / "loose.png", bad, *where).failed_with(words)


def test_bad_requests_are_refused_in_one_line(run: Run, where: list[str], name: str, pictures: Path) -> None:
    a = pictures / "loose.png"
    run("verify", a, "none.png", *where).failed_with("no image at none.png")
    run("search", a, "--gallery", name, *where).failed_with(name)
    run("search", a, "--gallery", name, "-k", "0", *where).failed_with("-k")
    run("search", a, "--gallery", name, "-k", "1000000000", *where).failed_with("-k")
    run("verify", a, a, "--point", "nonsense", *where).failed_with("nonsense", "strict")
    run("verify", a, a, "--target-far", "1e-9", *where).failed_with(
        "lookalike: --target-far 1e-09 is below", "smallest rate"
    )
    run("verify", a, a, "--target-far", "0", *where).failed_with("--target-far")
    run("search", a, "--gallery", name, "--target-fpir", "2", *where).failed_with("--target-fpir")
    both = ("--target-fpir", "0.5", "--target-far", "0.1")
    run("search", a, "--gallery", name, *both, *where).failed_with("--target-far and --target-fpir")
    run("verify", a, a, "--threshold", "3", *where).failed_with("--threshold")
    run("verify", a, a, "--threshold", "1", "--point", "strict", *where).failed_with("--threshold and --point")
    run("verify", a, f"galleries/{name}/items/none", *where).failed_with(name)


@pytest.mark.parametrize("effort", ["nprobe=0", "nprobe=-1", "ef_search=99999999999", "rescore=x"])
def test_an_effort_out_of_range_is_refused(run: Run, where: list[str], pictures: Path, effort: str) -> None:
    run("search", pictures / "loose.png", "--gallery", "g", "--effort", effort, *where).failed_with("--effort", effort)


@pytest.mark.parametrize("more", [["--exit-code"], pytest.param(["--exit-code", "--json"], marks=pytest.mark.slow)])
def test_a_reader_that_has_left_is_neither_yes_nor_no(more: list[str], bundle: Bundle, pictures: Path) -> None:
    image = str(pictures / "loose.png")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        command = [sys.executable, "-m", "lookalike", "verify", image, image, "--bundle", str(bundle.path), *more]
        ended = subprocess.run(command, check=False, stdout=out, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (2, b"")


def test_an_empty_gallery_is_told_how_it_is_filled(run: Run, where: list[str], name: str, pictures: Path) -> None:
    run("gallery", "create", name, *where)
    search = ("search", pictures / "loose.png", "--gallery", name, *where)
    assert "lookalike gallery add" in run(*search).out
    assert run(*search, "--filter", 'identity = "x"').out == "the filter accepts nothing\n"
    assert run(*search, "--json").out == "[]\n"


@pytest.mark.parametrize(
    "asked",
    [
        ["--version"],
        pytest.param(["verify", "loose.png", "loose.png", "--bundle", "BUNDLE", "--exit-code"], marks=pytest.mark.slow),
    ],
)
def test_a_closed_output_is_no_failure(asked: list[str], bundle: Bundle, pictures: Path) -> None:
    asked = [str(bundle.path) if each == "BUNDLE" else each for each in asked]
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "lookalike", *asked]
    ended = subprocess.run(command, check=False, stderr=subprocess.PIPE, cwd=pictures)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_handshake_that_fails_is_told_once(target: str, pictures: Path) -> None:
    image = str(pictures / "loose.png")
    asked = [sys.executable, "-m", "lookalike", "--tls", "verify", image, image, "--target", target]
    surroundings = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    ended = subprocess.run(asked, check=False, capture_output=True, text=True, env=surroundings)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "does not speak TLS" in ended.stderr


def test_an_image_may_come_through_a_pipe(run: Run, where: list[str], pictures: Path) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as out:
        out.write((pictures / "loose.png").read_bytes())
    ran = run("verify", pictures / "loose.png", f"/dev/fd/{reader}", *where)
    os.close(reader)
    assert ran.out.startswith("MATCH  distance 0.0000")


def test_what_the_disk_refuses_is_told_in_words(
    run: Run, where: list[str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, image = Path.read_bytes, pictures / "loose.png"

    def refused(path: Path) -> bytes:
        if path == image:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    said = run("verify", image, image, *where)
    said.failed_with(f"cannot read {image}: Permission denied")
    assert "Errno" not in said.err
    (pictures / "file").touch()
    said = run("demo", "--out", pictures / "file" / "demo")
    said.failed_with(f"cannot use {pictures / 'file' / 'demo'}: Not a directory")
    assert "Errno" not in said.err


def test_who_answers_must_be_clear(run: Run, bundle: Bundle, target: str, pictures: Path, tmp_path: Path) -> None:
    a = pictures / "loose.png"
    run("verify", a, a).failed_with("--target", "--bundle")
    run("verify", a, a, "--target", target, "--bundle", bundle.path).failed_with("not both")
    run("verify", a, a, "--target", target, "--device", "cpu").failed_with("--device goes with --bundle")
    run("verify", a, a, "--target", "127.0.0.1:1").failed_with("127.0.0.1:1", "lookalike serve")
    run("verify", a, a, "--target", "http://127.0.0.1:1/").failed_with("without http://: 127.0.0.1:1\n")
    run("verify", a, a, "--target", "127.0.0.1").failed_with("as in 127.0.0.1:50051")
    run("verify", a, a, "--bundle", tmp_path / "none").failed_with("no bundle", "lookalike train")
    run("health", "--target", "").failed_with("address is empty")
    here = ["--bundle", bundle.path, "--data", tmp_path / "nowhere"]
    run("search", a, "--gallery", "g", *here).failed_with("no folder of galleries", "nowhere")
