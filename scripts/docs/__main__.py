"""``python -m scripts.docs``: write the pages into ``build/docs`` and build them into ``site``."""

from __future__ import annotations

import argparse

from scripts.docs.build import build

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m scripts.docs", description="Build the site.")
    parser.add_argument("--no-figures", action="store_true", help="leave the diagnosis figures out")
    build(figures=not parser.parse_args().no_figures)
