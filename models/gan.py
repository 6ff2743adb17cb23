"""Relativistic GAN with zero-centred gradient penalties, on handwritten digits.

Huang, Gokaslan, Kuleshov, Tompkin. The GAN is dead; long live the GAN! NeurIPS 2024.
arXiv:2501.05441

    python -m models.gan --penalty 1 --data mine.npy
"""

from dataclasses import dataclass
from functools import partial

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.special import ndtr

from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import Generator
from pyrogen.evaluation import classifier_test
from pyrogen.nets import Standardized, mlp
from pyrogen.objectives import CriticLoss, GeneratorLoss, ZeroCentred
from pyrogen.training import AdversarialTrainer, History, Trainer

leaky = partial(mlp, activation=partial(nn.LeakyReLU, 0.2))

TARGET = 0.75  # accuracy of a classifier that tells draws from held-out digits


@dataclass(frozen=True)
class Config:
    data: str = "digits"  # or a .npy, .npz, .csv or IDX file
    steps: int = 4000
    batch: int = 128
    latents: int = 32
    hidden: tuple[int, ...] = (256, 256, 256)
    penalty: float = 1.0
    lr: float = 1e-3  # at the start of a cosine
    seed: int = 0


class GreyLevels(nn.Module):
    """Pictures with the noise that dequantisation gives to data, so that none tells them apart.

    Part of the input becomes a picture on [0, levels - 1], where white and black are reached
    exactly, as in data; the rest becomes the uniform noise of each pixel.
    """

    def __init__(self, picture: nn.Module, latents: int, levels: int) -> None:
        super().__init__()
        self.picture, self.latents, self.levels = picture, latents, levels

    def forward(self, z: Tensor) -> Tensor:
        z, noise = z[..., : self.latents], z[..., self.latents :]
        grey = self.picture(z).clamp(0, 1) * (self.levels - 1)
        return (grey + ndtr(noise)) / self.levels


def build(c: Config, data: Data) -> tuple[Generator, nn.Module]:
    picture = leaky(c.latents, data.features, c.hidden)
    if data.levels:
        nn.init.constant_(picture[-1].bias, 0.3)  # within (0, 1), where the gradient is
        pixels = GreyLevels(picture, c.latents, data.levels)
        generator = Generator(pixels, c.latents + data.features, (data.features,))
        shift, scale = torch.tensor(0.5), torch.tensor(1.0)
    else:
        generator = Generator(picture, c.latents, (data.features,)).standardize(data.train)
        shift, scale = generator.shift, generator.scale
    return generator, Standardized(leaky(data.features, 1, c.hidden), shift, scale)


def fit(c: Config, data: Data) -> tuple[Generator, History]:
    generator, critic = build(c, data)

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
