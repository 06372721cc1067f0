"""Quantized pages: 64 tokens of one KV head as codes with an fp16 scale and minimum per group."""

from .pages import Pages, cat_pages, decode_pages, encode_pages, page_bytes

__all__ = ["Pages", "cat_pages", "decode_pages", "encode_pages", "page_bytes"]
