"""`cgd`, also `kubectl cgd`: the command line for users of CGDRuns."""
