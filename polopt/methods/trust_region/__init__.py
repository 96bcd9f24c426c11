"""Methods of ratios, clipping, entropy and off-policy data."""
