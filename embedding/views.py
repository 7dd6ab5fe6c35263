"""Views of an image: turned copies that are embedded with it, or that train as identities of their own.

Shapes: V views, B images, C channels, H = W side, D embedding width of one view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedding.images import Pixels, View

_SHIFT = 0.1
"""Share of the side that a shifted view is moved by."""


def _moved(pixels: Pixels, *, right: int, down: int) -> Pixels:
    """The same, moved by so many tenths of the side; what comes in repeats the edge."""
    height, width = pixels.shape[-2:]
    row_H = np.clip(np.arange(height) - down * round(_SHIFT * height), 0, height - 1)
    column_W = np.clip(np.arange(width) - right * round(_SHIFT * width), 0, width - 1)
    return pixels[..., row_H[:, None], column_W]


_TURNS: dict[str, Callable[[Pixels], Pixels]] = {
    "rotate-90": lambda pixels: np.rot90(pixels, 1, axes=(-2, -1)),
    "rotate-180": lambda pixels: np.rot90(pixels, 2, axes=(-2, -1)),
    "rotate-270": lambda pixels: np.rot90(pixels, 3, axes=(-2, -1)),
    "shift-left": lambda pixels: _moved(pixels, right=-1, down=0),
    "shift-right": lambda pixels: _moved(pixels, right=1, down=0),
    "shift-up": lambda pixels: _moved(pixels, right=0, down=-1),
    "shift-down": lambda pixels: _moved(pixels, right=0, down=1),
}


def view_of(pixels: Pixels, view: View) -> Pixels:
    """The same pixels [..., H, W] in a view: left and right exchanged, turned anticlockwise by quarters, moved by a
    tenth of the side, or the first and then one of the others."""
    if view == "as-is":
        return pixels
    mirrored, turn = view.startswith("mirror"), view.removeprefix("mirror").removeprefix("-")
    if mirrored:
        pixels = pixels[..., ::-1]
    return _TURNS[turn](pixels) if turn else pixels


def views_of(pixels_BCHW: Pixels, views: Sequence[View]) -> Pixels:
    """All views [V·B, C, H, W], view by view."""
    return np.concatenate([view_of(pixels_BCHW, view) for view in views])


def joined(emb_VBD: Tensor, how: Literal["mean", "concatenate"]) -> Tensor:
    """One unit embedding an image from those of its views.

    "mean" gives [B, D], the direction of their mean: for views that training takes as the same identity. "concatenate"
    gives [B, V·D], whose squared distances are the means of those of the views: for views that training tells apart,
    where each is an opinion of its own.
    """
    if how == "concatenate":
        return F.normalize(emb_VBD.transpose(0, 1).flatten(1), dim=1)
    # One after the other: a reduction adds in an order, and rounds in a way, that depends on the batch.
    total_BD = emb_VBD[0].clone()
    for emb_BD in emb_VBD[1:]:
        total_BD += emb_BD
    return F.normalize(total_BD, dim=1)


def split_views(emb_ND: Tensor, views: int) -> Tensor:
    """Embeddings [V·B, D] of `views_of` as [V, B, D]."""
    return torch.unflatten(emb_ND, 0, (views, -1))
