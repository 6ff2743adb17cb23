"""Relativistic GAN with zero-centred gradient penalties, on handwritten digits.

Huang, Gokaslan, Kuleshov, Tompkin. The GAN is dead; long live the GAN! NeurIPS 2024.
arXiv:2501.05441

    python -m models.gan --penalty 1 --data mine.npy
"""

from dataclasses import dataclass

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import Generator
from pyrogen.evaluation import classifier_test
from pyrogen.nets import mlp
from pyrogen.objectives import CriticLoss, GeneratorLoss, ZeroCentred
from pyrogen.training import AdversarialTrainer, History, Trainer

TARGET = 0.9  # accuracy of a classifier that tells draws from held-out digits


@dataclass(frozen=True)
class Config:
    data: str = "digits"  # or a .npy, .npz, .csv or IDX file
    steps: int = 4000
    batch: int = 128
    latents: int = 64
    hidden: tuple[int, ...] = (256, 256)
    penalty: float = 10.0
    lr: float = 1e-3  # at the start of a cosine
    seed: int = 0


def fit(c: Config, data: Data) -> tuple[Generator, History]:
    net = mlp(c.latents, data.features, c.hidden)
    generator = Generator(net, c.latents, (data.features,), support=data.support)
    generator.standardize(data.dequantize(data.train))
    critic = mlp(data.features, 1, c.hidden)

    def trainer(objective: nn.Module, moving: nn.Module, average: float | None) -> Trainer:
        optimizer = torch.optim.Adam(moving.parameters(), c.lr, betas=(0.0, 0.99))
        schedule = CosineAnnealingLR(optimizer, c.steps, eta_min=0.02 * c.lr)
        return Trainer(objective, optimizer, schedule=schedule, average=average)

    game = AdversarialTrainer(
        trainer(GeneratorLoss(generator, critic), generator, 0.999),
        trainer(CriticLoss(generator, critic, penalty=ZeroCentred(c.penalty)), critic, None),
    )
    return generator, game.fit(data.batches(c.batch), steps=c.steps)


def draws(generator: Generator, data: Data) -> Tensor:
    return data.quantize(generator().sample((len(data.test),)))


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    generator, _ = fit(c, data)
    verdict = classifier_test(data.test, draws(generator, data))
    print(f"gan: {verdict}")
    return verdict.accuracy


if __name__ == "__main__":
    main(parse(Config, __doc__))
