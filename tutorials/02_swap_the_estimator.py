# %% [markdown]
# # Swap the estimator
#
# A variational loss is two choices: the **bound**, which says what is minimised, and its
# **gradient**, which says how that is estimated. You keep one model and one guide, swap both, one
# word at a time, and look at the price: variance, bias and milliseconds.
#
# **You need** `pyro.sample`, guides, and `SVI`.
# **It takes** about a minute on a laptop CPU.
#
# The model is small enough to know its truth: six causes are each on or off, those that are on
# have a size, and twelve sensors see their sum.

# %%
import itertools
import math
import os
import time
from statistics import median

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import nn

from pyrogen.divergences import squared_hellinger
from pyrogen.objectives import (
    ELBO,
    DoublyReparameterized,
    FDivergence,
    ImportanceWeighted,
    Learned,
    LeaveOneOut,
    MovingAverage,
    NoBaseline,
    Rebar,
    Renyi,
    Reparameterized,
    ReweightedWakeSleep,
    ScoreFunction,
    StraightThrough,
    Thermodynamic,
)

smoke = "PYROGEN_SMOKE" in os.environ  # the tests run every cell, briefly
mpl.use("Agg")
torch.set_num_threads(1)  # the tensors are too small to share
pyro.set_rng_seed(0)
LATENTS, SENSORS, NOISE = 6, 12, 1.0
weight = torch.randn(LATENTS, SENSORS)
sizes = torch.tensor([1.0, 0.0, -1.5, 0.0, 0.0, 0.3])  # half are on, one of them barely
x = sizes @ weight + NOISE * torch.randn(SENSORS)


def model(x):
    with pyro.plate("causes", LATENTS):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(LATENTS)))
    mean = (b * z).unsqueeze(-2) @ weight  # (*particles, 1, sensors)
    pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)


