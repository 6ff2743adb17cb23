"""Plain torch networks."""

from .convolutional import conv_decoder, conv_encoder
from .dense import Incomplete, ResidualMLP, Standardized, TimeMLP, mlp
from .masked import MaskedLinear, MaskedMLP

__all__ = [
    "Incomplete",
    "MaskedLinear",
    "MaskedMLP",
    "ResidualMLP",
    "Standardized",
    "TimeMLP",
    "conv_decoder",
    "conv_encoder",
    "mlp",
]
