"""Every public distribution, transform and objective passes every check, in both precisions."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyrogen.distributions as pd
import pyrogen.objectives as po
import pyrogen.transforms as pt
from pyrogen.divergences import kl
from pyrogen.guides import Amortized
from pyrogen.inputs import check_batch
from pyrogen.nets import ResidualMLP, TimeMLP, mlp
from pyrogen.testing import (
    DISTRIBUTION_CHECKS,
    MODULE_CHECKS,
    OBJECTIVE_CHECKS,
    TRANSFORM_CHECKS,
)

FEATURES, CONTEXT, LATENTS = 3, 2, 2


def context():
    return torch.linspace(-1, 1, 4 * CONTEXT).reshape(4, CONTEXT)


def moved(module):
    """The module away from its initial weights, where parts are often trivial."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def diffusion(sampler=None, **options):
    net = ResidualMLP(FEATURES, options.get("context", 0), hidden=16, blocks=1)
    return pd.Diffusion(net, (FEATURES,), sampler=sampler, **options)


def latent_variable(likelihood, outputs):
    return pd.LatentVariable(
        mlp(LATENTS + CONTEXT, outputs, (8,)),
        LATENTS,
        event_shape=(FEATURES,),
        context=CONTEXT,
        likelihood=likelihood,
    )


