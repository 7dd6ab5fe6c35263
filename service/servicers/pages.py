"""Pages of lists, which end by count or by bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from index.items import page_token_after
from service.call import limits

T = TypeVar("T")
M = TypeVar("M", bound=Message)

PAGE_BYTES = 4 * 2**20 - 64 * 1024
"""Most of one page, unless one element takes more: gRPC's clients take 4 MiB where nobody tells them otherwise."""


def most_bytes() -> int:
    """Of the page that the current call answers with; asked on the event loop."""
    return min(PAGE_BYTES, limits().message_bytes * 15 // 16)  # the token of the next page needs room too


def within(plural: str, parent: str, condition: str = "") -> str:
    """The kind of a list whose tokens hold for one parent and one filter alone, as https://google.aip.dev/158 asks."""
    asked = f", filter {hashlib.sha256(condition.encode()).hexdigest()[:12]}" if condition else ""
    return f"{plural} of {parent}{asked}"


def page(
    kind: str, found: Sequence[T], size: int, form: Callable[[T], M], name_of: Callable[[T], str], *, most: int
) -> tuple[list[M], str]:
    """What is `found` as messages, as many as a page takes, and the token of the next page, "" where none is left.

    `kind` in the plural says what is listed: a token of other things is refused.
    """
    messages: list[M] = []
    taken = 0
    for each in found[:size]:
        message = form(each)
        taken += message.ByteSize() + 8  # and its key and length
        if messages and taken > most:
            break
        messages.append(message)
    left = len(messages) < len(found)
    return messages, page_token_after(name_of(found[len(messages) - 1]), kind) if left and messages else ""
