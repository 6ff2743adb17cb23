"""The same flow by several libraries, behind one face: score, draw, and both at once.

pyrogen and Pyro are at hand; zuko, nflows and normflows where they are installed:

    pip install pyrogen zuko nflows normflows

All flows here have the same number of layers, hidden widths and bins; what else differs (the
activation, the tail bound, the start) is each library's own default.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import Tensor, nn

from pyrogen import distributions as pd
from pyrogen.distributions import Flow
from pyrogen.nets import mlp
from pyrogen.transforms import RationalQuadratic

Draw = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """A trainable density on real vectors."""

    package: str
    name: str
    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    draw_and_score: Draw  # differentiable draws and their log-densities
    sample: Callable[[int], Tensor]


@dataclass(frozen=True)
class Size:
    """What all flows share."""

    layers: int = 3
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    bound: float = 5.0  # of splines, where a library does not fix it


Make = Callable[[int, Size], Peer]


@contextmanager
def validation_kept() -> Iterator[None]:
    """Undo what an import or a compiler does to the validation of all distributions."""
    law = torch.distributions.Distribution
    before = law._validate_args
    try:
        yield
    finally:
        law.set_default_validate_args(before)


def of_pyrogen(name: str, flow: Flow) -> Peer:
    return Peer(
        "pyrogen",
        name,
        flow,
        lambda x: flow().log_prob(x),
        lambda n: flow().rsample_and_log_prob((n,)),
        lambda n: flow().rsample((n,)),
    )


def pyrogen_peers() -> dict[str, Make]:
    def splines(s: Size) -> RationalQuadratic:
        return RationalQuadratic(bins=s.bins, bound=s.bound)

    def maf(d: int, s: Size) -> Peer:
        return of_pyrogen("maf", pd.maf(d, layers=s.layers, hidden=s.hidden))

    def spline_maf(d: int, s: Size) -> Peer:
        flow = pd.maf(d, layers=s.layers, hidden=s.hidden, elementwise=splines(s))
        return of_pyrogen("maf, splines", flow)

    def nsf(d: int, s: Size) -> Peer:
        flow = pd.nsf(d, layers=s.layers, hidden=s.hidden, elementwise=splines(s))
        return of_pyrogen("nsf", flow)

    def realnvp(d: int, s: Size) -> Peer:
        return of_pyrogen("realnvp", pd.realnvp(d, layers=s.layers, hidden=s.hidden))

    return {"maf": maf, "spline maf": spline_maf, "nsf": nsf, "realnvp": realnvp}


def of_pyro(name: str, d: int, stack: Sequence[dist.TransformModule]) -> Peer:
    """Pyro's transforms; a module whose inverse stands in ``stack`` is registered too."""
    direct = [t if isinstance(t, nn.Module | dist.transforms.Permute) else t.inv for t in stack]
    noise = dist.Normal(torch.zeros(d), 1.0).to_event(1)
    law = dist.TransformedDistribution(noise, list(stack))

    def forget() -> None:
        for t in direct:  # or the next step walks the graph of the last one
            t.clear_cache()

    def log_prob(x: Tensor) -> Tensor:
        forget()
        return law.log_prob(x)

    def draw_and_score(n: int) -> tuple[Tensor, Tensor]:
        forget()
        x = law.rsample((n,))
        return x, law.log_prob(x)  # cached: no inversion

    def sample(n: int) -> Tensor:
        forget()
        return law.rsample((n,))

    registered = nn.ModuleList(t for t in direct if isinstance(t, nn.Module))
    return Peer("Pyro", name, registered, log_prob, draw_and_score, sample)


