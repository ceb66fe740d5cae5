"""`CGDRun`, version `cgd.dev/v1alpha1`: what a user writes and what the operator answers.

Written once, here: `crds/` is generated from these models (`make crds`), with their defaults, limits and CEL rules.
There are no floats (a custom resource must compare equal after any number of round trips), so fractions are strings:
`learningRate: "1e-6"`. Everything but the `MUTABLE` fields of `CGDRunSpec` is immutable; rows that are stored are
reused by the next run.
"""

GROUP, VERSION = "cgd.dev", "v1alpha1"
