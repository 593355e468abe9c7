"""PURE: fleet, model and batch in, plan out; the same inputs give the same plan."""
