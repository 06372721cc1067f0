"""Mergers: what becomes of the tokens that are not kept."""
