"""PURE: a plan or a fleet in, what it would do out; the same inputs and seed give the same result. Nothing is run."""
