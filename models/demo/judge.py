"""One row a law: what a held-out picture costs, whether draws pass for real, what z knows."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from models.data import Data
from pyrogen.evaluation import (
    ClassifierVerdict,
    Evidence,
    Kind,
    MMDVerdict,
    ProbeVerdict,
    classifier_test,
    linear_probe,
    mmd_test,
)

HEADER = (
    "law",
    "bits/dim",
    "kind",
    "MMD p",
    "classifier accuracy",
    "probe",
    "parameters",
    "seconds",
)


@dataclass(frozen=True)
class Row:
    """A line of the table. Draws and held-out pictures are compared on the pixel grid."""

    law: str
    draws: Tensor  # (n, features), grey levels
    mmd: MMDVerdict
    classifier: ClassifierVerdict
    score: Tensor | None = None  # cost of each held-out picture, bits per dimension
    kind: Kind | None = None
    probe: ProbeVerdict | None = None
    parameters: int | None = None
    seconds: float | None = None

    @property
    def bits(self) -> float:
        return math.nan if self.score is None else self.score.mean().item()

    def cells(self) -> list[str]:
        def dash(value: object, text: Callable) -> str:
            return "-" if value is None else text(value)

        low, high = self.classifier.interval
        return [
            self.law,
            dash(self.score, lambda s: f"{s.mean():.3f} ± {s.std() / math.sqrt(len(s)):.3f}"),
            "none" if self.kind is None else self.kind.value,
            f"{self.mmd.p_value:.3f}",
            f"{self.classifier.accuracy:.2f} [{low:.2f}, {high:.2f}]",
            dash(self.probe, lambda p: f"{p.accuracy:.2f}"),
            dash(self.parameters, lambda n: f"{n:,}"),
            dash(self.seconds, lambda s: f"{s:.0f}"),
        ]


def judge(
    law: str,
    data: Data,
    draws: Tensor,
    *,
    evidence: Evidence | None = None,
    representation: Callable[[Tensor], Tensor] | None = None,
    parameters: int | None = None,
    seconds: float | None = None,
) -> Row:
    """Compare dequantised draws of a law with the held-out pictures."""
    rounded = data.quantize(draws)
    probe = None
    if representation is not None and data.labels is not None:
        with torch.no_grad():
            z = [representation(data.dequantize(x)) for x in (data.train, data.test)]
        probe = linear_probe(z[0], data.labels[0], z[1], data.labels[2])
    return Row(
        law,
        rounded,
        mmd_test(data.test, rounded),
        classifier_test(data.test, rounded),
        score=None if evidence is None else data.score(evidence.log_prob),
        kind=None if evidence is None else evidence.kind,
        probe=probe,
        parameters=parameters,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixture of full covariances, by scikit-learn; of one component, a Gaussian."""

    fitted: GaussianMixture

    @classmethod
    def fit(cls, data: Data, components: int) -> "Mixture":
        x = torch.cat([data.dequantize(data.train) for _ in range(4)])  # fresh noise for each copy
        model = GaussianMixture(components, n_init=3, random_state=0)
        return cls(model.fit(x.double().numpy()))

    @property
    def parameters(self) -> int:
        return int(self.fitted._n_parameters())

    def evidence(self, data: Data) -> Evidence:
        x = data.dequantize(data.test).double().numpy()
        return Evidence(torch.from_numpy(self.fitted.score_samples(x)), Kind.EXACT)

    def draws(self, n: int) -> Tensor:
        rows, _ = self.fitted.sample(n)  # sorted by component
        return torch.from_numpy(np.ascontiguousarray(rows)).float()[torch.randperm(n)]
