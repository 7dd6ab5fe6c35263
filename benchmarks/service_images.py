"""Calls that carry images, on one server that the models take turns at: Verify beside its encoder, and overload."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc

from benchmarks import service_overload, service_verify
from benchmarks.report import Report
from benchmarks.service_server import Served, make_bundle, serving
from embedding.bundle import Bundle
from lookalike.v1 import model_pb2, model_pb2_grpc


def run(report: Report, *, quick: bool, peers: Sequence[str] = (), folder: Path | None = None) -> None:
    """Both, in this order. There are no peers."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        bundles = Path(place) / "models"
        bundles.mkdir()
        first, *_ = [make_bundle(bundles / recipe, recipe) for recipe in service_verify.cases(quick=quick)]
        with serving(first, models=bundles, galleries=Path(place) / "galleries") as server:

            def serve(recipe: str) -> Served:
                request = model_pb2.ActivateModelRequest(name=f"models/{Bundle.load(bundles / recipe).name}")
                with grpc.insecure_channel(server.address) as channel:
                    model_pb2_grpc.ModelServiceStub(channel).ActivateModel(request)
                return server

            service_verify.measure(report, bundles, serve, quick=quick)
            service_overload.measure(report, serve(service_overload.RECIPE), quick=quick)
