"""What a distribution without a density promises."""

__all__ = ["LikelihoodFree"]

from typing import ClassVar, NoReturn

from pyro.distributions import TorchDistribution
from torch import Tensor


class LikelihoodFree(TorchDistribution):
    """A distribution that can be sampled but not evaluated.

    Subclasses implement ``rsample``. They work wherever Pyro only draws: forward
    simulation, ``Predictive``, and as a prior inside a simulator.

    Example:
        >>> class Square(LikelihoodFree):
        ...     def rsample(self, sample_shape=()):
        ...         return torch.randn(sample_shape).square()
        >>> Square().sample((3,)).shape
        torch.Size([3])
        >>> Square().log_prob(torch.tensor(1.0))
        Traceback (most recent call last):
            ...
        NotImplementedError: Square has draws but no density, so Pyro cannot score it. To fit ...
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def log_prob(self, value: Tensor) -> NoReturn:
        """Refuse, and say what to do instead.

        Raises:
            NotImplementedError: Always.
        """
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} has draws but no density, so Pyro cannot score it. To fit it, compare its "
            "draws with data by an adversarial or a discrepancy objective of pyrogen.objectives. "
            "To condition on data, observe a noisy copy of the draw: Normal(draw, noise)."
        )
