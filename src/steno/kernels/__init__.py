"""Plain functions on tensors: attention over spans of tokens, and the packing of quantized pages."""
