"""Quantizers: the format of the pages."""
