"""JSON Web Tokens of an identity provider, checked against its public keys in a local file; extra `jwt`.

Nothing is fetched: the server reaches no network. The file, a JWK set, is read anew when it changes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from embedding.errors import CredentialsInvalid, InvalidInput
from embedding.extras import installing
from service.access.keys import scopes_of
from service.access.principal import Principal
from service.access.watched import Watched

if TYPE_CHECKING:
    import jwt
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    _Key = jwt.PyJWK | RSAPublicKey

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""What may be asked for: signatures by a private key. `none`, and HMAC, whose key is no public one, never count."""

_KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
"""Of keys, by how their algorithms begin."""

MAX_TOKEN = 8192
"""Longest token, in characters."""
MAX_KNOWN = 4096
"""Verified tokens remembered, so that a signature is checked once and not for each call."""

MIN_RSA_BITS = 2048
"""RFC 7518, section 3.3."""

_NAME = 128

_log = structlog.get_logger(__name__)


class Tokens:
    """What is accepted, and who it stands for; belongs to one event loop.

    Raises InvalidInput when the file holds no public keys, or the extra is not installed.
    """

    def __init__(
        self,
        jwks: Path,
        *,
        issuer: str,
        audience: str,
        algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA"),
        leeway: float = 30.0,
        scopes_claim: str = "scope",
        scope_prefix: str = "lookalike:",
        galleries_claim: str = "lookalike_galleries",
        galleries: tuple[str, ...] = (),
    ) -> None:
        """`galleries` are those of a token without the claim: none, unless said otherwise. `leeway` is in seconds."""
        wrong = sorted(set(algorithms) - set(ALGORITHMS))
        if wrong or not algorithms:
            raise InvalidInput(
                f"jwt_algorithms takes {', '.join(ALGORITHMS)}; got {', '.join(wrong) or 'none'}",
                field="jwt_algorithms",
            )
        if not issuer or not audience:
            raise InvalidInput(
                "tokens need jwt_issuer and jwt_audience: others' tokens must not count", field="jwt_issuer"
            )
        self._jwks = Watched(jwks)
        self._issuer, self._audience = issuer, audience
        self._algorithms, self._leeway = list(algorithms), leeway
        self._scopes_claim, self._prefix = scopes_claim, scope_prefix
        self._galleries_claim, self._galleries = galleries_claim, galleries
        self._known: OrderedDict[str, Principal] = OrderedDict()
        self._keys = _read(jwks)

    def of_token(self, token: str) -> Principal:
        """Who the token stands for. Raises CredentialsInvalid."""
        self._look()
        known = self._known.get(token)
        if known is not None:
            return known  # its expiry is checked with the principal's
        principal = self._verified(token)
        self._known[token] = principal
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return principal

    def _verified(self, token: str) -> Principal:
        import jwt

        if len(token) > MAX_TOKEN:
            raise CredentialsInvalid(f"the token is over {MAX_TOKEN:,} characters long")
        try:
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(
                token,
                self._key(header),
                algorithms=self._algorithms,
                issuer=self._issuer,
                audience=self._audience,
                leeway=self._leeway,
                options={"require": ["exp", "sub", "iss", "aud"]},
            )
            return self._principal(claims)
        except jwt.ExpiredSignatureError as error:
            raise CredentialsInvalid("the token has expired; get a new one") from error
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise CredentialsInvalid(f"the token does not count here: {' '.join(str(error).split())[:200]}") from error

    def _key(self, header: Mapping[str, Any]) -> _Key:
        """The key that a token names, or the only one for a token that names none. Raises CredentialsInvalid."""
        named = _KINDS.get(str(header.get("alg"))[:2], ""), str(header.get("kid", ""))
        if named not in self._keys:
            self._look(at_once=True)  # it may have been published just now
        key = self._keys.get(named)
        if key is None and len(self._keys) == 1 and "kid" not in header:
            key = next(iter(self._keys.values()))
        if key is None:
            raise CredentialsInvalid(
                "the token is signed by a key that this server does not know, or knows no more; get a new token"
            )
        return key

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        if not str(claims["sub"]).strip():
            raise CredentialsInvalid("the token names nobody: its `sub` is empty")
        wanted = _words(claims.get(self._scopes_claim, ()))
        galleries = claims.get(self._galleries_claim)
        return Principal(
            name=f"jwt:{_printable(str(claims['sub'])[:_NAME])}",  # no key can have this name
            scopes=scopes_of(word.removeprefix(self._prefix) for word in wanted if word.startswith(self._prefix)),
            galleries=self._galleries if galleries is None else _words(galleries),
            expires=float(claims["exp"]) + self._leeway,
        )

    def _look(self, *, at_once: bool = False) -> None:
        if not self._jwks.has_changed(at_once=at_once):
            return
        keys = self._jwks.read_again(_read, failed="keys of tokens not read; those in use stay")
        if keys is not None:
            self._keys = keys
            self._known.clear()  # who was known by a key that is gone is known no longer
            _log.info("keys of tokens read", file=str(self._jwks.path), keys=len(self._keys))


