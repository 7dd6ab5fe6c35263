"""What travels and how: method names, retries, and what the base install imports."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress

import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from lookalike import (
    AsyncClient,
    CallFailed,
    Client,
    Conflict,
    Decision,
    FailedPrecondition,
    Feedback,
    IndexSettings,
    ItemName,
    NewItem,
    ResourceExhausted,
    ServerError,
    Unavailable,
    Verdict,
    _methods,
)
from lookalike._calls import match
from lookalike.errors import from_status
from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2

DECISION = Decision(
    verdict=Verdict.MATCH,
    distance=0.25,
    threshold=0.5,
    match_probability=0.9,
    far=0.1,
    far_upper95=0.2,
    frr=0.1,
    model="m",
    calibration=1,
)


class Flaky(grpc.GenericRpcHandler):
    """Ends the first `failures` calls of each method with `code`, then answers with no bytes."""

    def __init__(self, code: grpc.StatusCode, failures: int) -> None:
        self._code, self._failures = code, failures
        self._lock = threading.Lock()
        self.seen: dict[str, int] = {}
        self.requests: list[bytes] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            with self._lock:
                self.requests.append(request)
                self.seen[details.method] = self.seen.get(details.method, 0) + 1
                fails = self.seen[details.method] <= self._failures
            if fails:
                context.abort(self._code, "not now")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def serving(handler: Flaky) -> Iterator[Client]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        server.stop(None).wait()


def test_reads_are_repeated_while_the_server_is_unavailable() -> None:
    with serving(handler := Flaky(grpc.StatusCode.UNAVAILABLE, failures=2)) as client:
        client.get_gallery("g")
        assert list(client.list_items("g")) == []
        assert client.search("g", b"image") == []
    assert handler.seen == {
        "/lookalike.v1.GalleryService/GetGallery": 3,
        "/lookalike.v1.GalleryService/ListItems": 3,
        "/lookalike.v1.SearchService/Search": 3,
    }


def test_a_large_read_is_repeated_too() -> None:
    with serving(Flaky(grpc.StatusCode.UNAVAILABLE, failures=1)) as client:
        assert client.search("g", bytes(2 * 2**20)) == []


def test_a_write_is_repeated_as_the_same_request() -> None:
    with serving(handler := Flaky(grpc.StatusCode.UNAVAILABLE, failures=1)) as client:
        client.delete_items("g", ["a"])
        client.delete_items("g", ["a"])
    first, again, second = (gallery_pb2.BatchDeleteItemsRequest.FromString(data) for data in handler.requests)
    assert first == again
    assert uuid.UUID(first.request_id).version == 4
    assert second.request_id != first.request_id


def test_every_write_can_be_repeated_and_imports_are_not() -> None:
    with serving(handler := Flaky(grpc.StatusCode.UNAVAILABLE, failures=1)) as client:
        for write in (
            lambda: client.create_gallery("g"),
            lambda: client.update_gallery("g", IndexSettings()),
            lambda: client.delete_gallery("g"),
            lambda: client.update_item("g", NewItem(id="a", image=b"")),
            lambda: client.delete_item(ItemName("g", "a")),
            lambda: client.purge_items("g", "*", force=True),
            lambda: client.put_alias("a", "g"),
            lambda: client.delete_alias("a"),
            lambda: client.delete_snapshot("g", "s"),
        ):
            with suppress(ValueError, OverflowError):  # an empty answer does not name what it tells of
                write()
        assert set(handler.seen.values()) == {2}
        assert b"-" in min(handler.requests, key=len)  # of the id
        with pytest.raises(Unavailable):
            list(client.import_items("g", [NewItem(id="a", image=b"")]))
    assert handler.seen["/lookalike.v1.GalleryService/ImportItems"] == 1


def test_other_failures_are_not_repeated() -> None:
    with serving(handler := Flaky(grpc.StatusCode.INTERNAL, failures=9)) as client, pytest.raises(ServerError):
        client.get_gallery("g")
    assert list(handler.seen.values()) == [1]


def test_a_short_answer_to_a_batch_is_refused() -> None:
    with serving(Flaky(grpc.StatusCode.OK, failures=0)) as client, pytest.raises(CallFailed, match="0 of 1 elements"):
        client.verify_batch([(b"a", b"b")])


def test_a_batch_that_fits_into_no_message_asks_nobody() -> None:
    huge = bytes(100_000)

    async def ask(target: str) -> None:
        async with AsyncClient(target, max_message_bytes=10_000) as client:
            check(await client.verify_batch([(huge, huge)]))

    def check(results: Sequence[object]) -> None:
        assert [type(result) for result in results] == [ResourceExhausted] * len(results)

    with serving(handler := Flaky(grpc.StatusCode.OK, failures=0)) as client:
        with Client(client.target, max_message_bytes=10_000) as small:
            check(small.embed_batch([huge] * 3))
            check(small.search_batch("g", [huge]))
        asyncio.run(ask(client.target))
    assert handler.seen == {}


def test_every_method_of_the_contract_is_called_by_its_name() -> None:
    contract = {
        f"/{service.full_name}/{method.name}"
        for module in (
            alias_pb2,
            feedback_pb2,
            gallery_pb2,
            match_pb2,
            model_pb2,
            operations_pb2,
            search_pb2,
            upkeep_pb2,
        )
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    } - {"/google.longrunning.Operations/DeleteOperation"}
    with serving(handler := Flaky(grpc.StatusCode.ABORTED, failures=1)) as client:
        for ask in (
            lambda: client.verify(b"", b""),
            lambda: client.verify_batch([(b"", b"")]),
            lambda: list(client.verify_stream([(b"", b"")])),
            lambda: client.embed(b""),
            lambda: client.embed_batch([b""]),
            lambda: client.search("g", b""),
            lambda: client.search_batch("g", [b""]),
            lambda: client.create_gallery("g"),
            lambda: client.get_gallery("g"),
            lambda: list(client.list_galleries()),
            lambda: client.delete_gallery("g"),
            lambda: client.get_item(ItemName("g", "a")),
            lambda: list(client.list_items("g")),
            lambda: client.update_items("g", [NewItem(id="a", image=b"")]),
            lambda: client.delete_items("g", ["a"]),
            lambda: client.search_matches("g", b""),
            lambda: list(client.search_stream("g", [b""])),
            lambda: client.update_gallery("g", IndexSettings()),
            lambda: client.update_item("g", NewItem(id="a", image=b"")),
            lambda: list(client.import_items("g", [NewItem(id="a", image=b"")])),
            lambda: client.delete_item(ItemName("g", "a")),
            lambda: client.purge_items("g", "*"),
            lambda: client.put_alias("a", "g"),
            lambda: client.get_alias("a"),
            lambda: list(client.list_aliases()),
            lambda: client.delete_alias("a"),
            lambda: client.reindex_gallery("g"),
            lambda: client.verify_gallery("g"),
            lambda: client.migrate_gallery("g", "h"),
            lambda: client.create_snapshot("g", "s"),
            lambda: list(client.list_snapshots("g")),
            lambda: client.delete_snapshot("g", "s"),
            lambda: client.restore_gallery("g", "s", "h"),
            lambda: client.get_operation("0"),
            lambda: client.wait_operation("0"),
            lambda: client.cancel_operation("0"),
            lambda: list(client.list_operations()),
            client.get_model,
            lambda: list(client.list_models()),
            lambda: client.activate_model("m"),
            lambda: client.record_feedback([Feedback(case_id="a", decision=DECISION, is_match=True)]),
            lambda: list(client.list_feedback()),
            lambda: client.delete_feedback("1"),
            lambda: client.deactivate_model("m"),
        ):
            with pytest.raises(Conflict):
                ask()
    assert set(handler.seen) == contract


def test_a_rich_status_becomes_a_typed_error() -> None:
    def packed(detail: object) -> any_pb2.Any:
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)  # type: ignore[arg-type]
        return wrapped

    violation = error_details_pb2.BadRequest.FieldViolation(field="a.b", description="too long")
    error = from_status(
        status_pb2.Status(
            code=code_pb2.FAILED_PRECONDITION,
            message="not\nnow",
            details=[
                packed(error_details_pb2.BadRequest(field_violations=[violation])),
                packed(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))),
                packed(error_details_pb2.ErrorInfo(reason="MODEL_MISMATCH")),
                packed(error_details_pb2.Help()),
            ],
        )
    )
    assert type(error) is FailedPrecondition
    assert (str(error), error.reason, error.fields, error.retry_after) == (
        "not now",
        "MODEL_MISMATCH",
        {"a.b": "too long"},
        1.5,
    )
    elsewhere = pickle.loads(pickle.dumps(error))
    assert (type(elsewhere), str(elsewhere), vars(elsewhere)) == (type(error), str(error), vars(error))


def test_a_status_of_an_unknown_code_is_a_server_error() -> None:
    assert type(from_status(status_pb2.Status(code=999))) is ServerError


def test_importing_the_client_brings_in_nothing_heavy() -> None:
    program = (
        "import sys, lookalike; lookalike.Client('127.0.0.1:1');"
        "heavy = {'torch', 'torchvision', 'faiss', 'pydantic', 'typer', 'rich', 'PIL', 'pyarrow', 'sklearn', "
        "'embedding', 'index', 'service', 'training'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_methods_show_their_parameters() -> None:
    with Client("127.0.0.1:1") as client:
        assert list(inspect.signature(client.list_items).parameters) == ["gallery", "filter", "metadata", "embedding"]
        assert client.verify.__doc__ == match.verify.__doc__
    assert isinstance(Client.verify, _methods.Unary)
