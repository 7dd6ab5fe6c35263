"""`lookalike doctor`."""

from __future__ import annotations

import dataclasses
import json as json_module
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lookalike.cli import connection, options, show

if TYPE_CHECKING:
    from service.doctor.finding import Finding
    from service.doctor.server import Way

UNWELL = 1

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="DIR", help="The bundle that answers. [env: LOOKALIKE_BUNDLE]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="The folder of galleries. [env: LOOKALIKE_GALLERIES]"),
    ] = None,
    settings_file: Annotated[
        Path | None,
        typer.Option("--settings", metavar="FILE", help="The server's settings. [env: LOOKALIKE_SETTINGS]"),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting by name; may repeat.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="HOST:PORT", help="A server that must answer; else that of the settings."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every item of every gallery, which takes long.")] = False,
    json: options.Json = False,
) -> None:
    """Check a deployment, and say what is wrong and what to do; exit with 1 if it cannot serve.

    Give it the settings that the server gets. It changes nothing and may run beside a server, which it calls as the
    options before the command say.
    """
    import structlog

    from embedding.errors import LookalikeError
    from service.doctor.deployment import looked_at
    from service.doctor.finding import Finding
    from service.doctor.server import asked
    from service.server import SERVICES
    from service.settings_sources import Flag, Origins, set_flags

    # What is logged about what is found is told as a finding.
    logging.disable(logging.ERROR)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not json:
            _print(finding)

    try:
        origins = Origins.read(
            file=settings_file,
            environment=os.environ,
            flags=[
                *set_flags(assignments or ()),
                Flag("bundle", "--bundle", bundle),
                Flag("galleries", "--data", data),
            ],
        )
    except LookalikeError as error:
        tell(Finding(check="settings", state="fail", what=str(error), do="correct it, and run this again"))
    else:
        tell(Finding(check="settings", state="ok", what=f"{len(origins.of)} given, the others at their defaults"))
        for finding in looked_at(origins.settings, full=full):
            tell(finding)
        for finding in asked(origins.settings, target=target, services=SERVICES, way=_way):
            tell(finding)
    if json:
        print(json_module.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    failed = sum(finding.state == "fail" for finding in findings)
    if not json:
        warned = sum(finding.state == "warn" for finding in findings)
        print(f"{show.counted(len(findings), 'check')}: {failed} failed, {warned} with a warning")
    if failed:
        raise typer.Exit(UNWELL)


def _way(address: str) -> Way:
    from service.doctor.server import Way

    found = connection.access(address)
    return Way(credentials=found.credentials, options=found.options, metadata=found.metadata)


def _print(finding: Finding) -> None:
    out = show.console()
    out.print(Text.assemble((f"{finding.state:5}", _STYLES[finding.state]), f" {finding.check}: {finding.what}"))
    if finding.do:
        out.print(Text(f"        {finding.do}"))
