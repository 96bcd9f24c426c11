"""The training loop and what surrounds it: checkpoints, budgets, tracking, reports."""
