"""The README's example runs, and finds what the README shows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyrogen"
README = (ROOT / "README.md").read_text()


def test_example_prints_what_is_shown(capsys):
    (example, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    shown, printed = README, capsys.readouterr().out
    assert "Reliable: k̂" in printed
    for text in (shown, printed):  # exactly -31.31135; the standard error is 0.002
        (evidence,) = re.findall(r"log evidence (-\d+\.\d+) ±", text)
        assert abs(float(evidence) + 31.31135) < 0.02


def test_the_map_names_every_file():
    (tree,) = re.findall(r"```\npyrogen/\n(.*?)```", README, re.DOTALL)
    named = set(re.findall(r"\w+\.py", tree))
    there = {file.name for file in PACKAGE.rglob("*.py")} - {"__init__.py"}
    inner = {"base.py", "vectorized.py", "parameters.py"}  # not for users
    assert there - named <= inner
    assert named <= there
