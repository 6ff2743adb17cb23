# %% [markdown]
# # A flow is a distribution
#
# You learn the law of a real table by a normalizing flow: every row has an exact density. Then the
# same object stands in a Pyro program four ways: as a law of its own, as a conditional law, as a
# prior, and as a guide. Each answer is checked against the table itself. At last you see a flow
# fail, and what shows it.
#
# **You need** `pyro.sample`, and an idea of what NUTS and SVI do.
# **It takes** three minutes on one core of a laptop.
#
# The table is a photograph: 273,280 pixels, each a row of red, green and blue. Its law has ridges
# and islands that no formula has.

# %%
import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_sample_image
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyrogen.distributions import nsf
from pyrogen.evaluation import bits_per_dim
from pyrogen.guides import AutoFlow
from pyrogen.inference import fidelity, importance
from pyrogen.objectives import (
    ELBO,
    AnnealedBootstrap,
    DoublyReparameterized,
    MaximumLikelihood,
    Replay,
)
from pyrogen.training import Batches, Trainer

smoke = "PYROGEN_SMOKE" in os.environ  # the tests run every cell, briefly
pyro.set_rng_seed(0)
photo = torch.tensor(load_sample_image("flower.jpg")).float()
height, width, _ = photo.shape
colours = ((photo + torch.rand_like(photo)) / 256).reshape(-1, 3).clamp(1e-6, 1 - 1e-6)
shuffled = torch.randperm(len(colours))
train, test = shuffled[20_000:], shuffled[:20_000]


def learn(flow, *data, steps=600, lr=5e-3):
    """Maximise the likelihood of a table."""
    steps = 2 if smoke else steps
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = CosineAnnealingLR(optimizer, steps)
    trainer = Trainer(MaximumLikelihood(flow), optimizer, schedule=schedule, clip=5.0)
    trainer.fit(Batches(*data, batch_size=512), steps=steps, progress=False)
    return flow.eval()


def bits(log_prob):
    """Mean cost of one of the three channels of a pixel."""
    return bits_per_dim(log_prob, 3, cell=1 / 256).mean().item()


# %% [markdown]
# ## 1. The law of a table
#
# Say where rows lie, and the flow lies there too: channels are numbers between 0 and 1. The recipe
# is a function, the flow a module, and calling the flow gives a Pyro distribution.

# %%
flow = nsf(3, support=constraints.unit_interval, hidden=(32, 32))
learn(flow.standardize(colours[train]), colours[train])
gauss = dist.MultivariateNormal(colours[train].mean(0), torch.cov(colours[train].T))
with torch.no_grad():
    print(f"flow:   {bits(flow().log_prob(colours[test])):.2f} bits per channel")
    print(f"normal: {bits(gauss.log_prob(colours[test])):.2f}")
    x, log_prob = flow().rsample_and_log_prob((20_000,))  # draw and score in one pass
    print(f"drawn:  {bits(log_prob):.2f}")

# %% [markdown]
# **Check.** The flow spends a bit and a half less on each channel of an unseen pixel than a normal
# law does. Its own draws cost about what real pixels cost, as the entropy of a law that fits must.
# No law on these levels can cost less than the table's own entropy, so a flow that seems to is
# broken.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True)
for axis, rows, title in zip(axes, (colours[test], x), ("pixels", "draws"), strict=True):
    axis.scatter(*rows[:5000, :2].T, c=rows[:5000].clamp(0, 1).numpy(), s=3)
    axis.set(title=title, xlabel="red", ylabel="green")

# %% [markdown]
# ## 2. A conditional law
#
# With a context the flow is a law for every context. Here the context is where a pixel stands, as
# a few waves across the picture, and the flow becomes a picture that is uncertain.

# %%
row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
place = torch.stack([row / height, column / height], dim=-1).reshape(-1, 2)
waves = place @ (6 * torch.randn(2, 24)) + 2 * math.pi * torch.rand(24)
context = waves.sin()
conditional = nsf(3, 24, support=constraints.unit_interval, hidden=(64, 64))
learn(conditional.standardize(colours[train]), colours[train], context[train])
with torch.no_grad():
    score = conditional(context[test]).log_prob(colours[test])
    print(f"given the place: {bits(score):.2f} bits per channel")
    painted = conditional(context).sample().reshape(height, width, 3)

# %% [markdown]
# **Check.** Knowing the place saves more than a bit. One call drew 273,280 pixels, one from each
# of as many laws: the batch shape of the distribution is that of the context.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, picture in zip(axes, (photo / 255, painted), strict=True):
    axis.imshow(picture.numpy())
    axis.axis("off")

# %% [markdown]
# ## 3. A prior
#
# A black-and-white camera reports how bright a pixel is, with some noise. What colour was it? The
# flow is the prior; what happened is the likelihood.

# %%
law = flow()
sensitivity = torch.tensor([0.3, 0.6, 0.1])


def camera(y):
    colour = pyro.sample("colour", law)
    pyro.sample("y", dist.Normal(colour @ sensitivity, 0.01), obs=y)


