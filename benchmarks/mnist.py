"""The importance-weighted autoencoder on MNIST: its bound after a given time, and its speed.

One stochastic layer, 784-200-200-50 and back, tanh; pixels are drawn anew at every visit. The
paper reports -log p(x) by L_5000 on the test digits, in nats (active units of 50 in brackets):

    k          1           5           50
    VAE        86.76 (19)  86.47 (20)  86.35 (20)
    IWAE       86.76 (19)  85.54 (22)  84.78 (25)

Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519

    export PYROGEN_DATA=folder OMP_NUM_THREADS=1      # folder/mnist/*-images-idx3-ubyte.gz
    python -m benchmarks.mnist train --k 5 --seconds 3600 --out k5.pt     # again to go on
    python -m benchmarks.mnist compare --k 5 --seconds 120
    python -m benchmarks.mnist speed

Large temporaries are what a step on the CPU waits for: with glibc, MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ set to 2147483648 keep their memory and halve the time of k = 50.
"""

import argparse
import gzip
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.elbo import ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pyrogen.distributions import BernoulliLogits, LatentVariable
from pyrogen.evaluation import active_units, log_evidence
from pyrogen.guides import Amortized, Diagonal
from pyrogen.nets import mlp
from pyrogen.objectives import ImportanceWeighted
from pyrogen.training import Batches, Trainer, load, save
from pyrogen.training.checkpoint import restore_rng, rng_state

PIXELS, LATENTS, HIDDEN = 784, 50, (200, 200)
BATCH, PARTICLES = 250, 5000
KEEP = 60.0  # seconds between checkpoints


def mnist(part: str) -> Tensor:
    """Read grey levels in [0, 1], shape (n, 784); each is the probability of a white pixel."""
    folder = os.environ.get("PYROGEN_DATA")
    if not folder:
        sys.exit("PYROGEN_DATA is not set. Set it to the folder that holds mnist/*.gz.")
    file = Path(folder) / "mnist" / f"{part}-images-idx3-ubyte.gz"
    if not file.exists():
        sys.exit(f"{file} does not exist. PYROGEN_DATA names the folder that holds mnist/*.gz.")
    grey = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16)
    return torch.as_tensor(grey.reshape(-1, PIXELS) / np.float32(255))


def held_out(n: int) -> Tensor:
    """Draw binary test digits, the same at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return mnist("t10k").bernoulli()[:n]


def stream(train: Tensor, batch: int) -> Batches:
    return Batches(train, batch_size=batch, transform=torch.bernoulli, drop_last=True)


def networks(train: Tensor) -> tuple[nn.Sequential, nn.Sequential]:
    """Build encoder and decoder; an output of zero stands for a pixel's mean."""
    nets = (
        mlp(PIXELS, 2 * LATENTS, HIDDEN, activation=nn.Tanh),
        mlp(LATENTS, PIXELS, HIDDEN, activation=nn.Tanh),
    )
    for layer in (*nets[0], *nets[1]):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nets


def adam(module: nn.Module, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr, fused=True)


@dataclass
class Contestant:
    """A way to train the networks, and the Pyro programs to judge them by."""

    name: str
    nets: nn.Module
    step: Callable[[Tensor], object]
    programs: tuple[Callable, ...] = ()  # model and guide


def autoencoder(train: Tensor) -> tuple[LatentVariable, Amortized]:
    encoder, decoder = networks(train)
    likelihood = BernoulliLogits((PIXELS,)).standardize(train)
    vae = LatentVariable(decoder, LATENTS, event_shape=(PIXELS,), likelihood=likelihood)
    guide = Amortized(vae.model, encoder, family=Diagonal(init_scale=1.0))
    return vae, guide.setup(train[:2].bernoulli())


def bound(k: int) -> ImportanceWeighted:
    return ImportanceWeighted(k, vectorize_particles=True, max_plate_nesting=1)


def with_pyrogen(train: Tensor, k: int, lr: float) -> Contestant:
    vae, guide = autoencoder(train)
    objective = bound(k)(vae.model, guide)
    trainer = Trainer(objective, adam(objective, lr))
    name = f"pyrogen ImportanceWeighted({k})"
    return Contestant(name, objective, trainer.step, (vae.model, guide))