class Guide(nn.Module):
    """Each cause on or off by itself, and its size normal: as mean-field as can be."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(LATENTS))
        self.loc = nn.Parameter(torch.zeros(LATENTS))
        self.log_scale = nn.Parameter(torch.zeros(LATENTS))

    def forward(self, x):
        with pyro.plate("causes", LATENTS):
            pyro.sample("b", dist.Bernoulli(logits=self.logits))
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


# %% [markdown]
# Given who is on, the sizes are Gaussian: the evidence is a sum of 64 of them.

# %%
states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=LATENTS)))
used = states[:, :, None] * weight
covariance = used.mT @ used + NOISE**2 * torch.eye(SENSORS)
log_joint = dist.Bernoulli(0.3).log_prob(states).sum(-1) + dist.MultivariateNormal(
    torch.zeros(SENSORS), covariance
).log_prob(x)
evidence = log_joint.logsumexp(0).item()
posterior_on = log_joint.softmax(0) @ states
print(f"log evidence {evidence:.3f} nats; who is on: {posterior_on.numpy().round(2)}")

# %% [markdown]
# ## 1. Why not plain Monte Carlo
#
# Averaging the likelihood over draws of the prior is unbiased for the evidence. Its logarithm says
# how well: even with a thousand draws for six causes the answer is up to a nat off, and differs
# from run to run.

# %%
with torch.no_grad(), pyro.plate("draws", 1000, dim=-2):
    for _ in range(3):
        with pyro.poutine.trace() as run:
            model(x)
        run.trace.compute_log_prob()
        log_likelihood = run.trace.nodes["x"]["log_prob"].flatten()
        naive = log_likelihood.logsumexp(0) - math.log(len(log_likelihood))
        print(f"plain Monte Carlo {naive:8.3f}   truth {evidence:.3f}")

# %% [markdown]
# ## 2. One bound, many gradients
#
# The ELBO, with four particles each. `b` has no path, `z` has one. Same model, same guide, and the
# same mean but for straight-through, which is biased; only the word after `gradient=` changes.

# %%
K = 4
gradients = {
    "score, no baseline": lambda: ScoreFunction(NoBaseline()),
    "score, moving average": lambda: ScoreFunction(MovingAverage()),
    "score, learned": lambda: ScoreFunction(Learned(nn.Linear(SENSORS, LATENTS))),
    "score, leave-one-out": lambda: ScoreFunction(LeaveOneOut()),
    "path and score": Reparameterized,  # the default
    "path and moving average": lambda: Reparameterized(LeaveOneOut(MovingAverage())),
    "straight-through": StraightThrough,
    "REBAR": Rebar,
}


class Study:
    """The gradients of one loss, as they come, and what they cost."""

    def __init__(self, loss, guide):
        self.module, self.parameters = loss(model, guide), list(guide.parameters())
        self.learned = list(loss.gradient.parameters())  # of a baseline
        self.optimizer = torch.optim.Adam(self.learned, lr=1.0) if self.learned else None
        self.draws, self.seconds = [], []

    def take(self):
        start = time.perf_counter()
        gradients = torch.autograd.grad(self.module(x), self.parameters + self.learned)
        self.seconds.append(time.perf_counter() - start)
        self.draws.append(torch.cat(gradients[: len(self.parameters)]))
        if self.learned:
            for p, g in zip(self.learned, gradients[len(self.parameters) :], strict=True):
                p.grad = g
            self.optimizer.step()

    def result(self, warm_up):
        variance = torch.stack(self.draws[warm_up:]).var(0).sum().item()
        return variance, 1e3 * median(self.seconds[warm_up:])


guide = Guide()
options = {"vectorize_particles": True, "max_plate_nesting": 1}
studies = {
    name: Study(ELBO(K, gradient=make(), **options), guide) for name, make in gradients.items()
}
warm_up, repeats = (3, 5) if smoke else (200, 300)
with pyro.validation_enabled(False):  # noqa: FBT003  # as in a long run
    for _ in range(warm_up + repeats):
        for one in studies.values():  # in turns, so that other work on the machine hits all alike
            one.take()
results = {name: one.result(warm_up) for name, one in studies.items()}
print(f"{'gradient':26}{'variance':>12}{'ms':>8}")
for name, (variance, cost) in results.items():
    print(f"{name:26}{variance:12.1f}{cost:8.2f}")

# %%
figure, ax = plt.subplots(figsize=(7.5, 4))
for name, (variance, cost) in sorted(results.items(), key=lambda pair: -pair[1][0]):
    ax.scatter(cost, variance, s=60, label=name)
ax.set(yscale="log", xlabel="ms a gradient", ylabel="total variance of the gradient")
ax.set_xlim(left=0)
ax.set_title("Lower and further left is better")
ax.legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False)
figure.tight_layout()
if not smoke:
    os.makedirs("out", exist_ok=True)
    figure.savefig("out/estimators.png", dpi=130)

# %% [markdown]
# An estimator that does not exist here is refused, with the reason and what to do instead.

# %%
try:
    ELBO(K, gradient=DoublyReparameterized()).differentiable_loss(model, guide, x)
except ValueError as refusal:
    print(refusal)

# %% [markdown]
# ## 3. Near the posterior
#
# With the switches known, the posterior is Gaussian and a guide can reach it. There the plain
# path gradient still has variance, and without the guide's score, sticking the landing, none.

# %%
chosen = weight[sizes != 0]
precision = torch.eye(len(chosen)) + chosen @ chosen.T / NOISE**2
truth = dist.MultivariateNormal(
    torch.linalg.solve(precision, chosen @ x / NOISE**2), precision_matrix=precision
)
loc = truth.mean.clone().requires_grad_()


def switched(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(len(chosen)), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z @ chosen, NOISE).to_event(1), obs=x)


def at_the_posterior(x):
    pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=truth.scale_tril))


for name, gradient in (("path", Reparameterized()), ("path alone", DoublyReparameterized())):
    loss = ELBO(gradient=gradient)
    draws = [
        torch.autograd.grad(loss.differentiable_loss(switched, at_the_posterior, x), loc)[0]
        for _ in range(5 if smoke else 200)
    ]
    print(f"{name:12} standard deviation {torch.stack(draws).std(0).max():.1e}")

# %% [markdown]
# ## 4. One gradient, many bounds
#
# Every bound trains the same guide. All are then judged by one number, the gap of the ELBO and of
# the importance-weighted bound to the exact evidence: a bound trains for its own divergence, so
# each has its own favourite.

# %%
K = 16
bounds = {
    "ELBO": ELBO(K, **options),
    "importance-weighted (VIMCO)": ImportanceWeighted(K, **options),
    "Rényi, alpha = 1/2": Renyi(K, alpha=0.5, **options),
    "thermodynamic": Thermodynamic(K, **options),
    "squared Hellinger": FDivergence(K, f=squared_hellinger, **options),
    "reweighted wake-sleep": ReweightedWakeSleep(K, **options),
}
judges = [ELBO(5000, **options), ImportanceWeighted(5000, **options)]
steps = 3 if smoke else 500
print(f"{'trained by':30}{'ELBO':>10}{'IW, 5000':>10}   gap to {evidence:.3f} nats")
for name, bound in bounds.items():
    pyro.set_rng_seed(1)
    guide = Guide()
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.03)
    loss = bound(model, guide)
    with pyro.validation_enabled(False):  # noqa: FBT003
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        gaps = [evidence + judge.loss(model, guide, x) for judge in judges]
    print(f"{name:30}{gaps[0]:10.3f}{gaps[1]:10.3f}")

# %% [markdown]
# Every loss is a Pyro `ELBO`, so it also goes where Pyro's do.

# %%
svi = SVI(model, Guide(), pyro.optim.Adam({"lr": 0.03}), loss=Renyi(K, alpha=0.5, **options))
for _ in range(steps // 10 + 1):
    svi.step(x)

# %% [markdown]
# ## How to choose
#
# | your guide | start with |
# |---|---|
# | `rsample` everywhere | `ELBO(K, gradient=DoublyReparameterized())`, more K if it is poor |
# | discrete sites | `ELBO(K)` with K of 4 or more, or `ELBO(K, gradient=Rebar())` |
# | discrete sites, one particle | a `MovingAverage` or `Learned` baseline, or `Rebar()` |
# | discrete sites, speed before truth | `StraightThrough()` |
# | narrower than its posterior | `ImportanceWeighted(K, gradient=DoublyReparameterized())` |
# | a proposal for importance sampling | `Renyi(K, alpha=0.5)`, `ReweightedWakeSleep(K)` |
# | the model is a simulator with jumps | `ELBO(K, gradient=ScoreFunction())`, few latents |
#
# More particles quiet every gradient; only the multi-sample bounds also change what is learned.
