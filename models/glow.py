"""Glow with splines on handwritten digits. A minute on one core.

Kingma, Dhariwal. Glow: Generative Flow with Invertible 1x1 Convolutions. NeurIPS 2018.
arXiv:1807.03039
Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032

    python -m models.glow --data $PYROGEN_DATA/mnist/train-images-idx3-ubyte.gz --picture glow.png
"""

from dataclasses import dataclass, replace

import pyro
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen import plots
from pyrogen.distributions import Flow
from pyrogen.distributions.recipes.image import glow
from pyrogen.evaluation import Evidence, Kind
from pyrogen.objectives import MaximumLikelihood
from pyrogen.training import History, Trainer
from pyrogen.transforms import RationalQuadratic

TARGET = 1.97  # bits per pixel of held-out digits
AT_ONCE = 500  # pictures that are scored together


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 400
    lr: float = 2e-3  # at the start of a cosine
    levels: int = 2
    couplings: int = 3  # at each level
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8  # of each spline
    picture: str = ""  # file for draws beside data


def pictures(data: Data) -> Data:
    """The same rows as pictures of shape (channels, height, width)."""
    if len(data.shape) not in (2, 3):
        raise ValueError(
            f"glow learns pictures of shape (height, width) or (channels, height, width), and "
            f"{data.name} has rows of shape {data.shape}. Try models.nsf."
        )
    shape = (1, *data.shape)[-3:]
    parts = {n: getattr(data, n).reshape(-1, *shape) for n in ("train", "validation", "test")}
    return replace(data, shape=shape, **parts)


def fit(c: Config, data: Data) -> tuple[Flow, History]:
    """Fit to pictures and keep the weights of the best validation."""
    flow = glow(
        data.shape,
        levels=c.levels,
        steps=c.couplings,
        hidden=c.hidden,
        elementwise=RationalQuadratic(bins=c.bins),
        support=data.support,
    ).standardize(data.dequantize(data.train))
    # The layers treat all pixels alike, so one shift and one scale serve all.
    flow.shift.fill_(flow.shift.mean())
    flow.scale.fill_(flow.scale.mean())
    objective = MaximumLikelihood(flow)
    optimizer = torch.optim.AdamW(flow.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    held = data.dequantize(data.validation[:AT_ONCE])
    return flow, Trainer(objective, optimizer, clip=5.0, schedule=schedule, average=0.99).fit(
        data.batches(c.batch), steps=c.steps, validation=lambda: objective(held).item()
    )


@torch.no_grad()
def held_out(flow: Flow, data: Data) -> Evidence:
    """Score the test pictures, exactly."""
    flow.eval()
    parts = data.dequantize(data.test).split(AT_ONCE)
    return Evidence(torch.cat([flow().log_prob(part) for part in parts]), Kind.EXACT)


@torch.no_grad()
def draws(flow: Flow, data: Data, file: str) -> None:
    """Picture draws beside data."""
    rows = {"data": data.test[:16], "glow": data.quantize(flow().sample((16,)))}
    rows["glow "] = data.quantize(flow().sample((16,)))
    grey = {name: x.mean(-3) for name, x in rows.items()}
    plots.image_grid(grey, high=max(data.levels - 1, 1)).savefig(file)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    images = pictures(data)
    flow, _ = fit(c, images)
    cost = density.report("glow", held_out(flow, images), data)
    if c.picture:
        draws(flow, images, c.picture)
    return cost


if __name__ == "__main__":
    main(parse(Config, __doc__))
