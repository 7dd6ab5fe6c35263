"""Upper bounds of error rates whose pairs are not independent: identities are, so identities are resampled.

Shapes: G identities, U super-classes, P pairs, T thresholds.

An identity that is easily taken for others spoils all its pairs at once, so a million pairs of a few hundred
identities carry far less evidence than a million coin tosses. The design effect says how much less: the variance
of the rate when identities are drawn with replacement, each with all its pairs (the pigeonhole bootstrap, Owen
2007), over the variance it would have if pairs were independent. The bound is Clopper and Pearson's on the pairs
divided by the design effect (Korn, Graubard 1998).

It bounds the rate that other identities will show, as many as were measured, and not only the rate in the long run:
such a rate varies by itself as much as the measured one did, so that the variance counts twice (a prediction bound;
Meeker, Hahn, Escobar 2017, section 6). Where few identities make most of the variance it is itself known badly, which
Satterthwaite's degrees of freedom (1946) say: 2V² over the variance of V, here of V = Σ cᵢ² for the contributions cᵢ of
identities, Σ cᵢ⁴ − V²/G.

The bootstrap's variance is had in closed form. For weights w_i of mean 1 and variance 1, and e_ij the errors of the
identity pair ij beyond the mean rate (errors_ij − rate·pairs_ij), the variance of Σ w_i w_j e_ij over i < j is
Σ_i (Σ_j e_ij)² + Σ_{i<j} e_ij². For e_i within an identity, that of Σ w_i e_i is Σ_i e_i², where each e_i is taken
against the rate of the others: an identity with most of the matching pairs makes the rate its own.

Where the split keeps whole super-classes apart (alphabets, not characters), unseen identities come with unseen
super-classes, and these are what is resampled: i and j above are super-classes then, e_ii the errors between
identities of one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, stdtrit

from training.pairs import Floats, Ints, PairTable

CONFIDENCE = 0.95

SUPPORTING_CLUSTERS = 4
"""Errors of fewer identities, or identity pairs, say too little about their own variance; the design effect of the
nearest threshold where more of them err stands in."""

_TWO_SAMPLES = 2
"""The measured rate varies, and the rate of as many other identities varies as much again."""

Rates = NDArray[np.float64]


class Resampled(NamedTuple):
    """What resampling identities, or super-classes, says about a rate at T thresholds."""

    variance_T: Rates
    """Of the rate."""
    erring_T: Ints
    """Identities, or pairs of them, with an error."""
    freedom_T: Rates
    """Satterthwaite's degrees of freedom of the variance."""

    def at_least(self, other: Resampled) -> Resampled:
        """This, with the other's variance where it is larger."""
        return self._replace(variance_T=np.maximum(self.variance_T, other.variance_T))

    def backwards(self) -> Resampled:
        """The same, from the last threshold to the first."""
        return Resampled(self.variance_T[::-1], self.erring_T[::-1], self.freedom_T[::-1])


class Bounds(NamedTuple):
    """Upper bounds at T thresholds."""

    upper_T: Rates
    effect_T: Rates
    """Design effect: how many pairs amount to one independent pair."""


def far_upper_bounds(table: PairTable, thresholds_T: Floats) -> Rates:
    """Upper bound [T] of the false-accept rate at each of T rising thresholds, which as many other identities exceed
    in one of twenty cases; it never falls."""
    return far_bounds(table, thresholds_T).upper_T


def frr_upper_bounds(table: PairTable, thresholds_T: Floats) -> Rates:
    """Upper bound [T] of the false-reject rate at each of T rising thresholds, which as many other identities exceed
    in one of twenty cases; it never rises."""
    return frr_bounds(table, thresholds_T).upper_T


