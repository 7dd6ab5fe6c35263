"""Losses that tell a match from non-matches by a softmax over cosines: SupCon, NT-Xent, InfoNCE, N-pair.

Sums of exponentials are taken as logsumexp, and cosines in float64 at temperatures that would leave float32 too few
digits, so that no temperature underflows.

Shapes: A anchors, R references, P pairs, N pairs of distinct identities, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import Comparison, LossOutput, MetricLoss, checked_temperature, mean
from training.losses.cosines import CosineLoss, Slope, exponentials_

_EXACT_BELOW = 0.02
"""Below this temperature, an error of 1e-7 in a cosine is more than 1e-5 in its logit."""


def supervised_contrastive_loss(similarity_BB: Tensor, is_match_BB: Tensor, *, temperature: float) -> Tensor:
    """Mean over anchors i of −1/|P(i)| Σ_{p∈P(i)} log(exp(s_ip/τ) / Σ_{a≠i} exp(s_ia/τ)).  Khosla et al. 2020, eq. 2.

    `similarity_BB` are cosines. P(i), the positives of i, leaves out i itself; anchors without a positive are left
    out of the mean. This is the definition; `SupervisedContrastiveLoss` computes it with its closed-form gradient.
    """
    itself_BB = torch.eye(len(similarity_BB), dtype=torch.bool, device=similarity_BB.device)
    is_positive_BB = is_match_BB & ~itself_BB
    positives_B = is_positive_BB.sum(1)
    logits_BB = similarity_BB / temperature
    log_sum_B = logits_BB.masked_fill(itself_BB, -torch.inf).logsumexp(1)
    attraction_B = logits_BB.where(is_positive_BB, 0).sum(1) / positives_B.clamp_min(1)
    return mean((log_sum_B - attraction_B)[positives_B > 0])


def nt_xent_loss(view_a_ND: Tensor, view_b_ND: Tensor, *, temperature: float) -> Tensor:
    """Mean over both views i of all images of −log(exp(s_ij/τ) / Σ_{k≠i} exp(s_ik/τ)), j being the other view of i.

    Chen et al. 2020 (SimCLR), eq. 1; no labels. Views are unit embeddings of N images.
    """
    image_N = torch.arange(len(view_a_ND), device=view_a_ND.device)
    output: LossOutput = NTXentLoss(temperature=temperature)(torch.cat([view_a_ND, view_b_ND]), image_N.repeat(2))
    return output.loss


def info_nce_loss(query_ND: Tensor, key_ND: Tensor, *, temperature: float, symmetric: bool = False) -> Tensor:
    """Mean over queries i of −log(exp(q_i·k_i/τ) / Σ_j exp(q_i·k_j/τ)): the keys of the others are the negatives.

    van den Oord et al. 2018, eq. 4. Symmetric: the mean of this and of the same with queries and keys exchanged, as
    in Radford et al. 2021 (CLIP).
    """
    logits_NN = query_ND @ key_ND.T / temperature
    itself_N = torch.arange(len(logits_NN), device=logits_NN.device)
    loss = F.cross_entropy(logits_NN, itself_N, reduction="sum")
    if symmetric:
        loss = 0.5 * (loss + F.cross_entropy(logits_NN.T, itself_N, reduction="sum"))
    return loss / max(len(logits_NN), 1)


def n_pair_loss(anchor_ND: Tensor, positive_ND: Tensor) -> Tensor:
    """Mean over anchors i of log(1 + Σ_{j≠i} exp(a_i·p_j − a_i·p_i)).  Sohn 2016 (multi-class N-pair), eq. 7.

    It is `info_nce_loss` with a temperature of 1; Sohn's penalty on the length of embeddings is constant for unit ones.
    """
    return info_nce_loss(anchor_ND, positive_ND, temperature=1.0)


class SupervisedContrastiveLoss(CosineLoss):
    """`supervised_contrastive_loss` of a batch; a term is an anchor, active when it has a positive."""

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = checked_temperature(temperature)
        self.exact = temperature < _EXACT_BELOW

    def slope(self, comparison: Comparison, cosine_AR: Tensor) -> tuple[Tensor, Tensor, Slope]:
        anchor_P, positive_P = comparison.positive_pairs
        positives_A = comparison.positives_A.to(cosine_AR.dtype)
        has_positive_A = positives_A > 0
        share_A = has_positive_A.to(cosine_AR.dtype) / has_positive_A.sum().clamp_min(1)
        pull_P = (share_A / (self.temperature * positives_A.clamp_min(1)))[anchor_P]
        exponentials = exponentials_(
            cosine_AR / self.temperature,
            comparison.without_itself_,
            least=-1 / self.temperature,
            most=1 / self.temperature,
        )
        total_A = exponentials.totals()
        log_sum_A = exponentials.shift_A + total_A.log()
        loss = (share_A * log_sum_A).sum() - (pull_P * cosine_AR[anchor_P, positive_P]).sum()
        rows_A = share_A / (self.temperature * total_A)
        slope = Slope(rows_A, exponentials.matrix_AR, exponentials.is_symmetric, anchor_P, positive_P, -pull_P)
        return loss, mean(has_positive_A.float()), slope


class NTXentLoss(CosineLoss):
    """NT-Xent over the matching pairs of a batch; a term is such a pair, always active.

    Mean over matching pairs (i, p) of −log(exp(s_ip/τ) / (exp(s_ip/τ) + Σ_{n∈N(i)} exp(s_in/τ))), N(i) the non-matches
    of i. With two images of each identity, the views of one image, it is `nt_xent_loss`, Chen et al. 2020, eq. 1.
    """

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = checked_temperature(temperature)
        self.exact = temperature < _EXACT_BELOW

    def slope(self, comparison: Comparison, cosine_AR: Tensor) -> tuple[Tensor, Tensor, Slope]:
        anchor_P, positive_P = comparison.positive_pairs
        logits_AR = cosine_AR / self.temperature
        logit_P = logits_AR[anchor_P, positive_P]
        exponentials = exponentials_(
            logits_AR, comparison.negatives_alone_, least=-1 / self.temperature, most=1 / self.temperature
        )
        total_A = exponentials.totals()
        excess_P = (exponentials.shift_A + total_A.log())[anchor_P] - logit_P
        loss = mean(F.softplus(excess_P))
        pull_P = excess_P.sigmoid() / (self.temperature * max(len(excess_P), 1))
        push_A = torch.zeros_like(total_A).index_add_(0, anchor_P, pull_P)
        slope = Slope(
            push_A / total_A, exponentials.matrix_AR, exponentials.is_symmetric, anchor_P, positive_P, -pull_P
        )
        return loss, loss.new_tensor(float(len(excess_P) > 0)), slope


class InfoNCELoss(MetricLoss):
    """`info_nce_loss` of a batch, of each identity's first two images: query and key; a term is such a pair.

    Further images of an identity are unused: sample two of each.
    """

    def __init__(self, *, temperature: float = 0.1, symmetric: bool = True) -> None:
        super().__init__()
        self.temperature = checked_temperature(temperature)
        self.symmetric = symmetric

    def measure(self, emb_BD: Tensor, labels_B: Tensor) -> LossOutput:
        query_N, key_N = first_two(labels_B)
        query_ND, key_ND = emb_BD[query_N], emb_BD[key_N]
        exact = torch.float64 if self.temperature < _EXACT_BELOW else emb_BD.dtype
        exact_loss = info_nce_loss(
            query_ND.to(exact), key_ND.to(exact), temperature=self.temperature, symmetric=self.symmetric
        )
        loss = exact_loss.to(emb_BD.dtype)
        with torch.no_grad():
            dist_NN = (2 - 2 * query_ND @ key_ND.T).clamp_min_(0).sqrt_()
            d_ap_N, pairs = dist_NN.diagonal(), len(dist_NN)
            d_an = (dist_NN.sum() - d_ap_N.sum()) / (pairs * (pairs - 1)) if pairs > 1 else d_ap_N.new_tensor(torch.nan)
            return LossOutput(loss, d_an.new_tensor(float(pairs > 1)), d_ap_N.mean(), d_an)


class NPairLoss(InfoNCELoss):
    """`n_pair_loss` of a batch, of each identity's first two images: anchor and positive; a term is such a pair."""

    def __init__(self) -> None:
        super().__init__(temperature=1.0, symmetric=False)


def first_two(labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of each identity of two images or more: the rows of its first and of its second, two int64 tensors."""
    sorted_B, order_B = labels_B.sort(stable=True)
    is_new_B = torch.ones_like(sorted_B, dtype=torch.bool)
    is_new_B[1:] = sorted_B[1:] != sorted_B[:-1]
    first = (is_new_B[:-1] & ~is_new_B[1:]).nonzero().squeeze(1)
    return order_B[first], order_B[first + 1]
