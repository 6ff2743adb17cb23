# %% [markdown]
# # A learned law is a Pyro distribution
#
# You learn the law of a data set twice, by a flow that has a density and by a generator that has
# none. Then you put both into one Pyro program, condition it on a measurement, and check the two
# answers against each other and against a brute-force truth.
#
# **You need** `pyro.sample`, `pyro.plate` and an idea of what NUTS does.
# **It takes** about a minute on a laptop CPU.
#
# The data are points on two half moons. Their law has no simple formula, which is what a
# generative model is for.

# %%
import os
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyrogen.distributions import Generator, nsf
from pyrogen.evaluation import mmd_test
from pyrogen.inference import NoiseReparam
from pyrogen.nets import mlp
from pyrogen.objectives import CriticLoss, GeneratorLoss, MaximumLikelihood, ZeroCentred
from pyrogen.targets import two_moons
from pyrogen.training import AdversarialTrainer, Batches, Trainer

smoke = "PYROGEN_SMOKE" in os.environ  # the tests run every cell, briefly
pyro.set_rng_seed(0)
x = two_moons(5000)
batches = Batches(x, batch_size=256)

# %% [markdown]
# ## 1. Learn
#
# Parameters live in modules. An objective is a module that turns a batch into a loss. A trainer
# takes steps. That is all there is to learn, and it is the same for every family: the flow
# maximises its likelihood,

# %%
flow = nsf(2).standardize(x)
optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
steps = 2 if smoke else 1000
trainer = Trainer(
    MaximumLikelihood(flow), optimizer, schedule=CosineAnnealingLR(optimizer, steps), clip=5.0
)
history = trainer.fit(batches, steps=steps, progress=False)

# %% [markdown]
# and the generator, which cannot be scored, plays against a critic: two trainers that alternate.

# %%
leaky = partial(mlp, hidden=(128, 128), activation=partial(nn.LeakyReLU, 0.2))
generator = Generator(leaky(4, 2), latents=4, event_shape=(2,)).standardize(x)
critic = leaky(2, 1)
steps = 2 if smoke else 3000


def player(objective, module):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.0, 0.99))
    schedule = CosineAnnealingLR(optimizer, steps, eta_min=2e-5)
    return Trainer(objective, optimizer, schedule=schedule, average=0.999)


game = AdversarialTrainer(
    player(GeneratorLoss(generator, critic), generator),
    player(CriticLoss(generator, critic, penalty=ZeroCentred(0.1)), critic),
)
game.fit(batches, steps=steps, progress=False)

# %% [markdown]
# **Check.** Calling a module gives a distribution, and both have draws of the shape of a datum.
# Are they draws of the right law? A two-sample test compares them with fresh data; a small p says
# that they differ.

# %%
fresh = two_moons(500)
for name, law in {"flow": flow(), "generator": generator()}.items():
    draws = law.sample((500,))
    assert draws.shape == fresh.shape
    print(f"{name:9s} {mmd_test(fresh, draws)}")

# %% [markdown]
# ## 2. Condition
#
# Somebody measures the first coordinate of a new point, with noise, and gets 0.9. Where is the
# point? Write down what happened; the law is the prior, wherever it came from.


# %%
def measurement(law, y):
    point = pyro.sample("point", law)
    pyro.sample("y", dist.Normal(point[0], 0.1), obs=y)


def posterior(model, law, draws):
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=draws // 2, disable_progbar=True)
    mcmc.run(law, y)
    samples = Predictive(model, mcmc.get_samples(), return_sites=["point"])(law, y)
    return samples["point"].reshape(-1, 2)


y = torch.tensor(0.9)
draws = 2 if smoke else 400

# %% [markdown]
# NUTS needs a density. The flow has one. The generator has none, but its noise does:
# `NoiseReparam` makes the noise the latent of the same model. The flow may be sampled in its noise
# too, where the moons are one round cloud and no gap between them holds up the sampler.

# %%
opened = poutine.reparam(measurement, {"point": NoiseReparam()})
found = {
    "flow": posterior(opened, flow(), draws),
    "generator": posterior(opened, generator(), draws),
}

# %% [markdown]
# **Check.** Brute force: of a million points, keep each with the probability of its measurement.

# %%
candidates = two_moons(10_000 if smoke else 1_000_000)
weight = dist.Normal(candidates[:, 0], 0.1).log_prob(y).exp()
found["truth"] = candidates[torch.multinomial(weight, 4000 if not smoke else 100)]
for name, points in found.items():
    lower = (points[:, 1] < 0.25).float().mean()
    print(f"{name:9s} x1 = {points[:, 0].mean():.2f} ± {points[:, 0].std():.2f}, ", end="")
    print(f"on the lower moon with probability {lower:.2f}")

# %% [markdown]
# ## What can go wrong
#
# * A law is only as good as its draws: look at the two-sample test before you condition on it.
# * NUTS in the flow's own space, without `NoiseReparam`, must jump between the moons. Try it:
#   `posterior(measurement, flow(), 400)`.
# * `generator().log_prob(x)` raises an error that says what to do instead. There is no silent
#   zero.
