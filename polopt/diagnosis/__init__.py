"""A method's estimator measured in the exact world: bias, variance, what it learns from, and where it leads."""
