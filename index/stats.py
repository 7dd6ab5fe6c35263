"""A gallery in numbers."""

from __future__ import annotations

from pathlib import Path

from index.engine import IndexSettings, SegmentStats, Stats
from index.live import Live
from index.planner import fallback
from index.snapshot import Part


def stats_of(live: Live) -> Stats:
    """What the gallery holds and takes at this moment."""
    snapshot = live.snapshot
    segments = [_segment(part, live.settings) for part in snapshot.parts[:-1]]
    fresh = snapshot.fresh
    wal_bytes = _size(live.store.path.with_name(live.store.path.name + "-wal"))
    in_memory = fresh.keys_N.nbytes + fresh.vectors_ND.nbytes + fresh.norms_N.nbytes
    return Stats(
        size=snapshot.size,
        generation=snapshot.generation,
        fresh=fresh.size,
        dead=snapshot.dead,
        disk_bytes=_size(live.store.path) + wal_bytes + sum(s.disk_bytes for s in segments),
        memory_bytes=in_memory + sum(s.memory_bytes for s in segments),
        segments=segments,
        settings=live.settings,
        wal_bytes=wal_bytes,
        seals=live.seals,
        compactions=live.compactions,
        busy=live.busy,
        last_failure=live.last_failure,
    )


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _segment(part: Part, settings: IndexSettings) -> SegmentStats:
    segment = part.segment
    if segment is None:
        raise TypeError("a sealed part has a segment")
    plan = segment.manifest.plan
    return SegmentStats(
        name=segment.name,
        rows=len(part.keys_N),
        dead=len(part.dead_R),
        structure=plan.structure,
        fallback=fallback(
            settings.structure, plan.structure, rows=len(part.keys_N), width=segment.manifest.embedding_dim
        ),
        disk_bytes=segment.disk_bytes,
        memory_bytes=part.keys_N.nbytes + (segment.structure.memory_bytes if segment.structure else 0),
        curve=[point.public() for point in plan.curve],
    )
