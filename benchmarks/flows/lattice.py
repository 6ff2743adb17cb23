"""Sampling of lattice field theory: how soon a flow learns the phi^4 model on 8 x 8 sites.

Couplings of a checkerboard, whose networks are small periodic convolutions, fall towards the
Boltzmann law exp(-S) of

    S(phi) = sum over sites of  M2 phi^2 + lambda phi^4 + sum over axes of (phi - phi')^2

with M2 = -4 and lambda = 8 by reverse KL, with the plain reparameterised gradient and with the
path gradient, which has no variance where the flow is exact. The effective sample size is that of
importance weights, as a fraction of the draws.

Albergo, Boyda, Hackett, Kanwar, Cranmer, Racaniere, Rezende, Shanahan. Introduction to Normalizing
Flows for Lattice Field Theory. arXiv:2101.08176
Vaitl, Nicoli, Nakajima, Kessel. Gradients Should Stay on Path. ICML 2022. arXiv:2207.08219

    python -m benchmarks.flows.lattice --seconds 154
"""

import argparse
import math
import time
from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor, nn

from pyrogen.distributions import Flow
from pyrogen.guides import AutoFlow
from pyrogen.objectives import ELBO, DoublyReparameterized, Gradient, Reparameterized
from pyrogen.transforms import Affine, Bijection

SIZE = 8
M2, LAMBDA = -4.0, 8.0


def action(phi: Tensor) -> Tensor:
    """S of fields of shape ``(*batch, SIZE ** 2)``."""
    field = phi.unflatten(-1, (SIZE, SIZE))
    density = M2 * field.square() + LAMBDA * field.pow(4)
    for axis in (-1, -2):
        density = density + (field - field.roll(1, axis)).square()
    return density.flatten(-2).sum(-1)


class Checkerboard(nn.Module):
    """Affine map of the sites of one colour, by a periodic convolution of the other's."""

    moves: Tensor

    def __init__(self, parity: int, hidden: Sequence[int] = (8, 8)) -> None:
        super().__init__()
        row = torch.arange(SIZE)
        self.register_buffer("moves", ((row[:, None] + row) % 2 == parity).float())
        self.affine = Affine()
        widths = [1, *hidden]
        stack: list[nn.Module] = []
        for a, b in pairwise(widths):
            stack += [nn.Conv2d(a, b, 3, padding=1, padding_mode="circular"), nn.LeakyReLU()]
        last = nn.Conv2d(widths[-1], 2, 3, padding=1, padding_mode="circular")
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*stack, last)

    def forward(self, context: None = None) -> Bijection:
        return _Checkerboard(self)


class _Checkerboard(Bijection):
    def __init__(self, layer: Checkerboard) -> None:
        super().__init__()
        self.layer = layer

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._map(x).call_and_ladj(x)
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._map(y).inverse_and_ladj(y)
        return x, ladj.sum(-1)

    def _map(self, x: Tensor) -> Bijection:
        layer = self.layer
        field = x.reshape(-1, 1, SIZE, SIZE) * (1 - layer.moves)
        params = layer.net(field) * layer.moves  # zero is the identity
        return layer.affine(params.flatten(-2).mT.reshape(*x.shape, 2))


def checkerboards(layers: int = 16) -> Flow:
    return Flow(SIZE**2, [Checkerboard(i % 2) for i in range(layers)])


@torch.no_grad()
def effective(flow: Flow, n: int = 4096) -> tuple[float, float]:
    """Effective sample size, a fraction of ``n``, and the mean cost in nats, up to log Z."""
    phi, log_q = flow().rsample_and_log_prob((n,))
    log_w = -action(phi) - log_q
    w = (log_w - log_w.max()).exp()
    return (w.sum().square() / w.square().sum() / n).item(), -log_w.mean().item()


def train(gradient: Gradient, c: argparse.Namespace) -> None:
    torch.manual_seed(c.seed)
    flow = checkerboards()
    flat = dist.Normal(torch.zeros(SIZE**2), 1.0).to_event(1).mask(False)  # noqa: FBT003

    def model() -> None:
        pyro.factor("action", -action(pyro.sample("phi", flat)))

    start = init_to_value(values={"phi": flat.mean})  # which the lattice's symmetries keep
    guide = AutoFlow(model, lambda features: flow, init_loc_fn=start).setup()
    elbo = ELBO(c.batch, vectorize_particles=True, max_plate_nesting=0, gradient=gradient)
    loss = elbo(model, guide)
    optimizer = torch.optim.Adam(flow.parameters(), c.lr)
    marks = [c.seconds * f for f in (0.125, 0.25, 0.5, 1.0)]
    spent, steps = 0.0, 0
    while marks:
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = c.lr * (1 + math.cos(math.pi * spent / c.seconds)) / 2
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        spent += time.process_time() - start
        steps += 1
        if spent >= marks[0]:
            marks.pop(0)
            ess, cost = effective(flow)
            name = type(gradient).__name__
            print(f"| {name} | {spent:.0f} | {steps} | {ess:.3f} | {cost:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=154.0, help="CPU time of training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3, help="at the start of a cosine")
    parser.add_argument("--seed", type=int, default=0)
    c = parser.parse_args()
    torch.set_num_threads(1)
    print("| gradient | CPU s | steps | ESS | KL - log Z, nats |\n|---|---|---|---|---|")
    with pyro.validation_enabled(False):  # noqa: FBT003
        for gradient in (Reparameterized(), DoublyReparameterized()):
            train(gradient, c)


if __name__ == "__main__":
    main()
