"""Which precision a recipe gets on a device."""

from __future__ import annotations

import pytest
import torch

from training import precision


@pytest.mark.parametrize(
    ("asked", "device", "has_bf16", "used"),
    [
        ("auto", "cpu", True, "fp32"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("bf16", "cpu", True, "bf16"),
        ("bf16", "cpu", False, "fp32"),
        ("bf16", "cuda", False, "fp16"),
        ("fp16", "cuda", True, "fp16"),
        ("fp32", "cuda", True, "fp32"),
    ],
)
def test_bf16_is_for_devices_that_have_it(
    asked: precision.Precision, device: str, has_bf16: bool, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.precision.has_bf16", lambda device: has_bf16)
    assert precision.used(asked, torch.device(device)) == used


@pytest.mark.parametrize(
    ("told", "has"),
    [({"avx2": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"bf16": True}, True), ({}, False)],
)
def test_a_processor_is_asked_for_bf16(told: dict[str, bool], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert precision.has_bf16(torch.device("cpu")) == has
