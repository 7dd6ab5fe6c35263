"""TLS and API keys through both clients and the command."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from lookalike import AccessDenied, AsyncClient, Client, NewItem, Tls, Unavailable
from lookalike.__main__ import main
from lookalike._secure import is_loopback
from service.access.key_ring import KeyRing
from service.settings import Settings
from tests.authority import Authority, Pair, replace
from tests.service.harness import Loop, make_bundle, png, served


@dataclass(frozen=True)
class Guarded:
    address: str
    ca: Path
    pair: Pair
    files: tuple[Path, Path]
    key: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority()
    certificate, key = authority.issue("server").write(folder, "server")
    pair = authority.issue("client")
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
        tls_client_ca=folder / "ca.crt",
    )
    loop = Loop()
    with served(loop, settings) as server:
        yield Guarded(server.address, folder / "ca.crt", pair, pair.write(folder, "client"), secret)
    loop.close()


def test_the_client_shows_certificate_and_key_on_every_kind_of_call(guarded: Guarded) -> None:
    certificate, key = guarded.files
    tls = Tls(ca=guarded.ca, certificate=str(certificate), key=key)
    with Client(guarded.address, tls=tls, api_key=guarded.key) as client:
        client.wait_until_ready()
        client.create_gallery("a")
        client.update_items("a", [NewItem(id=f"{n}", image=png(n)) for n in range(3)])
        assert [gallery.id for gallery in client.list_galleries()] == ["a"]
        assert len(client.search_matches("a", png(1))) >= 0
        assert len(list(client.search_stream("a", [png(1), png(2)]))) == 2
    with Client(guarded.address, tls=tls) as client, pytest.raises(AccessDenied) as caught:
        client.get_model()
    assert caught.value.reason == "CREDENTIALS_MISSING"


def test_the_asynchronous_client_does_too(guarded: Guarded) -> None:
    tls = Tls(ca=guarded.ca.read_bytes(), certificate=guarded.pair.certificate, key=guarded.pair.key)

    async def story() -> None:
        async with AsyncClient(guarded.address, tls=tls, api_key=guarded.key) as client:
            await client.create_gallery("b")
            await client.update_items("b", [NewItem(id="x", image=png(1))])
            await client.search_matches("b", png(1))
            assert [found async for found in client.search_stream("b", [png(1)])]

    asyncio.run(story())


def test_a_server_of_another_root_or_name_is_not_talked_to(guarded: Guarded) -> None:
    pair = {"certificate": guarded.pair.certificate, "key": guarded.pair.key}
    for tls in (Tls(ca=Authority("other").root, **pair), Tls(ca=guarded.ca, server_name="other.example", **pair)):
        with Client(guarded.address, tls=tls, api_key=guarded.key, timeout=5) as client, pytest.raises(Unavailable):
            client.get_gallery("a")
    with Client(
        guarded.address, tls=Tls(ca=guarded.ca, server_name="localhost", **pair), api_key=guarded.key
    ) as client:
        client.get_model()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("localhost:50051", True),
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("dns:localhost:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", True),
        ("unix:/run/socket", True),
        ("unix:///run/socket", True),
        ("localhost", True),
        ("example.com:50051", False),
        ("localhost.example.com:1", False),
        ("127.0.0.1.example.com:1", False),
        ("10.0.0.1:50051", False),
        ("[2001:db8::1]:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("dns://8.8.8.8/localhost:1", False),
        ("xds:///localhost", False),
        ("0.0.0.0:1", False),
        ("", False),
    ],
)
def test_which_targets_are_this_machine(target: str, expected: bool) -> None:
    assert is_loopback(target) is expected


def test_a_key_does_not_travel_in_plain_text_to_another_machine(tmp_path: Path) -> None:
    for made in (Client, AsyncClient):
        with pytest.raises(ValueError, match="plain text") as caught:
            made("example.com:50051", api_key="lk_secret")
        assert "lk_secret" not in str(caught.value)
    Client("example.com:50051", api_key="lk_secret", allow_insecure_key=True).close()
    client = Client("example.com:50051", api_key="lk_secret", tls=True)
    assert "lk_secret" not in repr(client)
    client.close()
    for wrong in ("", " ", "a\nb", "ü"):
        with pytest.raises(ValueError, match="printable ASCII"):
            Client("localhost:1", api_key=wrong)
    with pytest.raises(ValueError, match="give both"):
        Client("localhost:1", tls=Tls(certificate=b"x"))
    assert "secret" not in repr(Tls(certificate=b"x", key=b"secret"))
    (tmp_path / "text").write_text("no certificate")
    for ca in (tmp_path / "text", b"no certificate"):
        with pytest.raises(ValueError, match="holds no certificate and no key in PEM"):
            Client("127.0.0.1:1", tls=Tls(ca=ca))


def test_a_proxy_does_not_see_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.5)
        for name in ("http_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        with Client("127.0.0.1:1", api_key="lk_secret", timeout=2) as client, ThreadPoolExecutor(1) as calling:
            call = calling.submit(client.get_gallery, "a")
            with pytest.raises(TimeoutError):
                proxy.accept()
            assert isinstance(call.exception(), Unavailable)


def test_the_command_takes_them_from_options_and_the_environment(
    guarded: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = map(str, guarded.files)
    options = ["--tls-ca", str(guarded.ca), "--client-certificate", certificate, "--client-key", key]
    ask = ["gallery", "list", "--target", guarded.address]
    assert main([*options, *ask]) == 2
    assert "LOOKALIKE_API_KEY" in capsys.readouterr().err
    replace(tmp_path / "key", f"{guarded.key}\n".encode())
    assert main([*options, "--api-key-file", str(tmp_path / "key"), *ask]) == 0
    for content in (b"", b"\xff\xd8"):
        replace(tmp_path / "no-key", content)
        assert main([*options, "--api-key-file", str(tmp_path / "no-key"), *ask]) == 2
        assert "holds no API key" in capsys.readouterr().err
    assert main([*options, "health", "--target", guarded.address]) == 0
    assert main(["health", "--target", guarded.address, "--timeout", "1"]) == 1
    monkeypatch.setenv("LOOKALIKE_API_KEY", guarded.key)
    assert main([*options, *ask]) == 0
    monkeypatch.setenv("LOOKALIKE_TLS_CA", str(guarded.ca))
    monkeypatch.setenv("LOOKALIKE_CLIENT_CERTIFICATE", certificate)
    monkeypatch.setenv("LOOKALIKE_CLIENT_KEY", key)
    assert main(ask) == 0
    for name in ("TLS_CA", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
        monkeypatch.delenv(f"LOOKALIKE_{name}")
    capsys.readouterr()
    assert main(["gallery", "list", "--target", "example.com:1"]) == 2
    err = capsys.readouterr().err
    assert "--allow-insecure-key" in err
    assert guarded.key not in err
    assert main(["--tls-ca", str(tmp_path / "none"), *ask]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plain(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server without TLS."""
    folder = tmp_path_factory.mktemp("plain")
    bundle = make_bundle(folder / "toy", seed=0).path
    loop = Loop()
    with served(loop, Settings(bundle=bundle, galleries=folder / "galleries", port=0, device="cpu")) as server:
        yield server.address
    loop.close()


