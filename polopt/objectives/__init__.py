"""Policy objectives shared by three or more methods."""
