"""Problems whose answer is known in closed form: the oracles of tests and tutorials."""

__all__ = [
    "EightSchools",
    "GaussianMixture",
    "LinearGaussian",
    "checkerboard",
    "eight_gaussians",
    "pinwheel",
    "two_moons",
    "two_spirals",
]

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


class LinearGaussian:
    r"""Model :math:`z \sim \mathcal N(0, I)`, :math:`x \mid z \sim \mathcal N(Wz, s^2 I)`.

    Args:
        weight: Matrix :math:`W`, shape ``(features, latents)``.
        noise: Standard deviation :math:`s > 0`, in the units of ``x``.

    Example:
        >>> target = LinearGaussian(torch.ones(1, 1), noise=1.0)
        >>> target.posterior(torch.tensor([2.0])).mean
        tensor([1.])
        >>> target.log_evidence(torch.tensor([0.0]))
        tensor(-1.2655)
    """

    def __init__(self, weight: Tensor, noise: float) -> None:
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                "LinearGaussian expected a floating-point matrix (features, latents), got "
                f"{weight.dtype} of shape {tuple(weight.shape)}. Reshape or convert the weight."
            )
        if not noise > 0:
            raise ValueError(
                f"LinearGaussian expected a positive noise, got {noise}. Pass its standard "
                "deviation."
            )
        self.weight = weight
        self.noise = noise

    def __call__(self, x: Tensor) -> Tensor:
        """Pyro model: sites ``z`` and ``x``."""
        zero = self.weight.new_zeros(self.weight.shape[1])
        z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ self.weight.T, self.noise).to_event(1), obs=x)
        return z

    def plated(self, x: Tensor, *, subsample_size: int | None = None) -> None:
        """Pyro model of independent data, shape ``(batch, features)``, in the plate ``data``."""
        with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            self(x[rows])

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Exact p(z | x), for each datum of a batch."""
        eye = torch.eye(self.weight.shape[1]).to(self.weight)
        precision = eye + self.weight.T @ self.weight / self.noise**2
        mean = torch.linalg.solve(precision, (x @ self.weight / self.noise**2)[..., None])[..., 0]
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x), in nats."""
        eye = torch.eye(self.weight.shape[0]).to(self.weight)
        marginal = self.weight @ self.weight.T + self.noise**2 * eye
        return dist.MultivariateNormal(torch.zeros_like(x), marginal).log_prob(x)


def two_moons(n: int, noise: float = 0.1) -> Tensor:
    """Draw ``n`` points of two interleaved half circles of radius 1, shape ``(n, 2)``."""
    angle = torch.pi * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], dim=-1) + noise * torch.randn(n, 2)


