"""Claims of the trust-region methods."""
