"""The demo: learn handwritten digits four ways, check, condition, infer, report.

python -m models --out out
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import arviz
import pyro
import torch
from torch import Tensor, nn

import pyrogen
from models import diffusion, eight_schools, gan, nsf, vae
from models.command_line import parse
from models.data import Data, digits
from models.demo.complete import NOISE, Completion, complete
from models.demo.judge import HEADER, Mixture, Row, judge
from models.demo.report import Report
from pyrogen import plots
from pyrogen.distributions import Diffusion, Multistep
from pyrogen.evaluation import Evidence
from pyrogen.export import to_arviz
from pyrogen.inference import importance
from pyrogen.training import History

SHOWN = 8  # completed pictures
LEAD = (
    "The law of 8 x 8 handwritten digits, learned by a variational autoencoder, a normalizing "
    "flow, a generative adversarial network and a diffusion model, then judged, conditioned and "
    "checked with the same few words."
)


@dataclass(frozen=True)
class Config:
    out: str = "out"  # folder of the report
    scale: float = 1.0  # fraction of every training and sampling budget
    seed: int = 0


@dataclass(frozen=True)
class Law:
    """A learned law, and how each step of the demo can use it."""

    name: str
    module: nn.Module  # called, it gives the distribution
    history: History
    evidence: Callable[[], Evidence] | None = None
    representation: Callable[[Tensor], Tensor] | None = None


def scaled(config: Any, scale: float) -> Any:
    return replace(config, steps=max(2, int(scale * config.steps)))


def learn(data: Data, scale: float) -> list[Law]:
    """Train one law of each family."""
    print("   VAE")
    c = scaled(vae.Config(), scale)
    latent, guide, history = vae.fit(c, data)
    laws = [
        Law(
            "VAE",
            latent,
            history,
            evidence=lambda: vae.held_out(latent, guide, data, c.particles),
            representation=lambda x: guide.posterior(x)["z"].mean,
        )
    ]
    print("   flow")
    flow, history = nsf.fit(scaled(nsf.Config(), scale), data)
    laws.append(
        Law(
            "flow",
            flow,
            history,
            evidence=lambda: nsf.density.held_out(flow, data),
            representation=lambda x: flow().to_noise(x),
        )
    )
    print("   GAN")
    generator, history = gan.fit(scaled(gan.Config(), scale), data)
    laws.append(Law("GAN", generator, history))
    print("   diffusion")
    score, history = diffusion.fit(scaled(diffusion.Config(), scale), data)
    laws.append(
        Law(
            "diffusion",
            score,
            history,
            evidence=lambda: diffusion.held_out(score, data),
        )
    )
    return laws


def table(laws: list[Law], data: Data) -> list[Row]:
    """Judge real pictures, honest baselines and the learned laws, by the same measures."""
    rows = [judge("real digits", data, data.dequantize(data.train[: len(data.test)]))]
    for name, components in (("Gaussian", 1), ("Gaussian mixture", 10)):
        start = time.perf_counter()
        mixture = Mixture.fit(data, components)
        rows.append(
            judge(
                name,
                data,
                mixture.draws(len(data.test)),
                evidence=mixture.evidence(data),
                parameters=mixture.parameters,
                seconds=time.perf_counter() - start,
            )
        )
    for law in laws:
        with torch.no_grad():
            draws = law.module().sample((len(data.test),))
        rows.append(
            judge(
                law.name,
                data,
                draws,
                evidence=None if law.evidence is None else law.evidence(),
                representation=law.representation,
                parameters=sum(p.numel() for p in law.module.parameters()),
                seconds=law.history.seconds,
            )
        )
    return rows


def conditioned(laws: list[Law], y: Tensor, scale: float) -> dict[str, Completion]:
    """Complete pictures from their noisy upper halves ``y`` under each law."""
    draws, warmup = max(2, int(40 * scale)), max(2, int(60 * scale))
    completions = {}
    for law in laws:
        if isinstance(law.module, Diffusion):
            law.module.sampler = Multistep(8, order=2)  # few steps, for every gradient runs them
        print(f"   {law.name}")
        completions[law.name] = complete(law.module(), y, draws=draws, warmup=warmup)
    return completions


def schools(scale: float) -> str:
    """Infer the eight schools and say how far the answer can be trusted."""
    c = scaled(eight_schools.Config(steps=600), scale)
    model = eight_schools.EightSchools().non_centred
    guide = eight_schools.fit(c, model)
    posterior = importance(model, guide, draws=c.draws)
    exact = eight_schools.EightSchools().log_evidence()
    error = posterior.log_evidence_error
    return "\n".join(
        [
            str(arviz.summary(to_arviz(posterior, model), kind="stats", round_to=2)),
            "",
            f"Pareto k {posterior.khat:.2f}, reliable below {posterior.threshold:.2f}; "
            f"effective sample size {posterior.ess:.0f} of {c.draws}",
            f"log evidence {posterior.log_evidence:.4f} ± {error:.4f}, exactly {exact:.5f}",
        ]
    )


def main(c: Config) -> list[Row]:
    start = time.perf_counter()
    pyro.set_rng_seed(c.seed)
    folder = Path(c.out)
    data = digits()
    report = Report("Four laws of handwritten digits", LEAD, folder)

    print("1. Learn: a VAE, a flow, a GAN and a diffusion model of the digits")
    laws = learn(data, c.scale)
    for law in laws:
        law.module.requires_grad_(False).eval()  # noqa: FBT003

    print("2. Judge: cost of held-out digits, and draws against held-out digits")
    rows = table(laws, data)
    cells = [row.cells() for row in rows]
    widths = [max(len(line[j]) for line in [HEADER, *cells]) for j in range(len(HEADER))]
    for line in [HEADER, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))

    report.section("Draws", "Draws of each law, rounded to the 17 grey levels of the data.")
    report.figure("draws", draws_figure(rows, data))
    report.section("Verdicts", *VERDICTS)
    report.table(HEADER, cells)
    plots.table(HEADER, cells).savefig(folder / "table.png")
    report.section("Training", "Loss of each law in units of its own, raw and as a running mean.")
    report.figure("losses", losses_figure(laws))

    print("3. Condition: lower halves of held-out digits from their noisy upper halves")
    x = data.dequantize(data.test[:SHOWN])
    seen = data.features // 2
    y = x[:, :seen] + NOISE * torch.randn(len(x), seen)
    completions = conditioned(laws, y, c.scale)
    report.section("Conditioning", *CONDITIONING)
    report.table(
        ("law", "error of the mean over unseen pixels", "seconds"),
        [
            (name, f"{done.error(x):.3f}", f"{done.seconds:.0f}")
            for name, done in completions.items()
        ],
    )
    report.figure("completions", completions_figure(completions, x, y, data))

    print("4. Infer: eight schools, by a learned flow corrected by importance sampling")
    found = schools(c.scale)
    print(found)
    report.section("Eight schools", *SCHOOLS)
    report.text(found)

    seconds = time.perf_counter() - start
    path = report.write(
        f"pyrogen {pyrogen.__version__}, Pyro {pyro.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {seconds:.0f} seconds, seed {c.seed}."
    )
    print(f"5. Report: {path} and PNGs beside it, after {seconds:.0f} seconds")
    return rows


VERDICTS = (
    "bits/dim: what a pixel of a held-out digit costs on average, the lower the better; exact, "
    "the lower bound of the log density by importance weights, or an estimate by the "
    "probability-flow ODE.",
    "MMD p and classifier accuracy compare as many draws as there are held-out digits, both on "
    "the grid of grey levels: a small p, or an accuracy far above 0.5, tells them apart. The "
    "first row compares training digits with held-out ones: no law can do better.",
    "probe: accuracy of a linear classifier of the digit's class from the law's representation.",
)
CONDITIONING = (
    f"The upper half of each digit is seen through noise of standard deviation {NOISE}; the lower "
    "half is inferred by NUTS in one Pyro model whose prior is the learned law. NUTS moves the "
    "noise behind the picture: latent and pixel noise of the VAE, the noise of flow and GAN, the "
    "start of the diffusion's reverse process, here of eight deterministic steps.",
    "Rows: truth, what is seen, then for each law the posterior mean, its spread (dark: "
    "uncertain), and three draws.",
)
SCHOOLS = (
    "Rubin's eight schools, non-centred parametrisation: a flow learned as guide with the "
    "sticking-the-landing estimator, corrected by Pareto-smoothed importance sampling.",
)


def draws_figure(rows: list[Row], data: Data) -> Any:
    grid = {row.law: row.draws[:16].reshape(-1, *data.shape) for row in rows}
    grid["real digits"] = data.test[:16].reshape(-1, *data.shape)
    return plots.image_grid(grid, high=data.levels - 1)


def losses_figure(laws: list[Law]) -> Any:
    series = {}
    for law in laws:
        losses = law.history.losses
        if losses.ndim == 1:
            series[law.name] = losses
        else:
            series[f"{law.name} generator"], series[f"{law.name} critic"] = losses.unbind(-1)
    return plots.curves(series, smooth=50)


def completions_figure(
    completions: dict[str, Completion], x: Tensor, y: Tensor, data: Data
) -> Any:
    def pictures(rows: Tensor) -> Tensor:
        return rows.reshape(-1, *data.shape)

    seen = torch.full_like(x, torch.nan)
    seen[:, : y.shape[-1]] = y
    grid = {"truth": pictures(x), "seen": pictures(seen)}
    for name, done in completions.items():
        grid[f"{name}: mean"] = pictures(done.draws.mean(0))
        grid[f"{name}: spread"] = pictures(2 * done.draws.std(0))
        for i, draw in enumerate(done.draws[-3:]):
            grid[f"{name}: draw {i + 1}"] = pictures(draw)
    return plots.image_grid(grid)


if __name__ == "__main__":
    torch.set_num_threads(1)  # for nets this small, threads wait for one another
    main(parse(Config, __doc__))
