"""Print the Grafana dashboard: `python deploy/grafana/make_dashboard.py > deploy/grafana/lookalike.json`.

Written by a program because a panel is one line here and forty there; a test compares the two.
"""

from __future__ import annotations

import json
from typing import Any

WIDTH, HEIGHT = 8, 7
PER_ROW = 24 // WIDTH

RATE = "$__rate_interval"
HERE = 'instance=~"$instance"'

Panel = tuple[str, str, list[tuple[str, str]]]
"""Title, unit, and pairs of expression and legend."""

ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Calls",
        [
            ("Ready", "none", [(f"lookalike_ready{{{HERE}}}", "{{instance}}")]),
            (
                "Calls by method",
                "reqps",
                [(f"sum by (method) (rate(lookalike_calls_total{{{HERE}}}[{RATE}]))", "{{method}}")],
            ),
            (
                "Calls that did not end well, by code",
                "reqps",
                [(f'sum by (code) (rate(lookalike_calls_total{{{HERE},code!="OK"}}[{RATE}]))', "{{code}}")],
            ),
            (
                "Latency, 99th percentile",
                "s",
                [
                    (
                        "histogram_quantile(0.99, sum by (method, le) "
                        f"(rate(lookalike_call_seconds_bucket{{{HERE}}}[{RATE}])))",
                        "{{method}}",
                    )
                ],
            ),
            (
                "Latency, median",
                "s",
                [
                    (
                        "histogram_quantile(0.5, sum by (method, le) "
                        f"(rate(lookalike_call_seconds_bucket{{{HERE}}}[{RATE}])))",
                        "{{method}}",
                    )
                ],
            ),
            ("In flight", "none", [(f"sum by (method) (lookalike_calls_in_flight{{{HERE}}})", "{{method}}")]),
        ],
    ),
    (
        "Stages",
        [
            (
                "Mean time of an image or question in each stage",
                "s",
                [
                    (
                        f"sum by (stage) (rate(lookalike_stage_seconds_sum{{{HERE}}}[{RATE}])) / "
                        f"sum by (stage) (rate(lookalike_stage_seconds_count{{{HERE}}}[{RATE}]))",
                        "{{stage}}",
                    )
                ],
            ),
            (
                "Images embedded together",
                "none",
                [
                    (
                        f"rate(lookalike_batch_images_sum{{{HERE}}}[{RATE}]) / "
                        f"rate(lookalike_batch_images_count{{{HERE}}}[{RATE}])",
                        "mean {{instance}}",
                    )
                ],
            ),
            (
                "Encoder utilisation",
                "percentunit",
                [(f"rate(lookalike_batch_seconds_total{{{HERE}}}[{RATE}])", "{{instance}}")],
            ),
            ("Images that wait", "none", [(f"lookalike_queue_images{{{HERE}}}", "{{model}}")]),
            (
                "Images embedded lately, found again",
                "percentunit",
                [
                    (
                        f'rate(lookalike_embedding_cache_lookups_total{{{HERE},result="hit"}}[{RATE}]) / ignoring '
                        f"(result) sum without (result) (rate(lookalike_embedding_cache_lookups_total{{{HERE}}}"
                        f"[{RATE}]))",
                        "{{instance}}",
                    )
                ],
            ),
            (
                "Event loop late by, 99th percentile",
                "s",
                [
                    (
                        "histogram_quantile(0.99, sum by (instance, le) "
                        f"(rate(lookalike_event_loop_lag_seconds_bucket{{{HERE}}}[{RATE}])))",
                        "{{instance}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Models",
        [
            (
                "Match rate",
                "percentunit",
                [
                    (
                        "sum by (model, kind) "
                        f'(rate(lookalike_decisions_total{{{HERE},verdict="match"}}[{RATE}])) / '
                        f"sum by (model, kind) (rate(lookalike_decisions_total{{{HERE}}}[{RATE}]))",
                        "{{kind}} {{model}}",
                    )
                ],
            ),
            (
                "Distance, quartiles of pairs and nearest items",
                "none",
                [
                    (
                        f"histogram_quantile({quantile}, sum by (model, kind, le) "
                        f"(rate(lookalike_distance_bucket{{{HERE}}}[{RATE}])))",
                        f"{name} {{{{kind}}}} {{{{model}}}}",
                    )
                    for quantile, name in ((0.25, "lower"), (0.5, "median"), (0.75, "upper"))
                ]
                + [(f"lookalike_model_learned_margin{{{HERE}}}", "margin {{model}}")],
            ),
            ("Drift (PSI)", "none", [(f"lookalike_drift_psi{{{HERE}}}", "{{of}} {{model}}")]),
            ("Values in the drift window", "none", [(f"lookalike_drift_samples{{{HERE}}}", "{{of}} {{model}}")]),
            (
                "Estimated share of matching pairs",
                "percentunit",
                [(f"lookalike_drift_match_share{{{HERE}}}", "{{of}} {{model}}")],
            ),
            ("Loaded models", "none", [(f"lookalike_model_info{{{HERE}}}", "{{model}} active={{active}}")]),
        ],
    ),
    (
        "Galleries",
        [
            ("Items", "none", [(f"lookalike_gallery_items{{{HERE}}}", "{{gallery}}")]),
            ("Unsealed items", "none", [(f"lookalike_gallery_unsealed_items{{{HERE}}}", "{{gallery}}")]),
            ("Dead rows", "none", [(f"lookalike_gallery_dead_rows{{{HERE}}}", "{{gallery}}")]),
            ("Segments", "none", [(f"lookalike_gallery_segments{{{HERE}}}", "{{gallery}}")]),
            (
                "Segments written",
                "none",
                [
                    (
                        f"sum by (gallery, kind) (increase(lookalike_gallery_seals_total{{{HERE}}}[1h]))",
                        "{{kind}} {{gallery}}",
                    )
                ],
            ),
            (
                "On disk, and its log",
                "bytes",
                [
                    (f"lookalike_gallery_disk_bytes{{{HERE}}}", "{{gallery}}"),
                    (f"lookalike_gallery_wal_bytes{{{HERE}}}", "log of {{gallery}}"),
                ],
            ),
            ("In memory", "bytes", [(f"lookalike_gallery_memory_bytes{{{HERE}}}", "{{gallery}}")]),
            (
                "Busy, failing",
                "none",
                [
                    (f"lookalike_gallery_busy{{{HERE}}}", "busy {{gallery}}"),
                    (f"lookalike_gallery_failing{{{HERE}}}", "failing {{gallery}}"),
                ],
            ),
            (
                "Galleries, and those that cannot be opened",
                "none",
                [
                    (f"lookalike_galleries{{{HERE}}}", "all"),
                    (f"lookalike_galleries_unreadable{{{HERE}}}", "unreadable"),
                ],
            ),
        ],
    ),
    (
        "Process",
        [
            ("Memory", "bytes", [(f"process_resident_memory_bytes{{{HERE}}}", "{{instance}}")]),
            ("CPU", "none", [(f"rate(process_cpu_seconds_total{{{HERE}}}[{RATE}])", "{{instance}}")]),
            ("Disk free", "bytes", [(f"lookalike_disk_free_bytes{{{HERE}}}", "{{instance}}")]),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
                "id": len(panels) + 1,
            }
        )
        y += 1
        for at, (name, unit, targets) in enumerate(row):
            panels.append(
                {
                    "type": "timeseries",
                    "title": name,
                    "id": len(panels) + 1,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "gridPos": {
                        "x": WIDTH * (at % PER_ROW),
                        "y": y + HEIGHT * (at // PER_ROW),
                        "w": WIDTH,
                        "h": HEIGHT,
                    },
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "targets": [
                        {"refId": chr(ord("A") + nth), "expr": expression, "legendFormat": legend}
                        for nth, (expression, legend) in enumerate(targets)
                    ],
                }
            )
        y += HEIGHT * -(-len(row) // PER_ROW)
    return {
        "title": "lookalike",
        "uid": "lookalike",
        "schemaVersion": 39,
        "tags": ["lookalike"],
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "instance",
                    "type": "query",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": "label_values(lookalike_ready, instance)",
                    "includeAll": True,
                    "multi": True,
                    "refresh": 2,
                },
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
