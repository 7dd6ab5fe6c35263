"""The server over loopback beside what it is made of and beside its peers, in one run.

    python -m benchmarks.service [--quick] [--only SECTION] [--peers NAME ...] [--folder DIR] [--json FILE]

Server and load generator have cores of their own. `LOOKALIKE_PEERS` names the Python of an environment that has the
peers (extra `bench-servers`); a peer that cannot be started is left out, and said to be. Rows are printed as they come.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import machine
from benchmarks.report import Report
from benchmarks.servers.remote import PEERS, SLOW_TO_START

SECTIONS = ("service_search", "service_images")
"""Modules of this package, each with `run(report, quick=, peers=, folder=)`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and one turn of a second")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="these sections alone")
    parser.add_argument(
        "--peers", nargs="*", choices=list(PEERS), help="these peers alone; --quick leaves out the slow one"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write; a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too, after each section")
    options = parser.parse_args()
    where = machine(*(f"{name} {version(name)}" for name in ("grpcio", "protobuf", "uvloop", "faiss-cpu")))
    print(f"{where}\n\n| measured | rows | engine | figure | recall@10 | |\n| --- | ---: | --- | ---: | ---: | --- |")
    peers_of = [name for name in PEERS if not options.quick or name != SLOW_TO_START]
    peers = peers_of if options.peers is None else options.peers
    report = Report()
    for section in options.only or SECTIONS:
        if importlib.util.find_spec(f"benchmarks.{section}") is None:
            continue
        module = importlib.import_module(f"benchmarks.{section}")
        module.run(report, quick=options.quick, peers=peers, folder=options.folder)
        if options.json is not None:
            report.write(options.json, where)
    report.says()


if __name__ == "__main__":
    main()
