"""The continuous flows that several tests go through."""

import torch
from flow_cases import awake
from torch import nn

from pyrogen.distributions.recipes.continuous import cnf


class Linear(nn.Module):
    """v = A x + B c: its flow is a matrix exponential."""

    def __init__(self, features, context=0):
        super().__init__()
        self.a = nn.Parameter(torch.randn(features, features))
        self.b = nn.Parameter(torch.randn(features, context))

    def forward(self, x, t, context):
        v = x @ self.a.T
        return v if context is None else v + context @ self.b.T


def small(features=3, context=0, **kwargs):
    return awake(cnf(features, context, hidden=(16, 16), **kwargs))


def steep(flow, factor):
    with torch.no_grad():
        flow.layers[0].field.net[-1].weight.mul_(factor)
    return flow
