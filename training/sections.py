"""What every section of a recipe shares: frozen, strict, and errors of one line that name the key."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from embedding.errors import InvalidRecipe, NotFound

_TOLD = 4
"""Errors of a recipe that one message has."""


class Section(BaseModel):
    """A table of a recipe. An unknown key is refused with the keys that are accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        refuse_unknown_keys(cls, value)
        return handler(value)


Sections = TypeVar("Sections", bound=Section)


def read_toml(path: Path, *, kind: str) -> str:
    """The text of a recipe, study or other `kind` of file. Raises NotFound or InvalidRecipe."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"no {kind} {path}; give the path of a .toml file") from error
    except UnicodeDecodeError as error:
        raise InvalidRecipe(f"{path} cannot be read as a {kind}: it is no text in UTF-8; give a .toml file") from error
    except OSError as error:
        why = error.strerror or error
        raise InvalidRecipe(f"{path} cannot be read as a {kind} ({why}); give the path of a .toml file") from error


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The table that TOML text is; `where` begins the message of an error. Raises InvalidRecipe."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRecipe(f"{where} is not valid TOML: {error}") from error


def validated(
    model: type[Sections], table: Mapping[str, Any], *, where: str, not_keys: Collection[str | int]
) -> Sections:
    """The sections that a table holds. Raises InvalidRecipe as `invalid_recipe` words it."""
    try:
        return model.model_validate(tuples(table))
    except ValidationError as error:
        raise invalid_recipe(error, where=where, not_keys=not_keys) from error


def tuples(value: Any) -> Any:
    """The arrays of TOML or JSON as the tuples that strict validation asks for."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def refuse_unknown_keys(model: type[BaseModel], table: Any) -> None:
    """Raise a validation error for the first key of `table` that `model` does not have."""
    if not isinstance(table, Mapping):
        return
    for key in table:
        if key not in model.model_fields:
            guess, accepted = did_you_mean(key, model.model_fields), ", ".join(model.model_fields)
            raise error_at(key, f"unknown key{guess}; accepted: {accepted}")


def error_at(key: str, message: str) -> PydanticCustomError:
    """The error for a validator to raise when `key`, a dotted path below its section, is at fault."""
    return PydanticCustomError("error_at", "{message}", {"key": key, "message": message})


def did_you_mean(word: object, candidates: Sequence[str] | Mapping[str, object]) -> str:
    """`, did you mean 'steps'?` when a candidate is close to `word`, else nothing."""
    close = get_close_matches(str(word), list(candidates), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def invalid_recipe(error: ValidationError, *, where: str, not_keys: Collection[str | int]) -> InvalidRecipe:
    """Its errors as one line, most of them four: file, and of each dotted key, what is wrong, what was got.

    `not_keys` are parts of pydantic's path that a recipe does not spell, such as the discriminators of unions.
    """
    errors = error.errors(include_url=False)
    paths = [(*(part for part in each["loc"] if part not in not_keys), *_key_in_question(each)) for each in errors]
    keys = [".".join(map(str, path)) for path in paths]
    told = "; ".join(f"{key}: {_sentence(each)}" for key, each in list(zip(keys, errors, strict=True))[:_TOLD])
    others = len(errors) - _TOLD
    more = f"; and {others} more error{'s' if others > 1 else ''}" if others > 0 else ""
    return InvalidRecipe(f"{where}: {told}{more}", field=keys[0])


def _key_in_question(error: ErrorDetails) -> list[str]:
    if error["type"] == "error_at":
        return [error["ctx"]["key"]]
    if error["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        return [error["ctx"]["discriminator"].strip("'")]
    return []


def _sentence(error: ErrorDetails) -> str:
    context, got = error.get("ctx", {}), error["input"]
    match error["type"]:
        case "error_at":
            return error["msg"]
        case "missing" | "union_tag_not_found":
            return "this key is required"
        case "union_tag_invalid":
            return _not_among(context["tag"], context["expected_tags"].replace("'", "").split(", "))
        case "literal_error":
            return _not_among(got, context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
        case "value_error":
            return str(context["error"])
    return f"{error['msg'].replace('Input should', 'must')}; got {got!r}"


def _not_among(got: object, accepted: Sequence[str]) -> str:
    return f"got {got!r}{did_you_mean(got, accepted)}; accepted: {', '.join(accepted)}"