def pyro_peers() -> dict[str, Make]:
    t = pyro_transforms

    def reversed_order(d: int) -> dist.transforms.Permute:
        return t.Permute(torch.arange(d).flip(0))

    def alternating(layers: int, d: int, make: Callable[[], dist.TransformModule]) -> list:
        stack: list = []
        for i in range(layers):
            stack += [reversed_order(d)] if i else []
            stack.append(make())
        return stack

    def coupling(d: int, s: Size) -> Peer:
        make = lambda: t.affine_coupling(d, list(s.hidden))  # noqa: E731
        return of_pyro("affine_coupling", d, alternating(s.layers, d, make))

    def spline_coupling(d: int, s: Size) -> Peer:
        make = lambda: t.spline_coupling(  # noqa: E731
            d, hidden_dims=list(s.hidden), count_bins=s.bins, bound=s.bound
        )
        return of_pyro("spline_coupling", d, alternating(s.layers, d, make))

    def spline_autoregressive(d: int, s: Size) -> Peer:
        # its inverse, so that scoring takes one pass and drawing takes d
        def make() -> dist.TransformModule:
            hidden = [max(h, d) for h in s.hidden]  # Pyro asks for as many units as features
            return t.spline_autoregressive(d, hidden, count_bins=s.bins, bound=s.bound).inv

        return of_pyro("spline_autoregressive", d, alternating(s.layers, d, make))

    def iaf(d: int, s: Size) -> Peer:
        def make() -> dist.TransformModule:
            return t.affine_autoregressive(d, [max(h, d) for h in s.hidden])

        return of_pyro("affine_autoregressive", d, alternating(s.layers, d, make))

    return {
        "affine_coupling": coupling,
        "spline_coupling": spline_coupling,
        "spline_autoregressive": spline_autoregressive,
        "iaf": iaf,
    }


def zuko_peers() -> dict[str, Make]:
    with validation_kept():  # importing zuko switches validation off for torch and Pyro
        import zuko

    def wrap(name: str, flow: nn.Module) -> Peer:
        return Peer(
            "zuko",
            name,
            flow,
            lambda x: flow().log_prob(x),
            lambda n: flow().rsample_and_log_prob((n,)),
            lambda n: flow().rsample((n,)),
        )

    def maf(d: int, s: Size) -> Peer:
        return wrap("MAF", zuko.flows.MAF(d, transforms=s.layers, hidden_features=s.hidden))

    def nsf(d: int, s: Size) -> Peer:
        flow = zuko.flows.NSF(d, bins=s.bins, transforms=s.layers, hidden_features=s.hidden)
        return wrap("NSF", flow)

    def passes(d: int, s: Size) -> Peer:
        flow = zuko.flows.NSF(
            d, bins=s.bins, transforms=s.layers, hidden_features=s.hidden, passes=2
        )
        return wrap("NSF, passes=2", flow)

    def nice(d: int, s: Size) -> Peer:
        flow = zuko.flows.RealNVP(d, transforms=s.layers, hidden_features=s.hidden)
        return wrap("RealNVP", flow)

    return {"maf": maf, "nsf": nsf, "nsf passes=2": passes, "realnvp": nice}


