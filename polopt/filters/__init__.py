"""Which trajectories train."""
