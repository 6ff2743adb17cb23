"""Imports point down; importing changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyrogen"
LAYERS = [
    {"autodiff"},
    {"inputs", "parameters"},
    {"nets", "paths", "divergences"},
    {"transforms"},
    {"distributions", "targets"},
    {"guides", "objectives"},
    {"training"},
    {"evaluation"},
    {"inference"},
    {"export", "plots", "testing"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file):
    """Top-level pyrogen parts that a file imports."""
    here = file.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: -node.level]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        yield from (n[1] for n in names if n[0] == "pyrogen" and len(n) > 1)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    part = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if part == "__init__":
        return
    for other in imports(file):
        assert other == part or RANK[other] < RANK[part], f"{part} must not import {other}"


SIDE_EFFECTS = """
import sys, warnings, pyro, torch
from torch.distributions import Distribution

def state():
    return {
        "validation": Distribution._validate_args,
        "dtype": torch.get_default_dtype(),
        "rng": torch.random.get_rng_state().tolist(),
        "warning filters": len(warnings.filters),
        "pyro settings": pyro.settings.get(),
        "param store": len(pyro.get_param_store()),
    }

before = state()
import pyrogen, pyrogen.testing
changed = [k for k, v in state().items() if v != before[k]]
assert not changed, changed
assert not {"arviz", "matplotlib", "sklearn", "scipy", "pandas"} & sys.modules.keys()
"""


def test_importing_changes_nothing_and_needs_no_extra():
    subprocess.run([sys.executable, "-W", "error", "-c", SIDE_EFFECTS], check=True)
