"""Which of several methods helps, by how much, and is it noise? Runs under one budget, paired by seed."""
