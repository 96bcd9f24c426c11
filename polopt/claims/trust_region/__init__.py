"""Claims of the trust-region papers."""
