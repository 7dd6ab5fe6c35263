"""What is wrong with a deployment: its settings, bundle, galleries, certificates and machine, each looked at alone.

Every check answers with findings and raises nothing; a finding that is no `ok` says what to do. Nothing is changed: the
galleries are opened for reading, beside a server that may hold them (`galleries.py`). Bundles are looked at by
`models.py`, who may call and what else the settings ask of this machine by `access.py`; what a running
server says is asked by `server.py`.
"""

from __future__ import annotations

import os
import resource
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

from embedding.bundle import Bundle
from embedding.errors import InvalidInput
from embedding.extras import installing
from index.catalog import LOCK
from index.engine import GalleryEngine
from service.doctor.access import access, surroundings
from service.doctor.certificate_dates import NotValid, expiry
from service.doctor.finding import Finding
from service.doctor.galleries import galleries
from service.doctor.models import models
from service.settings import Settings
from service.tls import certificates

LEAST_FREE_BYTES = 1 << 30
"""Free disk below which a warning is due, and a tenth of it below which writes are about to fail."""

LEAST_FILES = 1024
"""Open files that a server should be allowed: connections, and a few for each gallery and thread."""

CERTIFICATE_WARNING = timedelta(days=14)

_FUTURE = timedelta(minutes=5)


def looked_at(settings: Settings, *, full: bool = False, now: datetime | None = None) -> Iterator[Finding]:
    """Every check that needs no running server; `full` reads galleries whole, which takes as long as reading them."""
    now = now or datetime.now(UTC)
    yield from _packages()
    yield from _files_limit()
    yield from _tls(settings, now)
    yield from access(settings, now)
    yield from surroundings(settings)
    bundles: list[Bundle] = []
    yield from models(settings, bundles)
    yield from _folder(settings.galleries)
    opened: list[GalleryEngine] = []
    if settings.galleries.is_dir() and os.access(settings.galleries, os.R_OK | os.X_OK):
        yield from galleries(settings, bundles, opened, full=full)
    yield from _memory(bundles, opened)
    yield from _clock(bundles, opened, now)
    for gallery in opened:
        gallery.close()


def _packages() -> Iterator[Finding]:
    wrong = list(_outdated(metadata.requires("lookalike") or (), _installed))
    if wrong:
        yield Finding(check="packages", state="fail", what="; ".join(wrong), do=installing("serve"))
    else:
        version = metadata.version("lookalike")
        yield Finding(check="packages", state="ok", what=f"lookalike {version} on Python {sys.version.split()[0]}")


def _outdated(requirements: Sequence[str], installed: Callable[[str], str | None]) -> Iterator[str]:
    """Those of the server's requirements, as `name>=version; extra == "serve"`, that are not met."""
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        extras = {"serve", "cli", "embedding"}
        if "extra ==" in marker and not any(f"'{extra}'" in marker.replace('"', "'") for extra in extras):
            continue
        name, _, least = wanted.strip().partition(">=")
        if "[" in name or ("sys_platform" in marker and sys.platform == "win32"):
            continue  # an extra of our own, whose requirements are listed too
        found = installed(name)
        if found is None:
            yield f"{name} is not installed"
        elif least and _numbers(found) < _numbers(least):
            yield f"{name} is {found}, and at least {least} is needed"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _files_limit() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        yield Finding(
            check="open files",
            state="fail" if soft < LEAST_FILES // 4 else "warn",
            what=f"a process may have {soft} files open, and each connection is one",
            do=f"raise it to {LEAST_FILES} or more, with `ulimit -n` or LimitNOFILE of systemd (allowed: {hard})",
        )
    else:
        yield Finding(check="open files", state="ok", what=f"up to {soft}")


