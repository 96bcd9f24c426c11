"""From a chat to the text a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from polopt.core.errors import UsageError
from polopt.core.example import Message, Text


class ChatTokenizer(Protocol):
    """What ``render`` needs of a Hugging Face tokenizer."""

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(
        self, conversation: Sequence[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


def render(text: Text, tokenizer: ChatTokenizer, *, add_generation_prompt: bool) -> str:
    """Text as the model reads it: a string as it is, a chat through the tokenizer's template.

    ``add_generation_prompt`` ends a chat with the opening of the assistant's turn; strings ignore it.

    Raises:
        UsageError: the text is a chat and the tokenizer has no chat template.
    """
    if isinstance(text, str):
        return text
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the prompts are chats but the tokenizer has no chat template; "
            "use an instruction-tuned model or give the prompts as plain text"
        )
    messages = [dict(message) for message in text]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