def nflows_peers() -> dict[str, Make]:
    from nflows import transforms as t
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NFlow
    from nflows.nn.nets import ResidualNet

    class Net(nn.Sequential):
        """Its own MLP takes no context argument, which its couplings pass."""

        def __init__(self, inputs: int, outputs: int, s: Size) -> None:
            super().__init__(*mlp(inputs, outputs, s.hidden, activation=nn.ReLU))
            self.hidden_features = s.hidden[0]  # by which nflows scales the bins

        def forward(self, x: Tensor, context: None) -> Tensor:
            return super().forward(x)

    def wrap(name: str, d: int, stack: list[nn.Module]) -> Peer:
        flow = NFlow(t.CompositeTransform(stack), StandardNormal([d]))
        return Peer(
            "nflows", name, flow, flow.log_prob, flow.sample_and_log_prob, lambda n: flow.sample(n)
        )

    def maf(d: int, s: Size) -> Peer:
        stack: list[nn.Module] = []
        for i in range(s.layers):
            stack += [t.ReversePermutation(d)] if i else []
            stack.append(
                t.MaskedAffineAutoregressiveTransform(
                    d, s.hidden[0], num_blocks=len(s.hidden) - 1, use_residual_blocks=False
                )
            )
        return wrap("MAF", d, stack)

    def couplings(s: Size, d: int, *, linear: bool, residual: bool) -> list[nn.Module]:
        def net(inputs: int, outputs: int) -> nn.Module:
            if residual:
                return ResidualNet(inputs, outputs, s.hidden[0], num_blocks=len(s.hidden) // 2)
            return Net(inputs, outputs, s)

        stack: list[nn.Module] = []
        for i in range(s.layers):
            stack += [t.LULinear(d, identity_init=True)] if linear else []
            stack.append(
                t.PiecewiseRationalQuadraticCouplingTransform(
                    (torch.arange(d) + i) % 2,
                    net,
                    num_bins=s.bins,
                    tails="linear",
                    tail_bound=s.bound,
                )
            )
        return stack

    def autoregressive(s: Size, d: int, *, linear: bool, residual: bool) -> list[nn.Module]:
        stack: list[nn.Module] = []
        for i in range(s.layers):
            stack += [t.ReversePermutation(d)] if i and not linear else []
            stack += [t.RandomPermutation(d), t.LULinear(d, identity_init=True)] if linear else []
            stack.append(
                t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    d,
                    s.hidden[0],
                    num_bins=s.bins,
                    tails="linear",
                    tail_bound=s.bound,
                    num_blocks=len(s.hidden) // 2 if residual else len(s.hidden) - 1,
                    use_residual_blocks=residual,
                )
            )
        return stack

    def nsf(d: int, s: Size) -> Peer:
        return wrap("RQ-NSF (C)", d, couplings(s, d, linear=False, residual=False))

    def nsf_lu(d: int, s: Size) -> Peer:
        return wrap("RQ-NSF (C), LU", d, couplings(s, d, linear=True, residual=False))

    def nsf_ar(d: int, s: Size) -> Peer:
        return wrap("RQ-NSF (AR)", d, autoregressive(s, d, linear=False, residual=False))

    def published(d: int, s: Size) -> Peer:
        stack = couplings(s, d, linear=True, residual=True)
        return wrap("RQ-NSF (C), as published", d, stack)

    def published_ar(d: int, s: Size) -> Peer:
        stack = autoregressive(s, d, linear=True, residual=True)
        return wrap("RQ-NSF (AR), as published", d, stack)

    return {
        "maf": maf,
        "nsf": nsf,
        "nsf LU": nsf_lu,
        "nsf AR": nsf_ar,
        "nsf published": published,
        "nsf AR published": published_ar,
    }


def normflows_peers() -> dict[str, Make]:
    import normflows

    def wrap(name: str, d: int, stack: list[nn.Module]) -> Peer:
        flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(d), stack)
        flow.q0.requires_grad_(False)  # noqa: FBT003
        return Peer(
            "normflows", name, flow, flow.log_prob, flow.sample, lambda n: flow.sample(n)[0]
        )

    def nsf(d: int, s: Size) -> Peer:
        stack = [
            normflows.flows.CoupledRationalQuadraticSpline(
                d, len(s.hidden) // 2, s.hidden[0], num_bins=s.bins, reverse_mask=bool(i % 2)
            )
            for i in range(s.layers)
        ]
        return wrap("RQ-NSF (C)", d, stack)

    def realnvp(d: int, s: Size) -> Peer:
        stack: list[nn.Module] = []
        for i in range(s.layers):
            stack += [normflows.flows.Permute(d, mode="swap")] if i else []
            kept = d - d // 2
            net = normflows.nets.MLP([kept, *s.hidden, 2 * (d // 2)], init_zeros=True)
            stack.append(normflows.flows.AffineCouplingBlock(net))
        return wrap("RealNVP", d, stack)

    return {"nsf": nsf, "realnvp": realnvp}


def all_peers() -> dict[str, Make]:
    """Every flow at hand, by ``package: name``."""
    found = {}
    for package, peers in (
        ("pyrogen", pyrogen_peers),
        ("zuko", zuko_peers),
        ("nflows", nflows_peers),
        ("normflows", normflows_peers),
        ("Pyro", pyro_peers),
    ):
        try:
            makers = peers()
        except ImportError:
            continue
        found |= {f"{package}: {name}": make for name, make in makers.items()}
    return found


def check(peer: Peer, d: int) -> float:
    """Largest distance between the score of a draw and its score as a datum, in nats."""
    torch.manual_seed(0)
    x, scored = peer.draw_and_score(64)
    return (scored - peer.log_prob(x.detach().clone())).abs().max().item()
