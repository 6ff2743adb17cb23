"""Networks of which each output sees chosen inputs only."""

__all__ = ["MaskedLinear", "MaskedMLP"]

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..inputs import check_positive


class MaskedLinear(nn.Linear):
    """Linear layer of which only the entries allowed by a mask act.

    Args:
        mask: What each output may see, boolean, shape ``(outputs, inputs)``.

    Example:
        >>> layer = MaskedLinear(torch.tensor([[True, False]]))
        >>> layer(torch.tensor([0.0, 1.0])) == layer.bias
        tensor([True])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        # of the weights' own type, whose product is cheapest
        self.register_buffer("mask", mask.to(self.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class MaskedMLP(nn.Sequential):
    """Fully connected network whose outputs for a feature see chosen features only.

    Its input is ``x`` followed by the context, shape ``(*batch, features + context)``; its
    result has shape ``(*batch, features * outputs)``, feature by feature. Every output sees
    all of the context. A hidden unit sees what some feature's outputs may see, and serves
    all features that may see at least as much.

    Args:
        adjacency: What the outputs for each feature may see, boolean, shape
            ``(features, features)``; strictly lower triangular for the features before it.
        outputs: Number of outputs for each feature.
        context: Number of features to condition on; 0 for none.
        hidden: Widths of the hidden layers; a layer has at least a unit for each set of features
            that is seen, which for an order is as many as there are features.

    Raises:
        ValueError: If a hidden layer has no units.

    References:
        Germain, Gregor, Murray, Larochelle. MADE: Masked Autoencoder for Distribution
        Estimation. ICML 2015. arXiv:1502.03509

    Example:
        >>> net = MaskedMLP(torch.ones(3, 3).tril(-1).bool(), 2)
        >>> jacobian = torch.autograd.functional.jacobian(net, torch.zeros(3))
        >>> jacobian[:2].abs().sum(), jacobian[:, 2].abs().sum()  # of feature 0; by feature 2
        (tensor(0.), tensor(0.))
    """

    def __init__(
        self,
        adjacency: Tensor,
        outputs: int,
        context: int = 0,
        *,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        check_positive("MaskedMLP", hidden_unit=min(hidden, default=1))
        kinds = adjacency.unique(dim=0)
        kinds = kinds[kinds.sum(1).argsort(stable=True)]
        if not context and len(kinds) > 1:
            kinds = kinds[kinds.any(1)]  # units that see nothing are constants
        layers: list[nn.Module] = []
        below = torch.eye(adjacency.shape[1], dtype=torch.bool)  # what each unit below has seen
        free = context  # inputs that everything may see
        for width in hidden:
            width = max(width, len(kinds))  # a kind without a unit would lose what it may see
            units = kinds[torch.arange(width) * len(kinds) // width]
            layers += [MaskedLinear(_may_see(units, below, free)), nn.SiLU()]
            below, free = units, 0
        rows = adjacency.repeat_interleave(outputs, dim=0)
        super().__init__(*layers, MaskedLinear(_may_see(rows, below, free)))
        self.outputs = outputs

    def outputs_for(self, features: Tensor, x: Tensor) -> Tensor:
        """Return the outputs for some features only, in their order.

        Args:
            features: Indices of the features, shape ``(chosen,)``.
            x: As for the whole network.

        Shape:
            Result ``(*batch, chosen * outputs)``.
        """
        *hidden, last = self
        for layer in hidden:
            x = layer(x)
        assert isinstance(last, MaskedLinear)
        weight, mask, bias = (
            w.unflatten(0, (-1, self.outputs))[features].flatten(0, 1)
            for w in (last.weight, last.mask, last.bias)
        )
        return nn.functional.linear(x, weight * mask, bias)


def _may_see(units: Tensor, below: Tensor, free: int) -> Tensor:
    """Whether each unit may see each unit below: if that has seen nothing that it must not."""
    forbidden = below.float() @ (~units).float().T
    return torch.cat([forbidden.T == 0, forbidden.new_ones(len(units), free) > 0], dim=1)
