"""The calls of GalleryService that are about items."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable

from lookalike import _messages as messages
from lookalike._calls.kinds import PAGE_SIZE, Batch, Call, Page, Stream, call, in_place, new_id
from lookalike.errors import CallFailed, from_status
from lookalike.types import Imported, Item, ItemName, NewItem, Purged
from lookalike.v1 import gallery_pb2

GALLERY = "lookalike.v1.GalleryService"

MAX_ITEMS = 1024


def get_item(name: ItemName, *, metadata: bool = True, embedding: bool = True) -> Call[Item]:
    """Describe an item; what is not wanted is not sent."""
    return call(
        f"{GALLERY}/GetItem",
        gallery_pb2.GetItemRequest(name=str(name), read_mask=messages.item_mask(metadata, embedding)),
        gallery_pb2.GetItemResponse,
        lambda response: messages.item(response.item),
    )


def list_items(
    page_token: str, gallery: str, *, filter: str = "", metadata: bool = True, embedding: bool = False
) -> Call[Page[Item]]:
    """The items of a gallery that a filter accepts, by name; pages are fetched as needed."""
    return call(
        f"{GALLERY}/ListItems",
        gallery_pb2.ListItemsRequest(
            parent=messages.gallery_name(gallery),
            page_size=PAGE_SIZE,
            page_token=page_token,
            filter=filter,
            read_mask=messages.item_mask(metadata, embedding),
        ),
        gallery_pb2.ListItemsResponse,
        lambda response: Page([messages.item(found) for found in response.items], response.next_page_token),
    )


def update_items(
    gallery: str, items: Iterable[NewItem], *, allow_missing: bool = True
) -> Batch[gallery_pb2.UpdateItemRequest, Item | CallFailed]:
    """Store items, durably: for each, in order, the item as stored, or why this one was not.

    Without `allow_missing` an item that is not there yet fails with NotFound.
    """
    return Batch(
        (messages.update_request(gallery, item) for item in items),
        MAX_ITEMS,
        lambda chunk: call(
            f"{GALLERY}/BatchUpdateItems",
            gallery_pb2.BatchUpdateItemsRequest(
                parent=messages.gallery_name(gallery),
                requests=chunk,
                allow_missing=allow_missing,
                request_id=new_id(),
            ),
            gallery_pb2.BatchUpdateItemsResponse,
            lambda response: [
                from_status(result.error) if result.HasField("error") else messages.item(result.item)
                for result in response.results
            ],
        ),
        in_place,
    )


def update_item(gallery: str, item: NewItem, *, fields: Iterable[str] = (), allow_missing: bool = True) -> Call[Item]:
    """Store an item, durably, or with `fields` (`identity`, `metadata`, `image`) only these of it."""
    return call(
        f"{GALLERY}/UpdateItem",
        messages.update_request(gallery, item, fields=fields, allow_missing=allow_missing, request_id=new_id()),
        gallery_pb2.UpdateItemResponse,
        lambda response: messages.item(response.item),
    )


def import_items(
    gallery: str, items: Iterable[NewItem] | AsyncIterable[NewItem], *, existing_only: bool = False
) -> Stream[Imported]:
    """Store any number of items over one call and tell, again and again, how many are durable.

    At most a window of items is read ahead of the acknowledgements. It has no time limit; iterate to its end.
    """
    config = gallery_pb2.ImportItemsConfig(parent=messages.gallery_name(gallery), existing_only=existing_only)

    def pack(item: NewItem) -> bytes:
        return gallery_pb2.ImportItemsRequest(item=messages.update_request(gallery, item)).SerializeToString()

    return Stream(
        f"{GALLERY}/ImportItems",
        gallery_pb2.ImportItemsRequest(config=config).SerializeToString(),
        items,
        pack,
        lambda data: [messages.imported(gallery_pb2.ImportItemsResponse.FromString(data))],
        lambda told, before: told[-1].acknowledged,
    )


def delete_item(name: ItemName, *, etag: str = "", allow_missing: bool = False) -> Call[None]:
    """Delete an item; with an `etag` only while it still carries it."""
    return call(
        f"{GALLERY}/DeleteItem",
        gallery_pb2.DeleteItemRequest(name=str(name), etag=etag, allow_missing=allow_missing, request_id=new_id()),
        gallery_pb2.DeleteItemResponse,
        lambda response: None,
    )


def purge_items(gallery: str, filter: str, *, force: bool = False) -> Call[Purged]:
    """Count the items that a filter accepts, `*` for all; with `force` delete them, in one step."""
    return call(
        f"{GALLERY}/PurgeItems",
        gallery_pb2.PurgeItemsRequest(
            parent=messages.gallery_name(gallery),
            filter=filter,
            force=force,
            request_id=new_id() if force else "",
        ),
        gallery_pb2.PurgeItemsResponse,
        messages.purged,
    )


def delete_items(gallery: str, ids: Iterable[str], *, allow_missing: bool = False) -> Call[int]:
    """Delete up to 1,024 items, all or none; gives how many were there before."""
    return call(
        f"{GALLERY}/BatchDeleteItems",
        gallery_pb2.BatchDeleteItemsRequest(
            parent=messages.gallery_name(gallery),
            names=[str(ItemName(gallery, item)) for item in ids],
            allow_missing=allow_missing,
            request_id=new_id(),
        ),
        gallery_pb2.BatchDeleteItemsResponse,
        lambda response: response.deleted_count,
    )
