"""Propagators: which tokens of the prompt each layer computes; the others go round it."""
