"""Settings from a TOML file, the environment and flags, the later winning; and how they are shown.

A name that no setting has is refused, wherever it stands, with the nearest name that one has: a misspelt limit would
otherwise be no limit.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

from pydantic import SecretStr

from embedding.errors import InvalidInput, NotFound, StorageFailed
from embedding.masking import MASK, masked
from service.settings import Settings, is_secret

PREFIX = "LOOKALIKE_"
SETTINGS_FILE = "LOOKALIKE_SETTINGS"
"""The variable that names the settings file."""

OF_OTHERS = frozenset(
    {
        SETTINGS_FILE,
        "LOOKALIKE_TARGET",
        "LOOKALIKE_TLS",
        "LOOKALIKE_TLS_CA",
        "LOOKALIKE_TLS_SERVER_NAME",
        "LOOKALIKE_CLIENT_CERTIFICATE",
        "LOOKALIKE_CLIENT_KEY",
        "LOOKALIKE_API_KEY",
        "LOOKALIKE_API_KEY_FILE",
        "LOOKALIKE_ALLOW_INSECURE_KEY",
        "LOOKALIKE_DATA",
        "LOOKALIKE_WEIGHTS",
        "LOOKALIKE_MILVUS_SERVER",
        "LOOKALIKE_PEERS",
    }
)
"""Variables that clients, training, tests and benchmarks read: known, and no settings of a server."""

# Kubernetes sets these for Services named `lookalike` or `lookalike-…`, LOOKALIKE_PORT=tcp://… among them.
_SERVICE_LINK = re.compile(r"LOOKALIKE_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")
_SERVICE_LINK_PORT = re.compile(r"LOOKALIKE_(\w+_)?PORT=(tcp|udp)://.*")


class Flag(NamedTuple):
    """A setting as the command line spells it; `value` is None when it was not given."""

    name: str
    option: str
    value: object


@dataclass(frozen=True, kw_only=True)
class Origins:
    """The settings of a server, with where each came from."""

    settings: Settings
    of: Mapping[str, str]
    """For each setting that was given: `file …`, `environment …` or `flag …`; the others have their default."""

    @classmethod
    def read(
        cls,
        *,
        file: Path | None = None,
        environment: Mapping[str, str],
        flags: Sequence[Flag] = (),
    ) -> Self:
        """The settings of all three sources.

        Args:
            file: A TOML file; by default the one that LOOKALIKE_SETTINGS names. Its relative paths start at its folder.
            environment: Variables LOOKALIKE_PORT for `port`, and so on. Lists are separated by commas; what is empty
                counts as unset.
            flags: Settings of the command line, a later one winning.

        Raises InvalidInput, NotFound or StorageFailed, naming the setting and its source.
        """
        if file is None and environment.get(SETTINGS_FILE):
            file = Path(environment[SETTINGS_FILE])
        options = {flag.name: flag.option for flag in flags}
        values: dict[str, object] = {}
        of: dict[str, str] = {}
        for name, value in (_of_file(file) if file else {}).items():
            values[name], of[name] = value, f"file {file}"
        for name, value in _of_environment(environment).items():
            values[name], of[name] = value, f"environment {PREFIX}{name.upper()}"
        for flag in flags:
            if flag.value is not None:
                values[flag.name], of[flag.name] = flag.value, f"flag {flag.option}"
        try:
            return cls(settings=Settings.checked(**values), of=of)
        except InvalidInput as error:
            name = (error.field or "").partition(".")[0]
            if name and name not in values:
                option = options.get(name, f"--set {name}=…")
                message = f"{error}; give {option}, {PREFIX}{name.upper()}, or `{name}` in a settings file"
                raise InvalidInput(message, field=error.field) from error
            raise InvalidInput(f"{error} ({of[name]})" if name else str(error), field=error.field) from error

    def shown(self) -> dict[str, Any]:
        """Every setting as JSON knows it, secrets masked."""
        return {name: _masked(name, getattr(self.settings, name)) for name in Settings.model_fields}

    def text(self) -> str:
        """A settings file of every setting, secrets masked, each with its source as a comment."""
        lines = []
        for name, value in self.shown().items():
            # TOML has no null: what is unset is told as a comment, so that the text can be read back.
            line = f"# {name} is unset" if value is None else f"{name} = {_toml(value)}"
            lines.append(f"{line}  # {self.of.get(name, 'default')}")
        return "\n".join(lines)


def set_flags(pairs: Iterable[str]) -> list[Flag]:
    """The settings of `--set NAME=VALUE`. Raises InvalidInput."""
    flags = []
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise InvalidInput(f"--set takes NAME=VALUE, such as --set port=50051; got {pair!r}", field=name)
        _check_known(name, Settings.model_fields, what=f"--set {name}", spell=str)
        flags.append(Flag(name, f"--set {name}", _split(name, text)))
    return flags


def _of_file(file: Path) -> dict[str, object]:
    try:
        values = tomllib.loads(file.read_text())
    except FileNotFoundError as error:
        raise NotFound(f"no settings file at {file}") from error
    except OSError as error:
        raise StorageFailed(f"the settings file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the settings file {file} is not TOML: {error}") from error
    for name in values:
        _check_known(name, Settings.model_fields, what=f"{name} in the settings file {file}", spell=str)
    return {name: _placed(name, value, file.parent) for name, value in values.items()}


def _of_environment(environment: Mapping[str, str]) -> dict[str, object]:
    known = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    values: dict[str, object] = {}
    for variable, text in environment.items():
        if not text or not variable.startswith(PREFIX) or variable in OF_OTHERS or _is_service_link(variable, text):
            continue
        _check_known(variable, [*known, *OF_OTHERS], what=f"the variable {variable}", spell=str.upper)
        name = variable.removeprefix(PREFIX).lower()
        values[name] = _split(name, text)
    return values


def _check_known(name: str, known: Iterable[str], *, what: str, spell: Any) -> None:
    names = list(known)
    if name in names:
        return
    # Without the prefix, which would make any two variables alike.
    bare = {each.removeprefix(PREFIX): each for each in names}
    near = [bare[each] for each in difflib.get_close_matches(spell(name.removeprefix(PREFIX)), bare, n=1)]
    hint = f"did you mean {near[0]}?" if near else "`lookalike serve --print-settings` lists those there are"
    raise InvalidInput(f"{what} is no setting; {hint}", field=name)


def _is_service_link(variable: str, text: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(variable) or _SERVICE_LINK_PORT.fullmatch(f"{variable}={text}"))


def _is_list(name: str) -> bool:
    return get_args(Settings.model_fields[name].annotation)[-1:] == (Ellipsis,)


def _holds_paths(name: str) -> bool:
    annotation = Settings.model_fields[name].annotation
    return Path in (annotation, *get_args(annotation))


def _split(name: str, text: str) -> object:
    return [part.strip() for part in text.split(",") if part.strip()] if _is_list(name) else text


def _placed(name: str, value: object, folder: Path) -> object:
    """A value of a file, its relative paths taken from the file's folder."""
    if not _holds_paths(name):
        return value
    if isinstance(value, list):
        return [folder / each if isinstance(each, str) else each for each in value]
    return folder / value if isinstance(value, str) else value


def _masked(name: str, value: object) -> Any:
    if is_secret(name) or isinstance(value, SecretStr):
        return None if value is None else MASK
    if isinstance(value, (tuple, list)):
        return [_masked(name, each) for each in value]
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Path):
        return str(value.absolute())  # what it means does not depend on where it is read
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _toml(value: Any) -> str:
    """A TOML literal: JSON's for all that settings hold, but for characters that TOML forbids in strings."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
