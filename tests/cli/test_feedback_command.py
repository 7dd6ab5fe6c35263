"""From decisions of a server over its users' feedback to the next calibration, which the server then answers with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding.bundle import Bundle, describe
from embedding.calibration import HeldOutPairs, Histogram
from lookalike import Client, Decision, Feedback, Verdict
from tests.cli.conftest import Run
from tests.service.harness import MARGIN, make_bundle, png, serving_here
from tests.training.shapes import draw_shapes

HELD_OUT = HeldOutPairs(
    matching=Histogram(cells=(100, 300, 500, 700), counts=(100, 150, 100, 50), effective=40.0),
    impostor=Histogram(cells=(400, 600, 900, 1500), counts=(50, 150, 200, 200), effective=60.0),
)


@pytest.fixture
def calibrated(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "first", seed=0, held_out=HELD_OUT)


def feedback(decision: Decision) -> list[Feedback]:
    """Users whose matches lie further apart than those held out did."""
    rng = np.random.default_rng(0)
    cases = []
    for i, (centre, is_match) in enumerate([(0.4, True), (1.2, False)] * 150):
        distance = float(np.float32(abs(rng.normal(centre, 0.15))))
        verdict = Verdict.MATCH if distance <= 0.5 else Verdict.NON_MATCH
        made = replace(decision, distance=distance, threshold=0.5, verdict=verdict)
        cases.append(Feedback(case_id=f"{i}", decision=made, is_match=is_match))
    return cases


def test_a_margin_learned_anew_is_activated_without_touching_galleries(
    run: Run, calibrated: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with (
        serving_here(calibrated.path, tmp_path / "galleries", models=models) as target,
        Client(target) as client,
    ):
        decision = client.verify(png(1), png(2))
        recorded = client.record_feedback(feedback(decision))
        assert len(recorded) == len(list(client.list_feedback(model=calibrated.name))) == 300
        client.delete_feedback(recorded[-1].id)
        file = tmp_path / "feedback.jsonl"
        assert run("feedback", "export", "--target", target, "--out", file).out == f"wrote 299 cases to {file}\n"
        assert run("feedback", "export", "--data", tmp_path / "galleries", "--out", tmp_path / "same").code == 0
        assert (tmp_path / "same").read_text() == file.read_text()
        monkeypatch.setenv("LOOKALIKE_TARGET", target)
        assert run("feedback", "export", "--out", tmp_path / "by the environment").code == 0
        assert (tmp_path / "by the environment").read_text() == file.read_text()
        monkeypatch.delenv("LOOKALIKE_TARGET")

        rates = ["--accepted-rate", "1", "--rejected-rate", "0.5"]
        out = run("calibrate", calibrated.path, "--feedback", file, "--out", models / "second", *rates).out
        assert f"wrote {calibrated.name}, calibration 4, to {models / 'second'}" in out
        assert "from 150 matching and 149 other pairs" in out
        second = Bundle.load(models / "second")
        assert second.fingerprint == calibrated.fingerprint
        assert (second.calibration.version, second.calibration.feedback_pairs) == (4, 299)
        assert second.calibration.learned_margin > MARGIN
        assert second.lineage.data["calibration 4"]["feedback pairs"] == 299  # type: ignore[index, call-overload]
        assert "Calibration 4" in (models / "second" / "README.md").read_text()

        client.create_gallery("g")
        client.activate_model(calibrated.name)
        assert client.verify(png(1), png(2)).threshold == second.calibration.learned_margin
        assert client.get_model().calibration.feedback_pairs == 299
        assert "and on feedback  299 pairs" in run("model", "show", "--target", target).out
        client.search("g", png(1))

        same = run("calibrate", calibrated.path, "--feedback", tmp_path / "galleries", "--out", tmp_path / "x", *rates)
        assert same.code == 0
        assert describe(tmp_path / "x").calibration == second.calibration


def exported(run: Run, target: str, file: Path) -> list[dict[str, Any]]:
    """What a server's export holds, without the times."""
    assert run("feedback", "export", "--target", target, "--out", file, "--overwrite").code == 0
    return [{**json.loads(line), "time": None} for line in file.read_text().splitlines()]


