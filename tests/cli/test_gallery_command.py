"""`gallery create|add|list|export|delete`, answered by a server and here."""

from __future__ import annotations

import csv
import errno
import json
import os
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.bundle import Bundle
from tests.cli.conftest import Run
from tests.service.harness import DIM, make_bundle, png


def items(run: Run, name: str, where: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run("gallery", "list", name, "--json", *where).out.splitlines()]


def test_a_folder_becomes_items_with_identities(run: Run, where: list[str], name: str, pictures: Path) -> None:
    assert name in run("gallery", "create", name, *where).out
    ran = run("gallery", "add", name, pictures, *where)
    assert (ran.code, ran.out, ran.err) == (0, f"stored 7 items in gallery {name}\n", "")
    stored = {item["name"].rpartition("/")[2]: item for item in items(run, name, where)}
    assert stored["class-1:3.png"]["identity"] == "class-1"
    assert stored["class-1:3.png"]["metadata"] == {"path": "class-1/3.png"}
    assert stored["loose.png"]["identity"] is None
    assert f"{name}  7" in " ".join(run("gallery", "list", *where).out.split()).replace(f"{name} 7", f"{name}  7")


def test_links_to_folders_are_followed_as_training_follows_them(
    run: Run, where: list[str], name: str, pictures: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "one").symlink_to(pictures / "class-1")
    (linked / "again").symlink_to(linked)
    run("gallery", "create", name, *where)
    assert run("gallery", "add", name, linked, *where).code == 0
    assert {item["identity"] for item in items(run, name, where)} == {"one"}


def test_adding_again_changes_nothing(run: Run, where: list[str], name: str, pictures: Path) -> None:
    run("gallery", "create", name, *where)
    for _ in range(2):
        assert run("gallery", "add", name, pictures, *where).code == 0
    assert len(items(run, name, where)) == 7


def test_bad_images_are_listed_and_skipped(run: Run, where: list[str], name: str, pictures: Path) -> None:
    (pictures / "bad.png").write_bytes(b"no image")
    (pictures / "empty.jpg").touch()
    run("gallery", "create", name, *where)
    ran = run("gallery", "add", name, pictures, *where)
    assert ran.out == f"stored 7 items in gallery {name} (2 skipped)\n"
    assert "skipped bad.png: not an image" in ran.err
    assert "skipped empty.jpg: the image is empty" in ran.err


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_names_items_identities_and_metadata(
    run: Run, where: list[str], name: str, pictures: Path, kind: str
) -> None:
    rows = [
        {"path": "class-0/0.png", "identity": "ann", "id": "first", "year": "1999"},
        {"path": "loose.png", "identity": "", "id": "", "year": ""},
        {"path": "gone.png", "identity": "", "id": "", "year": ""},
    ]
    manifest = pictures / f"manifest.{kind}"
    if kind == "csv":
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), manifest)
    run("gallery", "create", name, *where)
    ran = run("gallery", "add", name, manifest, *where)
    assert ran.out == f"stored 2 items in gallery {name} (1 skipped)\n"
    assert "gone.png" in ran.err
    first, loose = items(run, name, where)
    assert (first["identity"], first["metadata"]) == ("ann", {"path": "class-0/0.png", "year": "1999"})
    assert (loose["identity"], loose["metadata"]) == (None, {"path": "loose.png"})


