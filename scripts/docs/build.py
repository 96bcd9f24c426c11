"""From the staged pages to a site that needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.docs.pages import ROOT
from scripts.docs.stage import STAGE, stage

SHIM = re.compile(r'<script src="https://unpkg.com/iframe-worker/shim"[^>]*></script>')
"""What the theme fetches for the search of pages that are opened as files; ours is ``javascripts/worker.js``."""


def build(folder: Path = STAGE, site: Path = ROOT / "site", *, figures: bool = True) -> None:
    """Write every page into ``folder`` and the finished site into ``site``; a broken link ends the build.

    Raises SystemExit with the site builder's exit code when it fails, leaving the site of before.
    """
    stage(folder, figures=figures)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", "mkdocs.yml"]
    # API pages are read from the source beside this file, whatever is installed.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    sys.stdout.write(done.stdout)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(done.returncode)
    made = folder / "site"
    for page in made.rglob("*.html"):
        up = "../" * len(page.relative_to(made).parent.parts)
        ours = f'<script src="{up}javascripts/worker.js"></script>'
        page.write_text(SHIM.sub(ours, page.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(made, site)
