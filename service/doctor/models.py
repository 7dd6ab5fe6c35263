"""Which models a server would answer with: the bundles of the settings, or those that were activated since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from embedding.bundle import Bundle
from embedding.encoder import Encoder
from embedding.errors import DamagedData, LookalikeError
from service.doctor.finding import Finding
from service.rollout import standing
from service.rollout.stock import Choice, Stock
from service.settings import Settings


def models(settings: Settings, answering: list[Bundle]) -> Iterator[Finding]:
    """Every check of the bundles; those that would answer, the active one first, are added to `answering`."""
    given: list[Bundle] = []
    for path in (settings.bundle, *settings.other_bundles):
        yield from _bundle(settings, path, given)
    yield from _folder(settings)
    if len(given) == 1 + len(settings.other_bundles):
        yield from _activated(settings, given, answering)
    else:
        answering += given  # it would not start, as has been said


def _folder(settings: Settings) -> Iterator[Finding]:
    """The folder of further bundles; nothing is said of those that are sound, nor of their weights."""
    if settings.models is None:
        return
    try:
        damaged = Stock((), settings.models).damaged()
    except LookalikeError as error:
        yield Finding(check="models", state="fail", what=str(error), do="make the folder, or correct `models`")
        return
    for path, why in damaged.items():
        yield Finding(
            check=f"model {path.name}",
            state="warn",
            what=f"it cannot be activated: {why}",
            do="restore the bundle from a copy, or take it out of the folder",
        )


def _encoder(settings: Settings, bundle: Bundle) -> Iterator[Finding]:
    """Whether what runs the network is there."""
    try:
        Encoder(bundle, device=settings.device, runtime=settings.runtime, precision=settings.precision)
    except LookalikeError as error:
        what = str(error)
        yield Finding(check="encoder", state="fail", what=what, do=f"correct {error.field or 'device or runtime'}")


def _activated(settings: Settings, given: list[Bundle], answering: list[Bundle]) -> Iterator[Finding]:
    try:
        remembered = standing.kept(settings.galleries)
    except DamagedData as error:
        answering += given
        yield Finding(
            check="models",
            state="warn",
            what=str(error),
            do="if another model was activated, activate it again once the server runs: lookalike model activate",
        )
        return
    plain = tuple(map(Choice.of, given))
    wanted = plain if remembered is None else (remembered.active, *remembered.others)
    if wanted == plain or remembered is None:
        answering += given
        return
    if remembered.given != plain:
        answering += given
        yield Finding(
            check="models",
            state="ok",
            what=f"the settings name other bundles than when {remembered.active.model} was activated; these answer",
        )
        return
    stock = Stock((settings.bundle, *settings.other_bundles), settings.models)
    try:
        for choice in wanted:
            same = next((bundle for bundle in given if Choice.of(bundle) == choice), None)
            if same is not None:
                answering.append(same)
            else:
                yield from _bundle(settings, stock.find(choice.model, choice.calibration).path, answering)
    except LookalikeError as error:
        answering[:] = given
        yield Finding(
            check="models",
            state="warn",
            what=f"what was activated is gone, and the bundles of the settings would answer: {error}",
            do="bring its bundle back before the server starts, or activate another: lookalike model activate",
        )
        return
    active, *others = wanted
    beside = f", beside {', '.join(choice.model for choice in others)}" if others else ""
    yield Finding(
        check="models",
        state="ok",
        what=f"{active.model} was activated and answers{beside}; {standing.FILE} remembers it",
    )


def _bundle(settings: Settings, path: Path, found: list[Bundle]) -> Iterator[Finding]:
    try:
        bundle = Bundle.load(path)
        bundle.network()
    except LookalikeError as error:
        yield Finding(
            check="bundle", state="fail", what=str(error), do="restore the bundle from a copy, or correct its path"
        )
        return
    found.append(bundle)
    yield from _encoder(settings, bundle)
    calibration = bundle.calibration
    yield Finding(
        check="bundle",
        state="ok",
        what=f"{bundle.name}: sums agree, {calibration.identities} identities calibrated, "
        f"learned margin {calibration.learned_margin:.4f}",
    )
    if calibration.protocol != "identity-disjoint":
        yield Finding(
            check="calibration",
            state="warn",
            what=f"{bundle.name} was calibrated on identities that it was trained on: its rates flatter",
            do="train with an identity-disjoint split before relying on the rates of its decisions",
        )
    if bundle.reference is None:
        yield Finding(
            check="drift reference",
            state="warn",
            what=f"{bundle.name} was made by an earlier version and has no reference.json: drift is not measured",
            do="train it anew with this version, or leave it and do without",
        )
    else:
        yield Finding(
            check="drift reference", state="ok", what=f"{bundle.name}: of {bundle.reference.images} held-out images"
        )
