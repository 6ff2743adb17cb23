"""A guide that refines another one's posteriors for the data at hand."""

__all__ = ["At", "Refined", "refine"]

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.runtime import _DIM_ALLOCATOR
from torch import Size, Tensor, nn

from .amortized import Amortized
from .refinement import Refinement


class Refined(Amortized):
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
    steps.

    Cost: that of the steps, once per run.

    Args:
        guide: What gives the start: an :class:`~pyrogen.guides.Amortized` guide, or
            :class:`~pyrogen.guides.Local`. Its parameters are shared, and the state dicts of
            both are the same.
        refinement: The steps: :class:`Descent`, or :class:`Unrolled` to train through them.

    Raises:
        TypeError: If ``guide`` is not per datum.
        NotImplementedError: If the posterior is asked for from data alone.
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

    def __init__(self, guide: Amortized, refinement: Refinement) -> None:
        if not isinstance(guide, Amortized):
            raise TypeError(
                f"Refined expected a guide with numbers for each datum, got "
                f"{type(guide).__name__}. Pass Amortized or Local."
            )
        super().__init__(guide.model, guide.encoder, family=guide.family)
        self.refinement = refinement
        self._guide = (guide,)  # not a submodule: its parameters are in encoder and family
        self._at = (At(guide),)

    @property
    def guide(self) -> Amortized:
        """The guide that gives the start."""
        return self._guide[0]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.guide.setup(*args, **kwargs)
        super()._setup_prototype(*args, **kwargs)

    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        start = self.guide._read(plate, *args, **kwargs)
        with plate:
            noise = pyro.sample(
                f"_{self._pyro_name}_noise", _Seed(start), infer={"is_auxiliary": True}
            )
        seeded = _seeded(int(noise.flatten()[0]), start.device)
        return refine(self._at[0], self.refinement, start, plate, args, kwargs, noise=seeded)

    def _encode(self, x: Tensor, context: Tensor | None, *, plate_dim: int) -> Tensor:
        raise NotImplementedError(
            "Refined needs the arguments of its model, not the data alone. Call guide(*args) or "
            "guide.median(*args), or guide.guide.posterior(x) for where it starts."
        )

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None:
            return super()._create_plates(*args, **kwargs)
        self.plates = self.guide._create_plates(*args, **kwargs)
        return self.plates


class At(Amortized):
    """A guide's posteriors at numbers that are given: what steps are taken on.

    Args:
        guide: The guide in question.
    """

    def __init__(self, guide: Amortized) -> None:
        super().__init__(guide.model, nn.Identity(), family=guide.family, plate=guide.plate)
        self._held: tuple[Any, ...] = ()

    @contextmanager
    def holding(self, numbers: Tensor, plate: Any) -> Iterator[None]:
        """Be the posterior of these numbers, one row for each datum that ``plate`` shows."""
        before, self._held = self._held, (numbers, plate)
        try:
            yield
        finally:
            self._held = before

    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._held[0]

    def _enter_as_model(self, *args: Any, **kwargs: Any) -> Any:
        plate = self._held[1]
        return pyro.plate(plate.name, plate.size, subsample=plate.indices, dim=plate.dim)


def refine(
    at: At,
    refinement: Refinement,
    start: Tensor,
    plate: Any,
    args: tuple,
    kwargs: dict,
    *,
    noise: AbstractContextManager | None = None,
) -> Tensor:
    """Take the steps of a refinement for the data that a plate shows, out of all handlers' sight.

    Args:
        at: The guide, to be held at the numbers in question.
        refinement: The steps.
        start: Numbers to start from, as the guide reads them.
        plate: The data's plate.
        args: Arguments of the model.
        kwargs: Keywords of the model.
        noise: What to be in while the steps are made.

    Raises:
        FloatingPointError: If they diverge.
    """
    share = poutine.scale(scale=plate.subsample_size / plate.size)  # each datum counts once
    model, guide = share(at.model), share(at)
    loss = cast(Any, refinement.loss)

    def objective(numbers: Tensor) -> Tensor:
        _check_finite(numbers, refinement)
        with at.holding(numbers, plate):
            return loss.differentiable_loss(model, guide, *args, **kwargs)

    with _alone(), torch.enable_grad():
        at.setup(*args, **kwargs)
        if math.isinf(loss.max_plate_nesting):
            objective(start.detach())  # the first run looks at the plates, with noise of its own
        with noise or nullcontext():
            end = refinement(objective, start)
    _check_finite(end, refinement)
    return end


def _check_finite(numbers: Tensor, refinement: Refinement) -> None:
    if not numbers.isfinite().all():
        raise FloatingPointError(
            f"{type(refinement).__name__} diverged within {refinement.steps} steps. Lower its "
            "learning rate, or look for NaN in the data."
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Run what is inside as if nothing were around it: no handler, and no plate."""
    around, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        with poutine.block():
            yield
    finally:
        _DIM_ALLOCATOR._stack = around


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
