"""Methods that learn from which of several answers is preferred."""
