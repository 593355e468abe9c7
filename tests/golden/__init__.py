"""Payloads that no release may make otherwise: how they are made, and their bytes."""