def _tls(settings: Settings, now: datetime) -> Iterator[Finding]:
    try:
        if certificates(settings) is None:
            yield Finding(check="TLS", state="ok", what=f"none, on {settings.host}")
            return
    except InvalidInput as error:
        yield Finding(check="TLS", state="fail", what=str(error), do=f"correct {error.field}")
        return
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return  # refused above
    if key.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield Finding(check="TLS", state="warn", what=f"others may read the key {key}", do=f"run chmod 600 {key}")
    try:
        until = expiry(certificate, key)
    except NotValid as error:
        yield Finding(
            check="TLS",
            state="fail",
            what=f"the certificate {certificate} is not valid now: {error}",
            do="renew it; a running server reads it anew by itself",
        )
        return
    if until - now < CERTIFICATE_WARNING:
        yield Finding(
            check="TLS",
            state="warn",
            what=f"the certificate {certificate} ends on {until:%Y-%m-%d %H:%M} UTC",
            do="renew it; a running server reads it anew by itself",
        )
    else:
        yield Finding(check="TLS", state="ok", what=f"the certificate is valid until {until:%Y-%m-%d}")


def _folder(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        if folder.exists() or not os.access(there, os.W_OK | os.X_OK):
            yield Finding(
                check="galleries",
                state="fail",
                what=f"{folder} is no folder, and cannot be made",
                do=f"make it, owned by the server's user, or correct `galleries`; looked in {there}",
            )
            return
        yield Finding(check="galleries", state="ok", what=f"{folder} will be made")
        folder = there
    elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(
            check="galleries",
            state="fail",
            what=f"{folder} cannot be written to",
            do="give it to the user who runs the server (and this command): chown",
        )
    lock = folder / LOCK
    if lock.exists() and (not lock.is_file() or not os.access(lock, os.R_OK | os.W_OK)):
        yield Finding(
            check="galleries",
            state="fail",
            what=f"{lock} is no file that can be written to: no server can hold the folder",
            do="remove it while no server runs; one makes it anew. What a dead process has left holds nothing",
        )
    yield _free_space(folder)


def _free_space(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    what = f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB free under {folder}"
    if usage.free >= LEAST_FREE_BYTES:
        return Finding(check="disk", state="ok", what=what)
    return Finding(
        check="disk",
        state="fail" if usage.free < LEAST_FREE_BYTES // 10 else "warn",
        what=what,
        do="free space or move the galleries: a full disk ends writes with RESOURCE_EXHAUSTED, searches go on",
    )


def _memory(bundles: Sequence[Bundle], opened: Sequence[GalleryEngine]) -> Iterator[Finding]:
    available = _available_memory()
    if available is None:
        return
    weights = sum((bundle.path / "weights.safetensors").stat().st_size for bundle in bundles)
    needed = 2 * weights + sum(gallery.stats().memory_bytes for gallery in opened)
    what = f"{available / 1e9:.1f} GB available; models and galleries take about {needed / 1e9:.2f} GB"
    if needed > available:
        yield Finding(
            check="memory",
            state="warn",
            what=what,
            do="give the server more memory, or bound galleries: lookalike gallery configure NAME --memory-bytes",
        )
    else:
        yield Finding(check="memory", state="ok", what=what)


def _available_memory() -> int | None:
    """Bytes that this machine, or the control group that we are in, still has; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return available if most == "max" else min(available, int(most) - used)
    except (OSError, ValueError):
        return available


def _clock(bundles: Sequence[Bundle], opened: Sequence[GalleryEngine], now: datetime) -> Iterator[Finding]:
    dates = [bundle.lineage.created for bundle in bundles] + [gallery.created for gallery in opened]
    if dates and max(dates) > now + _FUTURE:
        yield Finding(
            check="clock",
            state="fail",
            what=f"it says {now:%Y-%m-%d %H:%M} UTC, and something here was made on {max(dates):%Y-%m-%d %H:%M}",
            do="set the clock (NTP): certificates and tokens are judged by it",
        )
    else:
        yield Finding(check="clock", state="ok", what=f"{now:%Y-%m-%d %H:%M} UTC")
