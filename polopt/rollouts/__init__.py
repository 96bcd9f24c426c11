"""How trajectories are collected."""
