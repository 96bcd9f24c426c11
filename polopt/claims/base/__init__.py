"""Claims of the methods on which the families build."""
