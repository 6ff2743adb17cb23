"""Gradient estimators side by side: variance, bias and cost of one gradient, and a Pareto plot.

Two problems whose gradient is known exactly:

    discrete     six Bernoulli latents in a plate, one Gaussian likelihood (64 states to enumerate)
    continuous   twenty Gaussian latents, linear-Gaussian model, mean-field guide (closed form)

    python -m benchmarks.estimators --plot out/estimators.png
    python -m benchmarks.estimators --peer numpyro     # in an environment with numpyro

Variance is the total over the guide's parameters; bias the distance of the mean from the exact
gradient in standard errors; ms the median CPU time of one value and gradient, in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import numpy as np

PARTICLES = 4
LOGIT = 1e-4  # not zero, where NumPyro's Bernoulli has another slope on either side


def six_bernoullis() -> tuple[np.ndarray, np.ndarray]:
    weight = [  # torch.manual_seed(0); torch.randn(6, 4); 2 * torch.randn(4)
        [-1.1258, -1.1524, -0.2506, -0.4339],
        [0.8487, 0.692, -0.316, -2.1152],
        [0.4681, -0.1577, 1.4437, 0.266],
        [0.1665, 0.8744, -0.1435, -0.1116],
        [0.9318, 1.259, 2.005, 0.0537],
        [0.6181, -0.4128, -0.8411, -2.316],
    ]
    x = [0.7408, 2.913, 1.8796, 1.5497]
    return np.array(weight, np.float32), np.array(x, np.float32)


def linear_gaussian() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 30)).astype(np.float32) / 3, rng.normal(size=30).astype(np.float32)


def exact_discrete() -> np.ndarray:
    """Gradient of the negative ELBO in the six logits, near zero, by enumeration."""
    w, x = six_bernoullis()
    states = np.array(list(product([0.0, 1.0], repeat=6)))
    log_p = (states * np.log(0.3) + (1 - states) * np.log(0.7)).sum(1)
    log_p = log_p - 0.5 * ((x - states @ w) ** 2).sum(1) - 2 * np.log(2 * np.pi)
    f = log_p - 6 * np.log(0.5)
    return -(f[:, None] * (states - 0.5)).mean(0)


def exact_continuous() -> np.ndarray:
    """Gradient of the negative ELBO in means and log-scales, at zero."""
    w, x = linear_gaussian()
    precision = np.eye(len(w)) + w @ w.T
    return np.concatenate([-(w @ x), np.diag(precision) - 1.0])


@dataclass
class Estimator:
    name: str
    package: str
    gradient: Callable[[], np.ndarray]
    warm_up: int = 5  # gradients before the first that counts: compilation, moving averages
    draws: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def take(self, keep: bool = True) -> None:  # noqa: FBT001, FBT002
        start = time.process_time()
        gradient = self.gradient()
        if keep:
            self.seconds.append(time.process_time() - start)
            self.draws.append(gradient)


@dataclass
class Row:
    problem: str
    name: str
    package: str
    variance: float
    bias: float  # of the mean, in standard errors, the largest coordinate
    milliseconds: float


def measure(problem: str, estimators: list[Estimator], exact: np.ndarray, n: int) -> list[Row]:
    for estimator in estimators:
        for _ in range(estimator.warm_up):
            estimator.take(keep=False)
    for _ in range(n):
        for estimator in estimators:
            estimator.take()
    rows = []
    for e in estimators:
        draws = np.stack(e.draws).astype(np.float64)
        spread = draws.std(0, ddof=1) / n**0.5 + 1e-7
        bias = np.abs((draws.mean(0) - exact) / spread).max()
        variance = draws.var(0, ddof=1).sum()
        rows.append(
            Row(problem, e.name, e.package, variance, bias, 1e3 * statistics.median(e.seconds))
        )
    return rows


def in_torch() -> dict[str, tuple[list[Estimator], np.ndarray]]:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

    import pyrogen.objectives as po

    torch.set_num_threads(1)
    w6, x6 = (torch.as_tensor(a) for a in six_bernoullis())
    w20, x20 = (torch.as_tensor(a) for a in linear_gaussian())

    def spikes() -> None:
        with pyro.plate("sites", 6):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z.unsqueeze(-2) @ w6, 1.0).to_event(1), obs=x6)

    def spikes_guide(**infer: object) -> None:
        # Pyro's losses look for params
        logits = pyro.param("logits", lambda: torch.full((6,), LOGIT))
        with pyro.plate("sites", 6):
            pyro.sample("z", dist.Bernoulli(logits=logits), infer=infer)

    def decaying() -> None:
        spikes_guide(baseline={"use_decaying_avg_baseline": True, "baseline_beta": 0.9})

    def slabs() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ w20, 1.0).to_event(1), obs=x20)

    def slabs_guide() -> None:
        loc, log_scale = (pyro.param(n, lambda: torch.zeros(20)) for n in ("loc", "log_scale"))
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def one(name, elbo, model, guide, names, package="pyrogen", warm_up=5):  # noqa: ANN001, ANN202
        def gradient() -> np.ndarray:
            store = dict(pyro.get_param_store().named_parameters())
            for p in store.values():
                p.grad = None
            with pyro.validation_enabled(False):  # noqa: FBT003
                elbo.loss_and_grads(model, guide)
            store = dict(pyro.get_param_store().named_parameters())
            return torch.cat([store[n].grad.flatten() for n in names]).numpy().copy()

        return Estimator(name, package, gradient, warm_up)

    def options(nesting: int, k: int = PARTICLES) -> dict:
        return {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": nesting}

    def discrete(name, elbo, **kwargs):  # noqa: ANN001, ANN003, ANN202
        return one(name, elbo, spikes, kwargs.pop("guide", spikes_guide), ["logits"], **kwargs)

    def continuous(name, elbo, **kwargs):  # noqa: ANN001, ANN003, ANN202
        return one(name, elbo, slabs, slabs_guide, ["loc", "log_scale"], **kwargs)

    score, average = po.ScoreFunction, po.MovingAverage
    a, b = options(1), options(0)
    return {
        "discrete": (
            [
                discrete("Trace_ELBO", Trace_ELBO(**a), package="Pyro"),
                discrete("TraceGraph_ELBO", TraceGraph_ELBO(**a), package="Pyro"),
                discrete(
                    "TraceGraph_ELBO, decaying average",
                    TraceGraph_ELBO(**a),
                    package="Pyro",
                    guide=decaying,
                    warm_up=100,
                ),
                discrete("no baseline", po.ELBO(gradient=score(po.NoBaseline()), **a)),
                discrete("moving average", po.ELBO(gradient=score(average()), **a), warm_up=100),
                discrete("leave-one-out", po.ELBO(**a)),
                discrete(
                    "leave-one-out toward moving average",
                    po.ELBO(gradient=score(po.LeaveOneOut(average())), **a),
                    warm_up=100,
                ),
                discrete("straight-through (biased)", po.ELBO(gradient=po.StraightThrough(), **a)),
                discrete("REBAR", po.ELBO(gradient=po.Rebar(), **a)),
            ],
            exact_discrete(),
        ),
        "continuous": (
            [
                continuous("Trace_ELBO", Trace_ELBO(**b), package="Pyro"),
                continuous("TraceMeanField_ELBO", TraceMeanField_ELBO(**b), package="Pyro"),
                continuous("no baseline", po.ELBO(gradient=score(po.NoBaseline()), **b)),
                continuous("leave-one-out score", po.ELBO(gradient=score(), **b)),
                continuous("path", po.ELBO(**b)),
                continuous(
                    "sticking the landing", po.ELBO(gradient=po.DoublyReparameterized(), **b)
                ),
            ],
            exact_continuous(),
        ),
    }


def in_numpyro() -> dict[str, tuple[list[Estimator], np.ndarray]]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

    w6, x6 = six_bernoullis()
    w20, x20 = linear_gaussian()

    def spikes() -> None:
        with numpyro.plate("sites", 6):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z @ w6, 1.0).to_event(1), obs=x6)

    def spikes_guide() -> None:
        logits = numpyro.param("logits", jnp.full(6, LOGIT))
        with numpyro.plate("sites", 6):
            numpyro.sample("z", dist.Bernoulli(logits=logits))

    def slabs() -> None:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z @ w20, 1.0).to_event(1), obs=x20)

    def slabs_guide() -> None:
        loc = numpyro.param("loc", jnp.zeros(20))
        scale = jnp.exp(numpyro.param("log_scale", jnp.zeros(20)))
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def one(elbo, model, guide, start: dict) -> Estimator:  # noqa: ANN001
        step = jax.jit(jax.grad(lambda p, key: elbo.loss(key, p, model, guide)))
        keys = iter(jax.random.split(jax.random.PRNGKey(0), 100_000))

        def gradient() -> np.ndarray:
            grads = step(start, next(keys))
            return np.concatenate([np.asarray(grads[name]) for name in start])

        return Estimator(type(elbo).__name__, "NumPyro, compiled", gradient)

    six = {"logits": jnp.full(6, LOGIT)}
    twenty = {"loc": jnp.zeros(20), "log_scale": jnp.zeros(20)}
    return {
        "discrete": (
            [one(TraceGraph_ELBO(num_particles=PARTICLES), spikes, spikes_guide, six)],
            exact_discrete(),
        ),
        "continuous": (
            [
                one(Trace_ELBO(num_particles=PARTICLES), slabs, slabs_guide, twenty),
                one(TraceMeanField_ELBO(num_particles=PARTICLES), slabs, slabs_guide, twenty),
            ],
            exact_continuous(),
        ),
    }


def plot(rows: list[Row], path: str) -> None:
    """Draw variance against cost; what lies below and to the left of all others is the best."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys(row.problem for row in rows))
    figure, axes = plt.subplots(1, len(problems), figsize=(6 * len(problems), 5))
    for ax, problem in zip(axes, problems, strict=True):
        mine = [row for row in rows if row.problem == problem]
        for package in dict.fromkeys(row.package for row in mine):
            part = [row for row in mine if row.package == package]
            ax.scatter([r.milliseconds for r in part], [r.variance for r in part], label=package)
        for i, row in enumerate(sorted(mine, key=lambda row: row.variance)):
            ax.annotate(
                row.name,
                (row.milliseconds, row.variance),
                textcoords="offset points",
                xytext=(6, 4 if i % 2 else -9),
                fontsize=7,
            )
        ax.set(yscale="log", xlabel="ms of CPU a gradient", title=f"{problem} latents")
        ax.margins(x=0.5)
    axes[0].set_ylabel("total variance of the gradient")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["numpyro"])
    parser.add_argument("--gradients", type=int, default=2000)
    parser.add_argument("--plot", default="")
    c = parser.parse_args()
    problems = in_numpyro() if c.peer == "numpyro" else in_torch()
    rows = []
    print("| latents | estimator | package | variance | bias, standard errors | ms |")
    print("|---|---|---|---|---|---|")
    for problem, (estimators, exact) in problems.items():
        for row in measure(problem, estimators, exact, c.gradients):
            rows.append(row)
            print(
                f"| {row.problem} | {row.name} | {row.package} | {row.variance:.3g} | "
                f"{row.bias:.1f} | {row.milliseconds:.2f} |",
                flush=True,
            )
    if c.plot:
        plot(rows, c.plot)


if __name__ == "__main__":
    main()
