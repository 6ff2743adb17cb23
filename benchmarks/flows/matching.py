"""Flow matching in two dimensions, by the published protocol, against the published numbers.

Tong et al. Simulation-free Schrödinger bridges via score and flow matching. AISTATS 2024.
arXiv:2307.03672, Table 2

    python -m benchmarks.flows.matching --seeds 0 1 2 --methods "OT-CFM" "I-CFM"

Protocol: 10,000 points to learn from and as many to judge by; a network of 3 x 64 SELU units on
(x, t); AdamW, learning rate 1e-3, weight decay 1e-5, batches of 512, 20,000 steps; 100 Euler
steps; the exact 2-Wasserstein distance between 10,000 draws and the 10,000 test points. ``floor``
is the distance between two test sets, which no model can be expected to pass; ``coupling`` the
share of the training's CPU time that finding the pairs takes.

The paper does not say how its sets are drawn. Here they are as in its authors' runner: eight
Gaussians of variance 1 on a circle of radius 5, as many points of each; scikit-learn's moons
(noise 0.05) times 2 and shifted by (-1, 0); its S-curve (noise 0.05) times 1.5. As a source the
moons are as in the authors' examples: times 3, shifted by (-1, -1), with noise 0.2.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import make_moons, make_s_curve
from torch import Tensor, nn

from pyrogen.distributions.recipes.continuous import cnf
from pyrogen.objectives.matching import (
    Bridge,
    FlowMatching,
    IndependentCoupling,
    MinibatchCoupling,
    OptimalTransport,
    SchroedingerBridge,
    Stochastic,
    Straight,
    Trigonometric,
)
from pyrogen.objectives.matching.interpolants import Interpolant
from pyrogen.transforms.ode import Euler

POINTS, BATCH = 10_000, 512

METHODS: dict[str, tuple[MinibatchCoupling, Interpolant]] = {
    "I-CFM": (IndependentCoupling(), Straight()),
    "OT-CFM": (OptimalTransport(), Straight()),
    "OT-CFM, one block": (OptimalTransport(block=BATCH), Straight()),
    "[SF]2M-Exact": (OptimalTransport(), Bridge(0.1)),
    "[SF]2M-Sinkhorn": (SchroedingerBridge(1.0), Bridge(1.0)),
    "trigonometric": (OptimalTransport(), Trigonometric()),
    "stochastic": (OptimalTransport(), Stochastic(Straight(), gamma=0.1)),
}

PUBLISHED = {  # of OT-CFM
    "N -> 8gaussians": ".303 ± .043",
    "moons -> 8gaussians": ".601 ± .027",
    "N -> moons": ".130 ± .016",
    "N -> scurve": ".144 ± .028",
}


def normal(n: int) -> Tensor:
    return torch.randn(n, 2)


def gaussians(n: int) -> Tensor:
    angle = 2 * torch.pi * torch.arange(n) / 8
    return 5 * torch.stack([angle.cos(), angle.sin()], -1) + torch.randn(n, 2)


def moons(n: int) -> Tensor:
    x, _ = make_moons(n, noise=0.05, random_state=_seed())
    return torch.tensor(2 * x - [1, 0], dtype=torch.float32)


def wide_moons(n: int) -> Tensor:
    x, _ = make_moons(n, noise=0.2, random_state=_seed())
    return torch.tensor(3 * x - 1, dtype=torch.float32)


def scurve(n: int) -> Tensor:
    x, _ = make_s_curve(n, noise=0.05, random_state=_seed())
    return torch.tensor(1.5 * x[:, [0, 2]], dtype=torch.float32)


def _seed() -> int:
    return int(torch.randint(2**31, ()))


TASKS: dict[str, tuple[Callable[[int], Tensor], Callable[[int], Tensor]]] = {
    "N -> 8gaussians": (normal, gaussians),
    "moons -> 8gaussians": (wide_moons, gaussians),
    "N -> moons": (normal, moons),
    "N -> scurve": (normal, scurve),
}


class Timed(MinibatchCoupling):
    """A coupling that adds up the CPU time it takes."""

    def __init__(self, coupling: MinibatchCoupling) -> None:
        self.coupling = coupling
        self.seconds = 0.0

    def __call__(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        start = time.process_time()
        paired = self.coupling(x, z, context)
        self.seconds += time.process_time() - start
        return paired


def wasserstein(x: Tensor, y: Tensor) -> float:
    """Exact 2-Wasserstein distance between two sets of one size."""
    partners = OptimalTransport(block=len(x))(x.double(), y.double(), None)
    return (x - partners).square().sum(-1).mean().sqrt().item()


@dataclass
class Row:
    distance: float
    floor: float
    share: float
    seconds: float


def run(task: str, method: str, seed: int, c: argparse.Namespace) -> Row:
    torch.manual_seed(seed)
    source, target = TASKS[task]
    coupling, interpolant = METHODS[method]
    timed = Timed(coupling)
    flow = cnf(2, hidden=(64, 64, 64), activation=nn.SELU, solver=Euler(c.euler))
    objective = FlowMatching(flow, coupling=timed, interpolant=interpolant)
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-3, weight_decay=1e-5)
    x, z = target(POINTS), source(POINTS)
    start = time.process_time()
    for _ in range(c.steps):
        rows = torch.randint(POINTS, (BATCH,))
        noise = z[torch.randint(POINTS, (BATCH,))] if source is not normal else None
        optimizer.zero_grad()
        objective(x[rows], noise=noise).backward()
        optimizer.step()
    seconds = time.process_time() - start

    test = target(POINTS)
    with torch.no_grad():
        distance = wasserstein(flow.layers[0]()(source(POINTS)), test)
    floor = wasserstein(target(POINTS), test)
    return Row(distance, floor, timed.seconds / seconds, seconds)


def spread(values: list[float]) -> str:
    error = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def table(done: dict[tuple[str, str], list[Row]]) -> None:
    print(
        "\n| task | pairs and paths | W2 | floor | published OT-CFM | coupling | CPU s | seeds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (task, method), rows in done.items():
        print(
            f"| {task} | {method} | {spread([r.distance for r in rows])} "
            f"| {spread([r.floor for r in rows])} | {PUBLISHED[task]} "
            f"| {statistics.mean(r.share for r in rows):.0%} "
            f"| {statistics.mean(r.seconds for r in rows):.0f} | {len(rows)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=["OT-CFM"], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--euler", type=int, default=100)
    c = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[tuple[str, str], list[Row]] = {}
    for seed in c.seeds:
        for task in c.tasks:
            for method in c.methods:
                done.setdefault((task, method), []).append(run(task, method, seed, c))
        table(done)


if __name__ == "__main__":
    main()
