"""The further commands of `lookalike gallery`, and searches with filter, effort and threshold; here and on a server."""

from __future__ import annotations

import json
import re
from functools import partialmethod
from pathlib import Path

import pytest

from embedding.bundle import Bundle
from lookalike.cli.local import LocalBackend
from lookalike.client import Client
from tests.cli.conftest import Run
from tests.index.test_verify import flip_in_place
from tests.service.harness import make_bundle, serving_here


@pytest.fixture
def filled(run: Run, where: list[str], name: str, pictures: Path) -> str:
    run("gallery", "create", name, *where)
    assert run("gallery", "add", name, pictures, *where).code == 0
    return name


def items(run: Run, where: list[str], gallery: str, *options: str) -> list[str]:
    ran = run("gallery", "list", gallery, "--json", *options, *where)
    assert ran.code == 0, ran.err
    return [json.loads(line)["name"].rpartition("/")[2] for line in ran.out.splitlines()]


def test_a_search_takes_a_filter_and_an_effort(run: Run, where: list[str], filled: str, pictures: Path) -> None:
    query = pictures / "loose.png"
    options = ["--gallery", filled, "--json", *where]
    for effort in ("exact", "0.5", "nprobe=4,rescore=2"):
        ran = run("search", query, "--filter", "identity = class-0", "--effort", effort, *options)
        assert ran.code == 0, ran.err
        assert {found["identity"] for found in json.loads(ran.out)} == {"class-0"}
    run("search", query, "--filter", "identity = ", *options).failed_with("filter, character 12", "a value")
    assert run("search", query, "--effort", "hard", *options).code == 2


def test_a_search_within_the_threshold(run: Run, where: list[str], filled: str, pictures: Path) -> None:
    query = pictures / "loose.png"
    ran = run("search", query, "--gallery", filled, "--within", "--threshold", "2", "--json", *where)
    assert len(json.loads(ran.out)) == 7
    ran = run("search", query, "--gallery", filled, "--within", "--threshold", "0", "--json", *where)
    assert [found["item"].rpartition("/")[2] for found in json.loads(ran.out)] == ["loose.png"]
    none = run("search", query, "--gallery", filled, "--within", "--filter", "name = nobody", *where)
    assert (none.code, none.out) == (0, "nothing in the gallery matches\n")