def _read(path: Path) -> dict[tuple[str, str], _Key]:
    """The keys for signatures by kind and id: RFC 7517, section 4.5, has keys of several kinds share an id. Raises
    InvalidInput."""
    try:
        import jwt
    except ImportError as error:
        raise InvalidInput(f"tokens need PyJWT: {installing('jwt')}", field="jwt_keys") from error
    try:
        listed = json.loads(path.read_bytes())["keys"]
    except OSError as error:
        raise InvalidInput(f"jwt_keys: cannot read {path}: {error.strerror}", field="jwt_keys") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(
            f'jwt_keys: {path} is no JWK set ({type(error).__name__}); it is JSON: {{"keys": [KEY, …]}}',
            field="jwt_keys",
        ) from error
    keys: dict[tuple[str, str], _Key] = {}
    for each in listed if isinstance(listed, list) else []:
        if not isinstance(each, dict) or each.get("kty") not in _KINDS.values() or not _signs(each):
            continue
        kid = str(each.get("kid") or "")
        if "d" in each:
            raise InvalidInput(
                f"jwt_keys: {path} holds the private key {kid[:80]!r}; publish its public part alone, and make another "
                "key where others have read it",
                field="jwt_keys",
            )
        try:
            key = jwt.PyJWK(each)
        except (jwt.PyJWTError, ValueError, TypeError):
            continue  # of a kind or curve that does not count here, or damaged: others of the set do
        bits = getattr(key.key, "key_size", 0) if key.key_type == "RSA" else MIN_RSA_BITS
        if bits < MIN_RSA_BITS:
            _log.warning("a key of tokens is too short to be safe, and does not count", kid=kid[:80], bits=bits)
            continue
        named = each["kty"], kid
        if named in keys:
            raise InvalidInput(
                f"jwt_keys: {path} holds two {each['kty']} keys of the kid {kid[:80]!r}, and tokens could mean either; "
                "give each a kid of its own, or leave out the one that signs no more",
                field="jwt_keys",
            )
        # PyJWT would take one that names no algorithm for a key of RS256 alone.
        keys[named] = key.key if key.key_type == "RSA" and not each.get("alg") else key
    if not keys:
        raise InvalidInput(f"jwt_keys: {path} holds no public key of type RSA, EC or OKP", field="jwt_keys")
    return keys


def _signs(key: Mapping[str, Any]) -> bool:
    """Whether the key is for signatures, as far as it says. RFC 7517, sections 4.2 and 4.3."""
    uses = key.get("key_ops", ["verify"])
    return key.get("use", "sig") == "sig" and isinstance(uses, list) and "verify" in uses


def _words(claim: Any) -> tuple[str, ...]:
    """A claim that is a list of words, or one string of them."""
    if isinstance(claim, str):
        return tuple(claim.split())
    return tuple(word for word in claim if isinstance(word, str)) if isinstance(claim, list | tuple) else ()


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
