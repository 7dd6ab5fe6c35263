"""Tokens and key sets made to be taken for what they are not, and what the audit log says of each refusal."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from structlog.testing import capture_logs

from embedding.errors import CredentialsInvalid, InvalidInput
from lookalike.v1 import model_pb2
from service.access.key_ring import KeyRing
from service.access.tokens import Tokens
from service.settings import Settings
from tests.authority import replace
from tests.service.harness import Loop, connected, info, rich, served

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SMALL = rsa.generate_private_key(public_exponent=65537, key_size=1024)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
KINDS: dict[type, Any] = {
    rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
    ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
    ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
}


def jwk(key: Key, kid: str, *, private: bool = False, **more: Any) -> dict[str, Any]:
    kind = next(kind for of, kind in KINDS.items() if isinstance(key, of))
    made: dict[str, Any] = kind.to_jwk(key if private else key.public_key(), as_dict=True)
    made.pop("key_ops", None)
    return {**made, "kid": kid, **more}


def claims(**given: Any) -> dict[str, Any]:
    every = {"iss": "i", "aud": "a", "sub": "anna", "exp": time.time() + 60, "scope": "lookalike:read", **given}
    return {name: value for name, value in every.items() if value is not None}


def token(sign: Callable[[bytes], bytes], header: dict[str, Any] | bytes, payload: Any = None) -> str:
    """Signed whatever it says of itself."""

    def part(content: bytes) -> bytes:
        return base64.urlsafe_b64encode(content).rstrip(b"=")

    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    signed = part(head) + b"." + part(json.dumps(claims() if payload is None else payload).encode())
    return (signed + b"." + part(sign(signed))).decode()


def rs256(message: bytes) -> bytes:
    signed: bytes = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256).sign(message, RSA)
    return signed


def encoded(key: Key, algorithm: str, kid: str) -> str:
    return jwt.encode(claims(), key, algorithm=algorithm, headers={"kid": kid})


def accepting(folder: Path, *keys: Any, **options: Any) -> Tokens:
    replace(folder / "jwks.json", json.dumps({"keys": keys}).encode())
    return Tokens(folder / "jwks.json", issuer="i", audience="a", **options)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return accepting(tmp_path, jwk(RSA, "r"), jwk(EC, "e"), jwk(ED, "o"))


def with_secret(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda message: hmac.new(secret, message, hashlib.sha256).digest()


PUBLIC = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
DER = RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def nothing(_: bytes) -> bytes:
    return b""


GOOD = {"alg": "RS256", "kid": "r"}
ATTACKS: dict[str, Callable[[], str]] = {
    **{
        f"the public key as a secret, {name}": lambda secret=secret: token(  # type: ignore[misc]
            with_secret(secret), {"alg": "HS256", "kid": "r"}
        )
        for name, secret in (("pem", PUBLIC), ("pem without its end", PUBLIC.strip()), ("der", DER))
    },
    **{
        f"alg {alg!r}": lambda alg=alg: token(nothing, {"alg": alg, "kid": "r"})  # type: ignore[misc]
        for alg in ("none", "None", "NONE", "nOnE", "", None, 5, ["RS256"], {"RS256": 1})
    },
    **{
        f"kid {kid!r}": lambda kid=kid: token(rs256, {"alg": "RS256", "kid": kid})  # type: ignore[misc]
        for kid in (None, "", 5, True, ["r"], {"r": 1}, "../../dev/null", "r\0", "' OR 1=1", "x" * 4000)
    },
    "no kid where there are several keys": lambda: token(rs256, {"alg": "RS256"}),
    "another kind of key": lambda: token(rs256, {"alg": "RS256", "kid": "e"}),
    "another algorithm of the same key": lambda: token(rs256, {"alg": "RS512", "kid": "r"}),
    "a key in the header": lambda: token(rs256, {"alg": "RS256", "kid": "x", "jwk": jwk(RSA, "x")}),
    "an address in the header": lambda: token(rs256, {"alg": "RS256", "kid": "x", "jku": "https://evil.example"}),
    "a critical extension": lambda: token(rs256, {**GOOD, "crit": ["exp2"], "exp2": 1}),
    "an algorithm said twice": lambda: token(nothing, b'{"alg": "RS256", "kid": "r", "alg": "none"}'),
    "a header that is no object": lambda: token(rs256, b"[]"),
    "claims that are no object": lambda: token(rs256, GOOD, []),
    "no end": lambda: token(rs256, GOOD, claims(exp=None)),
    "an end that is true": lambda: token(rs256, GOOD, claims(exp=True)),
    "another issuer": lambda: token(rs256, GOOD, claims(iss="ii")),
    "several issuers": lambda: token(rs256, GOOD, claims(iss=["i"])),
    "another audience": lambda: token(rs256, GOOD, claims(aud=["b"])),
    "an audience that is a number": lambda: token(rs256, GOOD, claims(aud=5)),
    "not yet": lambda: token(rs256, GOOD, claims(nbf=time.time() + 600)),
    "made in the future": lambda: token(rs256, GOOD, claims(iat=time.time() + 600)),
    "a nameless subject": lambda: token(rs256, GOOD, claims(sub="")),
    "a blank subject": lambda: token(rs256, GOOD, claims(sub=" ")),
    "a subject that is a number": lambda: token(rs256, GOOD, claims(sub=5)),
    "ten million letters": lambda: "a" * 10_000_000,
    "five parts": lambda: "a.b.c.d.e",
    "no letters of a token": lambda: "é.é.é",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nobody_is_taken_for_another(tokens: Tokens, attack: str) -> None:
    assert tokens.of_token(token(rs256, GOOD)).name == "jwt:anna"
    with pytest.raises(CredentialsInvalid) as caught:
        tokens.of_token(ATTACKS[attack]())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("key", "algorithm"), [(RSA, "RS256"), (EC, "ES256"), (ED, "EdDSA")])
def test_a_file_with_a_private_key_is_refused(tmp_path: Path, key: Key, algorithm: str) -> None:
    """An RSA one ended calls with INTERNAL; and whoever reads the file could make tokens."""
    with pytest.raises(InvalidInput, match="private key 'p'; publish its public part") as caught:
        accepting(tmp_path, jwk(RSA, "r"), jwk(key, "p", private=True))
    assert caught.value.field == "jwt_keys"


def test_keys_for_other_uses_do_not_sign(tmp_path: Path) -> None:
    others = (jwk(RSA, "use", use="enc"), jwk(EC, "ops", key_ops=["encrypt"]), jwk(ED, "odd", key_ops=5))
    made = accepting(tmp_path, *others, jwk(ED, "o", use="sig", key_ops=["verify"]))
    made.of_token(encoded(ED, "EdDSA", "o"))
    for key, algorithm, kid in ((RSA, "RS256", "use"), (EC, "ES256", "ops"), (ED, "EdDSA", "odd")):
        with pytest.raises(CredentialsInvalid, match="does not know"):
            made.of_token(encoded(key, algorithm, kid))
    with pytest.raises(InvalidInput, match="no public key"):
        accepting(tmp_path, *others)


@pytest.mark.parametrize("kid", ["r", ""])
def test_two_keys_of_one_kid_are_refused_unless_their_kinds_differ(tmp_path: Path, kid: str) -> None:
    """The last counted, silently."""
    made = accepting(tmp_path, jwk(RSA, kid), jwk(EC, kid), jwk(ED, kid))
    kinds = ((RSA, "RS256"), (EC, "ES256"), (ED, "EdDSA"))
    for key, algorithm in kinds:
        made.of_token(encoded(key, algorithm, kid))
    with capture_logs() as logs:
        (tmp_path / "jwks.json").write_text(json.dumps({"keys": [jwk(ED, kid), jwk(RSA, kid), jwk(OTHER, kid)]}))
        with pytest.raises(CredentialsInvalid, match="does not know"):
            made.of_token(encoded(RSA, "RS256", "new"))
    assert [line["reason"] for line in logs if "two RSA keys" in line["reason"]]
    for key, algorithm in kinds:
        made.of_token(encoded(key, algorithm, kid))
    with pytest.raises(InvalidInput, match="a kid of its own") as caught:
        accepting(tmp_path, jwk(RSA, kid), jwk(OTHER, kid))
    assert caught.value.field == "jwt_keys"


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256"])
def test_an_rsa_key_that_names_no_algorithm_signs_by_any_that_is_allowed(tmp_path: Path, algorithm: str) -> None:
    """As identity providers publish them; all but RS256 were refused, whatever jwt_algorithms said."""
    made = accepting(tmp_path, jwk(RSA, "r"), jwk(RSA, "pinned", alg="RS384"), algorithms=("RS384", algorithm))
    made.of_token(encoded(RSA, algorithm, "r"))
    made.of_token(encoded(RSA, "RS384", "pinned"))
    for wrong in (
        encoded(RSA, algorithm, "pinned"),
        token(with_secret(PUBLIC), {"alg": "HS256", "kid": "r"}),
        jwt.encode(claims(), EC, algorithm="ES256", headers={"kid": "r"}),
    ):
        with pytest.raises(CredentialsInvalid):
            made.of_token(wrong)


@pytest.mark.filterwarnings("ignore:The RSA key")
def test_keys_too_short_to_be_safe_do_not_count(tmp_path: Path) -> None:
    """RFC 7518 asks for 2048 bits; 1024 can be factored by who has the means."""
    with capture_logs() as logs:
        made = accepting(tmp_path, jwk(SMALL, "small"), jwk(RSA, "r"))
    assert [(line["log_level"], line["kid"]) for line in logs] == [("warning", "small")]
    made.of_token(encoded(RSA, "RS256", "r"))
    with pytest.raises(CredentialsInvalid, match="does not know"):
        made.of_token(encoded(SMALL, "RS256", "small"))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"keys":' * 50_000, b"\xff\xfe", b"null", b'{"keys": {}}'])
def test_a_file_that_is_no_key_set_changes_nothing_under_a_running_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """Brackets without end stopped every call with INTERNAL."""
    monkeypatch.setattr("service.access.watched.LOOK_SECONDS", 0.0)
    made = accepting(tmp_path, jwk(RSA, "r"))
    replace(tmp_path / "jwks.json", content)
    with capture_logs() as logs:
        for _ in range(2):
            made.of_token(encoded(RSA, "RS256", "r"))
    assert [line["log_level"] for line in logs] == ["error"]
    with pytest.raises(InvalidInput):
        Tokens(tmp_path / "jwks.json", issuer="i", audience="a")


def test_a_key_that_was_published_just_now_counts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.access.watched.LOOK_SECONDS", 1000.0)
    made = accepting(tmp_path, jwk(RSA, "r"))
    replace(tmp_path / "jwks.json", json.dumps({"keys": [jwk(RSA, "r"), jwk(EC, "e")]}).encode())
    assert made.of_token(encoded(EC, "ES256", "e")).name == "jwt:anna"
    replace(tmp_path / "jwks.json", json.dumps({"keys": [jwk(EC, "e")]}).encode())
    with pytest.raises(CredentialsInvalid):
        made.of_token(encoded(ED, "EdDSA", "unknown"))
    with pytest.raises(CredentialsInvalid):
        made.of_token(encoded(RSA, "RS256", "r"))


@pytest.fixture
def guarded(loop: Loop, settings: Settings, tmp_path: Path) -> Iterator[tuple[str, Path, str]]:
    """The address, the audit log and an API key."""
    accepting(tmp_path, jwk(RSA, "r"), jwk(EC, "e"))
    _, key = KeyRing(tmp_path / "keys.json").create("shop", scopes=["read"], galleries=["*"])
    own = settings.model_copy(
        update={
            "galleries": tmp_path / "galleries",
            "keys": tmp_path / "keys.json",
            "jwt_keys": tmp_path / "jwks.json",
            "jwt_issuer": "i",
            "jwt_audience": "a",
            "audit_log": tmp_path / "audit.jsonl",
        }
    )
    with served(loop, own) as server:
        yield server.address, tmp_path / "audit.jsonl", key


def test_every_refusal_has_a_line_and_no_token_in_it(guarded: tuple[str, Path, str]) -> None:
    address, log, _ = guarded
    attacks = [made for name, attack in ATTACKS.items() if len(made := attack()) < 8000 and made.isascii()]
    with connected(address) as stubs:
        for attack in attacks:
            with pytest.raises(grpc.RpcError) as caught:
                stubs.models.ListModels(
                    model_pb2.ListModelsRequest(), metadata=(("authorization", f"Bearer {attack}"),)
                )
            assert info(rich(caught.value)).reason == "CREDENTIALS_INVALID"
    deadline = time.monotonic() + 20
    while len(text := log.read_text().splitlines()) < len(attacks):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
    lines = [json.loads(line) for line in text]
    assert {(line["code"], line["caller"], line["method"]) for line in lines} == {
        ("UNAUTHENTICATED", "", "/lookalike.v1.ModelService/ListModels")
    }
    assert len({line["request_id"] for line in lines}) == len(attacks)
    assert not any(attack.split(".")[0] in "\n".join(text) for attack in attacks if len(attack) > 20)


def test_credentials_that_contradict_each_other_are_nobodys(guarded: tuple[str, Path, str]) -> None:
    """A gateway may have looked at the one that the server does not take."""
    address, _, key = guarded
    good, other = f"Bearer {key}", f"Bearer {token(rs256, GOOD)}"
    with connected(address) as stubs:
        for metadata in (
            (("authorization", good), ("authorization", other)),
            (("authorization", good), ("authorization", "Bearer lk_x")),
            (("authorization", good), ("x-api-key", "lk_x")),
            (("x-api-key", "lk_x"), ("x-api-key", key)),
            (("authorization", "Basic eDp5"), ("x-api-key", key)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stubs.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata)
            assert info(rich(caught.value)).reason == "CREDENTIALS_INVALID"
        for same in ((("authorization", good), ("x-api-key", key)), (("authorization", good),) * 2):
            stubs.models.ListModels(model_pb2.ListModelsRequest(), metadata=same)
