"""Matching a vector field to straight or bent lines between noise and data: no solver to train."""

__all__ = [
    "Bridge",
    "FlowMatching",
    "IndependentCoupling",
    "Interpolant",
    "MinibatchCoupling",
    "OptimalTransport",
    "SchroedingerBridge",
    "Stochastic",
    "Straight",
    "Trigonometric",
]

from .couplings import IndependentCoupling, MinibatchCoupling, OptimalTransport, SchroedingerBridge
from .flow_matching import FlowMatching
from .interpolants import Bridge, Interpolant, Stochastic, Straight, Trigonometric