def far_bounds(table: PairTable, thresholds_T: Floats) -> Bounds:
    """`far_upper_bounds`, with the design effects."""
    units, n = len(table.sizes), len(table.impostor)
    accepted_T = np.searchsorted(table.impostor, thresholds_T, side="right")
    found = across_variance(table, thresholds_T, accepted_T / n)
    if table.groups is not None:
        units = int(table.groups[-1]) + 1
        # A variance of few super-classes can be small by chance.
        found = group_across_variance(table, table.groups, thresholds_T, accepted_T / n).at_least(found)
    if units == 2:
        units = 1  # the one pair that two form says nothing about how pairs differ
    # The support falls with the threshold; `bounded` takes it the other way round.
    bounds = bounded(accepted_T[::-1] / n, n, found.backwards(), units=units, most=n / max(units // 2, 1))
    return Bounds(np.maximum.accumulate(bounds.upper_T[::-1]), bounds.effect_T[::-1])


def frr_bounds(table: PairTable, thresholds_T: Floats) -> Bounds:
    """`frr_upper_bounds`, with the design effects."""
    m = len(table.matching)
    rejected_T = m - np.searchsorted(table.matching, thresholds_T, side="right")
    pairs_U = matching_pairs(table)
    found = within_variance(table, thresholds_T, rejected_T / m)
    if table.groups is not None:
        pairs_U = matching_pairs(table, table.groups)
        of_groups = within_variance(table, thresholds_T, rejected_T / m, groups_G=table.groups)
        found = of_groups.at_least(found)
    # Where nothing errs: the pairs of a pair's own unit, on average.
    bounds = bounded(rejected_T / m, m, found, units=len(pairs_U), most=m / effective_units(pairs_U / m))
    return Bounds(np.maximum.accumulate(bounds.upper_T[::-1])[::-1], bounds.effect_T)


def bounded(rate_T: Rates, trials: int, found: Resampled, *, units: int, most: float) -> Bounds:
    """Bounds at thresholds in the order in which the rate of errors among the trials falls; `most` is the design effect
    where none or all of them err."""
    if units < 2:
        return Bounds(np.ones(len(rate_T)), np.full(len(rate_T), float(trials)))
    # Residuals are measured against a rate that their own unit has moved, and of few units are too small. Leaving one
    # out, and with it 2/units of the pairs, makes them units / (units − 2) as large: about this, which two units have.
    variance_T = found.variance_T * (units / (units - 1)) ** 3
    effect_T = _design_effect(rate_T, trials, variance_T, most=most)
    freedom_T = np.clip(found.freedom_T, 1, units - 1)
    is_supported_T = found.erring_T >= SUPPORTING_CLUSTERS
    effect_T, freedom_T = (_borrowed(each_T, is_supported_T) for each_T in (effect_T, freedom_T))
    return Bounds(upper_bound(rate_T, trials, _TWO_SAMPLES * effect_T, freedom_T), effect_T)


def upper_bound(rate_T: Rates, trials: int, effect_T: Rates, freedom_T: Rates) -> Rates:
    """Clopper–Pearson's 95 % upper bound on `trials` / design effect, with Korn and Graubard's correction of the
    effective trials for a variance that is itself estimated (Student's t with `freedom_T` degrees of freedom)."""
    correction_T = (stdtrit(max(trials - 1, 1), CONFIDENCE) / stdtrit(freedom_T, CONFIDENCE)) ** 2
    effective_T = trials / effect_T * np.minimum(correction_T, 1.0)
    errors_T = rate_T * effective_T
    bound_T: Rates = betaincinv(errors_T + 1, np.maximum(effective_T - errors_T, 1e-9), CONFIDENCE)
    bound_T = np.maximum(bound_T, rate_T)
    bound_T[rate_T >= 1] = 1
    return bound_T


def _design_effect(rate_T: Rates, trials: int, variance_T: Rates, *, most: float) -> Rates:
    """Variance of the rate over its binomial variance: at least 1, and `most` where every or no trial is an error."""
    binomial_T = rate_T * (1 - rate_T) / trials
    effect_T = np.full(len(rate_T), max(most, 1.0))
    np.divide(variance_T, binomial_T, out=effect_T, where=binomial_T > 0)
    effect_T[effect_T < 1] = 1
    return effect_T


def _borrowed(effect_T: Rates, is_supported_T: NDArray[np.bool_]) -> Rates:
    """Each unsupported value replaced by the nearest supported one before it."""
    source_T = np.maximum.accumulate(np.where(is_supported_T, np.arange(len(effect_T)), 0))
    return effect_T[source_T]


def across_variance(table: PairTable, thresholds_T: Floats, rate_T: Rates) -> Resampled:
    """Of the false-accept rates when identities are resampled; pairs of identities err."""
    identities, bins = len(table.sizes), len(thresholds_T) + 1
    accepts_GB = np.zeros((identities, bins), dtype=np.int64)  # by the first threshold that accepts the pair
    squares_B = np.zeros(bins)
    products_B = np.zeros(bins)
    erring_B = np.zeros(bins, dtype=np.int64)
    for identity in range(identities - 1):
        later_G = table.sizes[identity + 1 :]
        column_K = np.repeat(np.arange(identity + 1, identities), later_G)
        key_P = np.concatenate(
            [column_K * bins + np.searchsorted(thresholds_T, across) for _, across in table.rows_of(identity)]
        )
        key_P.sort()
        other_P, bin_P = np.divmod(key_P, bins)
        pairs_G = later_G * table.sizes[identity]
        # The r-th accept of an identity pair raises the square of its count by 2r − 1.
        rank_P = np.arange(1, len(key_P) + 1) - np.repeat(np.cumsum(pairs_G) - pairs_G, pairs_G)
        squares_B += np.bincount(bin_P, weights=2 * rank_P - 1, minlength=bins)
        products_B += np.bincount(bin_P, weights=pairs_G[other_P - identity - 1], minlength=bins)
        erring_B += np.bincount(bin_P[rank_P == 1], minlength=bins)
        accepts_GB[identity] += np.bincount(bin_P, minlength=bins)
        np.add.at(accepts_GB.reshape(-1), key_P, 1)

    accepts_GT = np.cumsum(accepts_GB, axis=1)[:, :-1]
    squares_T, products_T = np.cumsum(squares_B)[:-1], np.cumsum(products_B)[:-1]
    items = table.sizes.sum()
    pairs_G = table.sizes * (items - table.sizes)
    pairs_squared = ((table.sizes**2).sum() ** 2 - (table.sizes**4).sum()) / 2
    of_identity_GT = (accepts_GT - rate_T * pairs_G[:, None]) ** 2
    by_identity_T = of_identity_GT.sum(axis=0)
    by_pair_T = squares_T - 2 * rate_T * products_T + rate_T**2 * pairs_squared
    unbiased = identities / (identities - 1)
    variance_T = unbiased * (by_identity_T + by_pair_T) / len(table.impostor) ** 2
    return Resampled(variance_T, np.cumsum(erring_B)[:-1], degrees_of_freedom(of_identity_GT))


def group_across_variance(table: PairTable, groups_G: Ints, thresholds_T: Floats, rate_T: Rates) -> Resampled:
    """As `across_variance`, when super-classes are resampled, the errors within each included."""
    groups, bins = int(groups_G[-1]) + 1, len(thresholds_T) + 1
    group_N = np.repeat(groups_G, table.sizes)
    ends_G = np.cumsum(table.sizes)
    beyond_UT = np.zeros((groups, len(thresholds_T)))
    between_T = np.zeros(len(thresholds_T))
    erring_T = np.zeros(len(thresholds_T), dtype=np.int64)
    for group in range(groups):
        accepts_UB = np.zeros((groups, bins), dtype=np.int64)  # against this and later super-classes
        pairs_U = np.zeros(groups, dtype=np.int64)
        for identity in np.flatnonzero(groups_G == group).tolist():
            other_K = group_N[ends_G[identity] :]
            pairs_U += table.sizes[identity] * np.bincount(other_K, minlength=groups)
            for _, across in table.rows_of(identity):
                np.add.at(accepts_UB.reshape(-1), other_K * bins + np.searchsorted(thresholds_T, across), 1)
        accepts_UT = np.cumsum(accepts_UB, axis=1)[:, :-1]
        error_UT = accepts_UT - rate_T * pairs_U[:, None]
        beyond_UT[group] += error_UT[group:].sum(axis=0)
        beyond_UT[group + 1 :] += error_UT[group + 1 :]
        between_T += (error_UT[group + 1 :] ** 2).sum(axis=0)
        erring_T += (accepts_UT > 0).sum(axis=0)
    unbiased = groups / max(groups - 1, 1)
    variance_T = unbiased * ((beyond_UT**2).sum(axis=0) + between_T) / len(table.impostor) ** 2
    return Resampled(variance_T, erring_T, degrees_of_freedom(beyond_UT**2))


def within_variance(
    table: PairTable, thresholds_T: Floats, rate_T: Rates, *, groups_G: Ints | None = None
) -> Resampled:
    """Of the false-reject rates when identities are resampled, or, with `groups_G`, super-classes; these err."""
    several = np.flatnonzero(table.sizes > 1)
    units, unit_G = np.unique(several if groups_G is None else groups_G[several], return_inverse=True)
    error_UT = np.zeros((len(units), len(thresholds_T)))
    rejected_UT = np.zeros((len(units), len(thresholds_T)), dtype=np.int64)
    for unit, identity in zip(unit_G.tolist(), several.tolist(), strict=True):
        within_P = np.sort(np.concatenate([within for within, _ in table.rows_of(identity)]))
        rejected_T = len(within_P) - np.searchsorted(within_P, thresholds_T, side="right")
        error_UT[unit] += rejected_T - rate_T * len(within_P)
        rejected_UT[unit] += rejected_T
    share_U = matching_pairs(table, groups_G) / len(table.matching)
    return of_units(error_UT / len(table.matching), share_U, (rejected_UT > 0).sum(axis=0))


def of_units(error_UT: Rates, share_U: Rates, erring_T: Ints) -> Resampled:
    """Of the mean of trials of independent units: `error_UT` is what each adds to it beyond its share, `share_U`.

    A unit with much more than a U-th of the trials has moved the mean that it is measured against towards its own.
    Against the mean of the others (the jackknife) it errs 1/(1 − share) times as much; `bounded` does so for shares of
    1/U. And such units tell no more about the variance than `effective_units` like ones.
    """
    units = len(share_U)
    if units < 2:
        return Resampled((error_UT**2).sum(axis=0), erring_T, np.ones(len(erring_T)))
    square_UT = (error_UT * np.maximum((1 - 1 / units) / (1 - share_U), 1)[:, None]) ** 2
    variance_T = units / (units - 1) * square_UT.sum(axis=0)
    return Resampled(variance_T, erring_T, np.minimum(degrees_of_freedom(square_UT), effective_units(share_U) - 1))


def effective_units(share_U: Rates) -> float:
    """To how many units of one size those of these shares of the trials amount: 1 / Σ share² (Kish 1965)."""
    return float(1 / (share_U**2).sum())


def matching_pairs(table: PairTable, groups_G: Ints | None = None) -> Ints:
    """Matching pairs [U] of each identity that has some, or, with `groups_G`, of each super-class that has some."""
    several = table.sizes > 1
    pairs_U = (table.sizes * (table.sizes - 1) // 2)[several]
    if groups_G is None:
        return pairs_U
    _, unit_U = np.unique(groups_G[several], return_inverse=True)
    return np.bincount(unit_U, weights=pairs_U).astype(np.int64)


def degrees_of_freedom(square_UT: Rates) -> Rates:
    """Satterthwaite's degrees of freedom [T] of a sum of squares: 2 where one of them makes it up, U of normal ones."""
    total_T = square_UT.sum(axis=0)
    spread_T = (square_UT**2).sum(axis=0) - total_T**2 / len(square_UT)
    freedom_T = np.full(len(total_T), np.inf)
    np.divide(2 * total_T**2, spread_T, out=freedom_T, where=spread_T > 0)
    freedom_T[total_T == 0] = 1
    return freedom_T
