"""The service under load: server and load generator on cores of their own, one run, ratios.

    python -m benchmarks.service [--quick] [--only NAME ...] [--json FILE]

Each measurement has a file of its own (`service_NAME.py`). Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks import service_overload, service_verify
from benchmarks.measure import Bar, machine, say_bars
from benchmarks.service_server import Row

Measure = Callable[..., tuple[list[Row], list[Bar]]]

MEASUREMENTS: dict[str, Measure] = {"verify": service_verify.measure, "overload": service_overload.measure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="these alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    where = machine(*(f"{name} {version(name)}" for name in ("grpcio", "onnxruntime")))
    print(f"{where}\n\n| measured | figure | | |\n| --- | ---: | --- | --- |", flush=True)
    rows: list[Row] = []
    verdicts: list[Bar] = []
    for name in options.only:
        measured, held = MEASUREMENTS[name](quick=options.quick)
        for row in measured:
            print(f"| {row.what} | {row.value:,.3g} | {row.unit} | {row.note} |", flush=True)
        rows += measured
        verdicts += held
    say_bars(verdicts)
    if options.json is not None:
        report = {
            "machine": where,
            "rows": [asdict(row) for row in rows],
            "bars": [asdict(bar) for bar in verdicts],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
