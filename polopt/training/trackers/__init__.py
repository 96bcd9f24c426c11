"""Places a run can log to, one file per kind."""
