"""Where recipes lie: in the folder that the command runs in, or with the program."""

from __future__ import annotations

from pathlib import Path

from embedding.errors import NotFound

# A checkout has recipes/ beside the package; a wheel carries them inside it.
_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (Path("recipes"), _PACKAGE.parent / "recipes", _PACKAGE / "recipes")


def find_recipe(recipe: str) -> Path:
    """The file of that path, or the recipe of that name. Raises NotFound, listing the names there are."""
    path = Path(recipe)
    if path.suffix == ".toml" or path.is_file():
        return path
    for folder in _FOLDERS:
        if (found := folder / f"{recipe}.toml").is_file():
            return found
    names = sorted({found.stem for folder in _FOLDERS for found in folder.glob("*.toml")})
    raise NotFound(f"no recipe {recipe!r}; give a .toml file, or one of {', '.join(names) or '(none installed)'}")
