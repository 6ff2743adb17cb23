"""Held-out log-likelihood of flows at an equal budget, beside zuko, nflows and Pyro.

The same rows, batches, optimizer, schedule, clipping and number of steps for all, and the same
layers, hidden widths and bins; the weights of the best validation are scored. Small tables, which
all overfit, get two budgets, of which validation chooses. Data are standardised by the training
rows.

Tables (wine, parkinsons, protein, concrete, energy: the fixed test rows of the UCI collection)
hold whole numbers, repeated values and columns that are functions of others, where a density
has no upper bound. So Gaussian noise of 0.05 standard deviations is added to every column, anew
at every visit of a training row and once and for all to the others: the law that is learnt is the
table's, smoothed. The 2-D sets of FFJORD are taken as they are, except ``line`` and ``cos``, which
have no density without such noise.

    export PYROGEN_DATA=...    # the folder with uci/ and toy2d/
    python -m benchmarks.flows.quality --out out/quality.jsonl --seeds 5
    python -m benchmarks.flows.quality --report out/quality.jsonl

A run appends one line for each flow, set and seed, and goes on where it was stopped.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from benchmarks.flows.peers import Make, Size, all_peers, validation_kept

TABLES = ("energy", "concrete", "wine", "parkinsons", "protein")
PICTURES = (
    "8gaussians",
    "checkerboard",
    "2spirals",
    "moons",
    "pinwheel",
    "rings",
    "circles",
    "swissroll",
    "cos",
    "line",
)
DEGENERATE = ("line", "cos")
NOISE = 0.05  # of a standard deviation
SMALL = 2000  # training rows
ENTROPY = {"8gaussians": 2.833, "checkerboard": 3.4657}  # nats below which no mean cost can go
FLOWS = (
    "pyrogen: nsf",
    "pyrogen: spline maf",
    "zuko: nsf",
    "zuko: maf",
    "nflows: nsf published",
    "nflows: nsf AR published",
)
SLOWER = ("Pyro: spline_coupling", "Pyro: spline_autoregressive")


@dataclass(frozen=True)
class Split:
    train: Tensor
    validation: Tensor
    test: Tensor
    noise: float
    log_scale: float  # nats to add for the cost in the units of the data


def table(name: str, seed: int) -> Split:
    folder = Path(os.environ["PYROGEN_DATA"]) / "uci"
    rows = np.loadtxt(folder / f"{name}.data.csv.gz", delimiter=",")
    mask = np.loadtxt(folder / f"{name}.test_mask.csv.gz", delimiter=",")[:, seed] > 0
    rest, test = rows[~mask], rows[mask]
    return split(rest, test, NOISE, seed)


def picture(name: str, seed: int) -> Split:
    file = Path(os.environ["PYROGEN_DATA"]) / "toy2d" / "ffjord_toy2d.npz"
    rows = np.random.default_rng(seed).permutation(np.load(file)[name])
    return split(rows[:-4000], rows[-4000:], NOISE if name in DEGENERATE else 0.0, seed)


def split(rest: np.ndarray, test: np.ndarray, noise: float, seed: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(rest))
    held = max(len(rest) // 10, 50)
    validation, train = rest[order[:held]], rest[order[held:]]
    shift, scale = train.mean(0), train.std(0)
    torch.manual_seed(seed)
    parts = [
        torch.as_tensor((part - shift) / scale, dtype=torch.float32)
        for part in (train, validation, test)
    ]
    parts[1:] = [part + noise * torch.randn_like(part) for part in parts[1:]]
    return Split(*parts, noise, float(np.log(scale).sum()))


def batches(s: Split, size: int, seed: int) -> Iterator[Tensor]:
    """Rows in random order, epoch after epoch, of a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(s.train))
    while True:
        for rows in torch.randperm(len(s.train), generator=generator).split(size):
            if len(rows) == size:
                x = s.train[rows]
                yield x + s.noise * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def cost(log_prob, x: Tensor) -> Tensor:  # noqa: ANN001
    return -torch.cat([log_prob(part) for part in x.split(2048)])


