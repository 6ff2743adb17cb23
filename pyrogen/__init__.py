"""Pyrogen: deep generative models as Pyro distributions."""

__version__ = "0.1.0"

from . import (
    distributions,
    divergences,
    evaluation,
    export,
    guides,
    inference,
    nets,
    objectives,
    paths,
    plots,
    targets,
    training,
    transforms,
)

__all__ = [
    "distributions",
    "divergences",
    "evaluation",
    "export",
    "guides",
    "inference",
    "nets",
    "objectives",
    "paths",
    "plots",
    "targets",
    "training",
    "transforms",
]
