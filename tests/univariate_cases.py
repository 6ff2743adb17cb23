"""The families of maps of one variable that the tests go through."""

from pyrogen.transforms.integrated import Integrated, SumOfSquares
from pyrogen.transforms.monotone import Bernstein, LogisticMixture
from pyrogen.transforms.spline import BoundedSpline, CircularSpline, RationalQuadratic
from pyrogen.transforms.tails import HeavyTails, SinhArcsinh
from pyrogen.transforms.univariate import Affine, Inverted, Shift, Stacked

MONOTONE = {
    "mixture": LogisticMixture(components=5),
    "bernstein": Bernstein(),
    "integrated": Integrated(hidden=5),
    "sum of squares": SumOfSquares(),
}
LINE = {
    "affine": Affine(),
    "shift": Shift(),
    "spline": RationalQuadratic(),
    **MONOTONE,
    "heavy tails": HeavyTails(),
    "sinh-arcsinh": SinhArcsinh(),
    "inverted": Inverted(LogisticMixture(components=3)),
    "stacked": Stacked(LogisticMixture(components=3), Affine(), RationalQuadratic()),
}
COMPACT = {"bounded": BoundedSpline(bound=5.0), "circular": CircularSpline()}
FAMILIES = LINE | COMPACT
