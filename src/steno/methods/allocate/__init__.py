"""Allocators: how many tokens each head and layer keeps."""
