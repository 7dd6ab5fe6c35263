"""Settings: three sources, the later winning; what is misspelt refused; what is secret never shown."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, SecretStr
from structlog.testing import capture_logs

from embedding.errors import InvalidInput, LookalikeError, NotFound
from service import process, settings_sources
from service import settings as settings_module
from service.settings import NEEDS, Settings
from service.settings_sources import Flag, Origins, set_flags
from tests.processes import COMMAND, environment

ROOT = Path(__file__).parents[2]


def read(
    text: str = "", variables: dict[str, str] | None = None, flags: list[Flag] | None = None, *, folder: Path
) -> Origins:
    file = folder / "server.toml"
    file.write_text(text)
    return Origins.read(file=file, environment=variables or {}, flags=flags or [])


def test_the_later_source_wins_and_is_told(tmp_path: Path) -> None:
    text = 'bundle = "models/a"\nport = 1\nhost = "h"\nbatch_size = 2'
    origins = read(text, {"LOOKALIKE_PORT": "2", "LOOKALIKE_HOST": "i"}, [Flag("port", "--port", 3)], folder=tmp_path)
    settings = origins.settings
    assert (settings.port, settings.host, settings.batch_size) == (3, "i", 2)
    assert settings.bundle == tmp_path / "models/a"  # a file's paths start at its folder
    assert origins.of["port"] == "flag --port"
    assert origins.of["host"] == "environment LOOKALIKE_HOST"
    assert origins.of["batch_size"] == f"file {tmp_path / 'server.toml'}"
    assert "max_pixels" not in origins.of


def test_what_is_not_given_leaves_what_another_source_gave(tmp_path: Path) -> None:
    variables = {"LOOKALIKE_PORT": "", "PORT": "9"}
    origins = read('bundle = "b"\nport = 1', variables, [Flag("port", "--port", None)], folder=tmp_path)
    assert origins.settings.port == 1


def test_every_setting_can_come_from_the_environment() -> None:
    """Whatever its type: the default of each, as text, gives the default again."""
    defaults = Settings(bundle=Path("b"))
    variables = {}
    for name in Settings.model_fields:
        value = getattr(defaults, name)
        if value is not None and not isinstance(value, (tuple, SecretStr)):
            variables[f"LOOKALIKE_{name.upper()}"] = str(value)
    origins = Origins.read(environment=variables)
    assert origins.settings == defaults
    assert len(origins.of) == len(variables) > 10


def test_lists_are_separated_by_commas(tmp_path: Path) -> None:
    expected = (Path("a"), Path("b c"))
    variables = {"LOOKALIKE_BUNDLE": "x", "LOOKALIKE_OTHER_BUNDLES": "a, b c,"}
    assert Origins.read(environment=variables).settings.other_bundles == expected
    flags = [*set_flags(["bundle=x", "other-bundles=a,b c"])]
    assert Origins.read(environment={}, flags=flags).settings.other_bundles == expected
    in_file = read('bundle = "x"\nother_bundles = ["a", "/b"]', folder=tmp_path)
    assert in_file.settings.other_bundles == (tmp_path / "a", Path("/b"))


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('bundle = "/b"')
    assert Origins.read(environment={"LOOKALIKE_SETTINGS": str(file)}).settings.bundle == Path("/b")


@pytest.mark.parametrize(
    ("text", "variables", "pairs", "told"),
    [
        ('bundel = "b"', {}, [], r"^bundel in the settings file .*server.toml is no setting; did you mean bundle\?$"),
        ("", {"LOOKALIKE_PROT": "1"}, [], r"LOOKALIKE_PROT is no setting; did you mean LOOKALIKE_PORT\?$"),
        ("", {"LOOKALIKE_XYZZY": "1"}, [], r"LOOKALIKE_XYZZY is no setting; .*--print-settings"),
        ("", {}, ["max-pixel=3"], r"--set max_pixel is no setting; did you mean max_pixels\?$"),
        ("", {}, ["port"], r"--set takes NAME=VALUE"),
        ("", {}, [], r"^bundle is not set.*; give --bundle, LOOKALIKE_BUNDLE, or `bundle` in a settings file$"),
        ('bundle = "b"\nport = 70000', {}, [], r"^port: .*65535; got 70000 \(file .*server.toml\)$"),
        ('bundle = "b"', {"LOOKALIKE_PORT": "many"}, [], r"^port: .*'many' \(environment LOOKALIKE_PORT\)$"),
        ('bundle = "b"', {}, ["port=-1"], r"^port: .*\(flag --set port\)$"),
        ("bundle = [\nport = 1", {}, [], r"not TOML: .*line 2"),
        ('bundle = "b"\ndrain_seconds = inf', {}, [], r"^drain_seconds: "),
    ],
)
def test_what_is_wrong_is_told_with_its_source(
    text: str, variables: dict[str, str], pairs: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=told):
        read(text, variables, [*set_flags(pairs), Flag("bundle", "--bundle", None)], folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "needed"),
    [
        ("jwt_issuer", "https://id.example", {"jwt_keys": "jwks.json"}),
        ("jwt_audience", "lookalike", {"jwt_keys": "jwks.json"}),
        ("jwt_algorithms", "ES256", {"jwt_keys": "jwks.json"}),
        ("jwt_leeway_seconds", "0", {"jwt_keys": "jwks.json"}),
        ("jwt_scopes_claim", "roles", {"jwt_keys": "jwks.json"}),
        ("jwt_scope_prefix", "l:", {"jwt_keys": "jwks.json"}),
        ("jwt_galleries_claim", "g", {"jwt_keys": "jwks.json"}),
        ("jwt_galleries", "shop-*", {"jwt_keys": "jwks.json"}),
        ("tls_key", "tls.key", {"tls_certificate": "tls.crt"}),
        ("tls_client_ca", "ca.crt", {"tls_certificate": "tls.crt", "tls_key": "tls.key"}),
        ("milvus_uri", "http://localhost:19530", {"engine": "milvus"}),
        ("milvus_token", "root:secret", {"engine": "milvus"}),
        ("milvus_database", "d", {"engine": "milvus"}),
        ("milvus_prefix", "p", {"engine": "milvus"}),
        ("metrics_host", "0.0.0.0", {"metrics_port": "0"}),
        ("drift_window_seconds", "60", {"metrics_port": "0"}),
        ("otlp_headers", "x-key=secret", {"otlp_endpoint": "http://127.0.0.1:4317"}),
        ("trace_share", "0.1", {"otlp_endpoint": "http://127.0.0.1:4317"}),
        ("min_ping_seconds", "1", {"max_ping_strikes": "1"}),
        ("precision", "bfloat16", {"device": "auto"}),
    ],
)
def test_what_does_nothing_without_another_is_refused(name: str, text: str, needed: dict[str, str]) -> None:
    """`jwt_issuer` without `jwt_keys` would look like a locked door and stand open."""
    variable = f"LOOKALIKE_{name.upper()}"
    without = {"LOOKALIKE_BUNDLE": "b", "LOOKALIKE_DEVICE": "cpu", "LOOKALIKE_MAX_PING_STRIKES": "0"}
    with pytest.raises(InvalidInput, match=rf"^{name} is of no effect without .*\(environment {variable}\)$") as caught:
        Origins.read(environment={**without, variable: text})
    assert caught.value.field == name
    assert next(iter(needed)).split("_")[0] in str(caught.value)
    assert "secret" not in str(caught.value)
    whole = {f"LOOKALIKE_{other.upper()}": value for other, value in needed.items()}
    assert name in Origins.read(environment={**without, variable: text, **whole}).of


@pytest.mark.parametrize(("workers", "threads"), [("1", 12), ("5", 3), ("64", 1)])
def test_each_worker_takes_its_share_of_the_cores(
    workers: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "_CORES", 12)
    given = {"LOOKALIKE_BUNDLE": "b", "LOOKALIKE_WORKERS": workers}
    shared = read(variables=given, folder=tmp_path).settings
    assert (shared.decode_threads, shared.encode_threads, shared.gallery_threads) == (threads, threads, 2 * threads)
    chosen = read("decode_threads = 7", given, folder=tmp_path).settings
    assert (chosen.decode_threads, chosen.encode_threads) == (7, threads)


def test_every_need_is_tried_and_defaults_written_down_are_no_need() -> None:
    tried = next(
        mark.args[1]
        for mark in test_what_does_nothing_without_another_is_refused.pytestmark  # type: ignore[attr-defined]
        if mark.name == "parametrize"
    )
    assert {name for name, *_ in tried} == {name for need in NEEDS for name in need.names}
    assert Settings.checked(bundle="b", jwt_leeway_seconds=30, trace_share=1, metrics_host="127.0.0.1").port == 50051


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.toml"):
        Origins.read(file=tmp_path / "none.toml", environment={})
    with pytest.raises(LookalikeError, match="cannot be read"):
        Origins.read(file=tmp_path, environment={})


def test_kubernetes_service_links_are_no_settings() -> None:
    links = {
        "LOOKALIKE_BUNDLE": "/b",
        "LOOKALIKE_PORT": "tcp://10.0.0.1:50051",
        "LOOKALIKE_PORT_50051_TCP_ADDR": "10.0.0.1",
        "LOOKALIKE_SERVICE_HOST": "10.0.0.1",
        "LOOKALIKE_SERVICE_PORT_GRPC": "50051",
        # Of a further Service, `lookalike-metrics`; one of these is a setting's variable.
        "LOOKALIKE_METRICS_PORT": "tcp://10.0.0.2:9464",
        "LOOKALIKE_METRICS_PORT_9464_TCP_PROTO": "tcp",
        "LOOKALIKE_METRICS_SERVICE_HOST": "10.0.0.2",
    }
    settings = Origins.read(environment=links).settings
    assert (settings.port, settings.metrics_port) == (50051, None)


def test_variables_of_clients_and_training_are_known() -> None:
    """Each LOOKALIKE_ name in the code is a setting or another's: else a server beside a client would not start."""
    named = set()
    for package in ("lookalike", "training", "embedding", "index", "service", "tests"):
        for source in (ROOT / package).rglob("*.py"):
            text = source.read_text()
            if source != Path(__file__) and "LOOKALIKE_" in text:
                for node in ast.walk(ast.parse(text)):
                    is_name = isinstance(node, ast.Constant) and isinstance(node.value, str)
                    if is_name and node.value.startswith("LOOKALIKE_") and node.value.isidentifier():
                        named.add(node.value)
    named.discard(settings_sources.PREFIX)
    settings = {f"LOOKALIKE_{name.upper()}" for name in Settings.model_fields}
    assert named <= settings | settings_sources.OF_OTHERS


