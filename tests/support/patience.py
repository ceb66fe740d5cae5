"""How long a test waits for what must come. A wait ends as soon as it has come, so this costs only a test that fails:
it is long enough for a machine that is busy with much else."""

PATIENCE = 150.0
"""Seconds; below pytest's time-out, so that it is the wait that says what has not come."""
