"""Can importance weights be trusted, and how heavy is their tail?"""

__all__ = ["effective_sample_size", "khat_threshold", "psis"]

import math

import torch
from torch import Tensor

from ..inputs import check_batch

ROWS = 256  # rows fitted at once
SMALLEST = math.log(torch.finfo(torch.float64).tiny)


def check_log_weights(log_weights: Tensor, *, owner: str) -> None:
    """Refuse NaN, +inf and rows without any weight; -inf is a weight of zero."""
    if isinstance(log_weights, Tensor) and log_weights.is_floating_point():
        if log_weights.isnan().any() or (log_weights == torch.inf).any():
            raise ValueError(
                f"{owner} expected log weights below infinity, got NaN or inf. "
                "Look for NaN in log p(x, z) or log q(z)."
            )
        check_batch(log_weights.nan_to_num(neginf=0.0), (), owner=owner)
        if (log_weights == -torch.inf).all(-1).any():
            raise ValueError(
                f"{owner} expected some positive weight, got only zeros (log weights -inf). "
                "Let the proposal cover the target's support."
            )
    else:
        check_batch(log_weights, (), owner=owner)


def khat_threshold(draws: int) -> float:
    r"""The k̂ below which PSIS of S draws is reliable, :math:`\min(1 - 1/\log_{10} S, 0.7)`.

    It reaches 0.7 at 2155 draws.

    Args:
        draws: Number :math:`S` of draws, at least 2.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 2024.
        arXiv:1507.02646

    Example:
        >>> khat_threshold(4000), khat_threshold(100)
        (0.7, 0.5)
    """
    if draws < 2:
        raise ValueError(f"khat_threshold expected draws >= 2, got {draws}. Draw more.")
    return min(1 - 1 / math.log10(draws), 0.7)


@torch.no_grad()
def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Number of equal weights with the same variance, :math:`(\sum w)^2 / \sum w^2`.

    It is blind to what the proposal has missed: read it next to k̂.

    Args:
        log_weights: Log weights up to a constant, shape ``(*batch, draws)``.

    Shape:
        Output: ``(*batch)``, from 1 to ``draws``.

    Raises:
        TypeError: If the weights are not a tensor of floating point.
        ValueError: If a weight is NaN or infinite, or all are zero.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
        tensor(3.)
    """
    check_log_weights(log_weights, owner="effective_sample_size")
    w = log_weights.double().softmax(-1)
    return w.square().sum(-1).reciprocal().to(log_weights.dtype)


@torch.no_grad()
def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Pareto-smoothed importance sampling: calmer weights, and k̂, which says if to trust them.

    The largest :math:`\min(S/5, 3\sqrt S)` of S weights are replaced by the expected order
    statistics of the generalized Pareto law fitted to them (Zhang and Stephens, with a weak prior
    at k = 1/2 worth ten draws), cut at the largest raw weight.

    **k̂** is the shape of that tail: the weights have about 1/k̂ finite moments. Below 0.5 their
    variance is finite and the estimate behaves like a mean of draws. Up to 0.7 smoothing still
    gives a usable error; with fewer than 2155 draws the limit is lower, see
    :func:`khat_threshold`. Above it the number of draws needed is out of reach, and above 1 not
    even the mean exists: improve the proposal. k̂ describes the weights drawn; a mode that
    the proposal never visits leaves no trace in it.

    With at most 20 draws, or four weights or fewer above the threshold, nothing can be fitted:
    k̂ is inf and the weights are only normalised. When the largest weights are all equal (a
    perfect proposal, say) there is no tail: k̂ is -inf. Computed in float64; carries no gradient.
    Cost: O(S log S) a row.

    Args:
        log_weights: log p(x, z) - log q(z) up to a constant, independent draws, shape
            ``(*batch, draws)``; -inf is a weight of zero.

    Returns:
        Smoothed log weights that sum to one in each row, shape ``(*batch, draws)``, and k̂,
        shape ``(*batch)``.

    Raises:
        TypeError: If the weights are not a tensor of floating point.
        ValueError: If a weight is NaN or infinite, or all weights of a row are zero.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 2024.
        arXiv:1507.02646
        Zhang, Stephens. A New and Efficient Estimation Method for the Generalized Pareto
        Distribution. Technometrics 2009.

    Example:
        >>> z = 2 * torch.randn(4000)  # a proposal wider than its target
        >>> log_weights, khat = psis(dist.Normal(0, 1).log_prob(z) - dist.Normal(0, 2).log_prob(z))
        >>> khat < 0.5, log_weights.exp().sum().round(decimals=3)
        (tensor(True), tensor(1.))
    """
    check_log_weights(log_weights, owner="psis")
    rows = log_weights.double().reshape(-1, log_weights.shape[-1])
    parts = [smooth_rows(block) for block in rows.split(ROWS)]
    smooth = torch.cat([part[0] for part in parts]).reshape(log_weights.shape)
    khat = torch.cat([part[1] for part in parts]).reshape(log_weights.shape[:-1])
    return smooth.to(log_weights.dtype), khat.to(log_weights.dtype)


