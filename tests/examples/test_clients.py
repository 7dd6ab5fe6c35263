"""Clients that are not ours do what examples/ shows: over TLS, with an API key, against a real server.

All pass one list: health, Verify, a write and its reading, Search by image and by vector, a filter, a stream whose bad
element fails alone, the reason of an error, and a call without the key. What they print is held against what the
Python client is answered.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from google.rpc import error_details_pb2

from lookalike import Client, NewItem, Tls
from service.access.key_ring import KeyRing
from service.settings import Settings
from tests.authority import Authority, replace
from tests.service.harness import Loop, make_bundle, png, served

EXAMPLES = Path(__file__).parents[2] / "examples"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
REQUIRED = bool(os.environ.get("CLIENTS_REQUIRED"))
"""Whether a tool that is missing is a failure; `make test-clients` says so."""


@dataclass(frozen=True)
class Place:
    """A server, two images, and the environment that leads to it."""

    folder: Path
    variables: dict[str, str]
    target: str
    secret: str
    """An API key."""
    distance: float
    """Between the two images, as the Python client is told."""

    def run(self, *command: str | Path) -> str:
        words = [str(word) for word in command]
        ran = subprocess.run(
            words, env=self.variables, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert ran.stderr == ""
        return ran.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("shop")
    authority = Authority()
    certificate, key = authority.issue("server").write(folder, "server")
    replace(folder / "ca.crt", authority.root)
    _, secret = KeyRing(folder / "keys.json").create("shop", scopes=["read", "write", "admin"], galleries=["*"])
    settings = Settings(
        bundle=make_bundle(folder / "toy", seed=0).path,
        galleries=folder / "galleries",
        port=0,
        device="cpu",
        encode_threads=1,
        keys=folder / "keys.json",
        tls_certificate=certificate,
        tls_key=key,
    )
    (folder / "a.png").write_bytes(png(1))
    (folder / "b.png").write_bytes(png(2))
    loop = Loop()
    with served(loop, settings) as server:
        target = server.address.replace("127.0.0.1", "localhost")  # TLS knows no names that are addresses
        with Client(target, tls=Tls(ca=folder / "ca.crt"), api_key=secret) as client:
            distance = client.verify(folder / "a.png", folder / "b.png").distance
        yield Place(
            folder,
            {
                "PATH": PATH,
                "HOME": str(folder),
                "LOOKALIKE_TARGET": target,
                "LOOKALIKE_TLS_CA": str(folder / "ca.crt"),
                "LOOKALIKE_API_KEY": secret,
            },
            target,
            secret,
            distance,
        )
    loop.close()


def tool(name: str) -> str:
    """Where a program is; skips the test where it is not."""
    found = shutil.which(name, path=PATH)
    if found is None:
        missing(f"{name} is not installed; `make test-clients` installs it")
    return str(found)


def missing(why: str) -> None:
    if REQUIRED:
        pytest.fail(why)
    pytest.skip(why)


def by_node(place: Place) -> dict[str, Any]:
    node = tool("node")
    if not (EXAMPLES / "node" / "node_modules").is_dir():
        missing("examples/node has no node_modules; `make test-clients` installs them")
    out = place.run(node, EXAMPLES / "node" / "ask.mjs", "node", "a.png", "b.png")
    steps = {answer.pop("step"): answer for answer in map(json.loads, out.splitlines())}
    assert steps["stream"]["count"] == 100
    return {
        "health": steps["health"]["status"],
        "verify": steps["verify"]["distance"],
        "written": {"identity": steps["written"]["identity"], "n": steps["written"]["n"]},
        **{name: steps[name]["items"] for name in ("search by image", "search by vector", "filter")},
        "stream": [each.get("reason", each.get("distance")) for each in steps["stream"]["results"]],
        "error": steps["error"]["reason"],
        "without a key": steps["without a key"]["reason"],
    }


def by_shell(place: Place, name: str) -> dict[str, Any]:
    out = place.run(tool("bash"), EXAMPLES / "shell" / "ask.sh", name, f"by-{name}", "a.png", "b.png")
    parts = re.split(r"^# (.*)\n", out, flags=re.MULTILINE)[1:]
    steps = dict(zip(parts[::2], parts[1::2], strict=True))
    health, verify, written = (json.loads(steps[name]) for name in ("health", "verify", "written"))
    found = {
        name: [neighbor["item"].split("/")[-1] for neighbor in json.loads(steps[name])["neighbors"]]
        for name in ("search by image", "search by vector", "filter")
    }
    return {
        "health": health["status"],
        "verify": verify["decision"]["distance"],
        "written": {"identity": written["item"]["identity"], "n": written["item"]["metadata"]["n"]},
        **found,
        "stream": [
            each["error"]["details"][0]["reason"] if "error" in each else each["decision"].get("distance", 0)
            for each in documents(steps["stream"])
        ],
        "error": reason(steps["error"]),
        "without a key": reason(steps["without a key"]),
    }


def documents(text: str) -> list[dict[str, Any]]:
    decoder, found, text = json.JSONDecoder(), [], text.lstrip()
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:].lstrip()
    return found


def reason(text: str) -> str:
    """The reason that a failed call printed: in the clear by grpcurl, as the bytes of ErrorInfo by buf."""
    if text.startswith("{"):
        (info,) = (each for each in json.loads(text)["details"] if each["type"] == "google.rpc.ErrorInfo")
        data = base64.b64decode(info["value"] + "=" * (-len(info["value"]) % 4))
        return error_details_pb2.ErrorInfo.FromString(data).reason
    (found,) = re.findall(r'ErrorInfo".*"reason":"(\w+)"', text)
    return str(found)


@pytest.mark.parametrize(
    "ask",
    [by_node, lambda place: by_shell(place, "grpcurl"), lambda place: by_shell(place, "buf")],
    ids=["node", "grpcurl", "buf"],
)
def test_a_client_passes_the_list(
    place: Place, ask: Callable[[Place], dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.id != "node":
        tool(request.node.callspec.id)
    distance = pytest.approx(place.distance, rel=1e-6)  # a float32 in as many digits as each prints
    assert ask(place) == {
        "health": "SERVING",
        "verify": distance,
        "written": {"identity": "two", "n": 2},
        "search by image": ["one", "two"],
        "search by vector": ["two"],
        "filter": ["two"],
        "stream": [0, "INVALID_IMAGE", distance],
        "error": "INVALID_IMAGE",
        "without a key": "CREDENTIALS_MISSING",
    }


def test_k6_makes_load_and_sees_failures(place: Place) -> None:
    with Client(place.target, tls=Tls(ca=place.folder / "ca.crt"), api_key=place.secret) as client:
        client.create_gallery("k6")
        client.create_gallery("empty")
        client.update_item("k6", NewItem(id="a", image=place.folder / "a.png"))
    options = ["--quiet", "--no-usage-report", "--vus", "2", "--iterations", "20", "--summary-export", "summary.json"]

    def run(other: str, *further: str) -> None:
        images = ["-e", f"IMAGE={place.folder}/a.png", "-e", f"OTHER={place.folder}/{other}"]
        place.run(tool("k6"), "run", *options, *images, *further, EXAMPLES / "k6" / "load.js")

    for further, calls in (((), 20), (("-e", "GALLERY=k6"), 40)):
        run("b.png", *further)
        summary = json.loads((place.folder / "summary.json").read_text())["metrics"]
        assert (summary["checks"]["passes"], summary["checks"]["fails"]) == (calls, 0)
    (place.folder / "no.png").write_bytes(b"no image")
    with pytest.raises(AssertionError, match="thresholds"):
        run("no.png")
    with pytest.raises(AssertionError, match="thresholds"):
        run("b.png", "-e", "GALLERY=empty")


def test_ray_finds_what_one_search_finds(place: Place) -> None:
    if find_spec("ray") is None:
        missing("ray is not installed; `make test-clients` installs it")
    images = place.folder / "many"
    images.mkdir()
    for at in range(12):
        (images / f"{at}.png").write_bytes(png(at))
    (images / "no.png").write_bytes(b"no image")
    command = [sys.executable, EXAMPLES / "ray" / "neighbors.py", images, "--gallery", "ray", "--out", "rows"]
    with Client(place.target, tls=Tls(ca=place.folder / "ca.crt"), api_key=place.secret) as client:
        client.create_gallery("ray")
        client.update_items("ray", [NewItem(id=f"{at}", image=png(at), identity=f"{at % 3}") for at in range(12)])
        ran = subprocess.run(
            [*map(str, command), "-k", "3", "--workers", "2"],
            env=place.variables,
            cwd=place.folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.stdout == "wrote the neighbours of 13 queries to rows\n", ran.stderr
        wanted = [
            (str(images / f"{at}.png"), rank, found.item.id, found.identity, found.decision.distance)
            for at in range(12)
            for rank, found in enumerate(client.search("ray", png(at), k=3), start=1)
        ]
        decision = client.verify(png(1), png(1))
    rows = pq.read_table(place.folder / "rows").to_pylist()
    failed = [row for row in rows if row["error"]]
    assert [(row["query"], row["error_reason"]) for row in failed] == [(str(images / "no.png"), "INVALID_IMAGE")]
    found = [row for row in rows if not row["error"]]
    names = ("query", "rank", "item", "identity", "distance")
    assert sorted(tuple(row[name] for name in names) for row in found) == sorted(wanted)
    assert {(row["threshold"], row["far_upper95"], row["model"]) for row in found} == {
        (decision.threshold, decision.far_upper95, decision.model)
    }
    assert {row["verdict"] for row in found if row["is_match"]} == {"match"}
    assert {row["verdict"] for row in found if not row["is_match"]} == {"non-match"}
