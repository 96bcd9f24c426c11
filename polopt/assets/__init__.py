"""Files that ship with the package: the small base policy every command uses by default."""

from __future__ import annotations

from pathlib import Path


def base_policy_path() -> Path:
    """Folder of the base policy in Hugging Face format: ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it.

    It was trained from nothing by ``scripts/train_base_policy.py``; ``training.json`` in the folder says how.
    """
    return Path(__file__).parent / "base"
