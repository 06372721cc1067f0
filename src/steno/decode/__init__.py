"""Decoding: propose tokens, run one forward pass over them, accept some, commit them and roll the rest back."""
