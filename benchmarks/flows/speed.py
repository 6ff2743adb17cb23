"""CPU time and memory of flows, beside zuko, nflows, normflows and the transforms of Pyro.

Three layers of each, hidden widths 64 and 64, splines of eight bins. One thread; CPU time,
medians, all ways in turns; validation off everywhere.

    train    log-density of a batch and its gradient in the weights
    sample   a batch of draws, without gradients
    draw     draws, their log-densities, and the gradient through both (reverse KL)

    python -m benchmarks.flows.speed table --features 2 16 64 --batches 512 4096
    python -m benchmarks.flows.speed compiled --features 64
    python -m benchmarks.flows.speed trained          # autoregressive draws of a trained flow
    python -m benchmarks.flows.speed memory           # of one gradient, by the number of layers
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from benchmarks.flows.peers import Peer, Size, all_peers, validation_kept

Way = Callable[[], object]

# In the other direction an autoregressive flow takes a pass for each feature: too slow to repeat.
SLOW = {"sample": 16, "draw": 16, "train": 16}  # features from which one repetition must do
AUTOREGRESSIVE = ("maf", "nsf", "spline maf", "nsf AR", "spline_autoregressive")


def train(peer: Peer, x: Tensor) -> Way:
    def way() -> None:
        peer.module.zero_grad()
        (-peer.log_prob(x).mean()).backward()

    return way


def sample(peer: Peer, x: Tensor) -> Way:
    def way() -> None:
        with torch.no_grad():
            peer.sample(len(x))

    return way


def draw(peer: Peer, x: Tensor) -> Way:
    def way() -> None:
        peer.module.zero_grad()
        z, log_prob = peer.draw_and_score(len(x))
        (log_prob + 0.5 * z.square().sum(-1)).mean().backward()

    return way


WAYS = {"train": train, "sample": sample, "draw": draw}


def medians(ways: Sequence[Way], seconds: float, least: int = 3) -> list[float]:
    """Median CPU milliseconds of each way, in turns, for about ``seconds`` of each."""
    times: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    while True:
        busy = False
        for way, spent in zip(ways, times, strict=True):
            if len(spent) >= least and sum(spent) >= seconds:
                continue
            start = time.process_time()
            way()
            spent.append(time.process_time() - start)
            busy = True
        if not busy:
            return [1e3 * statistics.median(spent) for spent in times]


def is_slow(key: str, task: str, d: int, batch: int) -> bool:
    """Whether one call takes many seconds."""
    package, name = key.split(": ")
    one_pass = "train" if package != "Pyro" or name != "iaf" else "draw"
    many = name == "iaf" if task == "train" else task != one_pass and name in AUTOREGRESSIVE
    return many and d * batch > 64 * 512 and package != "pyrogen"


def table(c: argparse.Namespace) -> None:
    """Time every flow of every library."""
    makers = {k: m for k, m in all_peers().items() if not c.only or any(o in k for o in c.only)}
    for d in c.features:
        for batch in c.batches:
            print(f"\n| d = {d}, batch {batch}, ms | " + " | ".join(c.ways) + " |")
            print("|---|" + "---|" * len(c.ways))
            peers = {}
            for key, make in makers.items():
                torch.manual_seed(0)
                peers[key] = make(d, Size())
            x = torch.randn(batch, d)
            rows: dict[str, list[str]] = {key: [] for key in peers}
            for task in c.ways:
                timed = [k for k in peers if not is_slow(k, task, d, batch)]
                spent = medians([WAYS[task](peers[k], x) for k in timed], c.seconds)
                found = dict(zip(timed, spent, strict=True))
                for key, row in rows.items():
                    row.append(f"{found[key]:.1f}" if key in found else "-")
            for key, row in rows.items():
                print(f"| {key} | " + " | ".join(row) + " |", flush=True)


def compiled(c: argparse.Namespace) -> None:
    """Time pyrogen's flows as they are and through ``torch.compile(fullgraph=True)``."""
    print("| flow | d | batch | task | eager, ms | compiled, ms | times faster | first call, s |")
    print("|---|---|---|---|---|---|---|---|")
    makers = {k: m for k, m in all_peers().items() if k.startswith("pyrogen")}
    for key, make in makers.items():
        if c.only and not any(o in key for o in c.only):
            continue
        for d in c.features:
            for batch in c.batches:
                peer = make(d, Size())
                with torch.no_grad():
                    for p in peer.module.parameters():
                        p.add_(0.05 * torch.randn_like(p))
                x = torch.randn(batch, d)
                tasks = ("train",) if "maf" in key else ("train", "sample", "draw")
                for task in tasks:
                    fast = replace(
                        peer,
                        log_prob=torch.compile(peer.log_prob, fullgraph=True, dynamic=False),
                        draw_and_score=torch.compile(
                            peer.draw_and_score, fullgraph=True, dynamic=False
                        ),
                        sample=torch.compile(peer.sample, fullgraph=True, dynamic=False),
                    )
                    with validation_kept():  # which the compiler switches on or off
                        ways = [WAYS[task](p, x) for p in (peer, fast)]
                        start = time.perf_counter()
                        ways[1]()
                        first = time.perf_counter() - start
                        a, b = medians(ways, c.seconds)
                    print(
                        f"| {key} | {d} | {batch} | {task} | {a:.1f} | {b:.1f} | {a / b:.1f} "
                        f"| {first:.0f} |",
                        flush=True,
                    )


