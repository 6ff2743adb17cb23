"""A model's ``Config`` as command-line flags."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

C = TypeVar("C")


def parse(config: type[C], doc: str | None, arguments: Sequence[str] | None = None) -> C:
    """Read the fields of a frozen dataclass from the command line.

    Args:
        config: Dataclass whose fields all have defaults; a tuple takes several words.
        doc: Docstring of the model's file; its first line becomes the help text.
        arguments: Words to parse instead of ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").strip().split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(config):  # type: ignore[arg-type]
        flag: dict[str, Any] = {"type": type(field.default), "default": field.default, "help": " "}
        if isinstance(field.default, tuple):
            flag |= {"type": type(field.default[0]), "nargs": "+"}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **flag)
    chosen = vars(parser.parse_args(arguments))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})
