"""Variational autoencoder on handwritten digits. Half a minute on one core.

Kingma, Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114

    python -m models.vae --decoder logistic --latents 8 --data mine.npy
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import (
    BernoulliLogits,
    CategoricalLevels,
    CorrelatedGaussian,
    HeteroscedasticGaussian,
    LatentVariable,
    Likelihood,
    LogisticLevels,
)
from pyrogen.evaluation import Evidence, log_evidence
from pyrogen.guides import Amortized
from pyrogen.nets import Standardized, mlp
from pyrogen.objectives import ELBO, Bound
from pyrogen.training import History, Trainer

TARGET = 2.45  # bits per pixel of held-out digits, an upper bound


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 3000
    weight_decay: float = 1e-3
    decoder: str = "gaussian"  # one of DECODERS
    latents: int = 16
    hidden: tuple[int, ...] = (256, 256)
    particles: int = 500  # of the bound on held-out rows


@dataclass(frozen=True)
class Decoder:
    """What the decoder says about a pixel, and what the model sees of the data."""

    likelihood: Callable[[Data], Likelihood]
    view: Callable[[Data], Data] = lambda data: data


DECODERS = {
    "bernoulli": Decoder(lambda d: BernoulliLogits((d.features,)), Data.as_bits),
    "gaussian": Decoder(lambda d: HeteroscedasticGaussian((d.features,))),
    "correlated": Decoder(lambda d: CorrelatedGaussian((d.features,))),
    "logistic": Decoder(lambda d: LogisticLevels((d.features,), d.levels), Data.as_levels),
    "mixture": Decoder(
        lambda d: LogisticLevels((d.features,), d.levels, components=3), Data.as_levels
    ),
    "categorical": Decoder(lambda d: CategoricalLevels((d.features,), d.levels), Data.as_levels),
}


def view(c: Config, data: Data) -> Data:
    """Show the data as the decoder needs them: with noise, or as whole grey levels."""
    if c.decoder not in DECODERS:
        raise ValueError(f"There is no decoder {c.decoder!r}. Choose one of {list(DECODERS)}.")
    return DECODERS[c.decoder].view(data)


def standardized(net: torch.nn.Module, data: Data) -> Standardized:
    """Let a network see rows in standard units."""
    x = data.dequantize(data.train)
    return Standardized(net, x.mean(0), x.std(0).clamp(min=0.1 * x.std()))


def fit(
    c: Config, data: Data, bound: Bound | None = None
) -> tuple[LatentVariable, Amortized, History]:
    """Fit to data as ``view`` gives them, by the ELBO or another bound."""
    likelihood = DECODERS[c.decoder].likelihood(data)
    vae = LatentVariable(
        mlp(c.latents, likelihood.outputs.numel(), c.hidden),
        c.latents,
        event_shape=(data.features,),
        likelihood=likelihood,
    ).standardize(data.dequantize(data.train))
    guide = Amortized(vae.model, standardized(mlp(data.features, 2 * c.latents, c.hidden), data))
    objective = (ELBO() if bound is None else bound)(vae.model, guide)
    return vae, guide, minimise(objective, c, data)


def minimise(objective: torch.nn.Module, c: density.Config, data: Data) -> History:
    """Train, and keep the weights of the best validation."""
    optimizer = torch.optim.AdamW(objective.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    held = data.dequantize(data.validation.repeat(4, 1))
    trainer = Trainer(objective, optimizer, clip=1e4, schedule=schedule, average=0.99)
    return trainer.fit(
        data.batches(c.batch), steps=c.steps, validation=lambda: objective(held).item()
    )


def held_out(vae: LatentVariable, guide: Amortized, data: Data, particles: int) -> Evidence:
    """Bound the density of the test rows from below."""
    return log_evidence(vae.model, guide, data.dequantize(data.test), particles=particles)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = view(c, load(c.data))
    vae, guide, _ = fit(c, data)
    return density.report(f"vae, {c.decoder}", held_out(vae, guide, data, c.particles), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
