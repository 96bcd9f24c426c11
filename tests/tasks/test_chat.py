"""Rendering chats, against a template applied by Jinja itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import Template
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from polopt.core.errors import UsageError
from polopt.tasks.chat import render

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})


def tokenizer(template: str | None) -> Any:
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("opening", [True, False])
def test_a_chat_goes_through_the_template(opening: bool) -> None:
    expected = Template(TEMPLATE).render(messages=CHAT, add_generation_prompt=opening)
    assert render(CHAT, tokenizer(TEMPLATE), add_generation_prompt=opening) == expected


def test_a_string_stays_and_needs_no_template() -> None:
    assert render("Hi ", tokenizer(None), add_generation_prompt=True) == "Hi "
    assert render("Hi ", tokenizer(TEMPLATE), add_generation_prompt=True) == "Hi "


@pytest.mark.parametrize("without", [tokenizer(None), SimpleNamespace()])
def test_a_chat_without_a_template_is_an_error(without: Any) -> None:
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        render(CHAT, without, add_generation_prompt=True)