class GaussianMixture:
    r"""Law :math:`\sum_k w_k \mathcal N(m_k, S_k)`, exact at every noise level.

    Its noising :math:`\alpha x + \sigma\varepsilon` is again such a mixture, so the score and the
    best denoiser are known: the oracle of score matching and diffusion.

    .. math:: \mathbb E[x \mid \alpha x + \sigma\varepsilon = y] = \sum_k r_k(y)
        \big[m_k + \alpha S_k (\alpha^2 S_k + \sigma^2)^{-1}(y - \alpha m_k)\big]

    with :math:`r_k` the posterior probability of component k. One component is the Gaussian case.

    Args:
        means: Means, shape ``(components, features)``.
        covariances: Positive definite, shape ``(components, features, features)``.
        weights: Positive, of any sum, shape ``(components,)``; None for equal.

    Shape:
        ``x``: ``(*batch, features)``; ``alpha`` and ``sigma``: broadcastable to ``(*batch,)``.

    Raises:
        ValueError: If the shapes disagree, or a weight or an eigenvalue is not positive.

    Example:
        >>> target = GaussianMixture.ring(modes=8)
        >>> x = target.sample((5,))
        >>> target.log_prob(x).shape, target.score(x, sigma=torch.tensor(0.1)).shape
        (torch.Size([5]), torch.Size([5, 2]))
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor | None = None) -> None:
        components, features = means.shape
        if covariances.shape != (components, features, features):
            raise ValueError(
                "GaussianMixture expected covariances of shape "
                f"{(components, features, features)} for means of shape {tuple(means.shape)}, got "
                f"{tuple(covariances.shape)}."
            )
        weights = means.new_ones(components) if weights is None else weights
        if weights.shape != (components,) or not (weights > 0).all():
            raise ValueError(
                f"GaussianMixture expected {components} positive weights, got {weights.tolist()}."
            )
        self.means = means
        self.covariances = covariances
        self.weights = weights / weights.sum()
        self.variances, self.axes = torch.linalg.eigh(covariances)  # (k, d) and (k, d, d)
        if not (self.variances > 0).all():
            raise ValueError(
                "GaussianMixture expected positive definite covariances, got an eigenvalue of "
                f"{self.variances.min().item():.3g}."
            )

    @classmethod
    def ring(cls, modes: int = 8, *, radius: float = 1.3, std: float = 0.1) -> "GaussianMixture":
        """Equal round Gaussians of scale ``std`` on a circle, in two dimensions."""
        angle = 2 * torch.pi * torch.arange(modes) / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=-1)
        return cls(means, std**2 * torch.eye(2).expand(modes, 2, 2))

    def to(self, dtype: torch.dtype) -> "GaussianMixture":
        """The same law in another precision."""
        return GaussianMixture(
            self.means.to(dtype), self.covariances.to(dtype), self.weights.to(dtype)
        )

    def distribution(self) -> dist.TorchDistribution:
        """The law as a Pyro distribution."""
        return dist.MixtureSameFamily(
            dist.Categorical(self.weights), dist.MultivariateNormal(self.means, self.covariances)
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.distribution().sample(torch.Size(sample_shape))

    def log_prob(
        self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0
    ) -> Tensor:
        r"""Log-density of :math:`\alpha x + \sigma\varepsilon`, in nats, shape ``(*batch,)``."""
        return self._components(x, alpha, sigma)[0].logsumexp(-1)

    def score(self, x: Tensor, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.0) -> Tensor:
        """Gradient of :meth:`log_prob` in ``x``, shape ``(*batch, features)``."""
        log_joint, along, variance, _ = self._components(x, alpha, sigma)
        return self._average(log_joint, -along / variance)

    def denoise(
        self,
        x_t: Tensor,
        sigma: Tensor | float,
        context: None = None,
        *,
        alpha: Tensor | float = 1.0,
    ) -> Tensor:
        r"""Expected x given :math:`\alpha x + \sigma\varepsilon`, shape ``(*batch, features)``."""
        log_joint, along, variance, alpha = self._components(x_t, alpha, sigma)
        shrunk = self._average(log_joint, alpha * self.variances * along / variance)
        return shrunk + log_joint.softmax(-1) @ self.means

    def _components(
        self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log joint density (*, k), and offset and variance along the axes (*, k, d)."""
        alpha = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)[..., None, None]
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)[..., None, None]
        variance = alpha.square() * self.variances + sigma.square()
        offset = x.unsqueeze(-2) - alpha * self.means
        along = torch.einsum("...kd,kde->...ke", offset, self.axes)
        log_density = -(along.square() / variance + variance.log()).sum(-1) / 2
        constant = self.weights.log() - x.shape[-1] * math.log(2 * math.pi) / 2
        return log_density + constant, along, variance, alpha

    def _average(self, log_joint: Tensor, coordinates: Tensor) -> Tensor:
        vectors = torch.einsum("kde,...ke->...kd", self.axes, coordinates)
        return (log_joint.softmax(-1).unsqueeze(-1) * vectors).sum(-2)


