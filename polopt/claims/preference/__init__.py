"""Claims of the methods that learn from preferences."""
