"""The linear classifier on frozen embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from embedding.errors import DamagedData, InvalidDataset
from training.classifier import LinearClassifier, fit_classifier, shuffled_batches
from training.losses.combined import JointLoss
from training.losses.pairs import ContrastiveLoss

SETTINGS = {"identities": 4, "epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "seed": 5}


def blobs(items: int = 203, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit vectors around four centres."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(0, 4, (items,), generator=generator)
    centre_ID = torch.randn(4, 8, generator=generator)
    noise_ND = torch.randn(items, 8, generator=generator)
    return F.normalize(centre_ID[labels_N] + spread * noise_ND), labels_N


def adam_by_hand(emb_ND: Tensor, labels_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The same by Kingma and Ba 2015, algorithm 1, with the softmax's gradient written out, in float64."""
    initial = LinearClassifier.initial(identities=4, width=8, seed=5)
    emb, labels = emb_ND.double().numpy(), labels_N.numpy()
    values = [initial.weight_ID.detach().double().numpy().copy(), initial.bias_I.detach().double().numpy().copy()]
    first, second, step = [np.zeros_like(value) for value in values], [np.zeros_like(value) for value in values], 0
    for epoch in range(3):
        for batch in shuffled_batches(len(emb), 16, seed=5, epoch=epoch):
            rows = batch.numpy()
            logits = emb[rows] @ values[0].T + values[1]
            share = np.exp(logits - logits.max(1, keepdims=True))
            share /= share.sum(1, keepdims=True)
            share[np.arange(len(rows)), labels[rows]] -= 1
            step += 1
            for at, gradient in enumerate((share.T @ emb[rows] / len(rows), share.mean(0))):
                first[at] = 0.9 * first[at] + 0.1 * gradient
                second[at] = 0.999 * second[at] + 0.001 * gradient**2
                mean, square = first[at] / (1 - 0.9**step), second[at] / (1 - 0.999**step)
                values[at] = values[at] - 1e-2 * mean / (np.sqrt(square) + 1e-8)
    return values[0], values[1]


def test_takes_the_steps_of_adam_on_cross_entropy() -> None:
    emb_ND, labels_N = blobs()
    weight_ID, bias_I = adam_by_hand(emb_ND, labels_N)
    fitted = fit_classifier(emb_ND, labels_N, **SETTINGS)
    np.testing.assert_allclose(fitted.weight_ID.numpy(), weight_ID, atol=2e-5)
    np.testing.assert_allclose(fitted.bias_I.numpy(), bias_I, atol=2e-5)


def test_many_steps_reach_the_accuracy_of_a_regression_fitted_to_convergence() -> None:
    emb_ND, labels_N = blobs(2_000, spread=1.5)
    oracle = LogisticRegression(C=1e4, max_iter=2_000).fit(emb_ND.numpy(), labels_N.numpy())
    fitted = fit_classifier(emb_ND, labels_N, identities=4, epochs=40, batch_size=64)
    assert fitted.accuracy(emb_ND, labels_N) == pytest.approx(oracle.score(emb_ND.numpy(), labels_N.numpy()), abs=0.01)


def test_depends_on_its_arguments_alone_and_leaves_them_as_they_are() -> None:
    emb_ND, labels_N = blobs()
    given_ND = emb_ND.clone().requires_grad_()
    torch.manual_seed(1)
    one = fit_classifier(given_ND, labels_N, **SETTINGS)
    torch.manual_seed(2)
    other = fit_classifier(emb_ND, labels_N, **SETTINGS)
    assert torch.equal(one.weight_ID, other.weight_ID)
    assert torch.equal(given_ND.detach(), emb_ND)
    assert given_ND.grad is None
    assert not one.weight_ID.requires_grad
    another = fit_classifier(emb_ND, labels_N, **{**SETTINGS, "seed": 6})
    assert not torch.equal(one.weight_ID, another.weight_ID)


def test_comes_back_from_its_tensors() -> None:
    emb_ND, labels_N = blobs()
    fitted = fit_classifier(emb_ND, labels_N, **SETTINGS)
    back = LinearClassifier.from_tensors(load(save(fitted.tensors())))
    assert torch.equal(back(emb_ND), fitted(emb_ND))
    with pytest.raises(DamagedData, match="bias_I"):
        LinearClassifier.from_tensors({"weight_ID": torch.zeros(4, 8)})
    with pytest.raises(DamagedData, match=r"\[4, 8\] and \[3\]"):
        LinearClassifier.from_tensors({"weight_ID": torch.zeros(4, 8), "bias_I": torch.zeros(3)})


def test_accuracy_counts_the_largest_logit_and_no_tie() -> None:
    labels_N = torch.tensor([0, 1, 2, 0])
    right = LinearClassifier(torch.eye(3), torch.zeros(3))
    assert right.accuracy(torch.eye(3)[labels_N], labels_N) == 1
    assert right.accuracy(torch.eye(3)[(labels_N + 1) % 3], labels_N) == 0
    assert right.accuracy(torch.eye(3)[torch.tensor([0, 1, 0, 1])], labels_N) == 0.5
    tells_nothing = LinearClassifier(torch.zeros(3, 3), torch.zeros(3))
    assert tells_nothing.accuracy(torch.eye(3)[labels_N], labels_N) == 0
    assert right.accuracy(torch.full((4, 3), torch.nan), labels_N) == 0


def test_begins_as_the_classifier_of_the_joint_loss() -> None:
    joint = JointLoss(ContrastiveLoss(), alpha=0.5, identities=7, width=9, generator=torch.Generator().manual_seed(3))
    initial = LinearClassifier.initial(identities=7, width=9, seed=3)
    assert torch.equal(initial.weight_ID, joint.weight_ID)
    assert torch.equal(initial.bias_I, joint.bias_I)


def test_an_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    orders = [torch.cat(list(shuffled_batches(10, 4, seed=seed, epoch=epoch))) for seed in (0, 1) for epoch in (0, 1)]
    for order_N in orders:
        assert order_N.sort().values.tolist() == list(range(10))
    assert len({tuple(order_N.tolist()) for order_N in orders}) == 4
    assert [len(batch) for batch in shuffled_batches(10, 4, seed=0, epoch=0)] == [4, 4, 2]
    assert torch.equal(torch.cat(list(shuffled_batches(10, 3, seed=0, epoch=0))), orders[0])


def test_bad_input() -> None:
    emb_ND, labels_N = blobs(8)
    with pytest.raises(InvalidDataset, match=r"\[0, 2\).*got 0 to 3"):
        fit_classifier(emb_ND, torch.arange(8) % 4, identities=2, epochs=1)
    with pytest.raises(ValueError, match=r"\[8, 8\] and \[7\]"):
        fit_classifier(emb_ND, labels_N[:7], identities=4, epochs=1)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        fit_classifier(emb_ND, labels_N, identities=4, epochs=0)
