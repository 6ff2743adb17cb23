"""Pyrogen: deep generative models as Pyro distributions."""

__version__ = "0.1.0"
