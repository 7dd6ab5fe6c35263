"""The methods of GalleryService on items: parse, ask the engine, format."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from embedding.errors import InvalidInput, LookalikeError, ModelMismatch, ResponseTooLarge
from index import Deadline
from index.filters import parse_filter
from index.receipts import Token
from lookalike.v1 import gallery_pb2 as pb
from lookalike.v1 import gallery_pb2_grpc
from service import errors, writes
from service.call import limits
from service.errors import translated_errors
from service.messages import encoded, parse, wire
from service.once import Once
from service.servicers import pages
from service.servicers.streams import Elements
from service.serving import AsyncEngine, Serving
from service.sources import GivenEmbedding, Unusable, naming

MAX_ITEMS = 1024
"""Most items of one BatchUpdateItems or BatchDeleteItems."""

IMPORT_WINDOW = 256
"""Most items of one ImportItems that are stored and acknowledged together."""

R = TypeVar("R", bound=Message)
T = TypeVar("T")

Context = grpc.aio.ServicerContext[Any, Any]


class ItemMethods(gallery_pb2_grpc.GalleryServiceServicer):
    """Items of galleries, written and read."""

    def __init__(self, serving: Serving, once: Once) -> None:
        self._serving = serving
        self._once = once

    async def GetItem(self, request: pb.GetItemRequest, context: Context) -> pb.GetItemResponse:
        async with translated_errors(context):
            gallery_id, item_id = parse.item_name(request.name, "name")
            fields = parse.item_mask(request.read_mask)
            serving = self._serving.current

            def read() -> pb.GetItemResponse:
                gallery = serving.engine.gallery(gallery_id, path="name", any_model=True)
                stored = gallery.get(item_id)
                return pb.GetItemResponse(item=wire.item_fields(stored, gallery.id, fields))

            return await serving.run(read)

    async def ListItems(self, request: pb.ListItemsRequest, context: Context) -> Any:
        async with translated_errors(context):
            wrong = parse.Violations()
            with wrong:
                gallery_id = parse.gallery_name(request.parent, "parent")
            with wrong:
                size = parse.page_size(request.page_size)
            with wrong:
                allowed = parse_filter(request.filter)
            with wrong:
                fields = parse.item_mask(request.read_mask, listing=True)
            wrong.check()
            serving, most = self._serving.current, pages.most_bytes()

            def read(deadline: Deadline) -> bytes:
                gallery = serving.engine.gallery(gallery_id, path="parent", any_model=True)
                kind = pages.within("items", f"galleries/{gallery.id}", request.filter)
                return encoded.item_page(
                    gallery, size, request.page_token, allowed, fields, kind=kind, most_bytes=most, deadline=deadline
                )

            with _while_asked(context) as deadline:  # a filter may take long to find nothing
                return await serving.run(read, deadline)

    async def BatchUpdateItems(
        self, request: pb.BatchUpdateItemsRequest, context: Context
    ) -> pb.BatchUpdateItemsResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.parent, "parent")
            parse.check_batch(request.requests, most=MAX_ITEMS, path="requests")
            serving = await self._serving.of(gallery_id)
            resolve = serving.engine.names.aliases.resolve
            question = writes.UpdateItems(
                gallery=gallery_id,
                drafts=[
                    parse.draft(item, gallery_id, f"requests[{i}]", resolve=resolve)
                    for i, item in enumerate(request.requests)
                ],
                allow_missing=request.allow_missing,
            )

            def form(outcomes: Sequence[writes.Stored]) -> pb.BatchUpdateItemsResponse:
                return _batch_response(outcomes, resolve(gallery_id))

            return await self._once.written(
                request,
                pb.BatchUpdateItemsResponse,
                serving,
                gallery_id,
                lambda token: self._stored(serving, question, token, form, pb.BatchUpdateItemsResponse),
            )

    async def UpdateItem(self, request: pb.UpdateItemRequest, context: Context) -> pb.UpdateItemResponse:
        async with translated_errors(context):
            gallery_id, _ = parse.item_name(request.item.name, "item.name")
            draft = parse.draft(request, gallery_id, "")
            serving = await self._serving.of(gallery_id)
            resolve = serving.engine.names.aliases.resolve
            question = writes.UpdateItems(gallery=gallery_id, drafts=[draft], allow_missing=request.allow_missing)

            def form(outcomes: Sequence[writes.Stored]) -> pb.UpdateItemResponse:
                (outcome,) = outcomes
                if isinstance(outcome, LookalikeError):
                    raise outcome
                return pb.UpdateItemResponse(item=wire.item(outcome, resolve(gallery_id)))

            return await self._once.written(
                request,
                pb.UpdateItemResponse,
                serving,
                gallery_id,
                lambda token: self._stored(serving, question, token, form, pb.UpdateItemResponse),
            )

    async def ImportItems(
        self, request_iterator: AsyncIterator[pb.ImportItemsRequest], context: Context
    ) -> AsyncIterator[pb.ImportItemsResponse]:
        async with translated_errors(context), Elements(request_iterator, window=IMPORT_WINDOW) as elements:
            first = await elements.config()
            gallery_id = parse.gallery_name(first.config.parent, "config.parent")
            serving = await self._serving.of(gallery_id)
            await serving.run(serving.engine.gallery, gallery_id, path="config.parent")
            acknowledged = stored = 0
            async for some in elements.batches():
                for window in _without_repeats(some):
                    outcomes = await self._imported(serving, gallery_id, window, not first.config.existing_only)
                    failures = [
                        pb.ImportFailure(
                            index=acknowledged + i, name=request.item.item.name, error=errors.status(outcome)
                        )
                        for i, (request, outcome) in enumerate(zip(window, outcomes, strict=True))
                        if isinstance(outcome, LookalikeError)
                    ]
                    acknowledged += len(window)
                    stored += len(window) - len(failures)
                    yield pb.ImportItemsResponse(
                        acknowledged_count=acknowledged, stored_count=stored, failures=failures
                    )

    async def DeleteItem(self, request: pb.DeleteItemRequest, context: Context) -> pb.DeleteItemResponse:
        async with translated_errors(context):
            gallery_id, item_id = parse.item_name(request.name, "name")
            serving = self._serving.current

            def delete(token: Token | None) -> pb.DeleteItemResponse:
                etags = {item_id: request.etag} if request.etag else None
                written = serving.engine.written(gallery_id, path="name", any_model=True)
                with written as gallery, naming("name"):
                    writes.delete(
                        gallery, [item_id], lambda _: b"", allow_missing=request.allow_missing, etags=etags, token=token
                    )
                return pb.DeleteItemResponse()

            return await self._once.written(
                request, pb.DeleteItemResponse, serving, gallery_id, lambda token: serving.run(delete, token)
            )

    async def PurgeItems(self, request: pb.PurgeItemsRequest, context: Context) -> pb.PurgeItemsResponse:
        async with translated_errors(context):
            wrong = parse.Violations()
            with wrong:
                gallery_id = parse.gallery_name(request.parent, "parent")
            with wrong:
                allowed = parse.purge_filter(request.filter)
            wrong.check()
            purge = writes.PurgeItems(gallery=gallery_id, allowed=allowed, force=request.force)
            serving = self._serving.current

            def answer(token: Token | None, deadline: Deadline) -> pb.PurgeItemsResponse:
                asked = replace(purge, deadline=deadline, token=token, form=_purged)
                purged = asked.write(serving.engine)
                if asked.answered:
                    return pb.PurgeItemsResponse.FromString(asked.answered[0])
                return pb.PurgeItemsResponse(
                    purge_count=purged.count,
                    purge_sample=[wire.item_name(purged.gallery, name) for name in purged.sample],
                )

            with _while_asked(context) as deadline:
                return await self._once.written(
                    request,
                    pb.PurgeItemsResponse,
                    serving,
                    purge.gallery,
                    lambda token: serving.run(answer, token, deadline),
                )

    async def BatchDeleteItems(
        self, request: pb.BatchDeleteItemsRequest, context: Context
    ) -> pb.BatchDeleteItemsResponse:
        async with translated_errors(context):
            gallery_id = parse.gallery_name(request.parent, "parent")
            parse.check_batch(request.names, most=MAX_ITEMS, path="names")
            serving = self._serving.current
            resolve = serving.engine.names.aliases.resolve
            names = [
                parse.item_in(gallery_id, name, f"names[{i}]", resolve=resolve) for i, name in enumerate(request.names)
            ]

            def delete(token: Token | None) -> pb.BatchDeleteItemsResponse:
                written = serving.engine.written(gallery_id, path="parent", any_model=True)
                with written as gallery, naming("names"):
                    answer = writes.delete(gallery, names, _deleted, allow_missing=request.allow_missing, token=token)
                return pb.BatchDeleteItemsResponse.FromString(answer)

            return await self._once.written(
                request, pb.BatchDeleteItemsResponse, serving, gallery_id, lambda token: serving.run(delete, token)
            )

    async def _stored(
        self,
        serving: AsyncEngine,
        question: writes.UpdateItems,
        token: Token | None,
        form: Callable[[Sequence[writes.Stored]], R],
        response: type[R],
    ) -> R:
        """The answer to what is to be stored; with a token it is made where the items are written, and kept with them.

        Raises ResponseTooLarge; with a token nothing is stored then.
        """
        most = limits().message_bytes

        def receipt(outcomes: Sequence[writes.Stored]) -> bytes:
            answer = form(outcomes).SerializeToString()
            if len(answer) > most:  # by metadata that was stored before
                raise ResponseTooLarge(
                    f"the items as stored take {len(answer):,} bytes, and one message carries {most:,}; nothing was "
                    "stored: send fewer items at once",
                    field="requests",
                )
            return answer

        asked = replace(question, token=token, form=receipt, answered=[])
        return await self._asked(
            serving,
            asked,
            lambda outcomes: response.FromString(asked.answered[0]) if asked.answered else form(outcomes),
        )

    async def _imported(
        self,
        serving: AsyncEngine,
        gallery_id: str,
        requests: Sequence[pb.ImportItemsRequest],
        allow_missing: bool,
    ) -> list[writes.Stored]:
        resolve = serving.engine.names.aliases.resolve
        drafts: list[writes.Draft | Unusable] = []
        for request in requests:
            match request.WhichOneof("element"):
                case "item":
                    drafts.append(parse.draft(request.item, gallery_id, "item", resolve=resolve))
                case "config":
                    error = InvalidInput("only the first element is a config; send items after it", field="config")
                    drafts.append(Unusable(error=error))
                case _:
                    drafts.append(Unusable(error=InvalidInput("an element must hold an item", field="item")))
        question = writes.UpdateItems(gallery=gallery_id, drafts=drafts, allow_missing=allow_missing)
        return await self._asked(serving, question, list)

    async def _asked(
        self, serving: AsyncEngine, question: writes.UpdateItems, form: Callable[[list[writes.Stored]], T]
    ) -> T:
        """What `form` makes of the outcomes; where an alias has moved to a gallery of another model since `serving` was
        chosen, by that model.

        Raises ModelMismatch for embeddings that came with the request: nothing says that they are of that model.
        """
        try:
            return await serving.ask(question, form)
        except ModelMismatch:
            another = await self._serving.of(question.gallery)
            if another is serving or any(isinstance(source, GivenEmbedding) for source in question.sources):
                raise
            return await another.ask(question, form)


def _deleted(count: int) -> bytes:
    return pb.BatchDeleteItemsResponse(deleted_count=count).SerializeToString()


def _purged(count: int) -> bytes:
    return pb.PurgeItemsResponse(purge_count=count).SerializeToString()


def _without_repeats(requests: Sequence[pb.ImportItemsRequest]) -> Iterator[list[pb.ImportItemsRequest]]:
    """The requests in order, cut wherever a name comes again: the later one then overwrites the earlier."""
    window: list[pb.ImportItemsRequest] = []
    names: set[str] = set()
    for request in requests:
        name = request.item.item.name
        if name in names:
            yield window
            window, names = [], set()
        window.append(request)
        names.add(name)
    yield window


def _batch_response(outcomes: Sequence[writes.Stored], gallery_id: str) -> pb.BatchUpdateItemsResponse:
    return pb.BatchUpdateItemsResponse(
        results=[
            pb.UpdateItemResult(error=errors.status(outcome))
            if isinstance(outcome, LookalikeError)
            else pb.UpdateItemResult(item=wire.item(outcome, gallery_id))
            for outcome in outcomes
        ]
    )


@contextmanager
def _while_asked(context: Context) -> Iterator[Deadline]:
    """A deadline that ends with the call: a caller that has gone waits for no list, and wants nothing deleted."""
    deadline = Deadline(context.time_remaining())
    try:
        yield deadline
    finally:
        deadline.cancel()
