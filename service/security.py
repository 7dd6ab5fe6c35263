"""Who calls, and whether they may: the hook that admits calls.

A caller shows an API key or a token as `authorization: Bearer …` (a key as `x-api-key` too), or a registered client
certificate; a key or token goes before the certificate. Health checks and reflection pass by: `Calls` tells hooks of
our own services alone.
"""

from __future__ import annotations

import time
from typing import Any

import grpc
from google.protobuf.message import Message

from embedding.errors import (
    CredentialsInvalid,
    CredentialsMissing,
    GalleryForbidden,
    NotFound,
    PermissionDenied,
    ScopeMissing,
)
from service.access.keys import PREFIX, Keys
from service.access.principal import ANYBODY, Principal, Scope
from service.access.rate_limits import RateLimits
from service.access.rights import RULES, Rule, elements, named
from service.access.tokens import Tokens
from service.call import Call
from service.calls import Hook
from service.operations import Operations
from service.serving import Serving
from service.settings import Settings
from service.workers.passed_on import certificate_names

MAX_NAMES = 16
"""Most resources of one call that are kept for the audit log."""

_BEARER = "bearer "


class Security(Hook):
    """Admits calls by the keys, tokens and certificates that the settings name; anybody when they name none.

    Raises InvalidInput, DamagedData or StorageFailed for files that cannot be used.
    """

    def __init__(self, settings: Settings, serving: Serving, operations: Operations) -> None:
        self._serving, self._operations = serving, operations
        self._keys = None if settings.keys is None else Keys(settings.keys)
        self._tokens = _tokens(settings)
        self._certificates = settings.tls_client_ca is not None
        self._audited = settings.audit_log is not None
        self._limits = RateLimits()

    @property
    def asks(self) -> bool:
        """Whether callers have to say who they are."""
        return self._keys is not None or self._tokens is not None

    def begun(self, call: Call) -> None:
        call.principal = self._caller(call.context)
        if self.asks:
            self._limits.admit(call.principal)
            _require(call.principal, _rule(call.method).scope)

    def judge(self, call: Call) -> None:
        """`begun`, where another process answers the call, and counts its rate. Raises Unauthenticated and
        PermissionDenied."""
        call.principal = self._caller(call.context)
        if self.asks:
            _require(call.principal, _rule(call.method).scope)

    def received(self, call: Call, request: Message) -> None:
        if not self.asks and not self._audited:
            return
        rule = _rule(call.method)
        if self.asks:
            if call.requests:
                self._still(call)
            # The call itself took a token, and so its first request is paid for.
            call.pause = self._limits.charge(call.principal, elements(rule, request) - (not call.requests))
        call.requests += 1
        listed = self._audited and rule.scope != "read" and len(call.names) < MAX_NAMES
        if call.principal.may_all((rule.scope, "read")) and not listed:
            return
        for each in named(rule, request):
            if len(call.names) < MAX_NAMES:
                call.names.append(each.resource)
            scope, gallery = each.scope or rule.scope, each.gallery or self._worked_on(each.operation)
            if gallery:
                self._check(call.principal, gallery, scope)
                if call.requests == 1:
                    call.galleries.append((gallery, scope))
        if call.requests > 1:
            for gallery, scope in call.galleries:
                self._check(call.principal, gallery, scope)  # an alias may have moved since the stream began

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Principal:
        if self.asks:
            return self._authenticated(context)
        return self._somebody(context) if self._certificates else ANYBODY

    def _authenticated(self, context: grpc.aio.ServicerContext[Any, Any]) -> Principal:
        shown = _credential(context)
        if shown:
            if self._keys is not None and shown.startswith(PREFIX):
                principal = self._keys.of_key(shown)
            elif self._tokens is not None:
                principal = self._tokens.of_token(shown)
            else:
                raise CredentialsInvalid(f"not an API key of this server; they begin with {PREFIX}")
        else:
            asked = self._keys if self._certificates else None
            registered = asked.of_certificate(certificate_names(context)) if asked is not None else None
            if registered is None:
                raise CredentialsMissing(
                    "this server asks who calls: send an API key as metadata `authorization: Bearer KEY`; the "
                    "command and the client take it from LOOKALIKE_API_KEY"
                )
            principal = registered
        return _unexpired(principal)

    def _still(self, call: Call) -> None:
        """Raises CredentialsInvalid unless the caller has the rights still that the stream began with."""
        principal = call.principal
        if not principal.key:
            if self._tokens is not None:
                self._tokens.of_token(_credential(call.context))  # its signature counts by the keys of now
        elif self._keys is not None and self._keys.still(principal) != principal:
            raise CredentialsInvalid("the key was revoked, or its rights changed, while the call lasted; call again")
        _unexpired(principal)

    def _somebody(self, context: grpc.aio.ServicerContext[Any, Any]) -> Principal:
        """Whoever the certificate names: where no keys are asked for, every certificate that leads to a root counts."""
        name = next(iter(certificate_names(context)), "")
        return Principal(name=f"certificate:{name}", scopes=ANYBODY.scopes, galleries=ANYBODY.galleries)

    def _worked_on(self, operation: str) -> str:
        """The gallery that an operation works on; empty when there is none, which the servicer then says."""
        try:
            return self._operations.get(operation).target if operation else ""
        except NotFound:
            return ""

    def _check(self, principal: Principal, gallery: str, scope: Scope) -> None:
        """Raises PermissionDenied without rights on this name, and on the gallery that it stands for as an alias."""
        _require(principal, scope)
        if principal.allows(gallery) and (
            "*" in principal.galleries or principal.allows(self._serving.current.engine.names.aliases.resolve(gallery))
        ):
            return
        raise GalleryForbidden(
            f"{principal.name!r} may not {scope} gallery {gallery!r}, or what it stands for: ask for a key that may",
            needed={"scope": scope, "gallery": gallery},
        )


