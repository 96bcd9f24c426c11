"""The methods on which the families build."""
