"""Terms added to the objective: divergences to another policy, entropy."""