class EightSchools:
    r"""Eight coaching experiments with a common mean and spread, the classic of hierarchies.

    .. math:: \mu \sim \mathcal N(0, 5^2), \quad \tau \sim \text{HalfCauchy}(5), \quad
        \theta_j \sim \mathcal N(\mu, \tau^2), \quad y_j \sim \mathcal N(\theta_j, s_j^2).

    The exact values are one-dimensional integrals over :math:`\tau`: the rest is normal.

    Args:
        dtype: Type of the data and so of the models' draws; torch's default if None.

    References:
        Rubin. Estimation in Parallel Randomized Experiments. Journal of Educational Statistics 6,
        1981.
        Gelman, Carlin, Stern, Dunson, Vehtari, Rubin. Bayesian Data Analysis, 3rd edition, 2013,
        section 5.5.

    Example:
        >>> schools = EightSchools()
        >>> print(f"{schools.log_evidence():.6f}")
        -31.311347
        >>> print("{mu:.5f} {tau:.5f}".format(**schools.posterior_mean()))
        4.39682 3.59771
    """

    def __init__(self, *, dtype: torch.dtype | None = None) -> None:
        self.y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=dtype)
        self.s = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=dtype)

    def centred(self) -> None:
        """Pyro model with sites ``mu``, ``tau`` and, in a plate, ``theta``: a funnel."""
        mu, tau = self._hyperparameters()
        with pyro.plate("schools", len(self.y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, self.s), obs=self.y)

    def non_centred(self) -> None:
        """Pyro model of the same law, with ``theta = mu + tau * effect``: nearly normal."""
        mu, tau = self._hyperparameters()
        with pyro.plate("schools", len(self.y)):
            effect = pyro.sample("effect", dist.Normal(torch.zeros_like(mu), 1.0))
            theta = pyro.deterministic("theta", mu + tau * effect)
            pyro.sample("y", dist.Normal(theta, self.s), obs=self.y)

    def log_evidence(self) -> float:
        """Log p(y) in nats, to ten digits."""
        return self._integrate()[0].logsumexp(0).item()

    def posterior_mean(self) -> dict[str, float]:
        """Posterior means of ``mu`` and ``tau``, to eight digits."""
        log_joint, mu, tau = self._integrate()
        weight = log_joint.softmax(0)
        return {"mu": (weight @ mu).item(), "tau": (weight @ tau).item()}

    def _hyperparameters(self) -> tuple[Tensor, Tensor]:
        mu = pyro.sample("mu", dist.Normal(self.y.new_zeros(()), 5.0))
        return mu, pyro.sample("tau", dist.HalfCauchy(self.y.new_tensor(5.0)))

    def _integrate(self, nodes: int = 100_000) -> tuple[Tensor, Tensor, Tensor]:
        """Midpoint rule in the prior's distribution function of ``tau``.

        Returns:
            Log of each node's share of the evidence, posterior mean of ``mu`` there, and ``tau``.
        """
        level = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
        tau = 5.0 * (torch.pi / 2 * level).tan()
        y, variance = self.y.double(), self.s.double().square() + tau.square()[:, None]
        precision = 1 / 25 + (1 / variance).sum(-1)
        mu = (y / variance).sum(-1) / precision
        normal = dist.Normal(0.0, variance.sqrt()).log_prob(y).sum(-1)
        log_joint = normal + (precision * mu.square() - (25 * precision).log()) / 2
        return log_joint - math.log(nodes), mu, tau


def eight_gaussians(n: int) -> Tensor:
    r"""Draw ``n`` points of eight round Gaussians on a circle, shape ``(n, 2)``.

    Radius :math:`4/\sqrt2`, standard deviation :math:`0.5/\sqrt2`; its density is that of
    :meth:`GaussianMixture.ring`. Entropy 2.833 nats: no density has a lower expected loss.

    Example:
        >>> eight_gaussians(3).shape
        torch.Size([3, 2])
    """
    angle = 2 * torch.pi * torch.randint(8, (n,)) / 8
    center = 4 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return (center + 0.5 * torch.randn(n, 2)) / math.sqrt(2)


def checkerboard(n: int) -> Tensor:
    """Draw ``n`` points of the eight dark squares, of side 2, of a 4 x 4 board, shape ``(n, 2)``.

    The density is uniform on an area of 32, so the entropy is log 32 = 3.466 nats.

    Example:
        >>> checkerboard(1000).abs().max() <= 4
        tensor(True)
    """
    column, row = torch.randint(4, (n,)), 2 * torch.randint(2, (n,))
    corner = torch.stack([column, row + column % 2], dim=-1)
    return 2 * (corner + torch.rand(n, 2)) - 4


def pinwheel(n: int, arms: int = 5) -> Tensor:
    """Draw ``n`` points of a wheel of bent Gaussian blades, shape ``(n, 2)``.

    Its entropy has no closed form.

    References:
        Johnson, Duvenaud, Wiltschko, Datta, Adams. Composing graphical models with neural
        networks for structured representations and fast inference. NeurIPS 2016.
        arXiv:1603.06277

    Example:
        >>> pinwheel(3).shape
        torch.Size([3, 2])
    """
    along, across = 1 + 0.3 * torch.randn(n), 0.1 * torch.randn(n)
    angle = 2 * torch.pi * torch.randint(arms, (n,)) / arms + 0.25 * along.exp()
    x = along * angle.cos() + across * angle.sin()
    y = across * angle.cos() - along * angle.sin()
    return 2 * torch.stack([x, y], dim=-1)


def two_spirals(n: int, noise: float = 0.1) -> Tensor:
    """Draw ``n`` points of two interleaved spirals of one and a half turns, shape ``(n, 2)``.

    Its entropy has no closed form.

    Example:
        >>> two_spirals(3).shape
        torch.Size([3, 2])
    """
    angle = 3 * torch.pi * torch.rand(n).sqrt()  # square root: equally dense along the arm
    arm = torch.stack([-angle * angle.cos(), angle * angle.sin()], dim=-1) + torch.rand(n, 2) / 2
    sign = torch.where(torch.rand(n, 1) < 0.5, 1.0, -1.0)
    return sign * arm / 3 + noise * torch.randn(n, 2)
