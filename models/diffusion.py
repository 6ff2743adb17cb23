"""Score-based diffusion on handwritten digits. A minute on two cores.

Karras, Aittala, Aila, Laine. Elucidating the design space of diffusion-based generative models.
NeurIPS 2022. arXiv:2206.00364

    python -m models.diffusion --hidden 256 --data mine.npy
"""

from dataclasses import dataclass

import pyro
import torch
from torch.distributions import LogNormal
from torch.optim.lr_scheduler import OneCycleLR

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import Diffusion
from pyrogen.evaluation import Evidence, Kind
from pyrogen.nets import ResidualMLP
from pyrogen.objectives import DenoisingScore
from pyrogen.training import History, Trainer
from pyrogen.transforms import Hutchinson

TARGET = 2.4  # bits per pixel of held-out digits, by the probability-flow ODE


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 2500
    batch: int = 256
    lr: float = 2e-3  # at the top of a cycle
    weight_decay: float = 0.1
    hidden: int = 256
    blocks: int = 2
    dropout: float = 0.15


def fit(c: Config, data: Data) -> tuple[Diffusion, History]:
    net = ResidualMLP(data.features, hidden=c.hidden, blocks=c.blocks, dropout=c.dropout)
    diffusion = Diffusion(net, (data.features,), trace=Hutchinson(4), steps=32)
    diffusion.standardize(data.dequantize(data.train))
    noise = LogNormal(-1.2, 1.5)  # wide: dequantised pixels have sharp edges
    objective = DenoisingScore(diffusion, noise=noise)
    optimizer = torch.optim.AdamW(
        diffusion.parameters(), c.lr, betas=(0.9, 0.99), weight_decay=c.weight_decay, fused=True
    )
    schedule = OneCycleLR(
        optimizer, c.lr, total_steps=c.steps + 1, pct_start=0.04, cycle_momentum=False
    )
    trainer = Trainer(objective, optimizer, clip=1.0, schedule=schedule, average=0.999)
    return diffusion, trainer.fit(data.batches(c.batch), steps=c.steps)


@torch.no_grad()
def held_out(diffusion: Diffusion, data: Data) -> Evidence:
    """Score the test rows by the probability-flow ODE."""
    diffusion.eval()
    log_prob, _ = diffusion().log_prob_and_error(data.dequantize(data.test))
    return Evidence(log_prob, Kind.ODE)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    diffusion, _ = fit(c, data)
    return density.report("diffusion", held_out(diffusion, data), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
