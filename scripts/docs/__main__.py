"""``python -m scripts.docs``: write the pages into ``build/docs`` and build them into ``site``."""

from __future__ import annotations

import argparse
import subprocess
import sys

from scripts.docs.stage import CONFIG, stage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m scripts.docs", description="Build the site.")
    parser.add_argument("--no-figures", action="store_true", help="leave the diagnosis figures out")
    parser.add_argument("--pages-only", action="store_true", help="write build/docs and build nothing")
    given = parser.parse_args()
    stage(figures=not given.no_figures)
    if not given.pages_only:
        build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", str(CONFIG)]
        raise SystemExit(subprocess.run(build, check=False).returncode)
