"""Means with 95% intervals, and an exact test of paired differences."""

import math

import numpy as np

# Student's t, 97.5% quantiles for 1 to 10 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_quantile(degrees):
    """Student's t, 97.5%. Above 10 degrees of freedom by its series expansion."""
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    return 1.96 + 2.372 / degrees + 2.82 / degrees**2


def mean_and_half_width(values):
    """The mean of at least two values, and half the width of its 95% t interval."""
    standard_error = np.std(values, ddof=1) / math.sqrt(len(values))
    half_width = t_quantile(len(values) - 1) * standard_error
    return float(np.mean(values)), float(half_width)


def sign_flip_p(differences):
    """Two-sided p-value of the mean of paired differences, by an exact sign-flip test.

    It is the share of all 2^n choices of signs whose sum is at least as far from 0.
    """
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    observed = abs(np.sum(differences))
    return float(np.mean(np.abs(sums) >= observed * (1 - 1e-9)))
