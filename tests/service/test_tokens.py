"""Tokens of an identity provider: which count, who they stand for, and keys that change under a running server."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from embedding.errors import CredentialsInvalid, InvalidInput
from lookalike.v1 import gallery_pb2, match_pb2, search_pb2
from service.access.tokens import Tokens
from service.settings import Settings
from tests.authority import private_pem, replace
from tests.service.harness import Loop, Stubs, connected, encoded, info, rich, served


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.access.watched.LOOK_SECONDS", 0.0)


@dataclass
class Provider:
    """Signs tokens, and publishes its key."""

    kid: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def public(self) -> dict[str, Any]:
        made: dict[str, Any] = jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {**made, "kid": self.kid, "alg": "ES256"}

    def token(self, **claims: Any) -> str:
        given = {
            "iss": "https://id.example",
            "aud": "lookalike",
            "sub": "anna",
            "exp": time.time() + 60,
            "scope": "openid lookalike:read",
            "lookalike_galleries": ["shop-*"],
            **claims,
        }
        kept = {name: value for name, value in given.items() if value is not None}
        return jwt.encode(kept, private_pem(self.key).decode(), algorithm="ES256", headers={"kid": self.kid})


def publish(path: Path, *providers: Provider) -> Path:
    replace(path, json.dumps({"keys": [provider.public for provider in providers]}).encode())
    return path


@pytest.fixture
def provider() -> Provider:
    return Provider("one")


@pytest.fixture
def jwks(provider: Provider, tmp_path: Path) -> Path:
    return publish(tmp_path / "jwks.json", provider)


@pytest.fixture
def tokens(jwks: Path) -> Tokens:
    return Tokens(jwks, issuer="https://id.example", audience="lookalike")


def test_a_token_stands_for_its_subject_scopes_and_galleries(provider: Provider, tokens: Tokens) -> None:
    who = tokens.of_token(provider.token(scope=["lookalike:read", "lookalike:admin", "write", "lookalike:root"]))
    assert (who.name, who.scopes, who.galleries) == ("jwt:anna", {"read", "admin"}, ("shop-*",))
    assert tokens.of_token(provider.token(lookalike_galleries="a b-*")).galleries == ("a", "b-*")
    assert tokens.of_token(provider.token(scope=None)).scopes == frozenset()
    assert tokens.of_token(provider.token(lookalike_galleries=None)).galleries == ()
    assert tokens.of_token(provider.token(sub="a\nb")).name == "jwt:a?b"


def unsigned(token: str) -> str:
    header = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    return f"{header}.{token.split('.')[1]}."


def with_payload(token: str, of: str) -> str:
    head, _, signature = token.split(".")
    return ".".join((head, of.split(".")[1], signature))


@pytest.mark.filterwarnings("ignore:The HMAC key")
def test_tokens_that_do_not_count(provider: Provider, tokens: Tokens) -> None:
    good = provider.token()
    tokens.of_token(good)
    shared = jwt.encode(jwt.decode(good, options={"verify_signature": False}), "public", algorithm="HS256")
    wrong = {
        "expired": provider.token(exp=time.time() - 60),
        "not yet": provider.token(nbf=time.time() + 600),
        "another issuer": provider.token(iss="https://evil.example"),
        "another audience": provider.token(aud="payroll"),
        "no end": provider.token(exp=None),
        "no subject": provider.token(sub=None),
        "no audience": provider.token(aud=None),
        "another's signature": Provider("one").token(),
        "an unknown key": Provider("two").token(),
        "no signature": unsigned(good),
        "a shared secret": shared,
        "another payload": with_payload(good, provider.token(sub="root")),
        "garbage": "a.b.c",
        "nothing": "",
        "too long": provider.token(padding="x" * 10_000),
    }
    for what, token in wrong.items():
        with pytest.raises(CredentialsInvalid) as caught:
            tokens.of_token(token)
        assert "\n" not in str(caught.value), what


@pytest.mark.parametrize("claim", ["exp", "nbf", "iat"])
def test_times_that_are_no_times_do_not_count(provider: Provider, tokens: Tokens, claim: str) -> None:
    for value in (float("inf"), float("nan"), 10**400, "later", [], {}):
        with pytest.raises(CredentialsInvalid):
            tokens.of_token(provider.token(**{claim: value}))


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_header_or_claims_of_endless_depth_are_refused(provider: Provider, tokens: Tokens, opening: bytes) -> None:
    deep = base64.urlsafe_b64encode(opening * (6000 // len(opening))).rstrip(b"=").decode()
    header, claims, signature = provider.token().split(".")
    for token in (f"{deep}.{claims}.{signature}", f"{header}.{deep}.{signature}"):
        with pytest.raises(CredentialsInvalid):
            tokens.of_token(token[:8192])


def test_clocks_may_differ_by_the_leeway(provider: Provider, jwks: Path) -> None:
    late = provider.token(exp=time.time() - 20)
    assert Tokens(jwks, issuer="https://id.example", audience="lookalike").of_token(late).name == "jwt:anna"
    strict = Tokens(jwks, issuer="https://id.example", audience="lookalike", leeway=5)
    with pytest.raises(CredentialsInvalid, match="expired"):
        strict.of_token(late)


def test_algorithms_are_pinned(provider: Provider, jwks: Path) -> None:
    only = Tokens(jwks, issuer="https://id.example", audience="lookalike", algorithms=("RS256",))
    with pytest.raises(CredentialsInvalid):
        only.of_token(provider.token())
    for algorithms in (("HS256",), ("none",), ()):
        with pytest.raises(InvalidInput, match="jwt_algorithms"):
            Tokens(jwks, issuer="i", audience="a", algorithms=algorithms)
    for issuer, audience in (("", "a"), ("i", "")):
        with pytest.raises(InvalidInput, match="jwt_issuer and jwt_audience"):
            Tokens(jwks, issuer=issuer, audience=audience)


def test_keys_are_exchanged_under_a_running_server(provider: Provider, tokens: Tokens, jwks: Path) -> None:
    old, following = provider.token(), Provider("two")
    tokens.of_token(old)
    publish(jwks, provider, following)
    assert tokens.of_token(old).name == tokens.of_token(following.token()).name
    publish(jwks, following)
    tokens.of_token(following.token())
    with pytest.raises(CredentialsInvalid):
        tokens.of_token(old)  # although it was known before
    with capture_logs() as logs:
        replace(jwks, b"{}")
        tokens.of_token(following.token())
    assert [line["log_level"] for line in logs] == ["error"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "AAAA"}]}'])
def test_a_file_without_public_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    replace(tmp_path / "jwks.json", content)
    with pytest.raises(InvalidInput) as caught:
        Tokens(tmp_path / "jwks.json", issuer="i", audience="a")
    assert caught.value.field == "jwt_keys"


@pytest.fixture
def guarded(loop: Loop, settings: Settings, jwks: Path, tmp_path: Path) -> Iterator[str]:
    own = settings.model_copy(
        update={
            "galleries": tmp_path / "galleries",
            "jwt_keys": jwks,
            "jwt_issuer": "https://id.example",
            "jwt_audience": "lookalike",
        }
    )
    with served(loop, own) as server:
        yield server.address


def test_over_the_wire_its_scopes_and_galleries_hold(guarded: str, provider: Provider) -> None:
    def ended(request: Any, token: str) -> str:
        method = (
            stubs.galleries.GetGallery
            if isinstance(request, gallery_pb2.GetGalleryRequest)
            else stubs.galleries.CreateGallery
        )
        with pytest.raises(grpc.RpcError) as caught:
            method(request, metadata=(("authorization", f"Bearer {token}"),))
        return info(rich(caught.value)).reason

    with connected(guarded) as stubs:
        token = provider.token()
        assert ended(gallery_pb2.GetGalleryRequest(name="galleries/shop-a"), token) == "NOT_FOUND"
        assert ended(gallery_pb2.GetGalleryRequest(name="galleries/other"), token) == "GALLERY_FORBIDDEN"
        assert ended(gallery_pb2.CreateGalleryRequest(gallery_id="shop-a"), token) == "SCOPE_MISSING"
        assert ended(gallery_pb2.CreateGalleryRequest(gallery_id="shop-a"), "lk_x") == "CREDENTIALS_INVALID"


def key_withdrawn(jwks: Path, patch: pytest.MonkeyPatch) -> None:
    publish(jwks, Provider("two"))


def token_expired(jwks: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("service.security.time", SimpleNamespace(time=lambda: time.time() + 3600))


def searched(stubs: Stubs) -> tuple[Any, Any, Any]:
    config = search_pb2.StreamSearchConfig(gallery="galleries/shop-a", k=1)
    return (
        stubs.search.StreamSearch,
        search_pb2.StreamSearchRequest(config=config),
        search_pb2.StreamSearchRequest(query=encoded(1)),
    )


def verified(stubs: Stubs) -> tuple[Any, Any, Any]:
    pair = match_pb2.ImagePair(a=encoded(1), b=encoded(2))
    return (
        stubs.match.StreamVerify,
        match_pb2.StreamVerifyRequest(config=match_pb2.StreamVerifyConfig()),
        match_pb2.StreamVerifyRequest(pair=pair),
    )


@pytest.mark.parametrize("ends", [key_withdrawn, token_expired])
@pytest.mark.parametrize("asked", [searched, verified])
def test_a_stream_lasts_no_longer_than_its_token_counts(
    guarded: str,
    provider: Provider,
    jwks: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: Callable[[Stubs], tuple[Any, Any, Any]],
    ends: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    may = provider.token(scope="lookalike:read lookalike:admin")
    metadata = (("authorization", f"Bearer {may}"),)
    with connected(guarded) as stubs:
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="shop-a"), metadata=metadata)
        method, config, element = asked(stubs)
        elements: SimpleQueue[Any] = SimpleQueue()
        answers = method(iter(elements.get, None), metadata=metadata, timeout=30)
        for each in (config, element):
            elements.put(each)
        assert next(answers).WhichOneof("result") != "error"
        ends(jwks, monkeypatch)
        elements.put(element)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        elements.put(None)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert info(rich(caught.value)).reason == "CREDENTIALS_INVALID"
