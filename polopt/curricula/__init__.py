"""Which prompts are drawn, and how many trajectories each gets."""
