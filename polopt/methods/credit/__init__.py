"""Methods that decide which step or trajectory gets how much of the credit."""
