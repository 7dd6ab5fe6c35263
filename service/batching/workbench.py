"""The work on images itself, in whatever thread it is done, and how long it takes lately."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from embedding.decision import Vectors
from embedding.encoder import Encoder
from embedding.errors import ImageTooLarge, LookalikeError
from embedding.images import Pixels
from service.admission import Pace
from service.sources import Embedded
from service.stages import Shared

BRIEF_BYTES = 16 * 1024
"""Largest file that may be decoded by the thread that embeds it."""

BRIEF_SECONDS = 0.0002
"""Longest that such files may take to decode, by what was measured: about as long as going to a thread and back."""

BRIEF_PIXELS = 128 * 128
"""Most pixels of it, by its header: a file of 16 kB can hold fifty million."""

INSTANT_SECONDS = 0.0005
"""Longest that the event loop may decode and embed what waits, by what was measured, as it may search."""

INSTANT_BYTES = 4 * 1024
"""Largest file that it may decode: one made to be slow takes 3 ms at most."""

Outcome: TypeAlias = Embedded | Exception | None
"""Of embedding an image; None where it must be decoded elsewhere first."""


class Workbench:
    """Decodes and embeds with one encoder. Paces are read on the event loop, and written where the work is done."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.decode_pace = Pace()
        """Of an image in the decoders' threads."""
        self.brief_pace = Pace()
        """Of decoding an image of few bytes, wherever."""
        self.embed_pace = Pace()
        """Of an image in the encoder's thread, decoding included where it is done there."""
        self.batch_pace = Pace()
        """Of a batch in the encoder's thread."""
        self._work_pace = Pace()
        """Of an image there, by the processor time of the thread: what it would take on the event loop."""

    def decoded(self, images: Sequence[tuple[Shared, bytes]]) -> list[Pixels | Exception]:
        """Each image decoded."""
        outcomes: list[Pixels | Exception] = []
        for work, data in images:
            start = time.perf_counter()
            try:
                outcomes.append(work.run("decode", self.encoder.prepare, data))
            except Exception as error:  # of this image alone
                outcomes.append(_kept(error))
            seconds = time.perf_counter() - start
            self.decode_pace.record(seconds)
            if len(data) <= BRIEF_BYTES:
                self.brief_pace.record(seconds)
        return outcomes

    def is_instant(self, pieces: Sequence[tuple[Shared, bytes | Pixels]]) -> bool:
        """Whether `embedded` would be over before it was worth going to a thread for."""
        each = self._work_pace.latest
        return (
            0 < each * len(pieces) <= INSTANT_SECONDS
            and self.encoder.runtime == "onnx"  # PyTorch's threads are set for the encoder's thread alone
            and all(isinstance(piece, np.ndarray) or len(piece) <= INSTANT_BYTES for _, piece in pieces)
        )

    def embedded(self, pieces: Sequence[tuple[Shared, bytes | Pixels]]) -> list[Outcome]:
        """What becomes of these images, given as pixels or as files of few bytes; an error of all is that of each."""
        start, cpu = time.perf_counter(), time.thread_time()
        outcomes: list[Outcome] = [None] * len(pieces)
        pixels: dict[int, Pixels] = {}
        for at, (work, piece) in enumerate(pieces):
            if isinstance(piece, np.ndarray):
                pixels[at] = piece
                continue
            try:
                pixels[at] = work.run("decode", self._brief, piece)
            except ImageTooLarge:
                pass  # for the decoders, who know what is too large
            except Exception as error:  # of this image alone
                outcomes[at] = _kept(error)
        if pixels:
            works = [pieces[at][0] for at in pixels]
            try:
                embedded: Sequence[Embedded | Exception] = list(
                    Shared.run_together(works, "embed", self._forward, list(pixels.values()))
                )
            except Exception as error:
                embedded = [error] * len(pixels)
            for at, outcome in zip(pixels, embedded, strict=True):
                outcomes[at] = outcome
            seconds = time.perf_counter() - start
            self.embed_pace.record(seconds, len(pixels))
            self.batch_pace.record(seconds)
            self._work_pace.record(time.thread_time() - cpu, len(pixels))
        return outcomes

    def _brief(self, data: bytes) -> Pixels:
        start = time.perf_counter()
        try:
            return self.encoder.prepare(data, max_pixels=BRIEF_PIXELS)
        finally:
            self.brief_pace.record(time.perf_counter() - start)

    def _forward(self, pixels: list[Pixels]) -> Vectors:
        return self.encoder.encode_pixels(np.stack(pixels))


def _kept(error: Exception) -> Exception:
    """Without its frames, which hold the image and the list of outcomes, in a circle until the collector comes by."""
    return error.with_traceback(None) if isinstance(error, LookalikeError) else error
