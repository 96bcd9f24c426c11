"""Verifiable tasks: prompts that are generated, answers that a program checks exactly."""
