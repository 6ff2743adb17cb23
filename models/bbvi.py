"""Black-box variational inference on handwritten digits: no encoder. Half a minute on one core.

Every picture has a posterior of its own. For each minibatch these are optimised first, by steps
of descent, and then the decoder takes one step. Held-out pictures get theirs in the same way.

Ranganath, Gerrish, Blei. Black Box Variational Inference. AISTATS 2014. arXiv:1401.0118

    python -m models.bbvi --latents 8 --data mine.npy
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import HeteroscedasticGaussian, LatentVariable
from pyrogen.evaluation import Evidence, log_evidence
from pyrogen.guides import Descent, Local, VariationalEM
from pyrogen.nets import mlp
from pyrogen.objectives import ELBO
from pyrogen.training import Trainer

TARGET = 2.55  # bits per pixel of held-out digits, an upper bound


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 600  # of the decoder
    lr: float = 3e-3
    weight_decay: float = 1e-3
    latents: int = 16
    hidden: tuple[int, ...] = (256, 256)
    inner: int = 6  # steps of a minibatch's posteriors, for each of the decoder
    inner_lr: float = 0.1
    outer: int = 300  # steps of the posteriors of held-out rows
    particles: int = 100  # of the bound on held-out rows


class Pictures(nn.Module):
    """The Pyro program of a data set of which ``rows`` are seen."""

    def __init__(self, decoder: LatentVariable, size: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.size = size

    def forward(self, rows: Tensor, x: Tensor) -> None:
        with pyro.plate("data", self.size, subsample=rows):
            z = pyro.sample("z", self.decoder().prior)
            pyro.sample("x", self.decoder.decode(z), obs=x)


def fit(c: Config, data: Data) -> LatentVariable:
    decoder = LatentVariable(
        mlp(c.latents, 2 * data.features, c.hidden),
        c.latents,
        event_shape=(data.features,),
        likelihood=HeteroscedasticGaussian((data.features,)),
    ).standardize(data.dequantize(data.train))
    model = Pictures(decoder, len(data.train))
    bound = ELBO()(model, Local(model))
    objective = VariationalEM(bound, Descent(ELBO(), steps=c.inner, lr=c.inner_lr))
    optimizer = torch.optim.AdamW(decoder.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    trainer = Trainer(objective, optimizer, clip=1e6, schedule=schedule, average=0.99)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        size = min(c.batch, len(data.train))
        while True:
            for rows in torch.randperm(len(data.train)).split(size):
                if len(rows) == size:
                    rows = rows.sort().values  # so that all rows stand as the plate has them
                    yield rows, data.dequantize(data.train[rows])

    trainer.fit(batches(), steps=c.steps)
    return decoder


def held_out(c: Config, decoder: LatentVariable, data: Data) -> Evidence:
    """Bound the density of the test rows from below, at posteriors that are the best for them."""
    rows, x = torch.arange(len(data.test)), data.dequantize(data.test)
    model = Pictures(decoder, len(rows))
    bound = ELBO()(model, Local(model))
    descent = Descent(ELBO(), steps=c.outer, lr=c.inner_lr)
    VariationalEM(bound, descent)(rows, x)
    return log_evidence(model, bound.guide, rows, x, particles=c.particles, batch_size=len(rows))


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    decoder = fit(c, data)
    return density.report("bbvi", held_out(c, decoder, data), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
