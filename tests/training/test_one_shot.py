"""One-shot classification: known answers at both ends, chance in the middle, and groups kept apart."""

from __future__ import annotations

import numpy as np
import pytest

from embedding.errors import InvalidDataset
from training.one_shot import draw_runs, omniglot_drawers, one_shot, run_errors


def test_a_perfect_embedding_makes_no_error_and_a_collapsed_one_nothing_else() -> None:
    labels = np.repeat(np.arange(6), 3)
    groups = np.repeat([0, 1], 9)
    perfect = np.eye(6, dtype=np.float32)[labels]
    assert one_shot(perfect, labels, groups, ways=3, runs=20).error == 0
    assert one_shot(np.ones((18, 1), dtype=np.float32), labels, groups, ways=3, runs=20).error == 1


def test_an_embedding_without_information_answers_by_chance() -> None:
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(6000, 16))
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    labels = np.repeat(np.arange(3000), 2)
    result = one_shot(emb, labels, labels // 25, ways=5, runs=400)
    assert result.error == pytest.approx(0.8, abs=4 * result.standard_error)
    assert 0 < result.standard_error < 0.02
    assert one_shot(emb, labels, labels // 25, ways=5, runs=400) == result
    assert one_shot(emb, labels, labels // 25, ways=5, runs=400, seed=1) != result


def test_ways_are_drawn_within_one_group() -> None:
    # Identity k of either group has the same embedding: telling groups apart would be impossible, identities is easy.
    labels = np.repeat(np.arange(8), 2)
    emb = np.eye(4, dtype=np.float32)[labels % 4]
    assert one_shot(emb, labels, labels // 4, ways=4, runs=30).error == 0
    assert one_shot(emb, labels, np.zeros(16, dtype=int), ways=8, runs=30).error == 1


def test_too_small_groups_are_refused() -> None:
    labels = np.array([0, 0, 1, 1, 2])  # the last identity has one image only
    with pytest.raises(InvalidDataset, match="the largest of 1 groups has 2; ask for fewer ways"):
        one_shot(np.eye(5), labels, np.zeros(5, dtype=int), ways=3)


def drawings(alphabets: int, characters: int, drawers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, alphabet and drawer of every drawing, in shuffled order."""
    alphabet, character, drawer = np.indices((alphabets, characters, drawers)).reshape(3, -1)
    order = np.random.default_rng(1).permutation(len(drawer))
    return (alphabet * characters + character)[order], alphabet[order], drawer[order]


def test_a_run_is_of_one_alphabet_and_one_drawer_a_side_and_alphabets_take_turns() -> None:
    labels, alphabets, drawers = drawings(3, 6, 4)
    runs = draw_runs(labels, alphabets, drawers_N=drawers, ways=5, runs=6)
    for run in runs:
        assert labels[run.queries_W].tolist() == labels[run.supports_W].tolist()
        assert len(set(labels[run.queries_W])) == 5
        (supporter,), (asker,) = set(drawers[run.supports_W]), set(drawers[run.queries_W])
        assert supporter != asker
    assert np.bincount([int(alphabets[run.queries_W[0]]) for run in runs]).tolist() == [2, 2, 2]
    assert len({(int(drawers[run.supports_W[0]]), int(drawers[run.queries_W[0]])) for run in runs}) > 2
    again, other = (draw_runs(labels, alphabets, drawers_N=drawers, ways=5, runs=6, seed=seed) for seed in (0, 1))
    assert [run.queries_W.tolist() for run in again] == [run.queries_W.tolist() for run in runs]
    assert [run.queries_W.tolist() for run in other] != [run.queries_W.tolist() for run in runs]


def test_drawers_who_left_characters_out_are_paired_only_where_both_drew() -> None:
    # Drawer 0 drew characters 0 to 3, drawer 1 characters 2 to 5, drawer 2 all six.
    drew = {0: range(4), 1: range(2, 6), 2: range(6)}
    labels = np.array([character for each in drew.values() for character in each])
    drawers = np.array([drawer for drawer, each in drew.items() for _ in each])
    for run in draw_runs(labels, np.zeros_like(labels), drawers_N=drawers, ways=4, runs=30):
        assert 2 in {int(drawers[run.supports_W[0]]), int(drawers[run.queries_W[0]])}
    with pytest.raises(InvalidDataset, match="the largest of 1 groups has 4; ask for fewer ways"):
        draw_runs(labels, np.zeros_like(labels), drawers_N=drawers, ways=5)


def test_error_is_that_of_a_naive_loop() -> None:
    labels, alphabets, drawers = drawings(2, 8, 3)
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(16, 6))[labels] + 0.8 * rng.normal(size=(len(labels), 6))
    emb = (emb / np.linalg.norm(emb, axis=1, keepdims=True)).astype(np.float32)
    runs = draw_runs(labels, alphabets, drawers_N=drawers, ways=6, runs=4)
    expected = []
    for run in runs:
        nearest = [
            min(run.supports_W, key=lambda row: np.linalg.norm(emb[query] - emb[row])) for query in run.queries_W
        ]
        expected.append(
            np.mean([labels[row] != labels[query] for row, query in zip(nearest, run.queries_W, strict=True)])
        )
    assert run_errors(emb, runs).tolist() == pytest.approx(expected)
    assert 0 < np.mean(expected) < 1
    assert one_shot(emb, labels, alphabets, drawers_N=drawers, ways=6, runs=4).error == pytest.approx(np.mean(expected))


def test_drawers_are_told_by_omniglots_names_alone() -> None:
    names = ["Greek/character01/0709_01.png", "gallery/Greek/character02/0710_20.png"]
    found = omniglot_drawers(names)
    assert found is not None
    assert found.tolist() == [1, 20]
    assert omniglot_drawers([*names, "photo/Banana/train_Banana_001.jpg"]) is None


@pytest.mark.parametrize(("ways", "runs"), [(1, 20), (20, 0)])
def test_nothing_to_classify_is_refused(ways: int, runs: int) -> None:
    with pytest.raises(InvalidDataset, match=f"got {ways} ways and {runs} runs"):
        draw_runs(np.zeros(4), np.zeros(4), ways=ways, runs=runs)