def test_a_table_may_hold_more_than_text(run: Run, where: list[str], name: str, pictures: Path) -> None:
    columns = {
        "path": ["loose.png"],
        "taken": [datetime(1999, 12, 31, 23, 59)],
        "price": [Decimal("1.25")],
        "tags": [["a", "b"]],
        "size": [{"width": 3, "on": date(2000, 1, 1)}],
        "weight": [float("nan")],
    }
    run("gallery", "create", name, *where)
    pq.write_table(pa.table(columns), pictures / "manifest.parquet")
    assert run("gallery", "add", name, pictures / "manifest.parquet", *where).code == 0
    (stored,) = items(run, name, where)
    assert stored["metadata"] == {
        "path": "loose.png",
        "taken": "1999-12-31T23:59:00",
        "price": 1.25,
        "tags": ["a", "b"],
        "size": {"width": 3, "on": "2000-01-01"},
    }
    for column, value in {"thumbnail": b"bytes", "identity": ["a"], "sku": 2**53 + 1}.items():
        pq.write_table(pa.table({"path": ["loose.png"], column: [value]}), pictures / "manifest.parquet")
        run("gallery", "add", name, pictures / "manifest.parquet", *where).failed_with("row 1", column)
    (pictures / "manifest.csv").write_text("path,year\nloose.png,1999,2000\n")
    run("gallery", "add", name, pictures / "manifest.csv", *where).failed_with("row 1", "more values")
    (pictures / "manifest.csv").write_text("path\na\0b.png\n")
    run("gallery", "add", name, pictures / "manifest.csv", *where).failed_with("row 1", "path")


def test_an_empty_list_tells_a_slip_of_the_pen(run: Run, bundle: Bundle, where: list[str], name: str) -> None:
    nowhere = run("gallery", "list", "--bundle", bundle.path, "--data", "galeries", "--json")
    assert (nowhere.code, nowhere.out) == (0, "")
    assert nowhere.err == "there is no folder of galleries at galeries; name it with --data\n"
    run("gallery", "create", name, *where)
    assert run("gallery", "list", *where).err == ""
    assert f"no snapshots of a gallery {name}" in run("gallery", "snapshots", name, *where).err
    run("gallery", "snapshot", name, "one", *where)
    assert run("gallery", "snapshots", name, *where).err == ""
    run("gallery", "delete", name, *where)
    kept = run("gallery", "snapshots", name, *where)
    assert (kept.code, kept.err, "one" in kept.out) == (0, "", True)


def test_what_is_not_there_names_the_list_that_shows_what_is(
    run: Run, where: list[str], name: str, pictures: Path
) -> None:
    run("gallery", "create", name, *where)
    image = pictures / "loose.png"
    for command, listing in (
        (["gallery", "list", "nowhere"], "`lookalike gallery list`"),
        (["gallery", "snapshots", "nowhere"], "`lookalike gallery list`"),
        (["search", image, "--gallery", "nowhere"], "`lookalike gallery list`"),
        (["verify", image, f"galleries/{name}/items/none"], f"no item 'none' in gallery '{name}'"),
        (["gallery", "delete", name, "none"], f"`lookalike gallery list {name}`"),
        (["gallery", "restore", name, "none", "new"], f"`lookalike gallery snapshots {name}`"),
        (["gallery", "delete-alias", "none"], "`lookalike gallery aliases`"),
    ):
        run(*command, *where).failed_with(listing)


def test_a_manifest_without_its_columns_is_told_so(run: Run, where: list[str], pictures: Path) -> None:
    manifest = pictures / "manifest.csv"
    for text, words in {
        "loose.png\n": "names no images",
        "": "names no images",
        "path;id\na.png;1\n": "'path;id'",
    }.items():
        manifest.write_text(text)
        run("gallery", "add", "g", manifest, *where).failed_with("manifest.csv", words)


def test_names_are_shown_as_they_are(run: Run, where: list[str], name: str, pictures: Path) -> None:
    long = "l" * 200
    identities = ["[/x]", "[bold]b", ":fire:", long]
    lines = [f"loose.png,{at}:a:b,{identity}" for at, identity in enumerate(identities)]
    (pictures / "manifest.csv").write_text("\n".join(["path,id,identity", *lines]))
    (pictures / "a\nb.png").write_bytes(b"no image")
    run("gallery", "create", name, *where)
    assert run("gallery", "add", name, pictures / "manifest.csv", *where).code == 0
    for command in (["gallery", "list", name], ["search", pictures / "loose.png", "--gallery", name]):
        shown = run(*command, *where).out
        for at, identity in enumerate(identities):
            assert f"{at}:a:b" in shown
            assert identity in shown
    assert "skipped 'a\\nb.png': not an image" in run("gallery", "add", name, pictures, *where).err