class PyroVAE(nn.Module):
    """Written as Pyro's own VAE example is."""

    def __init__(self, train: Tensor) -> None:
        super().__init__()
        self.encoder, self.decoder = networks(train)
        mean = train.mean(0).clamp(1e-3, 1 - 1e-3)
        self.decoder[-1].bias.data = mean.logit()

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zero, one = x.new_zeros(x.shape[0], LATENTS), x.new_ones(x.shape[0], LATENTS)
            z = pyro.sample("latent", dist.Normal(zero, one).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def with_pyro(train: Tensor, lr: float, elbo: ELBO) -> Contestant:
    pyro.clear_param_store()
    vae = PyroVAE(train)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": lr}), loss=elbo)
    name = f"Pyro {type(elbo).__name__}({elbo.num_particles})"
    return Contestant(name, vae, svi.step, (vae.model, vae.guide))


def with_torch(train: Tensor, k: int, lr: float) -> Contestant:
    """No probabilistic program at all: the least that a step can cost."""
    vae = PyroVAE(train)
    optimizer = adam(vae, lr)

    def step(x: Tensor) -> Tensor:
        loc, log_scale = vae.encoder(x).chunk(2, -1)
        noise = torch.randn(k, *loc.shape)
        z = loc + log_scale.exp() * noise
        logits = vae.decoder(z)
        nll = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        log_weight = (log_scale + (noise.square() - z.square()) / 2).sum(-1) - nll.sum(-1)
        loss = -(log_weight.logsumexp(0) - math.log(k)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Contestant("plain torch", vae, step)


def contestants(train: Tensor, k: int, lr: float) -> list[Callable[[], Contestant]]:
    """Ways to train, each to be made just before it runs: Pyro's share one parameter store."""
    options = {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": 1}
    ways = [
        lambda: with_pyro(train, lr, Trace_ELBO(**options)),
        lambda: with_pyro(train, lr, RenyiELBO(alpha=0, **options)),
        lambda: with_pyrogen(train, k, lr),
    ]
    return ways if k > 1 else [ways[0], ways[2]]  # one particle: there is one bound only


def score(model: Callable, guide: Callable, x: Tensor) -> Tensor:
    """Return -L_5000 of each digit, in nats, one digit at a time to keep memory small."""
    return -log_evidence(model, guide, x, particles=PARTICLES, batch_size=1).log_prob


def describe(nats: Tensor) -> str:
    return f"{nats.mean():.2f} ± {nats.std() / math.sqrt(len(nats)):.2f}"


def train(c: argparse.Namespace) -> None:
    """Train for a given time, over several calls if need be, and score the test digits."""
    images = mnist("train")
    vae, guide = autoencoder(images)
    objective = bound(c.k)(vae.model, guide)
    trainer = Trainer(objective, adam(objective, c.lr))
    batches, seconds, kept = stream(images, c.batch), 0.0, 0.0
    path = Path(c.out)
    if path.exists():
        state = load(path)
        if (state["k"], state["batch"]) != (c.k, c.batch):
            sys.exit(f"{path} is of k={state['k']}, batch={state['batch']}. Choose another --out.")
        trainer.load_state_dict(state["trainer"])
        batches.load_state_dict(state["batches"])
        restore_rng(state["rng"])
        kept = seconds = state["seconds"]
        print(f"going on after {seconds:.0f} s, {trainer.steps} steps", flush=True)

    def keep() -> None:
        parts = {"trainer": trainer.state_dict(), "batches": batches.state_dict()}
        known = {"k": c.k, "batch": c.batch, "seconds": seconds, "rng": rng_state()}
        save({**parts, **known}, path)

    with pyro.validation_enabled(False):  # noqa: FBT003
        while seconds < c.seconds:
            losses, start = [], time.perf_counter()
            for (x,) in batches:
                left = max(1 - seconds / c.seconds, 0.0)
                trainer.optimizer.param_groups[0]["lr"] = c.lr * max(left, 0.01)
                losses.append(trainer.step(x))
                now = time.perf_counter()
                seconds, start = seconds + now - start, now
                if seconds - kept > KEEP or seconds >= c.seconds:
                    keep()
                    kept, start = seconds, time.perf_counter()
                if seconds >= c.seconds:
                    break
            if not losses:  # a checkpoint at the end of a pass
                continue
            mean = torch.stack(losses).mean() / c.batch
            if not mean.isfinite():
                sys.exit(f"The bound is {mean}. Lower --lr; {path} may hold weights not finite.")
            epoch = trainer.steps / len(batches)
            print(f"epoch {epoch:.0f}  {seconds:.0f} s  -L_{c.k} {mean:.2f}", flush=True)

        x = held_out(c.images)
        units = active_units(guide.posterior(x)["z"].mean)
        print(f"{units} of {LATENTS} units are active", flush=True)
        torch.manual_seed(2)
        nats = torch.cat([shown(score(vae.model, guide, part), i) for i, part in pieces(x)])
    epoch, milliseconds = trainer.steps / len(batches), 1e3 * seconds / trainer.steps
    print(
        f"k={c.k}: -L_{PARTICLES} {describe(nats)} nats on {len(x)} test digits, {units} active "
        f"units, after {seconds:.0f} s, {epoch:.0f} epochs, {milliseconds:.2f} ms a step"
    )


def pieces(x: Tensor) -> list[tuple[int, Tensor]]:
    return list(enumerate(x.split(500)))


def shown(nats: Tensor, piece: int) -> Tensor:
    print(f"test digits {500 * piece} and on: {nats.mean():.2f} nats", flush=True)
    return nats


def compare(c: argparse.Namespace) -> None:
    """Train in every way for the same CPU time and for the same steps, and score alike."""
    images, x = mnist("train"), held_out(c.images)
    rows: list[tuple[str, str, int, float, Tensor]] = []
    steps = 0
    for make in contestants(images, c.k, c.lr):
        torch.manual_seed(0)
        way, seconds, taken = make(), 0.0, 0
        batches = stream(images, c.batch)
        iterator = iter(batches)
        marks: dict[str, tuple[int, float, dict[str, Tensor]]] = {}
        with pyro.validation_enabled(False):  # noqa: FBT003
            while not {"time", "steps"} <= marks.keys():
                start = time.process_time()
                batch = next(iterator, None)
                if batch is None:
                    iterator = iter(batches)
                    batch = next(iterator)
                way.step(*batch)
                taken, seconds = taken + 1, seconds + time.process_time() - start
                if seconds >= c.seconds and "time" not in marks:
                    steps = steps or taken  # of the first one, for all
                    marks["time"] = (taken, seconds, clone(way.nets))
                if taken == steps:
                    marks["steps"] = (taken, seconds, clone(way.nets))
            for equal, (n, s, weights) in marks.items():
                way.nets.load_state_dict(weights)
                torch.manual_seed(2)
                rows.append((way.name, equal, n, s, score(*way.programs, x)))
                print(f"{way.name}, equal {equal}: {describe(rows[-1][-1])}", file=sys.stderr)
    print(f"| k = {c.k} | equal | steps | seconds | -L_{PARTICLES} | less than the first |")
    print("|---|---|---|---|---|---|")
    first = {equal: nats for _, equal, *_, nats in reversed(rows)}
    for name, equal, n, s, nats in sorted(rows, key=lambda row: row[1] == "steps"):
        gain = describe(first[equal] - nats) if nats is not first[equal] else ""
        print(f"| {name} | {equal} | {n} | {s:.0f} | {describe(nats)} | {gain} |")


def clone(module: nn.Module) -> dict[str, Tensor]:
    return {name: w.clone() for name, w in module.state_dict().items()}


def speed(c: argparse.Namespace) -> None:
    """Take the median CPU time of a step of every way, in turns."""
    images = mnist("train")
    x = images[: c.batch].bernoulli()
    print("| k | way | ms a step | times plain torch |\n|---|---|---|---|")
    for k in (1, 5, 50):
        options = {"num_particles": k, "vectorize_particles": True, "max_plate_nesting": 1}
        ways = [
            with_torch(images, k, c.lr),
            with_pyrogen(images, k, c.lr),
            with_pyro(images, c.lr, Trace_ELBO(**options)),
        ]
        times: list[list[float]] = [[] for _ in ways]
        with pyro.validation_enabled(False):  # noqa: FBT003
            for _ in range(300 // k + 10):
                for way, spent in zip(ways, times, strict=True):
                    start = time.process_time()
                    way.step(x)
                    spent.append(time.process_time() - start)
        medians = [1e3 * sorted(spent[3:])[len(spent[3:]) // 2] for spent in times]
        for way, median in zip(ways, medians, strict=True):
            print(f"| {k} | {way.name} | {median:.2f} | {median / medians[0]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(required=True)
    for run in (train, compare, speed):
        mode = modes.add_parser(run.__name__, help=run.__doc__)
        mode.set_defaults(run=run)
        mode.add_argument("--batch", type=int, default=BATCH)
        lr = 4e-3 if run is train else 1e-3  # train lets it fall to zero
        mode.add_argument("--lr", type=float, default=lr)
        if run is not speed:
            mode.add_argument("--k", type=int, default=1, help="particles")
            mode.add_argument("--seconds", type=float, default=60.0, help="of training")
            mode.add_argument("--images", type=int, default=500, help="test digits to score")
        if run is train:
            mode.add_argument("--out", required=True, help="checkpoint to write and go on from")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
