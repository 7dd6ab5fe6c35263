"""What a model's distances and norms looked like when it was calibrated, to compare live ones with (`reference.json`).

A share of matching pairs is a choice of whoever held identities out, not a fact about the world: so matching and
non-matching distances are kept apart, and live distances are compared with whichever mixture of both fits them best.
Norms are those of embeddings before they are divided by their length, of which the unit vectors tell nothing any more.
B bins.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]

_SUM_TOLERANCE = 1e-6


class Reference(BaseModel):
    """Histograms of the held-out images of a calibration. Bins lie between edges, the first and the last are open."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    images: Annotated[int, Field(ge=2)]
    """Held-out images measured."""
    distance_edges: tuple[float, ...]
    """Rising, B − 1 of them; a distance on an edge belongs to the bin below."""
    matching: tuple[Share, ...]
    """Share of matching pairs in each bin."""
    impostor: tuple[Share, ...]
    """Share of non-matching pairs in each bin."""
    norm_edges: tuple[float, ...]
    norms: tuple[Share, ...]
    """Share of images whose norm lies in each bin."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for edges, *histograms in (
            (self.distance_edges, self.matching, self.impostor),
            (self.norm_edges, self.norms),
        ):
            if any(low >= high for low, high in pairwise(edges)):
                raise ValueError("edges must rise strictly")
            for shares in histograms:
                if len(shares) != len(edges) + 1 or abs(sum(shares) - 1) > _SUM_TOLERANCE:
                    raise ValueError("a histogram has one bin more than edges, and its shares add up to 1")
        return self
