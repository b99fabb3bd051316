"""``kdpo build-world``: the world that comes with the package, made again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DESCRIPTION = "Trains the world that comes with the package anew, checks what it recalls, and writes its files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="is replaced (default: the package's own)")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Make it, and say what it knows."""
    from ..models import world

    made = world.ship(options.into or world.SHIPPED)
    known = json.loads((made.folder / "world.json").read_text(encoding="utf-8"))
    print(f"{made.folder}: recall {known['recall']:.1%}, worked out {known['worked_out']:.1%}")
    return 0
