"""`batch-search --shards`: the same answers here and on a server, those of `search`, going on where it was stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.bundle import Bundle
from lookalike import Client, NeighborColumns
from lookalike.cli import batch_job, batch_remote
from lookalike.errors import InvalidRequest, ResourceExhausted, Unavailable
from tests.cli.conftest import Ran, Run
from tests.service.harness import png


@pytest.fixture
def filled(run: Run, where: list[str], name: str, pictures: Path) -> str:
    assert run("gallery", "create", name, *where).code == 0
    assert run("gallery", "add", name, pictures, *where).code == 0
    return name


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_images_are_answered_as_search_answers_and_bad_ones_have_their_error(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "bad.png").write_bytes(b"no image")
    (pictures / "größe.png").write_bytes(png(40))
    (pictures / "gone.png").symlink_to("nowhere.png")
    out = tmp_path / "job"
    job = ["batch-search", pictures, "--gallery", filled, "--shards", out, "-k", 99, "--shard-queries", 4, *where]
    ran = run(*job)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"answered 10 queries in 3 shards of {out}\n2 errors; ")
    found = rows(out)
    failed = {row["query"]: row["error_reason"] for row in found if row["error"]}
    assert failed == {"bad.png": "INVALID_IMAGE", "gone.png": "UNREADABLE"}
    for query in ("größe.png", "loose.png", "class-0/2.png"):
        said = json.loads(run("search", pictures / query, "--gallery", filled, "-k", 99, "--json", *where).out)
        mine = [row for row in found if row["query"] == query]
        assert [(row["item"], row["distance"], row["verdict"], row["match_probability"]) for row in mine] == [
            (
                each["item"].rpartition("/")[2],
                *(each["decision"][n] for n in ("distance", "verdict", "match_probability")),
            )
            for each in said
        ]
        assert [(row["identity"] or None, row["threshold"]) for row in mine] == [
            (each["identity"], each["decision"]["threshold"]) for each in said
        ]
    whole = shards(out)
    (out / "part-00001.parquet").unlink()
    assert "; 1 shard written again, damaged" in run(*job).out
    assert shards(out) == whole


def test_a_gallery_against_itself_within_the_threshold(run: Run, where: list[str], filled: str, tmp_path: Path) -> None:
    out = tmp_path / "job"
    ran = run(
        *("batch-search", "--from-gallery", filled, "--gallery", filled, "--shards", out, "--within"),
        *("--threshold", 0.9, "--limit", 4, *where),
    )
    assert ran.code == 0, ran.err
    found = rows(out)
    for item in ("loose.png", "class-1:3.png"):
        name = f"galleries/{filled}/items/{item}"
        said = json.loads(
            run("search", name, "--gallery", filled, "--within", "--threshold", 0.9, "--json", *where).out
        )
        assert [row["item"] for row in found if row["query"] == item] == [
            each["item"].rpartition("/")[2] for each in said[:4]
        ]
        assert {row["truncated"] for row in found if row["query"] == item} <= {len(said) > 4}
    assert found
    assert not [row for row in found if row["item"] == row["query"]]


def test_a_rate_of_searches_is_tightened_for_the_gallery(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path
) -> None:
    ask = (pictures, "--gallery", filled, "-k", 3, *where)
    assert run("batch-search", "--shards", tmp_path / "a", "--target-fpir", "0.063", *ask).code == 0
    assert run("batch-search", "--shards", tmp_path / "b", "--threshold", "0.125", *ask).code == 0
    found = rows(tmp_path / "a")
    assert len(found) == 21
    assert found == rows(tmp_path / "b")


def test_embeddings_are_searched_as_their_images(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_remote, "TOGETHER", 3)
    items = tmp_path / "items.parquet"
    assert run("gallery", "export", filled, "--out", items, *where).code == 0
    ask = ("--gallery", filled, "-k", 3, *where)
    assert run("batch-search", items, "--shards", tmp_path / "a", *ask).code == 0
    assert run("batch-search", pictures, "--shards", tmp_path / "b", *ask).code == 0
    wanted = ("item", "rank", "distance", "verdict", "match_probability", "model", "gallery_generation")
    assert [[row[name] for name in wanted] for row in rows(tmp_path / "a")] == [
        [row[name] for name in wanted] for row in rows(tmp_path / "b")
    ]
    table = pq.read_table(items)
    pq.write_table(table.rename_columns(["item", "identity", "metadata", "v"]), items)
    run("batch-search", items, "--shards", tmp_path / "c", *ask).failed_with("--embeddings")
    assert run("batch-search", items, "--embeddings", "v", "--shards", tmp_path / "c", *ask).code == 0
    assert len(rows(tmp_path / "c")) == 21


def test_embeddings_on_a_server_come_in_columns_and_become_the_same_bytes(
    run: Run, bundle: Bundle, target: str, name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("gallery", "create", name, "--target", target)
    run("gallery", "add", name, pictures, "--target", target)
    (data,) = {path.parent.resolve() for path in tmp_path.parent.glob(f"*/galleries/{name}")}
    with Client(target) as client:
        vectors = np.stack([client.embed(png(number)) for number in range(11)])
    vectors[4], vectors[9, 0] = 2 * vectors[4], np.nan
    np.save(tmp_path / "queries.npy", vectors)
    ask = ["batch-search", tmp_path / "queries.npy", "--gallery", name, "-k", 3, "--shard-queries", 8]
    sizes: list[int] = []
    searched = batch_remote.ServerAnswering._asked

    def few(self: batch_remote.ServerAnswering, queries: Any) -> NeighborColumns:
        sizes.append(len(queries))
        if len(queries) > 2:
            raise InvalidRequest("lower k", code=grpc.StatusCode.INVALID_ARGUMENT, reason="RESPONSE_TOO_LARGE")
        return searched(self, queries)

    monkeypatch.setattr(batch_remote, "TOGETHER", 5)
    monkeypatch.setattr(batch_remote.ServerAnswering, "_asked", few)
    assert run(*ask, "--shards", tmp_path / "there", "--target", target).code == 0
    monkeypatch.undo()
    assert {1, 2, 5} <= set(sizes)
    assert run(*ask, "--shards", tmp_path / "here", "--bundle", bundle.path, "--data", data).code == 0
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / place).glob("part-*")} for place in ("here", "there")
    )
    assert len(here) == 2
    assert here == there
    failed = {row["query"]: row["error_reason"] for row in rows(tmp_path / "there") if row["error"]}
    assert failed == {"4": "INVALID_VECTOR", "9": "INVALID_VECTOR"}


def test_here_and_on_a_server_one_job_goes_on_with_the_other(
    run: Run, bundle: Bundle, target: str, name: str, pictures: Path, tmp_path: Path
) -> None:
    run("gallery", "create", name, "--target", target)
    run("gallery", "add", name, pictures, "--target", target)
    (data,) = {path.parent.resolve() for path in tmp_path.parent.glob(f"*/galleries/{name}")}
    out = tmp_path / "job"
    job = ["batch-search", pictures, "--gallery", name, "--shards", out, "--shard-queries", 3]
    assert run(*job, "--target", target).code == 0
    whole = shards(out)
    (out / "part-00001.parquet").unlink()
    ran = run(*job, "--bundle", bundle.path, "--data", data)
    assert (ran.code, shards(out)) == (0, whole), ran.err


def test_here_and_on_a_server_bad_queries_and_items_of_a_gallery_are_the_same(
    run: Run, bundle: Bundle, target: str, name: str, pictures: Path, tmp_path: Path
) -> None:
    run("gallery", "create", name, "--target", target)
    run("gallery", "add", name, pictures, "--target", target)
    (data,) = {path.parent.resolve() for path in tmp_path.parent.glob(f"*/galleries/{name}")}
    (pictures / "0.png").touch()
    (pictures / "1.png").write_bytes(png(3)[:40])
    (pictures / "2.png").symlink_to("2.png")
    (pictures / "3.jpg").write_bytes(b"no image")
    width = len(pq.read_table(_exported(run, name, target, tmp_path))["embedding"][0])
    unit = np.eye(5, width, dtype=np.float32)
    unit[1] *= 2
    unit[2, 0] = np.nan
    unit[3] = 0
    np.save(tmp_path / "some.npy", unit)
    np.save(tmp_path / "narrow.npy", unit[:, 1:])
    pq.write_table(pa.table({"embedding": [unit[0].tolist(), [], None, [1.0]]}), tmp_path / "ragged.parquet")
    sources = [[pictures], [tmp_path / "some.npy"], [tmp_path / "narrow.npy"], [tmp_path / "ragged.parquet"]]
    for at, source in enumerate([*sources, ["--from-gallery", name]]):
        out, code = tmp_path / f"job-{at}", 2 if source == [tmp_path / "narrow.npy"] else 0  # all queries fail
        for more in ([], ["--within", "--limit", 3]):
            job = ["batch-search", *source, "--gallery", name, "--shards", out, "--shard-queries", 3, *more]
            ran = run(*job, "--restart", "--target", target)
            assert ran.code == code, (source, ran.err)
            whole = shards(out)
            (out / "part-00000.parquet").unlink()
            ran = run(*job, "--bundle", bundle.path, "--data", data)
            assert ran.code == code, ran.err
            again = run(*job, "--restart", "--bundle", bundle.path, "--data", data)
            assert again.code == code, again.err
            assert code == 0 or "no query could be answered, the first because" in again.err
            mine = rows(out)
            run(*job, "--restart", "--target", target)
            assert shards(out) == whole
            theirs = rows(out)
            for row in (*mine, *theirs):
                row["error"] = row["error"] is not None  # a server may say it in other words, for the same reason
            assert mine == theirs, source


def _exported(run: Run, name: str, target: str, folder: Path) -> Path:
    assert run("gallery", "export", name, "--out", folder / "exported.parquet", "--target", target).code == 0
    return folder / "exported.parquet"


def test_a_job_waits_for_a_server_that_is_away_or_has_no_room(
    run: Run, target: str, name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("gallery", "create", name, "--target", target)
    run("gallery", "add", name, pictures, "--target", target)
    job = ["batch-search", pictures, "--gallery", name, "--shard-queries", 3, "--target", target, "--shards"]
    assert run(*job, tmp_path / "whole").code == 0
    answers, calls, waits = batch_remote.ServerAnswering.answers, 0, []
    failures = {
        2: Unavailable("away", code=grpc.StatusCode.UNAVAILABLE),
        3: ResourceExhausted("full", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED", retry_after=7),
        6: ResourceExhausted("disk", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="STORAGE_FULL", retry_after=7),
    }

    def failing(self: Any, queries: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in failures:
            raise failures[calls]
        return answers(self, queries)

    monkeypatch.setattr(batch_remote.ServerAnswering, "answers", failing)
    monkeypatch.setattr(batch_job.time, "sleep", waits.append)
    ran = run(*job, tmp_path / "job")
    assert ran.code == 0, ran.err
    assert ran.err.count("going on") == 2
    assert 1 <= waits[0] < 2
    assert 7 <= waits[1] < 9
    assert shards(tmp_path / "job") == shards(tmp_path / "whole")
    calls = 5
    assert run(*job, tmp_path / "another").code != 0  # waiting does not mend it
    assert len(waits) == 2


def test_what_was_begun_under_other_conditions_is_refused(
    run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "job"
    job = ["batch-search", pictures, "--gallery", filled, "--shards", out, *where]
    assert run(*job).code == 0
    run(*job, "-k", 5).failed_with("k was 10 and is 5", "--restart")
    (pictures / "new.png").write_bytes(png(50))
    run(*job).failed_with("queries digest", "--restart")
    assert run(*job, "--restart").code == 0
    run("gallery", "add", filled, pictures, *where)
    run(*job).failed_with("generation was 1 and is 2")


def test_misuse_is_told(run: Run, where: list[str], filled: str, pictures: Path, tmp_path: Path) -> None:
    ask = ("batch-search", "--gallery", filled, *where)
    run(*ask, pictures).failed_with("--out FILE", "--shards DIR")
    run(*ask, pictures, "--out", "a.parquet", "--shards", "b").failed_with("--out FILE", "--shards DIR")
    run(*ask, "--shards", "b").failed_with("--from-gallery")
    run(*ask, pictures, "--out", "a.parquet", "--within").failed_with("--shards")
    run(*ask, pictures, "--shards", "b", "--overwrite").failed_with("--restart")
    run("batch-search", pictures, "--shards", "b", *where).failed_with("--gallery")
    run(*ask, pictures, "--shards", "b", "--filter", "name <").failed_with("filter")
    run(*ask, pictures / "notes.txt", "--shards", "b").failed_with("neither")
    (tmp_path / "file").touch()
    run(*ask, pictures, "--shards", tmp_path / "file").failed_with("is a file", "give a folder")
    (tmp_path / "empty").mkdir()
    run(*ask, tmp_path / "empty", "--shards", "b").failed_with("nothing to search for")
    pq.write_table(pa.table({"v": ["x"]}), tmp_path / "t.parquet")
    run(*ask, tmp_path / "t.parquet", "--embeddings", "w", "--shards", "b").failed_with("no column 'w'")
    assert not (tmp_path / "b").exists()


class TestItemsOfAServer:
    def test_each_page_is_asked_for_once_however_many_shards_there_are(
        self, bundle: Bundle, target: str, name: str, run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lookalike._calls.items.PAGE_SIZE", 2)
        run("gallery", "create", name, "--target", target)
        run("gallery", "add", name, pictures, "--target", target)
        with Client(target) as client:
            pages, unary = 0, client.unary

            def counted(call: Any) -> Any:
                nonlocal pages
                pages += call.method.endswith("ListItems")
                return unary(call)

            monkeypatch.setattr(client, "unary", counted)
            items = batch_remote.RemoteItems(client, client.get_gallery(name))
            whole = [query.id for query in items.since(0, "")]
            assert (len(whole), pages) == (7, 4)
            for row in range(0, 8, 2):
                assert [query.id for query in items.since(row, "")] == whole[row:]
            pages = 0
            shards = [[query.id for query in islice(items.since(row, ""), 2)] for row in range(0, 7, 2)]
            assert [item for shard in shards for item in shard] == whole
            assert pages == 4
            pages = 0
            assert [query.id for query in items.since(3, "")] == whole[3:]
            assert pages == 3


class TestPatience:
    def ran(
        self, run: Run, target: str, name: str, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch, failing: Any
    ) -> tuple[Ran, list[float]]:
        """A job of seven shards whose n-th attempt to answer one fails where `failing(n)`; and how long it waited."""
        run("gallery", "create", name, "--target", target)
        run("gallery", "add", name, pictures, "--target", target)
        answers, calls, waits = batch_remote.ServerAnswering.answers, 0, list[float]()

        def now_and_then(self: Any, queries: Any) -> Any:
            nonlocal calls
            calls += 1
            if failing(calls):
                raise ResourceExhausted("full", code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED")
            return answers(self, queries)

        monkeypatch.setattr(batch_remote.ServerAnswering, "answers", now_and_then)
        monkeypatch.setattr(batch_job.time, "sleep", waits.append)
        job = ("batch-search", pictures, "--gallery", name, "--shard-queries", 1, "--target", target, "--shards", out)
        return run(*job), waits

    def test_it_begins_anew_with_each_shard(
        self, run: Run, target: str, name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran, waits = self.ran(
            run, target, name, pictures, tmp_path / "job", monkeypatch, lambda call: call % 4
        )  # three failures before each of seven shards
        assert ran.code == 0, ran.err
        assert len(waits) == 21
        assert all(1 <= waits[at] < 2 and 5 <= waits[at + 2] < 7 for at in range(0, 21, 3))

    def test_without_a_shard_it_ends_after_eight_waits(
        self, run: Run, target: str, name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran, waits = self.ran(run, target, name, pictures, tmp_path / "job", monkeypatch, lambda call: call > 3)
        assert ran.code != 0
        assert len(waits) == 8
        assert len(list((tmp_path / "job").glob("part-*"))) == 3


def test_stopped_by_the_keyboard_it_says_how_to_go_on_and_another_process_who_runs_it(
    run: Run, bundle: Bundle, pictures: Path, name: str, tmp_path: Path
) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("started in the background of a shell, where programs ignore interrupts")
    here = ("--bundle", bundle.path, "--data", tmp_path / "galleries")
    run("gallery", "create", name, *here)
    run("gallery", "add", name, pictures, *here)
    queries = np.tile(np.eye(bundle.embedding_dim, dtype=np.float32), (20_000, 1))
    np.save(tmp_path / "queries.npy", queries)
    out = tmp_path / "job"
    job = ("batch-search", tmp_path / "queries.npy", "--gallery", name, "--shards", out, "--shard-queries", 500, *here)
    started = subprocess.Popen(
        [sys.executable, "-m", "lookalike", *map(str, job)], stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    with started:
        while not (out / "part-00001.parquet").exists():
            assert started.poll() is None, started.stderr and started.stderr.read()
            time.sleep(0.05)
        run(*job).failed_with(f"process {started.pid} runs the job in {out}")
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert f"run the same command again to go on in {out}" in said
    assert "Traceback" not in said
    assert not list(out.glob(".partial-*"))
    stated = json.loads((out / "_job.json").read_text())
    assert not stated["done"]
    assert 0 <= len(list(out.glob("part-*"))) - len(stated["shards"]) <= 1  # one may be whole and not yet counted
