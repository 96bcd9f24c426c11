"""How gradients become parameters."""