def test_an_export_is_imported_as_it_was_recorded(
    run: Run, calibrated: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, back = tmp_path / "feedback.jsonl", tmp_path / "back.jsonl"
    with serving_here(calibrated.path, tmp_path / "first galleries") as target, Client(target) as client:
        cases = feedback(client.verify(png(1), png(2)))
        cases[0] = replace(cases[0], subject="user-12", review_rate=0.02, candidates=7)
        cases[1] = replace(cases[1], decision=replace(cases[1].decision, verdict=Verdict.UNCERTAIN))
        client.record_feedback(cases)
        before = exported(run, target, file)
        assert run("feedback", "import", file, "--target", target).out == (
            f"recorded 0 cases of {file}; 300 were there already\n"
        )
    with serving_here(calibrated.path, tmp_path / "other galleries") as target, Client(target) as client:
        monkeypatch.setenv("LOOKALIKE_TARGET", target)
        assert run("feedback", "import", file).out == f"recorded 300 cases of {file}\n"
        assert exported(run, target, back) == before
        client.record_feedback([replace(cases[0], is_match=False)])
        lines = file.read_text().splitlines()
        client.delete_feedback(next(each.id for each in client.list_feedback() if each.case_id == "5"))
        file.write_text("\n".join([*lines, lines[0]]))
        assert run("feedback", "import", file).out == f"recorded 1 case of {file}; 299 were there already\n"
        after = {case["case_id"]: case for case in exported(run, target, back)}
    assert after.pop("0") == before[0] | {"is_match": False}  # said later, and left as it is
    assert after == {case["case_id"]: case for case in before[1:]}


def test_an_export_of_nothing_is_imported(run: Run, calibrated: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "feedback.jsonl"
    with serving_here(calibrated.path, tmp_path / "galleries") as target:
        assert run("feedback", "export", "--target", target, "--out", file).out == f"wrote 0 cases to {file}\n"
        assert run("feedback", "import", file, "--target", target).out == f"recorded 0 cases of {file}\n"


def test_an_import_that_cannot_be_is_refused_in_one_line(run: Run, calibrated: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "feedback.jsonl"
    with serving_here(calibrated.path, tmp_path / "galleries") as target, Client(target) as client:
        client.record_feedback(feedback(client.verify(png(1), png(2))))
        exported(run, target, file)
        whole = file.read_text()
        given = ["feedback", "import", file, "--target", target]
        first, *_, last = whole.splitlines()
        for text, words in (
            ("path,identity\n", ["line 1: Invalid JSON"]),
            (f"{first}\n{first.replace('true', 'false')}\n", ["'0' is told to match and not to match"]),
            (last.replace('"case_id":"299"', '"case_id":"new"').replace("non-match", "match"), ["verdict"]),
        ):
            file.write_text(text)
            run(*given).failed_with(*words)
        run("feedback", "import", tmp_path / "none", "--target", target).failed_with("no file of feedback")
        run("feedback", "import", tmp_path, "--target", target).failed_with(f"cannot read {tmp_path}: Is a directory")
        file.write_bytes(b"\xff\xfe")
        run(*given).failed_with("no text in UTF-8")
    file.write_text(whole)
    run("feedback", "import", file).failed_with("--target", "LOOKALIKE_TARGET")
    run("feedback", "import", file, "--target", "127.0.0.1:1").failed_with("no server answers")
    other = make_bundle(tmp_path / "other", seed=1)
    with serving_here(other.path, tmp_path / "others") as target:
        run("feedback", "import", file, "--target", target).failed_with(calibrated.name, "put the bundle that decided")


def test_a_margin_is_learned_from_labelled_images(run: Run, calibrated: Bundle, tmp_path: Path) -> None:
    draw_shapes(tmp_path / "shapes", identities=8, images=4)
    out = run("calibrate", calibrated.path, "--images", tmp_path / "shapes", "--out", tmp_path / "own").out
    own = Bundle.load(tmp_path / "own")
    assert f"wrote {calibrated.name}, calibration 4, to {tmp_path / 'own'}" in out
    assert f"learned margin {own.calibration.learned_margin:.4f}, was {MARGIN:.4f}; from 32 images of 8" in out
    assert "learned-margin: threshold" in out
    assert (own.fingerprint, own.calibration.version, own.calibration.identities) == (calibrated.fingerprint, 4, 8)
    assert own.reference is not None
    assert own.reference.images == 32
    assert own.lineage.data["calibration 4"]["identities"] == 8  # type: ignore[index, call-overload]
    assert "Calibration 4** was learned from 32 other images" in (tmp_path / "own" / "README.md").read_text()
    again = run("calibrate", own.path, "--images", tmp_path / "shapes", "--out", tmp_path / "again", "--closed-set")
    assert "calibration 5" in again.out
    assert Bundle.load(tmp_path / "again").calibration.protocol == "closed-set"


def test_images_and_feedback_are_told_apart(run: Run, calibrated: Bundle, tmp_path: Path) -> None:
    def refused(*arguments: object) -> Callable[..., None]:
        return run("calibrate", calibrated.path, "--out", tmp_path / "out", *arguments).failed_with

    draw_shapes(tmp_path / "shapes", identities=2, images=1)
    refused()("--images", "--feedback")
    refused("--feedback", tmp_path / "shapes")("no feedback", f"--images {tmp_path / 'shapes'}")
    (tmp_path / "list.csv").write_text("path,identity\n")
    refused("--feedback", tmp_path / "list.csv")("no feedback", "--images")
    (tmp_path / "feedback.jsonl").write_text("")
    refused("--images", tmp_path / "feedback.jsonl")("--feedback")
    refused("--images", tmp_path / "shapes", "--accepted-rate", "1")("--accepted-rate goes with --feedback only")
    refused("--feedback", tmp_path / "feedback.jsonl", "--closed-set")("--closed-set goes with --images only")
    assert not (tmp_path / "out").exists()


def test_bad_input(run: Run, calibrated: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("earlier")
    run("feedback", "export", "--data", tmp_path, "--out", tmp_path / "kept").failed_with("exists", "--overwrite")
    away = ["feedback", "export", "--target", "127.0.0.1:1", "--out"]
    run(*away, tmp_path / "kept", "--overwrite").failed_with("no server answers")
    run(*away, tmp_path / "new").failed_with("no server answers")
    run("feedback", "export", "--data", tmp_path / "none", "--out", tmp_path / "new").failed_with("no folder")
    assert (tmp_path / "kept").read_text() == "earlier"
    assert not (tmp_path / "new").exists()
    run("feedback", "export", "--out", tmp_path / "f").failed_with("--target", "--data")
    run("feedback", "export", "--data", tmp_path, "--out", tmp_path / "f").failed_with("no feedback was recorded")
    arguments = ["--out", tmp_path / "out"]
    run("calibrate", calibrated.path, "--feedback", tmp_path / "none", *arguments).failed_with("export")
    file = tmp_path / "feedback.jsonl"
    file.write_text('{"case_id": "a"}\n')
    run("calibrate", calibrated.path, "--feedback", file, *arguments).failed_with("line 1", "fingerprint")
    file.write_text("path,identity")
    run("calibrate", calibrated.path, "--feedback", file, *arguments).failed_with("line 1: Invalid JSON")
    file.write_text("")
    run("calibrate", calibrated.path, "--feedback", file, *arguments).failed_with(
        "no feedback in it", "record_feedback"
    )
    assert not (tmp_path / "out").exists()
