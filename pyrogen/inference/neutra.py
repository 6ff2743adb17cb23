"""Neural transport: NUTS in the noise of a fitted guide, refused if the guide would mislead it."""

__all__ = ["NeuTra"]

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from ..guides.log_joint import LogJoint
from .fidelity import Limits, fidelity, transported
from .pilot import pushed


class NeuTra:
    r"""A model with the noise of a guide's map for its latents: easy to sample if the map is good.

    .. math:: z = T(\epsilon), \qquad \log p(\epsilon \mid x) = \log p\big(x, T(\epsilon)\big)
        + \log |\det \partial T / \partial \epsilon| + \text{const}

    The posterior is the model's own whatever the map; but a map that hides mass makes samplers
    that never find it, and report nothing. So the map is judged first, by :func:`fidelity`, and
    one that is not faithful is refused.

    Cost: the check, and one pass of the map on top of each run of the model.

    Args:
        model: Model of the guide.
        guide: Fitted guide with a transform, such as :class:`~pyrogen.guides.AutoFlow`.
        *args: Arguments of the model; run the sampler with the same.
        limits: What the verdict asks for; loosen it to go on deliberately.
        chains: Number of chains of the check.
        transitions: Length of the chains of the check.
        **kwargs: Keywords of the model.

    Attributes:
        verdict: The :class:`Fidelity` of the map.
        site: Name of the site of the noise.

    Raises:
        ValueError: If the map is not faithful, the model mixes draws, or model and guide do not
            belong together.
        TypeError: If the guide is no ``AutoContinuous``.
        NotImplementedError: If the guide has no transform, or it has no inverse.
        FloatingPointError: If the guide draws, or the model scores, NaN or infinity.

    References:
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan. NeuTra-lizing Bad Geometry in
        Hamiltonian Monte Carlo Using Neural Transport. 2019. arXiv:1903.03704

    Example:
        >>> from pyro.infer import MCMC, NUTS
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        >>> guide = AutoMultivariateNormal(model)
        >>> _ = guide()
        >>> neutra = NeuTra(model, guide)
        >>> mcmc = MCMC(NUTS(neutra.model), num_samples=20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run()
        >>> neutra.transform_sample(mcmc.get_samples()[neutra.site])["scale"].shape
        torch.Size([20])
    """

    def __init__(
        self,
        model: Callable,
        guide: AutoContinuous,
        *args: Any,
        limits: Limits | None = None,
        chains: int = 128,
        transitions: int = 60,
        **kwargs: Any,
    ) -> None:
        self.verdict = fidelity(
            model,
            guide,
            *args,
            limits=limits,
            chains=chains,
            transitions=transitions,
            **kwargs,
        )
        self.guide = guide
        self.site = f"{guide._pyro_name}_noise"
        self._model = model
        self._log_joint = LogJoint(model, guide, *args, **kwargs)
        self._refuse_mixing(args, kwargs)
        if not self.verdict.faithful:
            raise ValueError(
                f"NeuTra refuses {self.verdict.guide} as a map: "
                f"{'; '.join(self.verdict.faults)}. NUTS through it would be wrong in silence. "
                "Train it longer or with more particles, take a richer recipe or another "
                "parameterization, or pass limits=Limits(...) to go on."
            )

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The model, a function of noise: what ``NUTS`` takes. Returns what the model returns."""
        law = transported(self.guide)
        noise = pyro.sample(self.site, law.noise.mask(False))  # noqa: FBT003
        batch = noise.shape[:-1]
        u, ladj = pushed(law, noise.reshape(-1, noise.shape[-1]))
        values = {}
        for site, x in self.guide._unpack_latent(u.reshape(noise.shape)):
            transform = biject_to(site["fn"].support)
            z = values[site["name"]] = transform(x)
            own = transform.log_abs_det_jacobian(x, z)
            ladj = ladj + own.reshape(len(ladj), -1).sum(-1)
        pyro.factor(f"{self.site}_ladj", ladj.reshape(batch))
        with poutine.condition(data=values):
            return self._model(*args, **kwargs)

    @torch.no_grad()
    def transform_sample(self, noise: Tensor) -> dict[str, Tensor]:
        """Carry draws of the noise to the model's latents.

        Args:
            noise: Draws of :attr:`site`, shape ``(*sample, latents)``.

        Returns:
            Values of every latent site, each of shape ``(*sample, *shape)``.
        """
        rows = noise.reshape(-1, noise.shape[-1])
        u = pushed(transported(self.guide), rows)[0]
        return self._log_joint.constrain(u.reshape(noise.shape))

    @torch.no_grad()
    def _refuse_mixing(self, args: tuple, kwargs: dict) -> None:
        """Score draws alone: a model that mixes draws gives some of them another density."""
        law = transported(self.guide)
        noise = law.noise.sample(torch.Size((4,)))  # two may agree by chance
        u, ladj = pushed(law, noise)
        for one, expected in zip(noise, (self._log_joint(u) + ladj).tolist(), strict=True):
            held = poutine.condition(self.model, {self.site: one})
            with poutine.block():
                alone = float(poutine.trace(held).get_trace(*args, **kwargs).log_prob_sum())
            if abs(alone - expected) > 1e-3 * (1 + abs(alone)):
                raise ValueError(
                    f"NeuTra found that the model mixes draws: the log-density of one is "
                    f"{alone:.4g} alone and {expected:.4g} among others. Count dimensions from "
                    "the right."
                )