def test_a_search_that_is_cut_off_says_so_beside_the_json_too(
    run: Run, where: list[str], filled: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: type[Client | LocalBackend] = Client if "--target" in where else LocalBackend
    monkeypatch.setattr(answers, "search_matches", partialmethod(answers.search_matches, limit=3))
    query = pictures / "loose.png"
    asked = ("search", query, "--gallery", filled, "--within", "--threshold", "2", *where)
    ran = run(*asked, "--json")
    assert (len(json.loads(ran.out)), ran.err) == (3, "there are more matches than are shown\n")
    assert "there are more matches than are shown" in run(*asked).out


def test_a_listing_takes_a_filter(run: Run, where: list[str], filled: str) -> None:
    assert items(run, where, filled, "--filter", "NOT identity:*") == ["loose.png"]


def test_a_purge_counts_then_deletes(run: Run, where: list[str], filled: str) -> None:
    looked = run("gallery", "purge", filled, "identity = class-0", *where)
    assert (looked.code, looked.out.splitlines()[:3]) == (0, ["class-0:0.png", "class-0:2.png", "class-0:4.png"])
    assert "would delete 3 items" in looked.out
    assert len(items(run, where, filled)) == 7
    assert "deleted 3 items" in run("gallery", "purge", filled, "identity = class-0", "--force", *where).out
    assert len(items(run, where, filled)) == 4
    run("gallery", "purge", filled, "", "--force", *where).failed_with("filter is required")


def test_a_gallery_is_configured_indexed_and_shown(run: Run, where: list[str], filled: str) -> None:
    run("gallery", "configure", filled, *where).failed_with("nothing to change")
    assert run("gallery", "configure", filled, "--min-recall", "0.9", *where).code == 0
    ran = run("gallery", "reindex", filled, "--structure", "exact", *where)
    assert (ran.code, ran.out) == (0, f"indexed gallery {filled}: exact\n"), ran.err
    few = run("gallery", "reindex", filled, "--structure", "ivf-pq", *where)
    assert few.code == 0, few.err
    assert few.out.startswith(f"indexed gallery {filled}: exact\nivf-pq was asked for and is not used: with 7 rows")
    (segment,) = json.loads(run("gallery", "show", filled, "--json", *where).out)["stats"]["segments"]
    assert (segment["structure"], segment["fallback"]) == ("exact", "few-rows")
    assert "segment 1: with 7 rows exact search is as fast" in run("gallery", "show", filled, *where).out
    assert run("gallery", "reindex", filled, "--structure", "exact", *where).out.count("\n") == 1
    told = json.loads(run("gallery", "show", filled, "--json", *where).out)
    assert told["index"] == {"min_recall": 0.9, "structure": "exact", "memory_bytes": None, "vectors": "float32"}
    assert told["stats"]["fresh_items"] == 0
    shown = run("gallery", "show", filled, *where).out
    assert "7 items" in shown
    assert "exact, recall 0.9 or more" in shown
    run("gallery", "reindex", filled, "--structure", "tree", *where).failed_with("lookalike: --structure is", "hnsw")
    run("gallery", "configure", filled, "--vectors", "int8", *where).failed_with("lookalike: --vectors is", "float16")
    assert run("gallery", "reindex", filled, "--vectors", "float16", *where).code == 0
    assert "recall 0.9 or more, vectors in float16" in run("gallery", "show", filled, *where).out
    run("gallery", "configure", filled, "--vectors", "half", *where).failed_with("float32", "float16")


def test_a_gallery_is_copied_and_restored(run: Run, where: list[str], filled: str) -> None:
    assert "copied gallery" in run("gallery", "snapshot", filled, "before", *where).out
    run("gallery", "snapshot", filled, "before", *where).failed_with("already")
    (line,) = run("gallery", "snapshots", filled, "--json", *where).out.splitlines()
    assert json.loads(line)["id"] == "before"
    restored = run("gallery", "restore", filled, "before", f"{filled}-r", *where)
    assert restored.out == f"gallery {filled}-r holds 7 items\n", restored.err
    assert items(run, where, f"{filled}-r") == items(run, where, filled)
    assert run("gallery", "delete-snapshot", filled, "before", *where).code == 0
    run("gallery", "restore", filled, "before", f"{filled}-s", *where).failed_with("no snapshot")


def test_an_alias_with_the_name_of_a_deleted_gallery_deletes_no_snapshot_of_another(
    run: Run, where: list[str], name: str
) -> None:
    old, new = f"{name}-old", f"{name}-new"
    for gallery in (old, new):
        run("gallery", "create", gallery, *where)
        run("gallery", "snapshot", gallery, "before", *where)
    run("gallery", "delete", old, *where)
    run("gallery", "alias", old, new, *where)
    (line,) = run("gallery", "snapshots", old, "--json", *where).out.splitlines()
    assert json.loads(line)["gallery"] == old
    assert run("gallery", "restore", old, "before", f"{name}-r", *where).code == 0
    assert run("gallery", "delete-snapshot", old, "before", *where).code == 0
    run("gallery", "delete-snapshot", old, "before", *where).failed_with("no snapshot", f"alias of gallery {new!r}")
    run("gallery", "alias", f"{name}-other", new, *where)
    run("gallery", "delete-snapshot", f"{name}-other", "before", *where).failed_with("alias", "name it itself")
    assert len(run("gallery", "snapshots", new, "--json", *where).out.splitlines()) == 1


def test_a_damaged_snapshot_is_shown_and_not_restored(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    where = ["--bundle", str(bundle.path), "--data", str(tmp_path / "galleries")]
    run("gallery", "create", "g", *where)
    run("gallery", "snapshot", "g", "one", *where)
    (tmp_path / "galleries" / ".snapshots" / "g" / "one" / "copy.json").write_text("{")
    (line,) = run("gallery", "snapshots", "g", "--json", *where).out.splitlines()
    assert "copy.json" in json.loads(line)["damage"]
    assert "copy.json" in run("gallery", "snapshots", "g", *where).out
    ran = run("gallery", "restore", "g", "one", "again", *where)
    ran.failed_with("cannot be restored", "restore another one")
    assert len(ran.err.strip().splitlines()) == 1, "in one line"


def test_a_gallery_is_named_by_an_alias(run: Run, where: list[str], filled: str) -> None:
    alias = f"{filled}-now"
    assert run("gallery", "alias", alias, filled, *where).out == f"alias {alias} stands for gallery {filled}\n"
    assert items(run, where, alias) == items(run, where, filled)
    assert alias in run("gallery", "aliases", *where).out
    run("gallery", "delete", filled, "--force", *where).failed_with(alias)
    assert run("gallery", "delete-alias", alias, *where).code == 0
    run("gallery", "list", alias, *where).failed_with("no gallery")


def test_a_gallery_moves_to_another_model(run: Run, bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    newer = make_bundle(tmp_path / "newer", seed=1)
    old = ["--bundle", str(bundle.path), "--data", str(tmp_path / "galleries")]
    new = ["--bundle", str(newer.path), "--data", str(tmp_path / "galleries")]
    run("gallery", "create", "old", *old)
    run("gallery", "add", "old", pictures, *old)
    run("gallery", "alias", "now", "old", *old)
    run("gallery", "migrate", "now", "new", "--alias", "now", *new).failed_with("7 items", "loose.png", "import")
    run("gallery", "add", "old", pictures, "--thumbnails", "64", *old)
    ran = run("gallery", "migrate", "now", "new", "--alias", "now", *new)
    assert (ran.code, ran.out) == (0, "gallery new holds 7 items; alias now stands for it\n"), ran.err
    found = json.loads(run("search", pictures / "loose.png", "--gallery", "now", "-k", "1", "--json", *new).out)
    assert found[0]["item"] == "galleries/new/items/loose.png"
    assert found[0]["decision"]["distance"] == 0
    assert run("search", pictures / "loose.png", "--gallery", "old", "-k", "1", "--json", *old).code == 0


def test_damage_is_found_and_mended(
    run: Run, bundle: Bundle, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "galleries"
    here = ["--bundle", str(bundle.path), "--data", str(data)]
    run("gallery", "create", "g", *here)
    run("gallery", "add", "g", pictures, *here)
    run("gallery", "reindex", "g", *here)
    run("gallery", "alias", "now", "g", *here)
    query = ("search", pictures / "loose.png", "--gallery", "g", "--json")
    before = json.loads(run(*query, *here).out)
    alone = ["--data", str(data)]  # no model is needed
    whole = run("gallery", "verify", "now", *alone)
    assert whole.code == 0, whole.err
    assert whole.out.startswith("gallery g: 7 items, ")
    assert "nothing is wrong" in whole.out
    run("gallery", "verify", "nowhere", *alone).failed_with("no gallery 'nowhere'")
    with monkeypatch.context() as patched:  # a terminal, which is shown how far it is
        patched.setenv("TERM", "xterm")
        patched.setenv("FORCE_COLOR", "1")
        patched.setattr("lookalike.cli.upkeep.is_live", lambda console: console.is_interactive)
        patched.setattr("index.progress.LOOK_SECONDS", 0.0)
        assert "verify: comparing" in run("gallery", "verify", "g", *alone).err
    with monkeypatch.context() as patched:  # a file, which gets a line now and then
        patched.setattr("lookalike.cli.told.SAY_SECONDS", 0.0)
        patched.setattr("index.progress.LOOK_SECONDS", 0.0)
        assert re.search(r"^verify: comparing \d+/\d+$", run("gallery", "verify", "g", *alone).err, re.MULTILINE)
    assert run("gallery", "verify", "g", *alone).err == ""

    (path,) = data.glob("g/segments/*/vectors.f32")
    flip_in_place(path, 20)
    for options in ([], ["--json"]):
        found = run("gallery", "verify", "g", *options, *alone)
        assert found.code == 1, found.err
        assert f"segments/{path.parent.name}" in found.out
    assert json.loads(found.out)["sound"] is False
    with serving_here(bundle.path, data) as address:
        opened = run("gallery", "verify", "g", "--target", address)
        assert (opened.code, "(made again)" in opened.out) == (0, True), opened.err  # when the server opened it
        (path,) = data.glob("g/segments/*/vectors.f32")
        flip_in_place(path, 20)
        asked = run("gallery", "verify", "g", "--target", address)
        assert asked.code == 1, asked.err
        assert "--repair mends" in asked.out
        run("gallery", "verify", "g", *alone).failed_with("writes to the galleries")
        mended = run("gallery", "verify", "g", "--repair", "--target", address)
        assert (mended.code, "all damage is mended" in mended.out) == (0, True), mended.err
        assert run("gallery", "verify", "g", "--target", address).code == 0
    (path,) = data.glob("g/segments/*/vectors.f32")
    flip_in_place(path, 20)
    assert run("gallery", "verify", "g", "--repair", *alone).code == 0
    assert "nothing is wrong" in run("gallery", "verify", "g", *alone).out
    assert json.loads(run(*query, *here).out) == before

    (data / "g" / "store.sqlite").write_bytes(b"damage")
    lost = run("gallery", "verify", "g", "--repair", *alone)
    assert lost.code == 1
    assert "1 problem left" in lost.out


def test_a_gallery_is_named_as_a_resource_too(run: Run, where: list[str], filled: str) -> None:
    full = f"galleries/{filled}"
    assert run("gallery", "show", full, *where).out == run("gallery", "show", filled, *where).out
    assert items(run, where, full) == items(run, where, filled)
    for wrong in ("MINE", "galleries/MINE", "a/b", "galleries/"):
        for command in ("show", "list", "delete"):
            run("gallery", command, wrong, *where).failed_with(repr(wrong), "lower-case letters", "galleries/ID")