@pytest.fixture(params=["plain to TLS", "TLS to plain", "another root", "no certificate", "another name"])
def misunderstanding(request: pytest.FixtureRequest, guarded: Guarded, plain: str) -> tuple[str, Tls | bool, list[str]]:
    """A server, how it is called, and what the error then names."""
    certificate, key = guarded.files
    cases: dict[str, tuple[str, Tls | bool, list[str]]] = {
        "plain to TLS": (guarded.address, False, ["tls=Tls(ca=...)", "LOOKALIKE_TLS_CA", "--tls-ca", "does not speak"]),
        "TLS to plain": (plain, Tls(ca=guarded.ca), ["does not speak TLS", "leave out tls", "LOOKALIKE_TLS_CA"]),
        "another root": (guarded.address, Tls(ca=Authority("other").root), ["no root", "LOOKALIKE_TLS_CA"]),
        "no certificate": (guarded.address, Tls(ca=guarded.ca), ["client certificate", "LOOKALIKE_CLIENT_CERTIFICATE"]),
        "another name": (
            guarded.address,
            Tls(ca=guarded.ca, certificate=certificate, key=key, server_name="elsewhere"),
            ["another name", "--tls-server-name"],
        ),
    }
    return cases[request.param]


def test_the_error_says_what_the_two_do_not_agree_on(misunderstanding: tuple[str, Tls | bool, list[str]]) -> None:
    target, tls, named = misunderstanding
    told: list[str] = []
    with Client(target, tls=tls, retry=None) as client:
        with pytest.raises(Unavailable) as caught:
            client.get_model()
        told.append(str(caught.value))
        with pytest.raises(Unavailable, match="was not serving after") as caught:
            client.wait_until_ready(0.2)
        told.append(str(caught.value))

    async def ask() -> None:
        async with AsyncClient(target, tls=tls) as client:
            with pytest.raises(Unavailable) as caught:
                await client.get_model()
            told.append(str(caught.value))
            with pytest.raises(Unavailable, match="was not serving after") as caught:
                await client.wait_until_ready(0.2)
            told.append(str(caught.value))

    asyncio.run(ask())
    for message in told:
        assert target in message
        assert [name for name in named if name not in message] == []
        assert "\n" not in message
