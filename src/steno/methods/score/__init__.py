"""Scorers: how much each held token matters."""
