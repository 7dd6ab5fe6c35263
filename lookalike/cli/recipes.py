"""Where recipes and studies lie: in the folder that the command runs in, or with the program."""

from __future__ import annotations

from pathlib import Path

from embedding.errors import NotFound

# A checkout has recipes/ and studies/ beside the package; a wheel carries them inside it.
_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (Path(), _PACKAGE.parent, _PACKAGE)


def find_recipe(recipe: str) -> Path:
    """The file of that path, or the recipe of that name. Raises NotFound, listing the names there are."""
    return _find(recipe, kind="recipe", folder="recipes")


def find_study(study: str) -> Path:
    """The file of that path, or the study of that name. Raises NotFound, listing the names there are."""
    return _find(study, kind="study", folder="studies")


def _find(name: str, *, kind: str, folder: str) -> Path:
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    folders = [place / folder for place in _PLACES]
    for place in folders:
        if (found := place / f"{name}.toml").is_file():
            return found
    names = sorted({found.stem for place in folders for found in place.glob("*.toml")})
    raise NotFound(f"no {kind} {name!r}; give a .toml file, or one of {', '.join(names) or '(none installed)'}")
