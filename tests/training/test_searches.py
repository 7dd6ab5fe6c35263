"""Searches of a recipe: their images found by name, and refused where they could measure nothing or flatter."""

from __future__ import annotations

import numpy as np
import pytest

from embedding.errors import InvalidDataset, InvalidRecipe
from training.config import parse_recipe
from training.pairs import held_out
from training.searches import SearchConfig, find
from training.sources import list_part

NAMES = ["cat/icon.png", "cat/photo.png", "dog/icon.png", "dog/photo.png", "emu/photo.png"]
LABELS = np.array([0, 0, 1, 1, 2])


def test_patterns_name_queries_and_gallery() -> None:
    search = find(SearchConfig(name="photo to icon", query="*/photo.png", gallery="*/icon.png"), NAMES, LABELS)
    queries, gallery = search.sides(held_out(np.eye(5), LABELS))
    assert gallery is not None
    assert queries.identities.tolist() == [0, 1, 2]
    assert gallery.identities.tolist() == [0, 1]
    assert queries.embeddings.tolist() == np.eye(5)[[1, 3, 4]].tolist()


def test_without_a_gallery_queries_are_searched_among_themselves() -> None:
    search = find(SearchConfig(name="cats and dogs", query="[cd]*"), NAMES, LABELS)
    queries, gallery = search.sides(held_out(np.eye(5), LABELS))
    assert gallery is None
    assert queries.identities.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("query", "gallery", "message"),
    [
        ("*.jpg", "*/icon.png", r"none of 5 images has a name like '\*.jpg', the first is cat/icon.png"),
        ("*/photo.png", "*/ICON.png", r"none of 5 images has a name like '\*/ICON.png'"),
        ("*", "*/icon.png", "cat/icon.png is a query and in the gallery"),
        ("emu/*", "*/icon.png", "no query's identity is in the gallery"),
        ("*/icon.png", None, "no two of its images have one identity"),
        ("cat/*", None, "all its images have one identity"),
        ("cat/photo.png", "cat/icon.png", "queries and gallery have one identity"),
    ],
)
def test_a_search_that_measures_nothing_or_flatters_is_named(query: str, gallery: str | None, message: str) -> None:
    with pytest.raises(InvalidDataset, match=message) as caught:
        find(SearchConfig(name="q", query=query, gallery=gallery), NAMES, LABELS)
    assert caught.value.field == "evaluation.search"


RECIPE = """
name = "tiny"
preprocessing = {image_size = 16, channels = 1}
network = {name = "small_cnn"}
loss = {name = "triplet"}
training = {steps = 200}
data = {source = "digits", name = "scanned"}
"""


def test_a_part_of_the_data_that_has_a_name_puts_it_before_its_images() -> None:
    recipe = parse_recipe(RECIPE)
    assert list_part(recipe.data[0], data_root=None).names[:2] == ["scanned/0000", "scanned/0001"]


def test_two_searches_of_one_name_are_refused() -> None:
    table = '[[evaluation.search]]\nname = "a"\nquery = "*"\n'
    assert len(parse_recipe(RECIPE + table).evaluation.search) == 1
    with pytest.raises(InvalidRecipe, match=r"evaluation.search: two searches are called 'a'"):
        parse_recipe(RECIPE + table + table)
