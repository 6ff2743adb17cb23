"""What is subtracted from a score-function signal: it quiets the gradient and leaves its mean."""

__all__ = ["Baseline", "Learned", "LeaveOneOut", "MovingAverage", "NoBaseline"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def _first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


class Baseline(nn.Module, ABC):
    """A guess of a particle's learning signal that does not look at the particle's own draw.

    Since the score has mean zero, whatever does not depend on the draw may be subtracted from
    the signal that multiplies it. What comes back with a gradient is learned along with the
    guide: its squared distance from the signal is added to the loss, without changing the value.
    """

    @abstractmethod
    def forward(
        self, site: str, signal: Tensor, others: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the guess for every particle, broadcastable to ``signal``.

        Args:
            site: Name of the guide's site, or of the bound where the signal is shared by all.
            signal: What multiplies the score, shape ``(particles, *plates)``, without gradient.
            others: The same, as the other particles alone would give it; None with one particle.
            *args: Arguments of the model.
            **kwargs: Arguments of the model.
        """


class NoBaseline(Baseline):
    """Nothing: the plain score-function estimator, REINFORCE.

    References:
        Williams. Simple statistical gradient-following algorithms for connectionist
        reinforcement learning. Machine Learning 8, 1992.

    Example:
        >>> NoBaseline()("z", torch.ones(4), None)
        tensor(0.)
    """

    def forward(
        self, site: str, signal: Tensor, others: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return signal.new_zeros(())


class MovingAverage(Baseline):
    r"""An exponential moving average of past signals, one number a site.

    .. math:: c \leftarrow \rho c + (1 - \rho)\, \overline{\text{signal}}

    The average starts at the first signal; nothing is subtracted before there is one. Its state is
    part of ``state_dict``. It follows the signal's scale, so keep one size of minibatch.

    Args:
        decay: Memory :math:`\rho` in [0, 1) of one step.

    Raises:
        ValueError: If ``decay`` is not in [0, 1).

    References:
        Wingate, Weber. Automated Variational Inference in Probabilistic Programming. 2013.
        arXiv:1301.1299

    Example:
        >>> baseline = MovingAverage(0.5)
        >>> baseline("z", torch.full((4,), 3.0), None)  # the past, before this signal joins it
        tensor(0.)
        >>> baseline("z", torch.full((4,), 5.0), None)
        tensor(3.)
        >>> baseline("z", torch.full((4,), 5.0), None)
        tensor(4.)
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(
                f"MovingAverage expected decay in [0, 1), got {decay}. Pass the weight of the "
                "past, such as 0.9."
            )
        self.decay = decay
        self.past: dict[str, float] = {}

    def forward(
        self, site: str, signal: Tensor, others: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        past, now = self.past.get(site), signal.mean().item()
        if math.isfinite(now):  # else it would never recover
            self.past[site] = now if past is None else self.decay * past + (1 - self.decay) * now
        return signal.new_tensor(past or 0.0)

    def get_extra_state(self) -> dict[str, float]:
        return dict(self.past)

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.past = dict(state)


class Learned(Baseline):
    r"""A network's guess from the data: neural variational inference and learning, NVIL.

    The network is fitted by least squares to the signal, along with the guide: give its
    parameters to the optimizer, as ``elbo(model, guide).parameters()`` and ``SVI`` do.

    Args:
        net: Module from the data to one number a datum, shape ``(batch,)`` or ``(batch, 1)``, or
            to a scalar where the signal has no plate.
        select: Picks the network's data from the arguments of the model.

    Raises:
        ValueError: If the network's output does not fit the signal.
        TypeError: If ``net`` is not a module.

    References:
        Mnih, Gregor. Neural Variational Inference and Learning in Belief Networks. ICML 2014.
        arXiv:1402.0030

    Example:
        >>> baseline = Learned(nn.Linear(3, 1))
        >>> baseline("z", torch.zeros(4, 10), None, torch.randn(10, 3)).shape
        torch.Size([10])
    """

    def __init__(self, net: nn.Module, *, select: Callable[..., Tensor] = _first) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(
                f"Learned expected a network, got {net!r}. Pass a module from the data to one "
                "number a datum."
            )
        self.net = net
        self.select = select

    def forward(
        self, site: str, signal: Tensor, others: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        plates = signal.shape[1:]
        guess = self.net(self.select(*args, **kwargs))
        if [n for n in guess.shape if n > 1] != [n for n in plates if n > 1]:
            raise ValueError(
                f"Learned expected one number for each of {tuple(plates)} cells of site {site!r}, "
                f"got shape {tuple(guess.shape)}. Change the network's output, or pass select=."
            )
        return guess.reshape(plates)


class LeaveOneOut(Baseline):
    r"""What the other particles give: VarGrad and RLOO on the ELBO, VIMCO on a tighter bound.

    It needs no memory and no network. With one particle there are no others and nothing is
    subtracted. A second baseline steadies it when particles are few:

    .. math:: b_k = \frac{s\, b + (K - 1)\, \text{others}_k}{s + K - 1}.

    Args:
        toward: Baseline :math:`b` towards which the others' mean is shrunk.
        strength: Number :math:`s` of particles that ``toward`` counts for.

    Raises:
        ValueError: If ``strength`` is not positive.
        TypeError: If ``toward`` is not a baseline.

    References:
        Kool, van Hoof, Welling. Buy 4 REINFORCE Samples, Get a Baseline for Free! ICLR workshop
        2019.
        Richter, Boustati, Nüsken, Ruiz, Akyildiz. VarGrad: A Low-Variance Gradient Estimator for
        Variational Inference. NeurIPS 2020. arXiv:2010.10436
        Mnih, Rezende. Variational Inference for Monte Carlo Objectives. ICML 2016.
        arXiv:1602.06725

    Example:
        >>> signal = torch.tensor([1.0, 2.0, 6.0])
        >>> LeaveOneOut()("z", signal, (signal.sum() - signal) / 2)
        tensor([4.0000, 3.5000, 1.5000])
    """

    def __init__(self, toward: Baseline | None = None, *, strength: float = 10.0) -> None:
        super().__init__()
        if not strength > 0:
            raise ValueError(
                f"LeaveOneOut expected a positive strength, got {strength}. Pass the number of "
                "particles that the other baseline is worth, or leave it out."
            )
        if not (toward is None or isinstance(toward, Baseline)):
            raise TypeError(
                f"LeaveOneOut expected a baseline, got {toward!r}. Pass an object such as "
                "MovingAverage(), or leave it out."
            )
        self.toward = toward
        self.strength = strength

    def forward(
        self, site: str, signal: Tensor, others: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.toward is None:
            return signal.new_zeros(()) if others is None else others
        guess = self.toward(site, signal, others, *args, **kwargs)
        if others is None:
            return guess
        count = len(signal) - 1
        return (self.strength * guess + count * others) / (self.strength + count)
