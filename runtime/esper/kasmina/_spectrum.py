"""What rows of a site's activations and gradients say about it: pure, in float64, run by the health worker.

*Effective rank* (O. Roy, M. Vetterli, *The effective rank*, EUSIPCO 2007) is exp of the entropy of the normalised
eigenvalues of the feature covariance.

The *bottleneck score* is that of TINY (M. Verbockhaven, T. Rudkiewicz, S. Chevallier, G. Charpiat, *Growing tiny
networks: spotting expressivity bottlenecks and fixing them optimally*, TMLR 2024) over the squared effective rank. With
a row for each position: V the change that the loss asks of a site's output, minus its gradient; B what the output's own
weights read; X what a branch of the site would read. TINY's V_proj is what the own weights cannot give, and the
first-order gain of a branch with as many linear neurons as help is the part of it that X explains:

    R = V - B argmin_W |V - B W|^2        gain = tr(N' S^-1 N),  N = X' R / n,  S = X' X / n
    score = gain / (|V|^2 / n) / rank(B)^2

The published gain is not comparable across depth, for gradients are not; its share of the wish is. Choosing by TINY's
gain over the squared rank was as good as by the narrowest width (regret 0.8 points; by TINY's gain alone 3.1). On
perceptrons with one layer of 3 among those of 24 the score put a span around it first on all of 39, the lowest
effective rank on 13 (`loadtests/_bottleneck.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["bottleneck", "dead_fraction", "effective_rank", "saturation"]

_RIDGE = 1e-3
"""Beside the squared size of all rows, which are brought to a mean square of 1."""
_MARGIN = 1.5
"""Rows for each unknown of a regression."""


def effective_rank(rows: NDArray[np.float64]) -> float | None:
    """Of (rows, features): between 1 and the number of features; None where nothing varies or a value is not finite."""
    if len(rows) < 2 or not np.isfinite(rows).all():
        return None
    centred = rows - rows.mean(axis=0)
    # The Gram matrix has the same non-zero eigenvalues as the covariance, and is smaller for wide sites.
    gram = centred.T @ centred if centred.shape[1] <= len(centred) else centred @ centred.T
    values = np.clip(np.linalg.eigvalsh(gram), 0.0, None)
    total = values.sum()
    if total <= 0.0:
        return None
    shares = values[values > 1e-12 * total] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dead_fraction(rows: NDArray[np.float64]) -> float | None:
    """Share of features whose deviation is at most 1e-5 of the largest one's; None for fewer than two rows."""
    if len(rows) < 2 or not np.isfinite(rows).all():
        return None
    deviation = rows.std(axis=0)
    largest = deviation.max()
    return float((deviation <= 1e-5 * largest).mean()) if largest > 0.0 else 1.0


def saturation(rank: float | None, width: int, rows: int) -> float | None:
    """Effective rank over width; None where the rows are too few to tell.

    Fewer rows than the width show no more than their own number: a rank that comes close to it may be any larger one.
    """
    if rank is None or (rows - 1 < width and rank > (rows - 1) / 2):
        return None
    return min(1.0, rank / width)


def bottleneck(branch: NDArray[np.float64], own: NDArray[np.float64], gradient: NDArray[np.float64]) -> float | None:
    """The score of a site, 0 to 1; None where it can not be told. Rows are the same positions in each.

    Args:
        branch: X, what a branch would read.
        own: B, what the weights that give the output read.
        gradient: of the loss at the output.
    """
    # With fewer rows than unknowns everything is explained, and nothing said.
    enough = len(own) > _MARGIN * max(branch.shape[1], own.shape[1])
    rank = effective_rank(own)
    if not enough or rank is None or not (np.isfinite(branch).all() and np.isfinite(gradient).all()):
        return None
    wish = float(np.square(gradient).sum())
    if wish <= 0.0:
        return None
    missing = gradient - _explained(own, gradient)
    share = float((missing * _explained(branch, missing)).sum()) / wish
    return min(1.0, max(0.0, share)) / max(1.0, rank**2)


def _explained(x: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a ridge regression on x with a constant gives of the target; at most as many equations as rows."""
    centred = x - x.mean(axis=0)
    size = np.sqrt(np.square(centred).sum(axis=1).mean())
    inputs = np.concatenate([centred / (size or 1.0), np.ones((len(x), 1))], axis=1)
    system = inputs.T @ inputs + _RIDGE * np.eye(inputs.shape[1])
    explained: NDArray[np.float64] = inputs @ np.linalg.solve(system, inputs.T @ target)
    return explained
