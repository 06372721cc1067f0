"""Bytes and places: what was read once is kept under the address of its content, and found again by whoever reads the same."""