class _WithSecret(Settings):
    password: Annotated[SecretStr | None, Field(min_length=8)] = None
    endpoint: str | None = None


@pytest.fixture
def with_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "Settings", _WithSecret)
    monkeypatch.setattr(settings_sources, "Settings", _WithSecret)


@pytest.mark.usefixtures("with_secret")
def test_secrets_are_shown_nowhere() -> None:
    origins = Origins.read(
        environment={
            "LOOKALIKE_BUNDLE": "b",
            "LOOKALIKE_PASSWORD": "hunter2hunter2",
            "LOOKALIKE_ENDPOINT": "https://me:hunter2hunter2@collector:4317/x",
        }
    )
    assert origins.settings.password.get_secret_value() == "hunter2hunter2"  # type: ignore[attr-defined]
    for text in (origins.text(), json.dumps(origins.shown()), repr(origins)):
        assert "password" in text
    assert "hunter2" not in origins.text() + json.dumps(origins.shown())
    assert origins.shown()["endpoint"] == "https://**********@collector:4317/x"
    with pytest.raises(InvalidInput) as caught:
        Origins.read(environment={"LOOKALIKE_BUNDLE": "b", "LOOKALIKE_PASSWORD": "hunter2"})
    assert caught.value.field == "password"
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ('otlp_endpoint = "ftp://me:hunter2@collector:4317"', "'ftp://**********@collector:4317'"),
        ('otlp_endpoint = "http:/me:hunter2@collector"', "'http:/**********@collector'"),
        ('otlp_endpoint = "me:hunt/hunter2@collector"', "'**********@collector'"),
        ('milvus_uri = ["http://me:hunter2@milvus:19530"]', "['http://**********@milvus:19530']"),
        ('milvus_uri = {at = "http://me:hunter2@milvus"}', "{'at': 'http://**********@milvus'}"),
        ('port = "http://me:hunter2@milvus"', "'http://**********@milvus'"),
        ('port = "http://milvus:19530?token=hunter2"', "'http://milvus:19530?token=**********'"),
        ('port = "milvus/?db=x&token=hunt&er2"', "'milvus/?db=**********&token=**********'"),
        ('port = "http://me:hunter2@milvus?token=hunter2="', "'http://**********@milvus?token=**********'"),
        ('port = "http://me:hun?ter2@milvus#token=hunter2"', "'http://**********@milvus#token=**********'"),
        ('port = "http://milvus?user=me@home&token=hunter2"', "'http://**********@home&token=**********'"),
    ],
)
def test_a_refused_address_is_told_without_its_password(tmp_path: Path, setting: str, shown: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(f'bundle = "b"\n{setting}', folder=tmp_path)
    assert f"; got {shown} (file " in str(caught.value)
    assert "hunt" not in str(caught.value)
    assert "er2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("me:hunter2@milvus:19530", "**********@milvus:19530"),
        ("http://milvus:19530?token=hunter2&secure=true", "http://milvus:19530?token=**********&secure=**********"),
    ],
)
def test_an_address_is_shown_without_its_secrets(uri: str, shown: str) -> None:
    milvus = {"LOOKALIKE_BUNDLE": "b", "LOOKALIKE_ENGINE": "milvus", "LOOKALIKE_MILVUS_URI": uri}
    origins = Origins.read(environment=milvus)
    assert origins.shown()["milvus_uri"] == shown
    assert "hunter2" not in origins.text()


