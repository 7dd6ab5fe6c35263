"""Streams, filters, efforts, aliases and long work through both clients."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from lookalike import (
    AsyncClient,
    CallFailed,
    Client,
    Conflict,
    Effort,
    FailedPrecondition,
    Imported,
    IndexSettings,
    InvalidRequest,
    ItemName,
    NeighborColumns,
    Neighbors,
    NewItem,
    NotFound,
    OperatingPoint,
    Unavailable,
    Verification,
)
from lookalike.types import ImageLike
from service.server import Server
from tests.index.test_verify import flip_in_place
from tests.service.harness import MAX_MESSAGE_BYTES, png

ALL = OperatingPoint(threshold=2)


@pytest.fixture
def filled(client: Client, gallery: str) -> str:
    items = [NewItem(id=f"{n}", image=png(n), identity=f"p{n % 2}", metadata={"n": n}) for n in range(8)]
    assert not any(isinstance(outcome, CallFailed) for outcome in client.update_items(gallery, items))
    return gallery


def ids(found: Neighbors | CallFailed) -> list[str]:
    assert isinstance(found, Neighbors), found
    return [neighbor.item.id for neighbor in found]


def test_searches_take_filter_effort_and_exclusions(client: Client, filled: str) -> None:
    found = client.search(filled, png(1), filter="metadata.n >= 6", effort=Effort(exact=True))
    assert sorted(ids(found)) == ["6", "7"]
    assert (found.expected_recall, found.truncated, found.partial) == (1, False, False)
    assert found.generation == client.get_gallery(filled).generation
    assert "1" not in ids(client.search(filled, png(1), exclude=[ItemName(filled, "1")]))
    (batch,) = client.search_batch(filled, [png(1)], filter="identity = p0", effort=Effort(recall=0.5))
    assert sorted(ids(batch)) == ["0", "2", "4", "6"]
    with pytest.raises(InvalidRequest) as caught:
        client.search(filled, png(1), filter="n = 1")
    assert (caught.value.reason, list(caught.value.fields)) == ("INVALID_FILTER", ["filter"])
    assert [item.name.id for item in client.list_items(filled, filter="metadata.n < 2")] == ["0", "1"]


def test_columns_are_what_a_batch_finds(client: Client, filled: str) -> None:
    queries = [png(1), ItemName(filled, "3"), ItemName(filled, "nothing"), client.embed(png(5)), b"no image"]
    options = {"k": 5, "operating_point": OperatingPoint(threshold=0.4, uncertain_within=0.05)}
    rows = client.search_batch(filled, queries, **options)
    found = client.search_columns(filled, queries, metadata=True, **options)
    assert isinstance(found, NeighborColumns)
    assert (len(found), found.counts.tolist(), sorted(found.errors)) == (5, [5, 5, 0, 5, 0], [2, 4])
    for at, (row, one) in enumerate(zip(rows, found, strict=True)):
        if isinstance(row, CallFailed):
            assert isinstance(one, CallFailed)
            assert (type(one), one.reason, str(one)) == (type(row), row.reason, str(row))
            with pytest.raises(type(row)):
                found.neighbors(at)
            continue
        assert one == row
        assert found.neighbors(at) == row
        assert isinstance(one, Neighbors)
        assert (one.expected_recall, one.generation, one.partial) == (row.expected_recall, row.generation, row.partial)
        here = found.rows(at)
        assert found.ids[here] == row.ids
        assert np.array_equal(found.distances[here], row.distances)
        assert np.array_equal(found.matches[here], row.matches)
        assert found.signed_margins[here].tolist() == [each.decision.signed_margin for each in row]
        assert found.queries[here].tolist() == [at] * len(row)
    assert client.search_columns(filled, queries, k=5).metadata == [{}] * 15
    with pytest.raises(IndexError):
        found.rows(5)


def test_columns_of_an_array_of_embeddings(client: Client, filled: str) -> None:
    vectors = np.stack([client.embed(png(n)) for n in range(4)])
    for queries in (vectors, vectors.astype(np.float64), vectors.astype(">f4"), vectors[::-1][::-1], list(vectors)):
        found = client.search_columns(filled, queries, k=3)
        assert list(found) == client.search_batch(filled, list(vectors), k=3, metadata=False)
    assert client.search_columns(filled, vectors[:, :3]).errors.keys() == {0, 1, 2, 3}
    client.put_alias("columns-alias", filled)
    found = client.search_columns("columns-alias", vectors[:1], k=2)
    client.delete_alias("columns-alias")
    assert found.neighbors(0)[0].item.gallery == filled
    for queries in (vectors[:0], np.repeat(vectors, 300, axis=0)):
        with pytest.raises(ValueError, match=r"takes 1 to 1,024 queries.*split"):
            client.search_columns(filled, queries)
    with pytest.raises(ValueError, match="takes 1 to 20 queries"):
        client.search_columns(filled, np.repeat(vectors, 6, axis=0), k=10_000)


def test_columns_of_an_array_of_pixels(client: Client, filled: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    for queries in (grey, grey[..., None], np.stack([grey] * 3, axis=-1)):
        found = client.search_columns(filled, queries, k=3)
        assert list(found) == client.search_batch(filled, list(queries), k=3, metadata=False)
        assert not found.errors


def test_columns_are_awaited_as_well(server: Server, client: Client, filled: str) -> None:
    async def ask() -> NeighborColumns:
        async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
            return await other.search_columns(filled, [png(1), png(2)], k=3)

    assert list(asyncio.run(ask())) == list(client.search_columns(filled, [png(1), png(2)], k=3))


def test_what_is_not_wanted_is_not_sent(client: Client, filled: str) -> None:
    for found in (
        client.search(filled, png(1), metadata=False),
        client.search_matches(filled, png(1), operating_point=ALL, metadata=False),
        client.search_batch(filled, [png(1)], metadata=False)[0],
        next(iter(client.search_stream(filled, [png(1)], metadata=False))),
    ):
        assert ids(found)[0] == "1"
        assert isinstance(found, Neighbors)
        assert (found[0].identity, found[0].metadata, found[0].decision.distance) == ("p1", {}, 0)
    items = list(client.list_items(filled, metadata=False, embedding=True))
    assert [item.metadata for item in items] == [{}] * 8
    assert items[1].embedding is not None
    assert np.array_equal(items[1].embedding, client.embed(ItemName(filled, "1")))
    item = client.get_item(ItemName(filled, "1"), embedding=False)
    assert (item.embedding, item.metadata) == (None, {"n": 1})
    with pytest.raises(FailedPrecondition):
        client.delete_gallery(filled, validate_only=True)
    client.delete_gallery(filled, force=True, validate_only=True)
    assert client.get_gallery(filled).item_count == 8


@pytest.mark.parametrize(
    "effort",
    [Effort(exact=True, recall=0.9), Effort(recall=0.9, nprobe=1), Effort(exact=True, rescore=2), Effort(nprobe=0)],
)
def test_an_effort_is_one_thing(client: Client, filled: str, effort: Effort) -> None:
    with pytest.raises(ValueError, match=r"more than one|at least 1"):
        client.search(filled, png(1), effort=effort)


def test_all_matches(client: Client, filled: str) -> None:
    found = client.search_matches(filled, png(1), operating_point=ALL)
    assert (len(found), found.truncated, found.expected_recall) == (8, False, 1)
    assert ids(found) == ids(client.search(filled, png(1)))
    cut = client.search_matches(filled, png(1), operating_point=ALL, limit=3, filter="metadata.n > 0")
    assert (ids(cut), cut.truncated) == ([each for each in ids(found) if each != "0"][:3], True)
    with pytest.raises(ValueError, match="limit"):
        client.search_matches(filled, png(1), limit=0)
    with pytest.raises(NotFound):
        client.search_matches("nowhere", png(1))


def test_columns_of_neighbours_are_those_of_each(client: Client, filled: str) -> None:
    point = OperatingPoint(threshold=0.5, uncertain_within=0.25)
    answers = [
        client.search(filled, png(1), k=8, operating_point=point),
        client.search_matches(filled, png(1), operating_point=ALL),
        *client.search_batch(filled, [png(2), png(3)], k=3, operating_point=point),
        *client.search_stream(filled, [png(2), png(3)], k=3, operating_point=point, together=2),
        Neighbors(),
    ]
    for found in answers:
        assert isinstance(found, Neighbors)
        before = (found.ids, found.distances, found.matches)  # as they were received
        each = list(found)
        for ids_, distances, matches in (before, (found.ids, found.distances, found.matches)):
            assert ids_ == [neighbor.item.id for neighbor in each]
            assert distances.dtype == np.float32
            assert distances.tolist() == [neighbor.decision.distance for neighbor in each]
            assert matches.tolist() == [neighbor.decision.is_match for neighbor in each]
        assert found == each
        assert len(found) == len(each)
        assert found[:2] == each[:2]
        copied = pickle.loads(pickle.dumps(found))
        assert (copied, copied.generation, copied.expected_recall, copied.truncated) == (
            found,
            found.generation,
            found.expected_recall,
            found.truncated,
        )


def test_a_stream_of_searches(client: Client, filled: str) -> None:
    queries: list[ImageLike] = [png(1), b"no image", ItemName(filled, "2"), *(png(n) for n in range(100))]
    found = list(client.search_stream(filled, queries, k=2))
    assert len(found) == len(queries)
    assert isinstance(found[1], InvalidRequest)
    assert ids(found[0]) == ids(client.search(filled, png(1), k=2))
    assert ids(found[2]) == ids(client.search(filled, ItemName(filled, "2"), k=2))
    with pytest.raises(NotFound):
        list(client.search_stream("nowhere", [png(1)]))


@pytest.mark.parametrize("together", [1, 7, 256])
def test_images_of_a_stream_that_travel_together_are_answered_as_each_alone(
    client: Client, server: Server, filled: str, together: int
) -> None:
    queries: list[ImageLike] = [png(1), b"no image", ItemName(filled, "2"), *(png(n) for n in range(30))]
    expected = list(client.search_stream(filled, queries, k=2))
    found = list(client.search_stream(filled, queries, k=2, together=together))
    assert len(found) == len(queries)
    assert isinstance(found[1], InvalidRequest)
    assert found[:1] + found[2:] == expected[:1] + expected[2:]
    assert not list(client.search_stream(filled, [], together=together))

    async def later() -> AsyncIterator[ImageLike]:
        for query in queries:
            yield query

    async def ask() -> None:
        async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
            answers = [each async for each in other.search_stream(filled, later(), k=2, together=together)]
            assert answers[:1] + answers[2:] == expected[:1] + expected[2:]

    asyncio.run(ask())


@pytest.mark.parametrize("together", [1, 2, 32])
@pytest.mark.parametrize("error", [OSError, asyncio.CancelledError])
def test_images_given_before_their_source_failed_are_answered(
    client: Client, server: Server, filled: str, together: int, error: type[BaseException]
) -> None:
    def broken() -> Iterator[ImageLike]:
        yield from (png(n) for n in range(3))
        raise error("unplugged")

    async def later() -> AsyncIterator[ImageLike]:
        for query in broken():
            yield query

    async def ask(source: Iterator[ImageLike] | AsyncIterator[ImageLike]) -> None:
        async with AsyncClient(server.address) as other:
            async for each in other.search_stream(filled, source, k=1, together=together):
                answered.append(each)  # noqa: PERF401

    answered: list[Neighbors | CallFailed] = []
    for through in (
        lambda: answered.extend(client.search_stream(filled, broken(), k=1, together=together)),
        lambda: asyncio.run(ask(broken())),
        lambda: asyncio.run(ask(later())),
    ):
        answered.clear()
        with pytest.raises(error, match="unplugged"):
            through()
        assert answered == [client.search(filled, png(n), k=1) for n in range(3)]


def test_a_stream_takes_a_sane_number_of_images_together(client: Client, filled: str) -> None:
    for wrong in (0, 257):
        with pytest.raises(ValueError, match="together"):
            client.search_stream(filled, [png(1)], together=wrong)


def test_a_stream_of_pairs_and_a_batch_of_embeddings(client: Client, server: Server, filled: str) -> None:
    pairs: list[tuple[ImageLike, ImageLike]] = [(png(1), ItemName(filled, "1")), (png(1), b"no image")]
    pairs += [(png(n % 5), png(2)) for n in range(100)]
    decided = list(client.verify_stream(pairs, operating_point=ALL))
    assert isinstance(decided[1], InvalidRequest)
    assert [decided[0], *decided[2:]] == [client.verify(a, b, operating_point=ALL) for a, b in [pairs[0], *pairs[2:]]]
    embedded = client.embed_batch([png(1), b"no image", *(png(n % 3) for n in range(300))])
    assert isinstance(embedded[1], InvalidRequest)
    assert len(embedded) == 302
    assert np.array_equal(embedded[0], client.embed(png(1)))
    assert np.array_equal(embedded[-1], client.embed(png(299 % 3)))

    async def ask() -> None:
        async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
            answers = [each async for each in other.verify_stream(pairs, operating_point=ALL)]
            assert [answers[0], *answers[2:]] == [decided[0], *decided[2:]]
            assert np.array_equal((await other.embed_batch([png(1)]))[0], embedded[0])

    asyncio.run(ask())


def test_an_image_that_cannot_be_read_ends_a_stream_with_its_error(client: Client, filled: str, tmp_path: Path) -> None:
    answered: list[Neighbors | CallFailed] = []
    with pytest.raises(FileNotFoundError):
        answered.extend(client.search_stream(filled, [png(1), tmp_path / "missing.png", png(2)]))
    assert len(answered) <= 1


def test_a_stream_may_be_left_early(client: Client, filled: str) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield png(1)

    stream = client.search_stream(filled, endless(), k=1)
    assert ids(next(stream)) == ["1"]
    stream.close()  # type: ignore[attr-defined]
    assert client.search(filled, png(1), k=1)


def test_an_import(client: Client, gallery: str) -> None:
    items = [NewItem(id=f"{n:03}", image=png(n) if n != 5 else b"no image") for n in range(40)]
    told = list(client.import_items(gallery, items))
    assert (told[-1].acknowledged, told[-1].stored) == (40, 39)
    (failure,) = [failure for each in told for failure in each.failures]
    assert failure.index == 5
    assert isinstance(failure.error, InvalidRequest)
    assert client.get_gallery(gallery).item_count == 39


def test_items_are_written_by_parts_and_deleted_by_etag(client: Client, filled: str) -> None:
    name = ItemName(filled, "1")
    stored = client.update_item(filled, NewItem(id="1", identity="other"), fields=["identity"])
    item = client.get_item(name)
    assert (item.identity, item.metadata, item.etag) == ("other", {"n": 1}, stored.etag)
    with pytest.raises(NotFound):
        client.update_item(filled, NewItem(id="99", image=png(1)), allow_missing=False)
    with pytest.raises(Conflict):
        client.delete_item(name, etag="stale")
    client.delete_item(name, etag=stored.etag)
    with pytest.raises(NotFound):
        client.get_item(name)
    client.delete_item(name, allow_missing=True)


def test_a_purge(client: Client, filled: str) -> None:
    looked = client.purge_items(filled, "identity = p1")
    assert (looked.count, looked.sample[0]) == (4, ItemName(filled, "1"))
    assert client.purge_items(filled, "identity = p1", force=True).count == 4
    assert [item.name.id for item in client.list_items(filled)] == ["0", "2", "4", "6"]


def test_index_settings(client: Client, filled: str) -> None:
    before = client.get_gallery(filled)
    assert before.index == IndexSettings()
    settings = IndexSettings(min_recall=0.9, structure="exact", memory_bytes=10**9, vectors="float16")
    after = client.update_gallery(filled, settings, etag=before.etag)
    assert (after.index, client.get_gallery(filled).index) == (settings, settings)
    with pytest.raises(Conflict):
        client.update_gallery(filled, settings, etag=before.etag)


def test_long_work(client: Client, filled: str) -> None:
    begun = client.reindex_gallery(filled, index=IndexSettings(structure="exact"))
    assert (begun.verb, begun.target) == ("reindex", filled)
    done = client.wait_operation(begun.id)
    assert done.done
    assert done.error is None
    assert done.gallery is not None
    assert done.gallery.stats is not None
    assert [segment.rows for segment in done.gallery.stats.segments] == [8]
    assert client.get_operation(begun.id) == done
    assert done in list(client.list_operations())
    client.cancel_operation(begun.id)  # too late, and no error

    copied = client.wait_operation(client.create_snapshot(filled, "one").id).snapshot
    assert copied is not None
    assert list(client.list_snapshots(filled)) == [copied]
    other = f"{filled}-r"
    restored = client.wait_operation(client.restore_gallery(filled, "one", other).id)
    assert restored.gallery is not None
    assert restored.gallery.item_count == 8
    client.delete_gallery(other, force=True)
    client.delete_snapshot(filled, "one")
    with pytest.raises(InvalidRequest, match="already"):
        client.migrate_gallery(filled, other)


def test_a_check_through_both_clients(client: Client, server: Server, filled: str) -> None:
    client.wait_operation(client.reindex_gallery(filled).id)
    (path,) = (server._settings.galleries / filled).glob("segments/*/vectors.f32")
    flip_in_place(path, 20)
    found = client.wait_operation(client.verify_gallery(filled).id).verification
    assert found is not None
    assert (found.gallery, found.item_count, found.sound) == (filled, 8, False)
    assert (found.problems[0].path, found.problems[0].repaired) == (f"segments/{path.parent.name}", False)

    async def mended() -> Verification | None:
        async with AsyncClient(server.address) as other:
            return (await other.wait_operation((await other.verify_gallery(filled, repair=True)).id)).verification

    repaired = asyncio.run(mended())
    assert repaired is not None
    assert (repaired.sound, {problem.repaired for problem in repaired.problems}) == (True, {True})


def test_aliases(client: Client, filled: str) -> None:
    alias = client.put_alias(f"{filled}-now", filled)
    assert client.get_alias(alias.id) == alias
    assert alias in list(client.list_aliases())
    assert ids(client.search(alias.id, png(1))) == ids(client.search(filled, png(1)))
    client.delete_alias(alias.id)
    with pytest.raises(NotFound):
        client.get_alias(alias.id)


def test_the_asynchronous_client_streams_as_well(client: Client, server: Server, filled: str, tmp_path: Path) -> None:
    expected = client.search_matches(filled, png(1), operating_point=ALL)

    async def imported(other: AsyncClient) -> list[Imported]:
        return [told async for told in other.import_items(filled, [NewItem(id="0", image=png(0))])]

    async def failed(stream: AsyncIterator[Neighbors | CallFailed]) -> None:
        async for _ in stream:
            pass

    async def ask() -> None:
        async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
            found = await other.search_matches(filled, png(1), operating_point=ALL)
            assert (found, found.expected_recall) == (expected, 1)
            assert [told.stored for told in await imported(other)] == [1]
            answers = [each async for each in other.search_stream(filled, [png(n) for n in range(30)], k=1)]
            assert [ids(each) for each in answers[:8]] == [[f"{n}"] for n in range(8)]
            assert len(answers) == 30
            with pytest.raises(FileNotFoundError):
                await failed(other.search_stream(filled, [tmp_path / "missing.png"]))
            with pytest.raises(NotFound):
                await failed(other.search_stream("nowhere", [png(1)]))
        async with AsyncClient("127.0.0.1:1") as nobody:
            with pytest.raises(Unavailable):
                await failed(nobody.search_stream(filled, [png(1)]))

    asyncio.run(ask())
