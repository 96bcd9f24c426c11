"""Methods of ratios, clipping, entropy control and off-policy data."""