@pytest.mark.parametrize("name", ["port", "metrics_port", "decode_threads", "drain_seconds", "trace_share", "max_k"])
def test_a_boolean_is_no_number(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^{name}: a boolean is not accepted here; got True \(file .*\)$"):
        read(f'bundle = "b"\n{name} = true', folder=tmp_path)


def test_numbers_and_booleans_of_variables_and_flags_are_texts() -> None:
    variables = {"LOOKALIKE_BUNDLE": "b", "LOOKALIKE_PORT": "7", "LOOKALIKE_REFLECTION": "true"}
    found = Origins.read(environment=variables, flags=set_flags(["drain_seconds=1.5", "insecure=1"])).settings
    assert (found.port, found.reflection, found.drain_seconds, found.insecure) == (7, True, 1.5, True)


def test_what_is_printed_is_a_settings_file(tmp_path: Path) -> None:
    awkward = 'a "quoted" \\ näme 😀\x7f'
    first = Origins.read(environment={"LOOKALIKE_BUNDLE": f"/{awkward}", "LOOKALIKE_OTHER_BUNDLES": "/x,/y"})
    again = read(first.text(), folder=tmp_path)
    assert again.settings == first.settings.model_copy(update={"galleries": Path("galleries").absolute()})
    assert "port = 50051  # default" in first.text().splitlines()


def test_several_workers_log_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.logs, "configure", lambda **_: None)
    monkeypatch.setattr(process.parent, "run", lambda *_: None)
    with capture_logs() as logs:
        process.run(Settings(bundle=Path("b"), workers=2))
    assert [line["event"] for line in logs] == ["settings"]
    assert logs[0]["workers"] == 2


def test_the_command_prints_them_and_ends(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('bundle = "b"\nport = 7\nbatch_size = 3\n')
    ran = subprocess.run(
        [*COMMAND, "serve", "--settings", "server.toml", "--port", "9", "--set", "host=::1", "--print-settings"],
        env={
            **environment(),
            "LOOKALIKE_PORT": "8",
            "LOOKALIKE_TARGET": "h:1",
            "PYTHONPATH": os.pathsep.join([str(ROOT)]),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    printed = tomllib.loads(ran.stdout)
    assert (printed["port"], printed["host"], printed["batch_size"]) == (9, "::1", 3)
    assert "port = 9  # flag --port" in ran.stdout.splitlines()
    assert "batch_size = 3  # file server.toml" in ran.stdout.splitlines()
    assert set(printed) <= set(Settings.model_fields)
