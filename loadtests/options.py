"""What the commands here have in common on their command lines.

Duty: the options that say where measuring happens, and the figures that differ between a full run and a quick one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path


def add_place(parser: argparse.ArgumentParser, folder: str = "where servers write") -> None:
    """Let a command be told where. folder: what is to be said of it."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--store", choices=("driver", "server"), default="driver", help="whose core the Valkey shares")
    parser.add_argument("--folder", type=Path, help=folder)


def read(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    full: Mapping[str, float | int],
    quick: Mapping[str, float | int],
) -> argparse.Namespace:
    """Read a command line; what it leaves out is as in a full run, with `--quick` as in a quick one."""
    options = parser.parse_args(arguments)
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options
