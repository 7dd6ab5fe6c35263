"""`lookalike keys`: who may call a server, and what they may do."""

from __future__ import annotations

import json as as_json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias, cast

import typer

from lookalike.cli import show

if TYPE_CHECKING:
    from service.access.keys import Record
    from service.access.principal import Scope

app = typer.Typer(
    help="Make and manage the API keys of a server; a running one takes changes over within a second.",
    no_args_is_help=True,
)

KeyFile: TypeAlias = Annotated[
    Path,
    typer.Option(
        "--file", metavar="FILE", envvar="LOOKALIKE_KEYS", help="The file of keys, as `serve --keys` reads it."
    ),
]
Days: TypeAlias = Annotated[float | None, typer.Option("--days", min=0, help="Days until it expires, above 0.")]
Which: TypeAlias = Annotated[str, typer.Argument(metavar="KEY", help="Its id, or the name of its holder.")]

DEFAULT_FILE = Path("keys.json")


@app.callback()
def keys() -> None:
    """Make and manage the API keys of a server; a running one takes changes over within a second."""


@app.command()
def create(
    name: Annotated[
        str,
        typer.Argument(
            help="Who will hold it, as logs will show: 1 to 64 letters, digits and . _ @ -, the first a letter or "
            "digit."
        ),
    ],
    scope: Annotated[
        list[str], typer.Option("--scope", help="read, write or admin; may repeat. None implies another.")
    ],
    gallery: Annotated[
        list[str],
        typer.Option("--gallery", help="Galleries and aliases by id or pattern, such as 'shop-*'; may repeat."),
    ],
    file: KeyFile = DEFAULT_FILE,
    days: Days = None,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0, help="Calls a second, in the long run, above 0; none for no limit.")
    ] = None,
    burst: Annotated[
        int | None,
        typer.Option("--burst", min=1, help="With --rate: calls that may come at once; by default those of a second."),
    ] = None,
    certificate: Annotated[
        str,
        typer.Option(
            "--certificate",
            metavar="NAME",
            help="Register a client certificate instead: its alternative name, or CN= and its common name.",
        ),
    ] = "",
) -> None:
    """Make a key and print it; only its hash is kept, so that nobody can print it again."""
    from service.access.key_ring import KeyRing

    record, key = KeyRing(file).create(
        name,
        scopes=cast("Sequence[Scope]", scope),
        galleries=gallery,
        days=days,
        per_second=rate,
        burst=burst,
        certificate=certificate,
    )
    _tell(f"{'certificate' if certificate else 'key'} {record.id} of {name}: {_rights(record)}", key)


@app.command(name="list")
def list_(
    file: KeyFile = DEFAULT_FILE,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the keys and their rights."""
    from service.access.key_ring import KeyRing

    records = KeyRing(file).all()
    if json:
        print(as_json.dumps([record.model_dump(mode="json", exclude={"digest"}) for record in records], indent=1))
        return
    table = show.table(["id", "name", "scopes", "galleries", "rate", "expires", "certificate"])
    now = datetime.now(UTC)
    for record in records:
        rate = f"{record.per_second:g}/s, {record.burst:,} at once" if record.per_second else "no limit"
        expires = f"{record.expires:%Y-%m-%d %H:%M} UTC" if record.expires else "never"
        table.add_row(
            record.id,
            record.name,
            " ".join(record.scopes),
            " ".join(record.galleries),
            rate,
            f"{expires} (expired)" if record.has_expired(now) else expires,
            record.certificate,
        )
    show.console().print(table)


@app.command()
def rotate(
    which: Which,
    file: KeyFile = DEFAULT_FILE,
    overlap: Annotated[
        float,
        typer.Option("--overlap", min=0, max=876_000, help="Hours for which the old key counts beside the new one."),
    ] = 24.0,
    days: Days = None,
) -> None:
    """Make another key with the same rights, and let the old one expire; without --days it lives as long."""
    from service.access.key_ring import KeyRing

    record, key = KeyRing(file).rotate(which, overlap=timedelta(hours=overlap), days=days)
    _tell(f"key {record.id} of {record.name}: {_rights(record)}; the old one counts for {overlap:g} h more", key)


@app.command()
def revoke(which: Which, file: KeyFile = DEFAULT_FILE) -> None:
    """Take a key away at once; by the name of its holder, all that they have."""
    from service.access.key_ring import KeyRing

    for record in KeyRing(file).revoke(which):
        print(f"revoked {record.id} of {record.name}")


def _rights(record: Record) -> str:
    return f"may {', '.join(record.scopes)} in {' '.join(record.galleries)}"


def _tell(what: str, key: str) -> None:
    """The key alone goes to the standard output, so that it can be piped into wherever secrets are kept."""
    print(what, file=sys.stderr)
    if key:
        print(key)
