"""Transforms: a change of basis before tokens are stored, with its query side."""
