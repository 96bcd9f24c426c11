"""Claims of the methods that assign credit."""