def _rule(method: str) -> Rule:
    try:
        return RULES[method]
    except KeyError:
        raise PermissionDenied(f"{method} is not in the table of rights, and so is nobody's") from None


def _require(principal: Principal, scope: Scope) -> None:
    if scope not in principal.scopes:
        has = ", ".join(sorted(principal.scopes)) or "none"
        raise ScopeMissing(
            f"this needs the scope {scope!r}; {principal.name!r} has {has}: ask for a key that has it",
            needed={"scope": scope},
        )


def _unexpired(principal: Principal) -> Principal:
    if principal.expires is not None and principal.expires <= time.time():
        raise CredentialsInvalid("the key or token has expired; ask for a new one")
    return principal


def _credential(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The key or token that the call carries; empty when it has none.

    Raises CredentialsInvalid for another kind, and for several: whatever stands before the server may have looked at
    another one of them.
    """
    found = ""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            if value[: len(_BEARER)].lower() != _BEARER:
                raise CredentialsInvalid("authorization must be `Bearer` and a key or token")
            shown = value[len(_BEARER) :].strip()
        elif key == "x-api-key" and isinstance(value, str):
            shown = value.strip()
        else:
            continue
        if found and shown != found:
            raise CredentialsInvalid("the call carries several keys or tokens; send one")
        found = shown
    return found


def _tokens(settings: Settings) -> Tokens | None:
    if settings.jwt_keys is None:
        return None
    return Tokens(
        settings.jwt_keys,
        issuer=settings.jwt_issuer or "",
        audience=settings.jwt_audience or "",
        algorithms=settings.jwt_algorithms,
        leeway=settings.jwt_leeway_seconds,
        scopes_claim=settings.jwt_scopes_claim,
        scope_prefix=settings.jwt_scope_prefix,
        galleries_claim=settings.jwt_galleries_claim,
        galleries=settings.jwt_galleries,
    )