def test_bytes_that_are_no_text_are_shown_in_names(
    run: Run, where: list[str], name: str, pictures: Path, tmp_path: Path
) -> None:
    folder = pictures / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.png")).write_bytes(png(7))
    run("gallery", "create", name, *where)
    assert run("gallery", "add", name, pictures, *where).out == f"stored 8 items in gallery {name}\n"
    stored = items(run, name, where)[0]
    assert stored["name"].endswith(r"/caf\xe9:\xff.png")
    assert (stored["identity"], stored["metadata"]) == (r"caf\xe9", {"path": r"caf\xe9/\xff.png"})
    found = run("batch-search", pictures, "--gallery", name, "--out", tmp_path / "out.parquet", *where)
    assert (found.code, found.err) == (0, "")
    assert r"caf\xe9/\xff.png" in pq.read_table(tmp_path / "out.parquet")["query"].to_pylist()

    item = os.fsdecode(b"caf\xe9:\xff.png")
    for command in (
        ["gallery", "delete", name, item],
        ["gallery", "list", name, "--filter", f'name = "{item}"'],
        ["verify", folder / os.fsdecode(b"\xff.png"), f"galleries/{name}/items/{item}"],
    ):
        run(*command, *where).failed_with("ff.png")


def test_a_folder_that_cannot_be_looked_into_is_not_left_out(
    run: Run, where: list[str], name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = os.scandir  # of a path or, elsewhere, a descriptor

    def locked(path: Any) -> Any:
        if isinstance(path, str | Path) and os.fspath(path).endswith("class-1"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return look(path)

    run("gallery", "create", name, *where)
    monkeypatch.setattr(os, "scandir", locked)
    run("gallery", "add", name, pictures, *where).failed_with("class-1", "Permission denied", "let this user read it")
    assert items(run, name, where) == []
    out = tmp_path / "out.parquet"
    run("batch-search", pictures, "--gallery", name, "--out", out, *where).failed_with("class-1")


def test_an_export_holds_every_item_with_its_embedding(
    run: Run, where: list[str], name: str, pictures: Path, tmp_path: Path, bundle: Bundle
) -> None:
    from embedding.encoder import Encoder

    run("gallery", "create", name, *where)
    run("gallery", "add", name, pictures, *where)
    out = tmp_path / "out" / "items.parquet"
    assert run("gallery", "export", name, "--out", out, *where).code == 0
    rows = {row["item"]: row for row in pq.read_table(out).to_pylist()}
    assert len(rows) == 7
    assert json.loads(rows["class-0:0.png"]["metadata"]) == {"path": "class-0/0.png"}
    expected = Encoder(bundle, device="cpu").encode([png(0)])[0]
    assert expected.shape == (DIM,)
    np.testing.assert_allclose(rows["class-0:0.png"]["embedding"], expected, atol=1e-6)
    run("gallery", "export", name, "--out", out, *where).failed_with("exists", "--overwrite")
    assert run("gallery", "export", name, "--out", out, "--overwrite", *where).code == 0
    (tmp_path / "link").symlink_to(out)
    out.write_bytes(b"old")
    assert run("gallery", "export", name, "--out", tmp_path / "link", "--overwrite", *where).code == 0
    assert (tmp_path / "link").is_symlink()
    assert pq.read_table(out).num_rows == 7
    os.mkfifo(tmp_path / "pipe")
    run("gallery", "export", name, "--out", tmp_path / "pipe", "--overwrite", *where).failed_with("no file")
    assert (tmp_path / "pipe").is_fifo()


def test_deleting_items_and_galleries(run: Run, where: list[str], name: str, pictures: Path) -> None:
    run("gallery", "create", name, *where)
    run("gallery", "add", name, pictures, *where)
    run("gallery", "delete", name, "loose.png", "none", *where).failed_with("none")
    assert len(items(run, name, where)) == 7
    run("gallery", "delete", name, "loose.png", "--force", *where).failed_with("--force is for a whole gallery")
    assert run("gallery", "delete", name, "loose.png", *where).code == 0
    assert len(items(run, name, where)) == 6
    run("gallery", "delete", name, *where).failed_with("6 items")
    assert run("gallery", "delete", name, "--force", *where).code == 0
    run("gallery", "list", name, *where).failed_with(name)


def test_bad_input_is_refused_in_one_line(
    run: Run, where: list[str], name: str, pictures: Path, tmp_path: Path
) -> None:
    run("gallery", "create", "Not A Name!", *where).failed_with("lower-case")
    run("gallery", "create", name, *where)
    run("gallery", "create", name, *where).failed_with(name)
    (tmp_path / "empty").mkdir()
    run("gallery", "add", name, tmp_path / "empty", *where).failed_with("no images")
    run("gallery", "add", name, tmp_path / "none", *where).failed_with("no such folder")
    run("gallery", "add", name, pictures / "notes.txt", *where).failed_with("neither a folder nor")
    run("gallery", "add", "nowhere", pictures, *where).failed_with("nowhere")
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    ran = run("gallery", "add", name, tmp_path / "empty", *where)
    assert ran.code == 2
    assert "of 1 image of" in ran.err
    for content in ("name,identity\nx,y\n", "path\n\xff\n"):
        (tmp_path / "bad.csv").write_bytes(content.encode("latin-1"))
        run("gallery", "add", name, tmp_path / "bad.csv", *where).failed_with("bad.csv")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    run("gallery", "add", name, tmp_path / "bad.parquet", *where).failed_with("not a Parquet table")


def test_a_server_is_not_told_whether_to_store_thumbnails(run: Run, target: str, name: str, pictures: Path) -> None:
    run("gallery", "create", name, "--target", target)
    for side in (64, 0):
        refused = run("gallery", "add", name, pictures, "--thumbnails", side, "--target", target)
        refused.failed_with("--thumbnails goes with --bundle", "`lookalike serve --thumbnails`", "leave it out")
    assert items(run, name, ["--target", target]) == []


def test_two_images_for_one_item_are_refused(run: Run, where: list[str], name: str, tmp_path: Path) -> None:
    for path in (tmp_path / "p" / "a" / "1.png", tmp_path / "p" / "a:1.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(1))
    run("gallery", "create", name, *where)
    run("gallery", "add", name, tmp_path / "p", *where).failed_with("a/1.png", "a:1.png")


def test_a_gallery_of_another_model_is_refused(run: Run, bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=1)
    galleries = tmp_path / "galleries"
    run("gallery", "create", "g", "--bundle", bundle.path, "--data", galleries)
    a = pictures / "loose.png"
    for command in (["gallery", "add", "g", pictures], ["search", a, "--gallery", "g"]):
        run(*command, "--bundle", other.path, "--data", galleries).failed_with(bundle.name, other.name)


def test_a_damaged_gallery_is_listed_with_its_damage(run: Run, bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    where = ["--bundle", bundle.path, "--data", tmp_path / "galleries"]
    for name in ("bad", "good"):
        run("gallery", "create", name, *where)
    (tmp_path / "galleries" / "bad" / "store.sqlite").write_bytes(b"no database, but as long as one" * 500)
    bad, good = (json.loads(line) for line in run("gallery", "list", "--json", *where).out.splitlines())
    assert (bad["id"], bad["create_time"], bool(bad["damage"])) == ("bad", None, True)
    assert (good["id"], good["damage"]) == ("good", "")
    run("search", pictures / "loose.png", "--gallery", "bad", *where).failed_with("bad")


def test_a_file_too_large_to_send_is_skipped(
    run: Run, where: list[str], name: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lookalike.cli.images.MAX_IMAGE_BYTES", 2000)
    (pictures / "large.png").write_bytes(png(1) + bytes(2000))
    run("gallery", "create", name, *where)
    ran = run("gallery", "add", name, pictures, *where)
    assert ran.out == f"stored 7 items in gallery {name} (1 skipped)\n"
    assert "skipped large.png: the file has" in ran.err
