"""Score-based diffusion on handwritten digits. A minute on two cores.

Karras, Aittala, Aila, Laine. Elucidating the design space of diffusion-based generative models.
NeurIPS 2022. arXiv:2206.00364

    python -m models.diffusion --hidden 256 --data mine.npy
"""

from dataclasses import dataclass

import pyro
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import Diffusion
from pyrogen.evaluation import Evidence, Kind
from pyrogen.nets import ResidualMLP
from pyrogen.objectives import DenoisingScore
from pyrogen.training import History, Trainer

TARGET = 2.5  # bits per pixel of held-out digits, by the probability-flow ODE


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 4000
    batch: int = 256
    hidden: int = 256
    blocks: int = 3


def fit(c: Config, data: Data) -> tuple[Diffusion, History]:
    net = ResidualMLP(data.features, hidden=c.hidden, blocks=c.blocks)
    diffusion = Diffusion(net, (data.features,)).standardize(data.dequantize(data.train))
    objective = DenoisingScore(diffusion)
    optimizer = torch.optim.AdamW(diffusion.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    trainer = Trainer(objective, optimizer, clip=1.0, schedule=schedule, average=0.999)
    return diffusion, trainer.fit(data.batches(c.batch), steps=c.steps)


@torch.no_grad()
def held_out(diffusion: Diffusion, data: Data) -> Evidence:
    """Score the test rows by the probability-flow ODE."""
    log_prob, _ = diffusion().log_prob_and_error(data.dequantize(data.test))
    return Evidence(log_prob, Kind.ODE)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    diffusion, _ = fit(c, data)
    return density.report("diffusion", held_out(diffusion, data), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
