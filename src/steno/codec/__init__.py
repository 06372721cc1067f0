"""Segments and bytes: what a cache holds as a file that can be opened, checked and read without steno (docs/format.md)."""
