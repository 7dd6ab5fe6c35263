"""The audit log: what stands in it, that it survives rotation, and that nothing of what is sent gets into any log."""

from __future__ import annotations

import base64
import errno
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf import struct_pb2
from structlog.testing import capture_logs

from embedding.errors import InvalidInput
from lookalike.v1 import common_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2
from service.access.audit import Audit
from service.access.key_ring import KeyRing
from service.server import Server
from service.settings import Settings
from tests.service.harness import Loop, Stubs, connected, encoded, info, png, refused, rich, served, stored, unit


@dataclass
class Audited:
    path: Path
    server: Server
    stubs: Stubs
    metadata: tuple[tuple[str, str], ...]

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The lines, once there are so many: the last call may be answered before it is written down."""
        deadline = time.monotonic() + 10
        while len(text := self.path.read_text().splitlines() if self.path.exists() else []) < count:
            assert time.monotonic() < deadline, text
            time.sleep(0.01)
        return [json.loads(line) for line in text]


@pytest.fixture
def audited(loop: Loop, settings: Settings, tmp_path: Path) -> Iterator[Audited]:
    _, key = KeyRing(tmp_path / "keys.json").create(
        "shop", scopes=["read", "write", "admin"], galleries=["g", "mine"], per_second=1000
    )
    own = settings.model_copy(
        update={
            "galleries": tmp_path / "galleries",
            "keys": tmp_path / "keys.json",
            "audit_log": tmp_path / "audit.jsonl",
        }
    )
    with served(loop, own) as server, connected(server.address) as stubs:
        yield Audited(own.audit_log, server, stubs, (("authorization", f"Bearer {key}"),))  # type: ignore[arg-type]


def names(gallery: str, *items: str) -> list[str]:
    return [f"galleries/{gallery}/items/{item}" for item in items]


def updates(gallery: str, *items: str) -> gallery_pb2.BatchUpdateItemsRequest:
    return gallery_pb2.BatchUpdateItemsRequest(
        parent=f"galleries/{gallery}",
        requests=[
            gallery_pb2.UpdateItemRequest(item=gallery_pb2.Item(name=name), image=encoded(1))
            for name in names(gallery, *items)
        ],
        allow_missing=True,
    )


def test_writes_administration_and_refusals_have_a_line_and_reads_have_none(audited: Audited) -> None:
    stubs, metadata = audited.stubs, audited.metadata
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"), metadata=metadata)
    stubs.galleries.BatchUpdateItems(updates("g", "a", "b"), metadata=metadata)
    stubs.search.Search(search_pb2.SearchRequest(gallery="galleries/g", query=encoded(1)), metadata=metadata)
    for request, sent in (("none", metadata), ("theirs", metadata), ("g", ())):
        with pytest.raises(grpc.RpcError):
            stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{request}"), metadata=sent)
    with pytest.raises(grpc.RpcError):
        stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name="galleries/theirs"), metadata=metadata)
    lines = audited.lines(6)
    assert [
        (line["caller"], line["method"].rpartition("/")[2], line["scope"], line["resources"], line["code"])
        for line in lines
    ] == [
        ("shop", "CreateGallery", "admin", ["g"], "OK"),
        ("shop", "BatchUpdateItems", "write", ["galleries/g", *names("g", "a", "b")], "OK"),
        ("shop", "DeleteGallery", "admin", ["galleries/none"], "PERMISSION_DENIED"),
        ("shop", "DeleteGallery", "admin", ["galleries/theirs"], "PERMISSION_DENIED"),
        ("", "DeleteGallery", "admin", [], "UNAUTHENTICATED"),
        ("shop", "GetGallery", "read", ["galleries/theirs"], "PERMISSION_DENIED"),
    ]
    assert len({line["request_id"] for line in lines}) == 6
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in lines)
    assert audited.path.stat().st_mode & 0o777 == 0o600


def test_a_stream_has_one_line_with_the_first_of_its_names(audited: Audited) -> None:
    stubs, metadata = audited.stubs, audited.metadata
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"), metadata=metadata)
    config = gallery_pb2.ImportItemsConfig(parent="galleries/g")
    requests = [gallery_pb2.ImportItemsRequest(config=config)]
    requests += [
        gallery_pb2.ImportItemsRequest(item=each) for each in updates("g", *(f"{n}" for n in range(40))).requests
    ]
    list(stubs.galleries.ImportItems(iter(requests), metadata=metadata))
    line = audited.lines(2)[1]
    assert (line["requests"], line["code"]) == (41, "OK")
    assert line["resources"] == ["galleries/g", *names("g", *(f"{n}" for n in range(15)))]


def test_long_names_are_shortened_in_lines_and_statuses(audited: Audited) -> None:
    """They are unparsed still, and a status that does not fit into headers reaches nobody."""
    stubs, metadata, long = audited.stubs, audited.metadata, "x" * 20_000
    create = partial(stubs.galleries.CreateGallery, metadata=metadata)
    told = info(rich(refused(create, gallery_pb2.CreateGalleryRequest(gallery_id=long))))
    assert (told.reason, told.metadata["gallery"]) == ("GALLERY_FORBIDDEN", "x" * 399 + "…")
    activate = partial(stubs.models.ActivateModel, metadata=metadata)
    refused(activate, model_pb2.ActivateModelRequest(name=f"models/{long}"))
    refused(create, gallery_pb2.CreateGalleryRequest(gallery_id=long[:400]))
    assert [line["resources"] for line in audited.lines(3)] == [
        ["x" * 399 + "…"],
        ["models/" + "x" * 392 + "…"],
        ["x" * 400],
    ]


def test_a_file_that_is_moved_away_is_opened_anew(audited: Audited, tmp_path: Path) -> None:
    def delete() -> None:
        request = gallery_pb2.DeleteGalleryRequest(name="galleries/g")
        with pytest.raises(grpc.RpcError):
            audited.stubs.galleries.DeleteGallery(request, metadata=audited.metadata)

    delete()
    (first,) = audited.lines(1)
    audited.path.rename(tmp_path / "audit.jsonl.1")
    delete()
    (second,) = audited.lines(1)
    assert first["request_id"] != second["request_id"]
    assert len((tmp_path / "audit.jsonl.1").read_text().splitlines()) == 1


def test_strangers_cannot_fill_the_disk(audited: Audited) -> None:
    request = gallery_pb2.DeleteGalleryRequest(name="galleries/g")
    for _ in range(6):  # not more at once than a server takes
        calls = [audited.stubs.galleries.DeleteGallery.future(request) for _ in range(50)]
        assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    deadline = time.monotonic() + 10
    told = left_out = 0
    while (
        told + left_out < 300
    ):  # a call may be answered before it is counted; what was left out stands in the next line
        assert time.monotonic() < deadline, (told, left_out)
        with pytest.raises(grpc.RpcError):
            audited.stubs.galleries.DeleteGallery(request, metadata=audited.metadata)
        lines = audited.lines(1)
        told = sum(line["code"] == "UNAUTHENTICATED" for line in lines)
        left_out = sum(line.get("refusals_left_out", 0) for line in lines)
    assert told + left_out == 300
    assert 100 <= told < 250


def test_a_file_that_cannot_be_written_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="audit_log: cannot write") as caught:
        Audit(tmp_path / "none" / "audit.jsonl")
    assert caught.value.field == "audit_log"


def test_nothing_that_is_sent_is_logged_anywhere(audited: Audited, caplog: pytest.LogCaptureFixture) -> None:
    """Images, vectors, metadata, filters and keys, in calls that succeed and that fail, in every log there is."""
    secret = "xyzzy-secret"
    image, broken = png(77), b"\x89PNG\r\n" + os.urandom(60)
    vector, odd = unit(0.3, 0.7), os.urandom(64)
    key = audited.metadata[0][1]
    out = io.StringIO()
    config = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(out), cache_logger_on_first_use=False)
    stubs = audited.stubs

    def call(method: Any, request: Any) -> None:
        try:
            answer = method(request, metadata=audited.metadata)
            if isinstance(answer, grpc.Call):
                list(answer)
        except grpc.RpcError:
            pass

    item = gallery_pb2.Item(name=names("g", "a")[0], identity=secret, metadata=struct_pb2.Struct())
    item.metadata["k"] = secret
    try:
        with redirect_stdout(out), redirect_stderr(out), caplog.at_level(logging.DEBUG):
            call(stubs.galleries.CreateGallery, gallery_pb2.CreateGalleryRequest(gallery_id="g"))
            for data in (image, broken):
                source = common_pb2.ImageInput(encoded=data)
                call(stubs.galleries.UpdateItem, gallery_pb2.UpdateItemRequest(item=item, image=source))
                call(stubs.match.Verify, match_pb2.VerifyRequest(a=source, b=stored("g", "a")))
                call(stubs.search.Search, search_pb2.SearchRequest(gallery="galleries/g", query=source))
            for values in (vector, odd):
                source = common_pb2.ImageInput(embedding=values)
                call(stubs.galleries.UpdateItem, gallery_pb2.UpdateItemRequest(item=item, image=source))
                call(stubs.match.Embed, match_pb2.EmbedRequest(image=source))
            purge = gallery_pb2.PurgeItemsRequest(parent="galleries/g", filter=f'metadata.k = "{secret}"')
            call(stubs.galleries.PurgeItems, purge)
            call(stubs.galleries.PurgeItems, gallery_pb2.PurgeItemsRequest(parent="galleries/g", filter=f"{secret} ="))
            audited.lines(7)
            deadline = time.monotonic() + 10
            while out.getvalue().count("request_id") < 13:  # each call's line
                assert time.monotonic() < deadline, out.getvalue()
                time.sleep(0.01)
    finally:
        structlog.configure(**config)
    logs = out.getvalue() + caplog.text + audited.path.read_text()
    assert "galleries/g/items/a" in logs
    assert secret not in logs
    assert key.split("_", 2)[2] not in logs
    for sent in (image, broken, vector, odd):
        for size in (16, 24):
            part = sent[8 : 8 + size]
            for spelled in (part.hex(), str(part)[2:-1], base64.b64encode(part[: size - size % 3]).decode()):
                assert spelled not in logs


def test_a_line_that_a_full_disk_cut_off_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one was appended to what there was of it, and neither could be read."""
    path = tmp_path / "audit.jsonl"
    audit, whole, room = Audit(path), os.write, iter((1000, 9, 0, 1, 12, 1000, 1000))

    def write(descriptor: int, data: bytes) -> int:
        if descriptor != audit._descriptor:
            return whole(descriptor, data)
        left = next(room)
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(descriptor, data[:left])

    monkeypatch.setattr("service.access.audit.os.write", write)
    with capture_logs() as logs:
        for number in range(7):
            audit._lines.put(json.dumps({"number": number}))
        audit.close()
    readable = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            readable.append(json.loads(line)["number"])
    assert readable == [0, 5, 6]
    assert [json.loads(line["line"])["number"] for line in logs] == [1, 2, 3, 4], "the log has what the file has not"


def test_lines_that_a_disk_that_hangs_does_not_take_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.access.audit.MOST_WAITING", 3)
    audit, whole, hangs = Audit(tmp_path / "audit.jsonl"), os.write, threading.Event()

    def write(descriptor: int, data: bytes) -> int:
        if descriptor == audit._descriptor:
            hangs.wait(timeout=60)
        return whole(descriptor, data)

    def ended() -> None:
        call: Any = SimpleNamespace(
            method="/lookalike.v1.GalleryService/CreateGallery", caller="", names=[], requests=1, request_id="r",
            context=SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1", invocation_metadata=tuple),
        )  # fmt: skip
        audit.ended(call, grpc.StatusCode.OK)

    monkeypatch.setattr("service.access.audit.os.write", write)
    ended()
    while audit._lines.qsize():
        pass  # the writer has taken it, and hangs
    with capture_logs() as logs:
        for _ in range(10):
            ended()
    assert [line["log_level"] for line in logs] == ["error"]
    hangs.set()
    while audit._lines.qsize():
        pass
    ended()
    audit.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line.get("lines_left_out", 0) for line in lines] == [0, 0, 0, 0, 7]
