"""Which galleries a change of models would leave without the model of their embeddings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from embedding.errors import GalleriesIncompatible
from service.engine import Engine
from service.operations import Operations

NAMED = 5
"""Galleries, and operations, that the message of an error names."""


def check_galleries(
    engine: Engine, operations: Operations, served: Collection[str], *, model: str, force: bool
) -> Mapping[str, str]:
    """The galleries of models that are not among `served`, by fingerprint, each with that model's name.

    Those that migrations and restorations are yet to make or to complete are among them; damaged ones answer nobody as
    it is. `model` is the one to be activated, "" where one is unloaded. Raises GalleriesIncompatible when there are
    any, unless `force`.
    """
    # Before the galleries: that of an operation which ends in between is found among these.
    unfinished = {each.id: each.makes for each in operations.all() if each.makes is not None and not each.done}
    lost = {name: makes for name, makes in unfinished.items() if makes.model.fingerprint not in served}
    healthy, _ = engine.names.catalog.survey()
    left = {one.id: one.model.name for one in healthy if one.model.fingerprint not in served}
    left |= {makes.gallery: makes.model.name for makes in lost.values()}
    left = dict(sorted(left.items()))
    if left and not force:
        raise GalleriesIncompatible(_why(left, [f"operations/{name}" for name in lost], model), galleries=left)
    return left


def _why(left: Mapping[str, str], making: Sequence[str], model: str) -> str:
    shown = ", ".join(f"{gallery!r} ({of})" for gallery, of in list(left.items())[:NAMED])
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    advice = f"migrate them to {model}, set keep_previous where they hold" if model else "migrate them, or keep"
    if making:
        others = f" and {len(making) - NAMED} more" if len(making) > NAMED else ""
        advice = f"cancel {', '.join(making[:NAMED])}{others}, which migrate or restore into them; {advice}"
    return (
        f"{len(left)} galleries would be left without the model of their embeddings: {shown}{more}; {advice} "
        f"{'the embeddings of the model that is active now' if model else 'the model loaded'}, or set force"
    )
