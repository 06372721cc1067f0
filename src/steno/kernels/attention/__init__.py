"""Attention over spans: dense tokens and quantized pages, read where they lie."""

from .dispatch import attend
from .gather import Gathered, gather_tokens
from .heads import attend_heads, softmax_weights
from .mass import attention_mass, attention_weights
from .merge import merge_attention
from .spans import DenseSpan, PageSpan, Span
from .table import Append, SpanTable

__all__ = [
    "Append",
    "DenseSpan",
    "Gathered",
    "PageSpan",
    "Span",
    "SpanTable",
    "attend",
    "attend_heads",
    "attention_mass",
    "attention_weights",
    "gather_tokens",
    "merge_attention",
    "softmax_weights",
]
