"""Credit per trajectory or step, shared by three or more methods."""
