"""Maximum likelihood for the flows of this folder: train, stop by validation, score."""

import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from models.data import Data
from pyrogen.distributions import Flow
from pyrogen.evaluation import Evidence, Kind
from pyrogen.objectives import MaximumLikelihood
from pyrogen.training import History, Trainer


@dataclass(frozen=True)
class Config:
    """What the flows' settings have in common; each file has defaults of its own."""

    data: str = "digits"  # or a .npy, .npz, .csv or IDX file
    steps: int = 1500
    batch: int = 128
    lr: float = 1e-3  # at the start of a cosine
    weight_decay: float = 1e-4
    seed: int = 0


def train(flow: Flow, data: Data, c: Config) -> History:
    """Fit the flow to the training rows and keep the weights of the best validation."""
    flow.standardize(data.dequantize(data.train))
    objective = MaximumLikelihood(flow)
    optimizer = torch.optim.AdamW(flow.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    held = data.dequantize(data.validation.repeat(4, 1))
    return Trainer(objective, optimizer, clip=5.0, schedule=schedule, average=0.99).fit(
        data.batches(c.batch), steps=c.steps, validation=lambda: objective(held).item()
    )


@torch.no_grad()
def held_out(flow: Flow, data: Data) -> Evidence:
    """Score the test rows, exactly."""
    flow.eval()
    return Evidence(flow().log_prob(data.dequantize(data.test)), Kind.EXACT)


def report(name: str, evidence: Evidence, data: Data) -> float:
    """Print and return the mean cost of a test row."""
    score = data.score(evidence.log_prob)
    error = score.std() / math.sqrt(len(score))
    kind = f"{evidence.kind.value}, {len(score)} held-out {data.name}"
    print(f"{name}: {score.mean():.3f} ± {error:.3f} {data.unit} ({kind})")
    return score.mean().item()
