"""`cgd`, also as `kubectl cgd`: what a user of CGDRuns looks at, from a terminal."""
