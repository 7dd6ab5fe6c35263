"""The client against a real server; what both clients share is tried through both."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

import lookalike
from lookalike import (
    AlreadyExists,
    AsyncClient,
    CallFailed,
    Client,
    Conflict,
    Decision,
    FailedPrecondition,
    Feedback,
    InvalidRequest,
    Item,
    ItemName,
    NewItem,
    NotFound,
    OperatingPoint,
    ResourceExhausted,
    Unavailable,
    Verdict,
)
from lookalike._calls.match import MAX_PAIRS
from lookalike.v1 import common_pb2, match_pb2
from service.server import Server
from tests.nested import nested
from tests.service.harness import DIM, MARGIN, MAX_MESSAGE_BYTES, png


def fill(client: Client, gallery: str, count: int) -> list[Item]:
    outcomes = client.update_items(
        gallery, [NewItem(id=f"{n:04}", image=png(n), identity=f"p{n % 3}") for n in range(count)]
    )
    items = [outcome for outcome in outcomes if isinstance(outcome, Item)]
    assert len(items) == count
    return items


class TestVerify:
    def test_gives_the_whole_decision(self, client: Client) -> None:
        decision = client.verify(png(1), png(2), operating_point=OperatingPoint(name="strict"))
        assert decision.threshold == 0.125
        assert (decision.far, decision.far_upper95, decision.frr) == (0.0, 0.02, 0.6)
        assert decision.calibration == 3
        assert decision.model.startswith("toy-")
        assert decision.is_match is (decision.distance <= 0.125)
        assert decision.signed_margin == decision.threshold - decision.distance

    def test_every_way_to_give_an_image_agrees_bit_for_bit(self, client: Client, gallery: str, tmp_path: Path) -> None:
        client.update_items(gallery, [NewItem(id="a", image=png(1))])
        path = tmp_path / "a.png"
        path.write_bytes(png(1))
        embedding = client.embed(png(1))
        assert embedding.shape == (DIM,)
        assert embedding.dtype == np.float32
        ways = [png(1), path, str(path), embedding, embedding.astype(np.float64), ItemName(gallery, "a")]
        decisions = {client.verify(way, png(2)) for way in ways}
        assert len(decisions) == 1

    def test_operating_points_reach_the_server(self, client: Client) -> None:
        a, b = png(1), png(2)
        assert client.verify(a, b).threshold == MARGIN
        assert client.verify(a, b, operating_point=OperatingPoint(threshold=1.5)).threshold == 1.5
        assert client.verify(a, b, operating_point=OperatingPoint(target_far=0.01)).threshold == MARGIN
        wide = OperatingPoint(threshold=1.0, uncertain_within=2.0)
        assert client.verify(a, b, operating_point=wide).verdict is Verdict.UNCERTAIN

    def test_a_rate_of_searches_is_tightened_for_the_gallery(self, client: Client, gallery: str) -> None:
        fill(client, gallery, 3)
        rate = OperatingPoint(target_fpir=0.03)  # 0.01 a comparison
        assert [each.decision.threshold for each in client.search(gallery, png(1), operating_point=rate)] == [
            MARGIN
        ] * 3
        fill(client, gallery, 5)
        (found,) = client.search_batch(gallery, [png(1)], operating_point=rate)
        assert not isinstance(found, CallFailed)
        assert {each.decision.threshold for each in found} == {0.125}
        with pytest.raises(InvalidRequest, match="a rate of searches"):
            client.verify(png(1), png(2), operating_point=rate)

    def test_threshold_zero_is_not_taken_for_unset(self, client: Client) -> None:
        assert client.verify(png(1), png(2), operating_point=OperatingPoint(threshold=0.0)).threshold == 0.0

    def test_two_thresholds_are_refused_before_anything_is_sent(self, client: Client) -> None:
        with pytest.raises(ValueError, match="target_far and threshold"):
            client.verify(png(1), png(2), operating_point=OperatingPoint(target_far=0.1, threshold=1.0))

    def test_an_array_that_is_no_embedding_is_refused(self, client: Client) -> None:
        with pytest.raises(ValueError, match=r"floating-point \[D\]"):
            client.verify(np.zeros((8, 8)), png(2))

    def test_a_missing_file_is_an_ordinary_error(self, client: Client, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            client.verify(tmp_path / "none.png", png(2))


class TestBatches:
    def test_a_bad_pair_fails_alone_and_in_its_place(self, client: Client) -> None:
        good, bad, last = client.verify_batch([(png(1), png(2)), (b"no image", png(2)), (png(1), png(1))])
        assert isinstance(good, Decision)
        assert good == client.verify(png(1), png(2))
        assert isinstance(bad, InvalidRequest)
        assert bad.reason == "INVALID_IMAGE"
        assert isinstance(last, Decision)
        assert last.distance == 0.0

    def test_more_elements_than_one_call_takes_are_sent_in_several(self, client: Client) -> None:
        embedding, other = client.embed(png(1)), client.embed(png(2))
        pairs = [(embedding, other if n % 2 else embedding) for n in range(2 * MAX_PAIRS + 3)]
        decisions = client.verify_batch(pairs)
        assert [isinstance(found, Decision) and found.distance == 0.0 for found in decisions] == [
            n % 2 == 0 for n in range(len(pairs))
        ]

    def test_more_bytes_than_one_message_takes_are_sent_in_several(self, client: Client, gallery: str) -> None:
        image = png(5, size=(300, 300))
        count = MAX_MESSAGE_BYTES // len(image) + 3
        outcomes = client.update_items(gallery, (NewItem(id=f"{n}", image=image) for n in range(count)))
        assert [outcome.name.id for outcome in outcomes if isinstance(outcome, Item)] == [f"{n}" for n in range(count)]

    @pytest.mark.parametrize("at", [(0,), (2,), (0, 1, 4), (5, 7), (0, 1, 2, 3, 4, 5, 6, 7)])
    def test_an_element_over_the_limit_fails_alone_and_in_its_place(
        self, client: Client, gallery: str, server: Server, at: tuple[int, ...]
    ) -> None:
        huge = bytes(MAX_MESSAGE_BYTES)
        images = [huge if n in at else png(n) for n in range(8)]
        told = (
            rf"alone is over the size limit \(\d+ vs\. {MAX_MESSAGE_BYTES}\), in bytes; send smaller images, or raise"
        )

        def check(results: Sequence[object]) -> None:
            assert [n for n, result in enumerate(results) if isinstance(result, CallFailed)] == list(at)
            for n in at:
                assert isinstance(results[n], ResourceExhausted)
                assert re.search(told, str(results[n]))

        embeddings = client.embed_batch(iter(images))
        check(embeddings)
        for n, embedding in enumerate(embeddings):
            if n not in at:
                assert np.array_equal(embedding, client.embed(png(n)))  # type: ignore[arg-type]
        check(client.verify_batch((image, png(1)) for image in images))
        check(client.update_items(gallery, (NewItem(id=f"{n}", image=image) for n, image in enumerate(images))))
        assert [item.name.id for item in client.list_items(gallery)] == [f"{n}" for n in range(8) if n not in at]
        rows = client.search_batch(gallery, images, k=3)
        check(rows)
        columns = list(client.search_columns(gallery, images, k=3, metadata=True))
        check(columns)
        assert [each for n, each in enumerate(columns) if n not in at] == [
            each for n, each in enumerate(rows) if n not in at
        ]

        async def ask() -> None:
            async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
                check(await other.embed_batch(images))
                check(list(await other.search_columns(gallery, images, k=3)))

        asyncio.run(ask())

    def test_elements_over_the_limit_stay_in_place_among_several_calls(self, client: Client) -> None:
        image, huge = png(5, size=(300, 300)), bytes(MAX_MESSAGE_BYTES)
        count = 3 * MAX_MESSAGE_BYTES // len(image)
        over = {0, 1, count // 2, count - 1}
        embeddings = client.embed_batch(huge if n in over else image for n in range(count))
        assert {n for n, result in enumerate(embeddings) if isinstance(result, ResourceExhausted)} == over
        assert sum(isinstance(result, np.ndarray) for result in embeddings) == count - len(over)

    def test_the_limit_is_that_of_the_message(self, client: Client) -> None:
        """What does not fit beside others may fit alone, to the last byte."""
        whole = match_pb2.BatchEmbedRequest(images=[common_pb2.ImageInput(encoded=bytes(MAX_MESSAGE_BYTES))])
        most = 2 * MAX_MESSAGE_BYTES - whole.ByteSize()
        sent, refused = client.embed_batch([bytes(most), bytes(most + 1)])
        assert isinstance(sent, InvalidRequest)
        assert sent.reason == "INVALID_IMAGE"
        assert isinstance(refused, ResourceExhausted)
        assert f"({MAX_MESSAGE_BYTES + 1} vs. {MAX_MESSAGE_BYTES})" in str(refused)

    def test_the_limit_of_columns_is_that_of_the_message(self, client: Client, gallery: str) -> None:
        def errors(size: int) -> Mapping[int, CallFailed]:
            return client.search_columns(gallery, [bytes(size)], k=3).errors

        (over,) = errors(MAX_MESSAGE_BYTES).values()
        too_much = int(re.findall(r"\((\d+) vs", str(over))[0]) - MAX_MESSAGE_BYTES
        (sent,), (refused,) = (errors(MAX_MESSAGE_BYTES - too_much + more).values() for more in (0, 1))
        assert isinstance(sent, InvalidRequest)
        assert sent.reason == "INVALID_IMAGE"
        assert isinstance(refused, ResourceExhausted)
        with pytest.raises(ResourceExhausted, match="fewer at once"):
            client.search_columns(gallery, [bytes(MAX_MESSAGE_BYTES // 2)] * 3)

    def test_feedback_over_the_limit_is_not_recorded_in_part(self, client: Client, server: Server) -> None:
        decision = client.verify(png(1), png(2))
        cases = [Feedback(case_id=case_id, decision=decision, is_match=True) for case_id in ("small", "large" * 10_000)]
        with Client(server.address, max_message_bytes=10_000) as other:
            with pytest.raises(ResourceExhausted, match=r"alone is over the size limit \(50\d+ vs\. 10000\)"):
                other.record_feedback(cases)
            assert "small" not in {recorded.case_id for recorded in other.list_feedback()}

    def test_more_neighbors_than_one_call_gives_are_asked_for_in_several(self, client: Client, gallery: str) -> None:
        fill(client, gallery, 3)
        query = client.embed(png(9))
        results = client.search_batch(gallery, [query] * 25, k=10_000)
        assert results == [client.search(gallery, query)] * 25

    def test_an_empty_batch_asks_nothing(self, client: Client) -> None:
        assert client.verify_batch([]) == []

    def test_search_batch_agrees_with_search(self, client: Client, gallery: str) -> None:
        fill(client, gallery, 7)
        queries = [png(100), b"no image", ItemName(gallery, "0002"), png(3)]
        results = client.search_batch(gallery, queries, k=3)
        assert isinstance(results[1], InvalidRequest)
        for query, result in zip(queries, results, strict=True):
            if not isinstance(result, CallFailed):
                assert result == client.search(gallery, query, k=3)


class TestGalleries:
    def test_life_of_a_gallery(self, client: Client) -> None:
        made = client.create_gallery("life")
        assert (made.id, made.item_count, made.damage) == ("life", 0, "")
        with pytest.raises(AlreadyExists):
            client.create_gallery("life")
        fill(client, "life", 2)
        assert client.get_gallery("life").item_count == 2
        assert "life" in [gallery.id for gallery in client.list_galleries()]
        with pytest.raises(FailedPrecondition):
            client.delete_gallery("life")
        client.delete_gallery("life", force=True)
        with pytest.raises(NotFound):
            client.get_gallery("life")

    def test_an_item_comes_back_as_it_was_stored(self, client: Client, gallery: str) -> None:
        metadata = {"source": "scan", "page": 3, "tags": ["a", None, True, 2**53], "nested": {"x": 0.5, "y": [-7]}}
        (stored,) = client.update_items(gallery, [NewItem(id="ä b", image=png(1), identity="x", metadata=metadata)])
        assert isinstance(stored, Item)
        assert stored.embedding is None
        item = client.get_item(ItemName(gallery, "ä b"))
        assert (item.identity, item.metadata, item.etag) == ("x", metadata, stored.etag)
        assert json.dumps(item.metadata, sort_keys=True) == json.dumps(metadata, sort_keys=True)  # 3, and not 3.0
        assert item.update_time.tzinfo is not None
        assert item.embedding is not None
        np.testing.assert_array_equal(item.embedding, client.embed(png(1)))

    def test_metadata_takes_numpys_numbers_and_names_what_json_has_no_form_for(
        self, client: Client, gallery: str
    ) -> None:
        metadata = {"a": np.int64(3), "b": (np.float32(0.5), np.bool_(True)), "c": {"d": np.array([1, 2])[0]}}
        (stored,) = client.update_items(gallery, [NewItem(id="n", image=png(1), metadata=metadata)])  # type: ignore[dict-item]
        assert isinstance(stored, Item)
        assert client.get_item(stored.name).metadata == {"a": 3, "b": [0.5, True], "c": {"d": 1}}
        for wrong, message in (
            ({"a": {"tags": {1, 2}}}, "'tags' holds a set"),
            ({"a": [b"x"]}, "'a' holds a bytes"),
            ({"a": np.zeros(2)}, "'a' holds a ndarray"),
            ({"a": {3: 4}}, "strings for keys; got 3"),
        ):
            with pytest.raises(TypeError, match=message):
                client.update_items(gallery, [NewItem(id="n", image=png(1), metadata=wrong)])  # type: ignore[arg-type]

    def test_metadata_that_nothing_can_carry_is_named_and_what_the_server_does_not_store_fails_alone(
        self, client: Client, gallery: str
    ) -> None:
        for wrong in (nested(31), nested(600), {"a": [10**400]}):
            with pytest.raises(ValueError, match=r"'(inner|a)'"):
                client.update_items(gallery, [NewItem(id="n", image=png(1), metadata=wrong)])
        sent = [NewItem(id=f"{depth}", image=png(1), metadata=nested(depth)) for depth in (16, 17, 30)]
        stored, *refused = client.update_items(gallery, sent)
        assert isinstance(stored, Item)
        assert stored.metadata == nested(16)
        for error in refused:
            assert isinstance(error, InvalidRequest)
            assert "nested 16 deep at most" in str(error)

    def test_listing_goes_on_over_pages(self, client: Client, gallery: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(client, gallery, 7)
        monkeypatch.setattr("lookalike._calls.items.PAGE_SIZE", 2)
        assert [item.name.id for item in client.list_items(gallery)] == [f"{n:04}" for n in range(7)]

    def test_a_stale_etag_is_a_conflict(self, client: Client, gallery: str) -> None:
        (first,) = fill(client, gallery, 1)
        (second,) = client.update_items(gallery, [NewItem(id="0000", image=png(9), etag=first.etag)])
        assert isinstance(second, Item)
        (refused,) = client.update_items(gallery, [NewItem(id="0000", image=png(9), etag=first.etag)])
        assert isinstance(refused, Conflict)

    def test_without_allow_missing_an_unknown_item_fails_alone(self, client: Client, gallery: str) -> None:
        fill(client, gallery, 1)
        items = [NewItem(id="0000", image=png(4)), NewItem(id="new", image=png(5))]
        known, unknown = client.update_items(gallery, items, allow_missing=False)
        assert isinstance(known, Item)
        assert isinstance(unknown, NotFound)

    def test_delete_items_is_all_or_nothing(self, client: Client, gallery: str) -> None:
        fill(client, gallery, 3)
        with pytest.raises(NotFound):
            client.delete_items(gallery, ["0000", "none"])
        assert client.delete_items(gallery, ["0000", "none"], allow_missing=True) == 1
        assert [item.name.id for item in client.list_items(gallery)] == ["0001", "0002"]

    def test_search_leaves_out_the_item_itself(self, client: Client, gallery: str) -> None:
        fill(client, gallery, 4)
        found = client.search(gallery, ItemName(gallery, "0001"))
        assert sorted(neighbor.item.id for neighbor in found) == ["0000", "0002", "0003"]
        assert found[0].identity is not None
        assert [n.decision.distance for n in found] == sorted(n.decision.distance for n in found)

    def test_k_zero_is_not_taken_for_the_default(self, client: Client, gallery: str) -> None:
        with pytest.raises(ValueError, match="k must be at least 1"):
            client.search(gallery, png(1), k=0)
        with pytest.raises(ValueError, match="k must be at least 1"):
            client.search_batch(gallery, [png(1)], k=0)


class TestModels:
    def test_the_whole_calibration_is_readable(self, client: Client) -> None:
        model = client.get_model()
        assert model.active
        assert model.embedding_dim == DIM
        calibration = model.calibration
        assert calibration.learned_margin == MARGIN
        assert calibration.named_points == {"learned-margin": MARGIN, "strict": 0.125}
        assert [row.threshold for row in calibration.curve] == [0.125, MARGIN, 2.0]
        assert calibration.smallest_supported_far == 3 / 600
        assert [listed.id for listed in client.list_models()] == [model.id]
        assert client.get_model(model.id) == model


class TestErrors:
    def test_a_bad_image_names_its_field_and_reason(self, client: Client) -> None:
        with pytest.raises(InvalidRequest) as caught:
            client.verify(png(1), b"no image")
        error = caught.value
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.reason == "INVALID_IMAGE"
        assert list(error.fields) == ["b.encoded"]
        assert "\n" not in str(error)

    def test_an_unsupported_rate_is_refused(self, client: Client) -> None:
        with pytest.raises(InvalidRequest, match="smallest rate"):
            client.verify(png(1), png(2), operating_point=OperatingPoint(target_far=1e-9))

    def test_a_message_over_the_limit_says_so(self, server: Server) -> None:
        with (
            Client(server.address) as client,
            pytest.raises(ResourceExhausted, match=r"over the size limit \(\d+ vs\. \d+\); send smaller"),
        ):
            client.embed(bytes(2 * MAX_MESSAGE_BYTES))

    def test_nobody_there(self) -> None:
        with Client("127.0.0.1:1", timeout=0.5) as client, pytest.raises(CallFailed, match=r"127\.0\.0\.1:1"):
            client.get_model()
        with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match="was not serving after"):
            client.wait_until_ready(0.3)

    @pytest.mark.parametrize(
        "settings", [{"timeout": 0}, {"timeout": -1.0}, {"timeout": None}, {"max_message_bytes": 100}]
    )
    def test_senseless_settings_are_refused(self, settings: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="must be"):
            Client("127.0.0.1:1", **settings)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must name a server"):
            Client("")


class TestAsync:
    def test_answers_what_the_blocking_client_answers(self, client: Client, server: Server, gallery: str) -> None:
        fill(client, gallery, 5)

        async def ask() -> None:
            async with AsyncClient(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as other:
                await other.wait_until_ready(10)
                assert await other.is_serving()
                assert await other.verify(png(1), png(2)) == client.verify(png(1), png(2))
                assert await other.search(gallery, png(9)) == client.search(gallery, png(9))
                listed = [item.name async for item in other.list_items(gallery)]
                assert listed == [item.name for item in client.list_items(gallery)]
                pairs = [(png(1), png(2)), (png(1), b"no image")]
                good, bad = await other.verify_batch(pairs)
                assert good == client.verify(png(1), png(2))
                assert isinstance(bad, InvalidRequest)
                many = await asyncio.gather(*(other.verify(png(n), png(n + 1)) for n in range(20)))
                assert many == [client.verify(png(n), png(n + 1)) for n in range(20)]
                with pytest.raises(NotFound):
                    await other.get_gallery("none")

        asyncio.run(ask())

    def test_nobody_there(self) -> None:
        async def ask() -> None:
            async with AsyncClient("127.0.0.1:1", timeout=0.5) as nobody:
                with pytest.raises(CallFailed):
                    await nobody.get_model()
                with pytest.raises(Unavailable):
                    await nobody.wait_until_ready(0.3)

        asyncio.run(ask())

    def test_has_every_method_of_the_blocking_client(self) -> None:
        def public(kind: type) -> set[str]:
            return {name for name in dir(kind) if not name.startswith("_")}

        assert public(Client) == public(AsyncClient)


def test_exported_names_are_sorted_and_exist() -> None:
    assert lookalike.__all__ == sorted(lookalike.__all__)
    assert all(hasattr(lookalike, name) for name in lookalike.__all__)