def best_fit(make: Make, s: Split, c: argparse.Namespace, seed: int) -> dict[str, float]:
    """Fit with each budget and return the best of validation; seconds are those of all."""
    budgets = [c.steps] if len(s.train) > SMALL else [c.steps, c.steps * 3 // 10]
    fits = [fit(make, s, c, steps, seed) for steps in budgets]
    best = min(fits, key=lambda f: f["validation"])
    return {**best, "seconds": sum(f["seconds"] for f in fits)}


def fit(make: Make, s: Split, c: argparse.Namespace, steps: int, seed: int) -> dict[str, float]:
    """Train, keep the best of validation, and score the test rows."""
    torch.manual_seed(seed)
    peer = make(s.train.shape[1], Size(layers=c.layers))
    moving = [p for p in peer.module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, c.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, at, weights = math.inf, 0, {}
    rows = batches(s, c.batch, seed)
    start = time.process_time()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = -peer.log_prob(next(rows)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(moving, c.clip)
        optimizer.step()
        schedule.step()
        if step % c.every == 0 or step == steps:
            peer.module.eval()
            held = cost(peer.log_prob, s.validation).mean().item()
            peer.module.train()
            if held < best:
                best, at = held, step
                weights = {k: w.clone() for k, w in peer.module.state_dict().items()}
            if step - at >= c.patience or not math.isfinite(held):
                break
    seconds = time.process_time() - start
    if weights:
        peer.module.load_state_dict(weights)
    peer.module.eval()
    nats = cost(peer.log_prob, s.test)
    return {
        "nats": nats.mean().item() + (s.log_scale if s.train.shape[1] == 2 else 0.0),
        "median": nats.median().item(),
        "validation": best,
        "train": loss.item(),
        "best_step": at,
        "seconds": seconds,
        "steps": steps,
        "weights": sum(p.numel() for p in moving),
    }


def run(c: argparse.Namespace) -> None:
    out = Path(c.out)
    done = set()
    if out.exists():
        for line in out.read_text().splitlines():
            r = json.loads(line)
            done.add((r["flow"], r["set"], r["seed"]))
    makers = all_peers()
    for seed in range(c.seeds):
        for name in c.sets:
            left = [f for f in c.flows if (f, name, seed) not in done and f in makers]
            if not left:
                continue
            s = (picture if name in PICTURES else table)(name, seed)
            for flow in left:
                try:
                    found: dict[str, object] = dict(best_fit(makers[flow], s, c, seed))
                except (RuntimeError, ValueError, AssertionError) as error:
                    found = {"nats": math.nan, "error": f"{type(error).__name__}: {error}"[:200]}
                line = json.dumps({"flow": flow, "set": name, "seed": seed, **found})
                with out.open("a") as file:
                    file.write(line + "\n")
                print(line, file=sys.stderr, flush=True)


def report(file: Path) -> None:
    """Print mean and standard error over seeds, the best of each set in bold."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for line in file.read_text().splitlines():
        r = json.loads(line)
        cells[r["flow"], r["set"]].append(r["nats"])
        seconds[r["flow"]].append(r.get("seconds", math.nan))
    flows = [f for f in dict.fromkeys([*FLOWS, *SLOWER, *(f for f, _ in cells)]) if f in seconds]
    print("| set | " + " | ".join(flows) + " |\n|---|" + "---|" * len(flows))
    for name in (*TABLES, *PICTURES):
        found = {f: cells[f, name] for f in flows if (f, name) in cells}
        if not found:
            continue
        best = min(statistics.fmean(v) for v in found.values() if not math.isnan(sum(v)))
        row = []
        for f in flows:
            values = found.get(f, [])
            if not values:
                row.append("")
                continue
            mean = statistics.fmean(values)
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
            text = f"{mean:.3f} ± {error:.3f}" if len(values) > 1 else f"{mean:.3f}"
            row.append(f"**{text}**" if mean == best else text)
        floor = f" (entropy {ENTROPY[name]})" if name in ENTROPY else ""
        print(f"| {name}{floor} | " + " | ".join(row) + " |")
    means = [f"{statistics.fmean(seconds[f]):.1f}" for f in flows]
    print("| CPU seconds of a run | " + " | ".join(means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="file of results, one JSON line each")
    parser.add_argument("--report", help="file of results to print as a table")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", default=[*PICTURES, *TABLES])
    parser.add_argument("--flows", nargs="+", default=[*FLOWS, *SLOWER])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3, help="at the start of a cosine")
    parser.add_argument("--clip", type=float, default=5.0, help="largest norm of a gradient")
    parser.add_argument("--every", type=int, default=25, help="steps between validations")
    parser.add_argument("--patience", type=int, default=400, help="steps without improvement")
    c = parser.parse_args()
    torch.set_num_threads(1)
    if c.report:
        report(Path(c.report))
        return
    if not c.out:
        parser.error("pass --out FILE to measure, or --report FILE to print")
    with warnings.catch_warnings(), validation_kept(), pyro.validation_enabled(False):  # noqa: FBT003
        warnings.filterwarnings("ignore", module="nflows|zuko")  # of deprecated functions
        run(c)


if __name__ == "__main__":
    main()
