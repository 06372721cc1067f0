"""transformers as the host: the attention function and the mask function that are registered under the name `steno`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from steno.cache.layer import LayerCache
from steno.errors import UnsupportedAttention

NAME = "steno"

# keyword arguments of attention that change nothing in the result, or are handled by name
HARMLESS = frozenset(
    {
        "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position",
        "is_causal", "sliding_window", "softcap", "s_aux", "logits_to_keep", "past_key_values", "labels",
        "num_items_in_batch", "output_router_logits", "inputs_embeds", "input_ids", "position_embeddings",
        "shared_kv_states",
    }
)  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class HostMask:
    """The mask of one forward pass, not built: rows and lengths, and how to build it for a layer that needs it dense.

    counts: real new tokens per row if the batch is padded on the left, None if nothing is padded.
    reason: why a plain causal layer cannot use this mask; empty if it can.
    """

    counts: list[int] | None
    reason: str
    arguments: dict[str, Any]
    built: list[Tensor | None] = field(default_factory=list)

    def dense(self) -> Tensor | None:
        """The mask as transformers' SDPA takes it, built once; for layers that keep transformers' own cache."""
        if not self.built:
            self.built.append(sdpa_mask(**self.arguments))
        return self.built[0]


def host_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> HostMask:
    """The mask function of the host; see `transformers.masking_utils.sdpa_mask` for the arguments."""
    reason = "" if mask_function is causal_mask_function else "its mask is not plainly causal"
    counts = None
    if attention_mask is not None and not reason:
        counts, reason = _padding(attention_mask, q_length, q_offset)
    arguments = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return HostMask(counts=counts, reason=reason, arguments=arguments)


def _padding(mask: Tensor, q_length: int, q_offset: int) -> tuple[list[int] | None, str]:
    """Real new tokens per row of a 2-D mask `[B, seen + T]`; a reason instead if it is not left padding."""
    if mask.shape[1] != q_offset + q_length:
        return None, f"its attention mask covers {mask.shape[1]} tokens instead of {q_offset + q_length}"
    if bool(mask.all()):
        return None, ""
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        return None, "its attention mask has padding or holes after the first token, and only left padding is supported"
    new = mask[:, q_offset:].sum(1).tolist()
    return (None if min(new) == q_length else new), ""


def steno_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: HostMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of the host: query `[B, H, T, D]` to `[B, T, H, D]`.

    key and value are the `LayerCache` itself where the layer is ours, tensors `[B, Hkv, S, D]` where it is transformers'
    own (sliding window, or no cache at all). Raises UnsupportedAttention instead of being silently wrong.
    """
    if isinstance(key, LayerCache):
        return _attend_cache(module, query, key, attention_mask, dropout, scaling, kwargs), None
    mask = attention_mask.dense() if isinstance(attention_mask, HostMask) else attention_mask
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if softcap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout:
        raise UnsupportedAttention(
            f"attention dropout of {dropout} with soft cap or sinks; set it to 0 or call eval()."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _dense_attention(query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
    return out.transpose(1, 2).contiguous(), None


def is_attention(module: Any) -> bool:
    """Whether a module is one that calls `steno_attention`: it knows its layer, and whether it is causal."""
    flags = getattr(module, "layer_idx", None), getattr(module, "is_causal", None)
    return isinstance(flags[0], int) and isinstance(flags[1], bool)


def _attend_cache(
    module: torch.nn.Module,
    query: Tensor,
    layer: LayerCache,
    mask: Any,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    where = f"layer {layer.layer_idx} of {type(module).__name__}"
    if dropout:
        raise UnsupportedAttention(f"{where}: attention dropout of {dropout} in training mode; call model.eval().")
    if isinstance(mask, Tensor):
        raise UnsupportedAttention(f"{where}: a ready-made 4-D attention mask; pass the 2-D padding mask instead.")
    if mask is not None and mask.reason:
        raise UnsupportedAttention(f"{where} cannot be computed exactly: {mask.reason}.")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(f"{where}: attention that is not causal.")
    if kwargs.get("output_attentions"):
        raise UnsupportedAttention(
            f"{where}: output_attentions=True; the weights are never built. Use 'eager' for them."
        )
    window = kwargs.get("sliding_window")
    if window is not None and layer.seen + query.shape[2] > window:
        raise UnsupportedAttention(
            f"{where}: a sliding window of {window} in a layer that the configuration calls full attention."
        )
    unknown = [name for name, x in kwargs.items() if name not in HARMLESS and isinstance(x, (Tensor, float, dict))]
    if unknown:
        raise UnsupportedAttention(f"{where}: unknown argument of attention: {', '.join(sorted(unknown))}.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    counts = mask.counts if mask is not None else None
    out = layer.attend(query, counts, scale=scale, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)
    return out.transpose(1, 2).contiguous()


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass under autograd run, and makes a backward pass through the cache an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise UnsupportedAttention("there is no gradient through steno's cache; train with use_cache=False.")


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Explicit attention for transformers' own layers with a soft cap or sinks; mask: bool, True takes part, or None."""
    num_rows, num_heads, num_new, _ = q.shape
    num_kv_heads, num_keys = k.shape[1], k.shape[2]
    if mask is None and num_new > 1:
        mask = torch.ones(num_new, num_keys, dtype=torch.bool, device=q.device).tril_(num_keys - num_new)
    grouped = q.reshape(num_rows, num_kv_heads, -1, num_new, q.shape[3])
    logits = torch.einsum("bkgtd,bksd->bkgts", grouped, k) * scale  # [B, Hkv, G, T, S]
    logits = logits.reshape(num_rows, num_heads, num_new, num_keys)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    logits = logits.float()
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(num_rows, -1, num_new, 1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :num_keys].to(v.dtype)
    out = torch.einsum("bkgts,bksd->bkgtd", weights.reshape(num_rows, num_kv_heads, -1, num_new, num_keys), v)
    return out.reshape(num_rows, num_heads, num_new, v.shape[3])


def register() -> None:
    """Enters the name `steno` in transformers' two public registries. Called once, when steno is imported."""
    AttentionInterface.register(NAME, steno_attention)
    AttentionMaskInterface.register(NAME, host_mask)