y = torch.tensor(0.5)
sampler = MCMC(NUTS(camera), num_samples=4 if smoke else 300, disable_progbar=True)
sampler.run(y)

# %% [markdown]
# **Check.** The table is a sample of the prior, so weighing its rows by the likelihood gives the
# posterior without any flow.


# %%
def weigh(y):
    """Posterior by brute force: rows of the table, drawn as likely as they make the reading."""
    weight = dist.Normal(colours @ sensitivity, 0.01).log_prob(y)
    return colours[torch.multinomial(weight.softmax(0), 4000, replacement=True)]


def describe(name, rows):
    mean, std = rows.mean(0), rows.std(0)
    print(f"{name:7s}", "  ".join(f"{m:.2f} ± {s:.2f}" for m, s in zip(mean, std, strict=True)))


print("        red          green        blue")
describe("table", weigh(y))
describe("NUTS", sampler.get_samples()["colour"])

# %% [markdown]
# ## 4. A guide
#
# The same recipe makes a guide: `AutoFlow` finds the latents, maps them to the reals and fits a
# flow over all of them by the evidence lower bound. Importance weights then say whether it has
# arrived, and mend what is left.


# %%
def infer(y, steps=600):
    pyro.set_rng_seed(1)
    guide = AutoFlow(camera, nsf).setup(y)
    optimizer = torch.optim.Adam(guide.parameters(), lr=5e-3)
    elbo = ELBO(64, vectorize_particles=True, gradient=DoublyReparameterized())
    steps = 2 if smoke else steps
    schedule = CosineAnnealingLR(optimizer, steps)
    trainer = Trainer(elbo(camera, guide), optimizer, schedule=schedule, clip=5.0)
    trainer.fit([(y,)], steps=steps, progress=False)
    return guide, importance(camera, guide, y, draws=4000)


guide, posterior = infer(y)
print(posterior)

# %% [markdown]
# ## 5. When a flow fails
#
# A darker pixel may be a red petal or a green leaf: the posterior has islands. The evidence lower
# bound does not mind a guide that misses one, and weights of its draws cannot tell either, for
# they never go there. Here the prior is a law that can be drawn from, so the truth is cheap:

# %%
y = torch.tensor(0.3)
guide, posterior = infer(y)
with torch.no_grad():
    candidates = law.sample((2000 if smoke else 200_000,))
weight = dist.Normal(candidates @ sensitivity, 0.01).log_prob(y)
truth = weight.logsumexp(0).item() - math.log(len(weight))
print(f"log evidence: {truth:.2f} in truth, {posterior.log_evidence:.2f} by the guide")
print(f"k̂ of the guide: {posterior.khat:.2f}")

# %% [markdown]
# **Check.** The evidence is short of the truth although the weights look well. What shows it
# without the truth is `fidelity`: it starts short chains in the noise of the map, and those that
# cannot leave where they start tell that the map hides something. `NeuTra(camera, guide, y)`,
# NUTS in that noise, asks it first and refuses.

# %%
print(fidelity(camera, guide, y))

# %% [markdown]
# The cure is a loss that minds. `AnnealedBootstrap` moves draws of the guide toward where it is
# too thin, by Hamiltonian steps, and learns from where they end.

# %%
steps = 2 if smoke else 200
guide = AutoFlow(camera, nsf).setup(y)
bootstrap = AnnealedBootstrap(
    guide.flow, guide.log_density(y), draws=128, intermediate=4, leapfrog=3, replay=Replay()
)
optimizer = torch.optim.Adam(guide.parameters(), lr=5e-3)
schedule = CosineAnnealingLR(optimizer, steps)
Trainer(bootstrap, optimizer, schedule=schedule, clip=5.0).fit([()], steps=steps, progress=False)
cured = importance(camera, guide, y, draws=4000)
print(f"log evidence: {truth:.2f} in truth, {cured.log_evidence:.2f} by the guide")
print(f"k̂ of the guide: {cured.khat:.2f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), sharex=True, sharey=True)
shown = {
    "truth": candidates[torch.multinomial(weight.softmax(0), 2000, replacement=True)],
    "by the lower bound": posterior.resample(2000)["colour"],
    "by the bootstrap": cured.resample(2000)["colour"],
}
for axis, (title, rows) in zip(axes, shown.items(), strict=True):
    axis.scatter(rows[:, 0], rows[:, 2], c=rows.clamp(0, 1).numpy(), s=3)
    axis.set(title=title, xlabel="red", ylabel="blue")

# %% [markdown]
# ## What can go wrong
#
# * The prior itself may be wrong: between islands of data a flow leaves bridges. Compare
#   `weigh(y)` with `shown["truth"]`: the table has more red in it than the flow. No inference
#   mends a prior; more layers, or a `FlowMixture`, do.
# * A support that is too wide. Give `support=` what you know: no draw is ever outside.
# * Heavy tails. A flow of splines is its noise beyond their bound: pass
#   `noise=StudentTNoise(...)`.
