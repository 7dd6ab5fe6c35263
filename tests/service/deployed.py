"""A deployment with nothing wrong, for tests of the doctor to break in one way each."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding.bundle import Bundle
from index import Catalog, ModelRef
from service.doctor.finding import Finding
from service.settings import Settings
from tests.service.test_drift import referenced

__all__ = ["referenced", "whole", "wrong"]


def wrong(findings: Iterator[Finding]) -> dict[str, Finding]:
    """The findings that are not ok, by check; each says what to do."""
    found = {finding.check: finding for finding in findings if finding.state != "ok"}
    assert all(finding.do for finding in found.values())
    return found


@pytest.fixture
def whole(settings: Settings, referenced: Bundle, tmp_path: Path) -> Settings:
    """A deployment with nothing wrong: a bundle, a gallery of its model, a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    galleries = tmp_path / "deployed"
    model = ModelRef(name=referenced.name, fingerprint=referenced.fingerprint, embedding_dim=referenced.embedding_dim)
    with Catalog(galleries) as catalog:
        catalog.create("kept", model)
    return settings.model_copy(update={"bundle": referenced.path, "galleries": galleries, "port": port})
