"""Docstrings of the API pages through the same door as those of the generated ones: their mathematics is literal."""

from __future__ import annotations

from typing import Any

import griffe

from scripts.docs.prose import docstring


class Literal(griffe.Extension):
    """Rewrites each docstring that is read as the Markdown of its text."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = docstring(obj.docstring.value)