MODULES = {  # name -> (module, what it is called with)
    "Flow": lambda: (pd.Flow(FEATURES, [pt.LULinear(FEATURES)]), ()),
    "nice": lambda: (pd.nice(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "iaf": lambda: (pd.iaf(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "naf": lambda: (pd.naf(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "umnn": lambda: (pd.umnn(FEATURES, CONTEXT, hidden=(8,), units=4), (context(),)),
    "triangular": lambda: (pd.triangular(FEATURES, CONTEXT, hidden=(8,), units=4), (context(),)),
    "sospf": lambda: (pd.sospf(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "bernstein": lambda: (pd.bernstein(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "gaussianization": lambda: (pd.gaussianization(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "cnf": lambda: (pd.cnf(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "glow": lambda: (pd.glow((1, 4, 4), CONTEXT, steps=1, hidden=(8,)), (context(),)),
    "ncsf": lambda: (pd.ncsf(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "planar": lambda: (pd.planar(FEATURES, CONTEXT, layers=2, hidden=(8,)), (context(),)),
    "radial": lambda: (pd.radial(FEATURES, CONTEXT, layers=2, hidden=(8,)), (context(),)),
    "sylvester": lambda: (pd.sylvester(FEATURES, CONTEXT, layers=2, hidden=(8,)), (context(),)),
    "FlowMixture": lambda: (
        pd.FlowMixture([pd.realnvp(FEATURES, CONTEXT, hidden=(8,)) for _ in range(2)], CONTEXT),
        (context(),),
    ),
    "Dequantized": lambda: (pd.Dequantized(pd.nsf(FEATURES, CONTEXT, hidden=(8,))), (context(),)),
    "realnvp": lambda: (pd.realnvp(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "nsf": lambda: (pd.nsf(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "maf": lambda: (pd.maf(FEATURES, CONTEXT, hidden=(8,)), (context(),)),
    "Generator": lambda: (
        pd.Generator(mlp(LATENTS + CONTEXT, FEATURES), LATENTS, (FEATURES,), CONTEXT),
        (context(),),
    ),
    "Diffusion": lambda: (diffusion(context=CONTEXT), (context(),)),
    "Multistep": lambda: (diffusion(pd.Multistep(4)), ()),
    "Heun": lambda: (diffusion(pd.Heun(4)), ()),
    "Ancestral": lambda: (diffusion(pd.Ancestral(4)), ()),
    "LatentVariable": lambda: (
        latent_variable(pd.HomoscedasticGaussian((FEATURES,)), FEATURES),
        (context(),),
    ),
    "HeteroscedasticGaussian": lambda: (
        latent_variable(pd.HeteroscedasticGaussian((FEATURES,)), 2 * FEATURES),
        (context(),),
    ),
    "CorrelatedGaussian": lambda: (
        latent_variable(pd.CorrelatedGaussian((FEATURES,)), FEATURES),
        (context(),),
    ),
    "BernoulliLogits": lambda: (
        latent_variable(pd.BernoulliLogits((FEATURES,)), FEATURES),
        (context(),),
    ),
    "LogisticLevels": lambda: (
        latent_variable(pd.LogisticLevels((FEATURES,), 5, components=2), 6 * FEATURES),
        (context(),),
    ),
    "CategoricalLevels": lambda: (
        latent_variable(pd.CategoricalLevels((FEATURES,), 5), 5 * FEATURES),
        (context(),),
    ),
}
VALUES = {  # made without a module
    "DiscretizedLogistic": lambda: pd.DiscretizedLogistic(
        torch.linspace(-2, 6, 4), torch.tensor(0.5), 5
    ),
    "Pushforward": lambda: pd.Pushforward(
        torch.square, dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), (2,)
    ),
    "Transformed": lambda: pd.Transformed(
        dist.Normal(torch.zeros(4, 2), 1.0).to_event(1), [dist.transforms.ExpTransform()]
    ),
    "Mixture": lambda: pd.Mixture(torch.zeros(2), [pd.nsf(2)(), pd.nsf(2)()]),
    "Quantized": lambda: pd.Quantized(pd.nsf(2)()),
    "Marginal": lambda: pd.Marginal(
        dist.Normal(torch.zeros(4, 2), 1.0).to_event(1),
        lambda z: dist.Normal(z, 0.1).to_event(1),
    ),
}
COVERED = {  # made or used by the entries above
    "Diffused": "Diffusion",
    "Preconditioned": "Diffusion",
    "HomoscedasticGaussian": "LatentVariable",
}
ABSTRACT_OR_TESTED_ELSEWHERE = {
    "Denoiser": "abstract",
    "Likelihood": "abstract",
    "LikelihoodFree": "abstract",
    "Dequantizer": "abstract",
    "UniformDequantizer": "tests/test_dequantized.py",
    "VariationalDequantizer": "tests/test_dequantized.py",
    "CircularNoise": "tests/test_noise.py",
    "MixtureNoise": "tests/test_noise.py",
    "StudentTNoise": "tests/test_noise.py",
    "UniformNoise": "tests/test_noise.py",
    "circular": "a constraint: tests/test_circular.py",
    "PyroLayer": "tests/test_foreign.py: layers of others, in their precision",
    "ZukoFlow": "tests/test_foreign.py",
    "import_zuko": "tests/test_foreign.py",
    "ExactDenoiser": "tests/test_samplers.py, by exact scores",
    "FrozenScore": "tests/test_samplers.py: it needs an Ornstein-Uhlenbeck path",
}


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*MODULES, *VALUES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_distribution(name, check, dtype):
    if name in VALUES:
        if dtype == torch.float64:
            pytest.skip("a value keeps the precision it was made with")
        check(VALUES[name]())
        return
    module, arguments = MODULES[name]()
    check(moved(module).to(dtype)(*(a.to(dtype) for a in arguments)))


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_module(name, check):
    module, arguments = MODULES[name]()
    check(moved(module), *arguments)


def test_no_distribution_is_left_out():
    entries = {*MODULES, *VALUES, *COVERED, *ABSTRACT_OR_TESTED_ELSEWHERE}
    assert set(pd.__all__) == entries


FAMILIES = {
    "Affine": pt.Affine(),
    "Bernstein": pt.Bernstein(),
    "HeavyTails": pt.HeavyTails(),
    "Integrated": pt.Integrated(4),
    "Inverted": pt.Inverted(pt.RationalQuadratic()),
    "LogisticMixture": pt.LogisticMixture(),
    "PerFeature": pt.PerFeature([pt.Affine(), pt.RationalQuadratic()]),
    "RationalQuadratic": pt.RationalQuadratic(),
    "Shift": pt.Shift(),
    "SinhArcsinh": pt.SinhArcsinh(),
    "Stacked": pt.Stacked(pt.Affine(), pt.RationalQuadratic()),
    "SumOfSquares": pt.SumOfSquares(),
}


def coupling(family):
    return lambda: (
        pt.Coupling(FEATURES, CONTEXT, elementwise=family, hidden=(8,)),
        context(),
    )


LAYERS = {name: coupling(family) for name, family in FAMILIES.items()} | {
    "ActNorm": lambda: (pt.ActNorm(FEATURES), None),
    "Autoregressive": lambda: (
        pt.Autoregressive(FEATURES, CONTEXT, elementwise=pt.RationalQuadratic(), hidden=(8,)),
        context(),
    ),
    "Coupling": lambda: (pt.Coupling(FEATURES, CONTEXT, hidden=(8,)), context()),
    "Continuous": lambda: (
        pt.Continuous(TimeMLP(FEATURES, CONTEXT, hidden=(8,)), FEATURES, CONTEXT),
        context(),
    ),
    "Householder": lambda: (pt.Householder(FEATURES), None),
    "Planar": lambda: (pt.Planar(FEATURES, CONTEXT, hidden=(8,)), context()),
    "Radial": lambda: (pt.Radial(FEATURES, CONTEXT, hidden=(8,)), context()),
    "Sylvester": lambda: (pt.Sylvester(FEATURES, CONTEXT, hidden=(8,)), context()),
    "Elementwise": lambda: (pt.Elementwise(FEATURES), None),
    "Inverse": lambda: (pt.Inverse(pt.Autoregressive(FEATURES, CONTEXT, hidden=(8,))), context()),
    "LULinear": lambda: (pt.LULinear(FEATURES), None),
    "Permutation": lambda: (pt.Permutation([2, 0, 1]), None),
}
NOT_LAYERS = {  # test_transforms.py, test_univariate.py, test_splines.py, test_diffusion.py
    *("Bijection", "BoundedSpline", "CircularSpline", "Composed", "ExactTrace", "Hutchinson"),
    *("Monotone", "Reflections", "ShiftScale", "Trace", "Univariate", "Wrapped"),
    *("Convolution1x1", "ImageCoupling", "MultiScale", "Squeeze"),  # test_image_flows.py
    *("Costs", "FlowMap"),  # test_continuous.py
    *("DormandPrince", "Euler", "Midpoint", "RungeKutta4", "Solver"),  # test_ode.py
}


@pytest.mark.parametrize("check", TRANSFORM_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_transform(name, check, dtype):
    layer, c = LAYERS[name]()
    layer = moved(layer).to(dtype).eval()
    check(layer, torch.randn(4, FEATURES, dtype=dtype), None if c is None else c.to(dtype))


def test_no_transform_is_left_out():
    assert set(pt.__all__) == set(LAYERS) | NOT_LAYERS


def adversarial(loss, **options):
    generator = pd.Generator(mlp(LATENTS, FEATURES), LATENTS, (FEATURES,))
    return loss(generator, mlp(FEATURES, 1), **options)


def elbo(estimator, **options):
    vae = pd.LatentVariable(mlp(LATENTS, FEATURES, (8,)), LATENTS, event_shape=(FEATURES,))
    return estimator(**options)(vae.model, Amortized(vae.model, mlp(FEATURES, 2 * LATENTS)))


class Even(nn.Module):
    """A prior of fair coins."""

    def __init__(self):
        super().__init__()
        self.register_buffer("zero", torch.zeros(LATENTS))

    def forward(self, context=None):
        return dist.Bernoulli(logits=self.zero).to_event(1)


class Coins(nn.Module):
    """A guide of Bernoullis."""

    def __init__(self):
        super().__init__()
        self.encoder = mlp(FEATURES, LATENTS)

    def forward(self, x):
        check_batch(x, (FEATURES,), owner="Coins", like=next(self.parameters()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def discrete(gradient):
    net = mlp(LATENTS, FEATURES, (8,))
    vae = pd.LatentVariable(net, LATENTS, event_shape=(FEATURES,), prior=Even())
    return po.ELBO(2, gradient=gradient)(vae.model, Coins())


def score(baseline):
    return elbo(po.ELBO, gradient=po.ScoreFunction(baseline), num_particles=2)


OBJECTIVES = {
    "Annealing": lambda: elbo(po.Tempered, beta=po.Annealing(1, start=0.5, stop=0.5)),
    "ChiSquared": lambda: elbo(po.ChiSquared, num_particles=2),
    "CriticLoss": lambda: adversarial(po.CriticLoss),
    "FlowMatching": lambda: po.FlowMatching(moved(pd.cnf(FEATURES, hidden=(8,)))),
    "RegularizedLikelihood": lambda: po.RegularizedLikelihood(pd.cnf(FEATURES, hidden=(8,))),
    "DenoisingScore": lambda: po.DenoisingScore(moved(diffusion())),
    "DoublyReparameterized": lambda: elbo(po.ELBO, gradient=po.DoublyReparameterized()),
    "ELBO": lambda: elbo(po.ELBO),
    "FDivergence": lambda: elbo(po.FDivergence, f=kl, num_particles=2),
    "GeneratorLoss": lambda: adversarial(po.GeneratorLoss),
    "ImportanceWeighted": lambda: elbo(po.ImportanceWeighted, num_particles=2),
    "Learned": lambda: score(po.Learned(mlp(FEATURES, 1))),
    "LeaveOneOut": lambda: score(po.LeaveOneOut()),
    "MaximumLikelihood": lambda: po.MaximumLikelihood(pd.nsf(FEATURES, hidden=(8,))),
    "MovingAverage": lambda: score(po.MovingAverage()),
    "NoBaseline": lambda: score(po.NoBaseline()),
    "NonSaturating": lambda: adversarial(po.CriticLoss, game=po.NonSaturating()),
    "Rebar": lambda: discrete(po.Rebar()),
    "Relativistic": lambda: adversarial(po.GeneratorLoss, game=po.Relativistic()),
    "Renyi": lambda: elbo(po.Renyi, alpha=0.5),
    "Reparameterized": lambda: elbo(po.ELBO, gradient=po.Reparameterized()),
    "ReweightedWakeSleep": lambda: elbo(po.ReweightedWakeSleep),
    "ScoreFunction": lambda: elbo(po.ELBO, gradient=po.ScoreFunction(), num_particles=2),
    "StraightThrough": lambda: discrete(po.StraightThrough()),
    "TailAdaptive": lambda: elbo(po.TailAdaptive, num_particles=4),
    "Tempered": lambda: elbo(po.Tempered, beta=0.5, free_nats=0.1),
    "Thermodynamic": lambda: elbo(po.Thermodynamic),
    "Trace_ELBO of Pyro": lambda: elbo(Trace_ELBO),
    "ZeroCentred": lambda: adversarial(po.CriticLoss, penalty=po.ZeroCentred(1.0)),
}
NOT_OBJECTIVES = {  # parts, tested with what they are part of
    *("AnnealedBootstrap", "Replay"),  # takes no data: tests/test_annealed.py
    "Dequantization",  # takes whole numbers: tests/test_dequantized.py
    *("Bridge", "IndependentCoupling", "Interpolant", "OptimalTransport", "MinibatchCoupling"),
    *("SchroedingerBridge", "Stochastic", "Straight", "Trigonometric"),
    *("Baseline", "Bound", "Game", "Gradient", "MultiSample", "UniformTime", "edm_weight"),
}


@pytest.mark.parametrize("check", OBJECTIVE_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_objective(name, check, dtype):
    objective = OBJECTIVES[name]()
    assert isinstance(objective, nn.Module)
    check(objective.to(dtype), torch.randn(6, FEATURES, dtype=dtype))


def test_no_objective_is_left_out():
    assert set(po.__all__) == set(OBJECTIVES) - {"Trace_ELBO of Pyro"} | NOT_OBJECTIVES


@pytest.mark.parametrize("part", [pd, pt, po], ids=lambda m: m.__name__)
def test_every_public_name_says_what_it_is(part):
    for name in part.__all__:
        assert inspect.getdoc(getattr(part, name)), f"{part.__name__}.{name} has no docstring"