def correlated(n: int, d: int) -> Tensor:
    """Draw a chain whose every feature bends and scales with the one before it, not Gaussian."""
    x = torch.randn(n, d)
    for i in range(1, d):
        before = x[:, i - 1]
        x[:, i] = 0.7 * before.sin() + x[:, i] * (0.3 + 0.4 * torch.sigmoid(2 * before))
    return x / x.std(0)


def learn(peer: Peer, x: Tensor, steps: int) -> float:
    optimizer = torch.optim.Adam(peer.module.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -peer.log_prob(x[torch.randint(len(x), (256,))]).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def trained(c: argparse.Namespace) -> None:
    """Train an autoregressive spline flow of each library on a chain, then draw from both."""
    d = c.features[-1]
    torch.manual_seed(0)
    x = correlated(20_000, d)
    makers = all_peers()
    peers = [makers["pyrogen: spline maf"](d, Size())]
    if "zuko: nsf" in makers:
        peers.append(makers["zuko: nsf"](d, Size()))
    for peer in peers:
        start = time.process_time()
        loss = learn(peer, x, c.steps)
        spent = time.process_time() - start
        print(f"{peer.package} {peer.name}: {loss:.2f} nats after {c.steps} steps, {spent:.0f} s")
    noise = torch.randn(c.batches[0], d)
    flow = peers[0].module()
    with torch.no_grad():
        fast = flow.from_noise(noise)
    exact = flow.from_noise(noise.clone().requires_grad_())  # all passes, for the derivatives
    print(f"largest distance from all {d} passes: {(fast - exact).abs().max():.1e}")
    spent = medians([sample(p, x[: c.batches[0]]) for p in peers], c.seconds)
    for peer, ms in zip(peers, spent, strict=True):
        print(f"| {peer.package} {peer.name} | {ms:.0f} ms | {ms / spent[0]:.1f} |")


def memory(c: argparse.Namespace) -> None:
    """Bytes that one gradient keeps for its backward pass, by the number of layers."""
    d, batch = c.features[-1], c.batches[0]
    print("| flow | " + " | ".join(f"{n} layers, MB" for n in (2, 4, 8, 16)) + " |")
    print("|---|---|---|---|---|")
    for key, make in all_peers().items():
        if c.only and not any(o in key for o in c.only):
            continue
        if key == "Pyro: iaf":
            continue
        row = []
        for layers in (2, 4, 8, 16):
            peer = make(d, Size(layers=layers))
            x = torch.randn(batch, d)
            row.append(kept(lambda p=peer, v=x: p.log_prob(v).mean()) / 2**20)
        print(f"| {key} | " + " | ".join(f"{m:.0f}" for m in row) + " |", flush=True)


def kept(loss: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd holds on to."""
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    del value
    return sum(held.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(required=True)
    for run in (table, compiled, trained, memory):
        mode = modes.add_parser(run.__name__, help=run.__doc__)
        mode.set_defaults(run=run)
        mode.add_argument("--features", type=int, nargs="+", default=[2, 16, 64])
        mode.add_argument("--batches", type=int, nargs="+", default=[512, 4096])
        mode.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
        mode.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
        mode.add_argument("--steps", type=int, default=600, help="of training")
        mode.add_argument("--only", nargs="+", help="flows whose name holds one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings(), validation_kept(), pyro.validation_enabled(False):  # noqa: FBT003
        warnings.filterwarnings("ignore", module="nflows|zuko")  # of deprecated functions
        arguments.run(arguments)


if __name__ == "__main__":
    main()
