"""The folder that the site is built from: pages kept in ``docs``, the readme as home, and the generated pages."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from polopt.cli.catalog import name_of
from polopt.core.part import SLOTS
from scripts.docs import figures as drawing
from scripts.docs import pages
from scripts.docs.pages import ROOT

STAGE = ROOT / "build" / "docs"
FIGURES = ROOT / "build" / "diagnosis"
WIDE = "---\nhide: [navigation]\n---\n\n"
UNWRITTEN = {
    "leaderboard.md": "# Leaderboard\n\nNot measured yet.\n",
    "diagnose.md": "# Diagnosing a method\n\n`polopt diagnose --help` explains the command.\n",
    "compare.md": "# Comparing methods\n\nNot written yet.\n",
    "claims.md": "# Claims\n\nNot written yet.\n",
}
"""Stand-ins for pages that a checkout may lack, so that links to them lead somewhere."""


def stage(folder: Path = STAGE, *, figures: bool = True) -> None:
    """Write every page and the configuration into ``folder``, replacing what was there."""
    target = folder / "pages"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in UNWRITTEN.items():
        if not (target / name).exists():
            (target / name).write_text(content, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (target / "index.md").write_text(WIDE + readme.replace("](docs/", "]("), encoding="utf-8")
    for path, content in generated(target, figures=figures).items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(content, encoding="utf-8")
    config = configuration()
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def generated(target: Path, *, figures: bool) -> Mapping[str, str]:
    """Pages by their path; pictures and sources are put into ``target``."""
    made = {"methods/index.md": pages.methods_index(), "parts/index.md": pages.parts_index()}
    made |= {f"parts/{slot}.md": pages.slot_page(slot) for slot in SLOTS}
    ledger = pages.read_ledger()
    (target / "source").mkdir(parents=True, exist_ok=True)
    (target / "images").mkdir(exist_ok=True)
    for method in (m for members in pages.families().values() for m in members):
        source = pages.source_of(method)
        shutil.copyfile(ROOT / source, target / "source" / Path(source).name)
        picture, why = drawing.draw(method, FIGURES) if figures else (None, "this build draws none.")
        if picture is not None:
            shutil.copyfile(picture, target / "images" / f"diagnosis-{method.slug}.png")
        shown = f"../images/diagnosis-{method.slug}.png" if picture is not None else None
        section = pages.figure_section(method, shown, why, "polopt " + " ".join(drawing.arguments(method)))
        made[f"methods/{method.slug}.md"] = pages.method_page(method, ledger.get(method.slug, ()), section, source)
    return made


def configuration() -> dict[str, Any]:
    """The repository's ``mkdocs.yml`` with the generated pages in its navigation."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    titles: dict[str, list[Any]] = {
        "methods/index.md": [
            {family.replace("-", " ").capitalize(): [{name_of(m): f"methods/{m.slug}.md"} for m in members]}
            for family, members in pages.families().items()
        ],
        "parts/index.md": [{slot.capitalize(): f"parts/{slot}.md"} for slot in SLOTS],
    }
    for section in config["nav"]:
        for entries in section.values():
            if isinstance(entries, list) and entries[0] in titles:
                entries += titles[entries[0]]
    return config | {"docs_dir": "pages", "site_dir": "site"}
