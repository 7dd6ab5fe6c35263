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
from service.keys import scopes_of
from service.principal import Principal
from service.watched import Watched

if TYPE_CHECKING:
    import jwt

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""What may be asked for: signatures by a private key. `none`, and HMAC, whose key is no public one, never count."""

MAX_TOKEN = 8192
"""Longest token, in characters."""
MAX_KNOWN = 4096
"""Verified tokens remembered, so that a signature is checked once and not for each call."""

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
            key = self._keys.get(str(header.get("kid", "")))
            if key is None and len(self._keys) == 1 and "kid" not in header:
                key = next(iter(self._keys.values()))
            if key is None:
                raise CredentialsInvalid("the token is signed by a key that this server does not know")
            claims = jwt.decode(
                token,
                key,
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

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        wanted = _words(claims.get(self._scopes_claim, ()))
        galleries = claims.get(self._galleries_claim)
        return Principal(
            name=f"jwt:{_printable(str(claims['sub'])[:_NAME])}",  # no key can have this name
            scopes=scopes_of(word.removeprefix(self._prefix) for word in wanted if word.startswith(self._prefix)),
            galleries=self._galleries if galleries is None else _words(galleries),
            expires=float(claims["exp"]) + self._leeway,
        )

    def _look(self) -> None:
        if not self._jwks.has_changed():
            return
        keys = self._jwks.read_again(_read, failed="keys of tokens not read; those in use stay")
        if keys is not None:
            self._keys = keys
            self._known.clear()  # who was known by a key that is gone is known no longer
            _log.info("keys of tokens read", file=str(self._jwks.path), keys=len(self._keys))


def _read(path: Path) -> dict[str, jwt.PyJWK]:
    try:
        import jwt
    except ImportError as error:
        raise InvalidInput("tokens need PyJWT: run pip install 'lookalike[jwt]'", field="jwt_keys") from error
    try:
        found = jwt.PyJWKSet.from_dict(json.loads(path.read_bytes())).keys
    except OSError as error:
        raise InvalidInput(f"jwt_keys: cannot read {path}: {error.strerror}", field="jwt_keys") from error
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInput(f"jwt_keys: {path} is no JWK set: {error}", field="jwt_keys") from error
    keys = {str(key.key_id or ""): key for key in found if key.key_type in {"RSA", "EC", "OKP"}}
    if not keys:
        raise InvalidInput(f"jwt_keys: {path} holds no public key of type RSA, EC or OKP", field="jwt_keys")
    return keys


def _words(claim: Any) -> tuple[str, ...]:
    """A claim that is a list of words, or one string of them."""
    if isinstance(claim, str):
        return tuple(claim.split())
    return tuple(word for word in claim if isinstance(word, str)) if isinstance(claim, list | tuple) else ()


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
