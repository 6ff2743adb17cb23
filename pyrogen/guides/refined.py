"""A guide that refines another one's posteriors for the data at hand."""

__all__ = ["Refined"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from .at import At, refine
from .per_datum import PerDatum
from .refinement import Refinement


class Refined(PerDatum):
    r"""A guide that starts where another one ends, and refines it for the data at hand.

    .. math:: q_{\lambda_T(x)}(z), \qquad \lambda_0 = e(x), \quad
        \lambda_{t+1} = \lambda_t - \eta_t\, \nabla_\lambda L(\lambda_t, x)

    Each run of the guide makes the steps anew, for the data of this run and on the model as it is
    now, so it stands wherever a guide stands: with every loss, in importance sampling, for the
    density of held-out data. Steps are taken without gradients being on around, are invisible to
    Pyro's handlers, share the subsample of the run, and leave nothing behind.

    The noise of the steps is a draw of the guide like any other, from an auxiliary site, so a
    second run on the same draws makes the same steps. All particles of a vectorized loss share
    them.

    Latents outside the data's plate, if hidden from the guide, are drawn from their prior in the
    steps. Within :class:`~pyrogen.guides.Mixed` they are those of the run; its particles must then
    be drawn one at a time.

    Cost: that of the steps, once per run.

    Args:
        guide: What gives the start: an :class:`~pyrogen.guides.Amortized` guide, or
            :class:`~pyrogen.guides.Local`. Its parameters are shared, and the state dicts of
            both are the same.
        refinement: The steps: :class:`Descent`, or :class:`Unrolled` to train through them.

    Raises:
        TypeError: If ``guide`` is not per datum.
        NotImplementedError: If the posterior is asked for from data alone, or the sites given
            have many draws at once.
        FloatingPointError: If the steps diverge.

    References:
        Kim, Wiseman, Miller, Sontag, Rush. Semi-Amortized Variational Autoencoders. ICML 2018.
        arXiv:1802.02550
        Marino, Yue, Mandt. Iterative Amortized Inference. ICML 2018. arXiv:1807.09356

    Example:
        >>> from pyrogen.guides import Amortized, Descent
        >>> from pyrogen.objectives import ELBO
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
        >>> encoder = nn.Linear(1, 2).requires_grad_(False)  # untrained
        >>> descent = Descent(ELBO(64, vectorize_particles=True), steps=100, lr=0.2)
        >>> guide = Refined(Amortized(model, encoder), descent)
        >>> guide.median(torch.tensor([[4.0]]))["z"].round()  # exactly 2
        tensor([2.])
    """

    def __init__(self, guide: PerDatum, refinement: Refinement) -> None:
        if not isinstance(guide, PerDatum):
            raise TypeError(
                f"Refined expected a guide with numbers for each datum, got "
                f"{type(guide).__name__}. Pass Amortized or Local."
            )
        super().__init__(
            guide.model,
            guide.encoder,
            family=guide.family,
            plate=guide.plate,
            create_plates=guide.create_plates,
        )
        self.refinement = refinement
        self._guide = (guide,)  # not a submodule: its parameters are in encoder and family
        self._at = (At(guide),)

    @property
    def guide(self) -> PerDatum:
        """The guide that gives the start."""
        return self._guide[0]

    def joint(self, x: Tensor, context: Tensor | None = None) -> Any:
        """Refuse: steps need the model's arguments."""
        raise NotImplementedError(
            "Refined needs the arguments of its model, not the data alone. Call guide(*args) or "
            "guide.median(*args), or guide.guide.posterior(x) for where it starts."
        )

    posterior = joint

    def _build(self, like: Tensor, *args: Any, **kwargs: Any) -> None:
        self.guide.setup(*args, **kwargs)

    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        start = self.guide._read(plate, *args, **kwargs)
        with plate:
            noise = pyro.sample(
                f"_{self._pyro_name}_noise", _Seed(start), infer={"is_auxiliary": True}
            )
        seeded = _seeded(int(noise.flatten()[0]), start.device)
        return refine(self._at[0], self.refinement, start, plate, args, kwargs, noise=seeded)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a random state of its own inside, and leave that of outside as it is."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Seed(dist.TorchDistribution):
    """Law of the seed from which a run draws its noise; not of a parameter, so without density."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.nonnegative_integer
    has_rsample = True  # there is nothing to differentiate

    def __init__(self, like: Tensor) -> None:
        super().__init__(Size(), Size(), validate_args=False)
        self.like = like.new_zeros(())

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return torch.randint(2**31, Size(sample_shape), device=self.like.device)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.like.expand(value.shape)
