"""The text of a completion, whether plain or a chat."""

from __future__ import annotations

from typing import Any


def completion_text(completion: Any) -> str:
    """A string as it is; of a chat, the contents of the assistant's messages, one per line."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if message.get("role") == "assistant")
