"""RM-Bench: accuracy by the styles of both texts (Liu et al., arXiv 2410.16184)."""

import numpy as np


def rm_bench(wins):
    """The scores of one domain.

    wins: {(i, j): [whether the chosen text of style i beat the rejected text of style
        j, for every prompt]}. Styles go from the plainest to the richest
    Returns the matrix of accuracies and the means of its cells: "hard" (the rejected
    text has the richer style), "normal" (equal styles), "easy" (the chosen text has the
    richer style) and "mean" (all). A cell without pairs is a ValueError.
    """
    n_styles = 1 + max(max(cell) for cell in wins)
    matrix = np.zeros((n_styles, n_styles))
    for i in range(n_styles):
        for j in range(n_styles):
            if not wins.get((i, j)):
                raise ValueError(f"no pair of chosen style {i} and rejected style {j}")
            matrix[i, j] = np.mean(wins[i, j])
    above_diagonal = np.triu_indices(n_styles, 1)
    return {
        "matrix": matrix.tolist(),
        "hard": float(matrix[above_diagonal].mean()),
        "normal": float(matrix.diagonal().mean()),
        "easy": float(matrix.T[above_diagonal].mean()),
        "mean": float(matrix.mean()),
    }