def smooth_rows(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth each row, shape ``(rows, draws)``; rows whose tails are of one size go together."""
    draws = log_weights.shape[1]
    tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    khat = log_weights.new_full((len(log_weights),), torch.inf)
    ordered, order = (log_weights - log_weights.amax(1, keepdim=True)).sort(dim=1)
    if tail > 4:
        cutoff = ordered[:, -tail - 1].clamp_min(SMALLEST)
        size = (ordered > cutoff[:, None]).sum(1)
        khat[size == 0] = -torch.inf  # nothing stands above the threshold: ties, no tail
        for n in size[size > 4].unique().tolist():
            same = size == n
            values, shape = smooth_tail(ordered[same, -n:], cutoff[same, None])
            ordered[same, -n:] = values
            khat[same] = shape
    smooth = torch.empty_like(ordered).scatter(1, order, ordered)
    return smooth.log_softmax(1), khat


def smooth_tail(tail: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Replace sorted log weights above ``cutoff``, shape ``(rows, n)``, by Pareto quantiles."""
    # e^tail - e^cutoff, without losing the difference of almost equal weights
    excess = -tail.exp() * torch.expm1(cutoff - tail)
    k, scale = fit_pareto(excess)
    p = (torch.arange(tail.shape[1]).to(tail) + 0.5) / tail.shape[1]
    stretch = -torch.log1p(-p)
    flat = k.abs() < 1e-12
    k_or_one = k.where(~flat, 1.0)
    quantile = torch.where(flat, stretch, torch.expm1(k_or_one * stretch) / k_or_one) * scale
    smooth = torch.logaddexp(quantile.log(), cutoff).clamp_max(0.0)
    failed = ~smooth.isfinite().all(1, keepdim=True) | ~k.isfinite()
    return smooth.where(~failed, tail), k.where(~failed, torch.inf)[:, 0]


def fit_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k and scale of a generalized Pareto law, each ``(rows, 1)``.

    Args:
        excess: Positive sorted values, shape ``(rows, n)``.
    """
    n = excess.shape[1]
    grid = 30 + math.isqrt(n)
    steps = torch.arange(1, grid + 1).to(excess) - 0.5
    quartile = excess[:, int(n / 4 + 0.5) - 1, None]
    b = (1 - (grid / steps).sqrt()) / (3 * quartile) + 1 / excess[:, -1:]
    k = torch.log1p(-b[..., None] * excess[:, None]).mean(-1)
    log_likelihood = n * ((-b / k).log() - k - 1)
    b = (log_likelihood.softmax(1) * b).sum(1, keepdim=True)
    k = torch.log1p(-b * excess).mean(1, keepdim=True)
    return (n * k + 10 * 0.5) / (n + 10), -k / b
