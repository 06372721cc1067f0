"""How many tokens a budget in bytes allows: those that surely fit, and those that turn out to fit once they are chosen."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from steno.cache.policy import LayerPolicy, SegmentEncoder
from steno.errors import BudgetError
from steno.kernels.attention.table import Column
from steno.kernels.quant import page_bytes
from steno.recipe import Recipe
from steno.types import PAGE_TOKENS, LayerKV, Need

ATTEMPTS = 5
"""How often the number of tokens between those that surely fit and the most is halved."""

T = TypeVar("T")


@final
@dataclass(frozen=True, kw_only=True)
class LayerRoom:
    """What the tokens of a layer may take of a budget in bytes, `num_bytes`, and what they take at most.

    dense: bytes of a token of one head that is stored as it is; beside: those of them that a token takes in a page or chunk
    too, beside its numbers; slots: of what an evictor holds of it. per_page: bytes of a page of one head, None without
    pages; encoder: what stores tokens where there are none. unit: heads that all keep as many tokens store multiples of
    it, others of a page or chunk. plain: tokens of each head that a transform leaves as they are, which `num_bytes` counts
    already. fixed: bytes of the layer beside all these. excess: tokens per head that layers may keep more on average.
    """

    recipe: Recipe
    num_bytes: int
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    dense: int
    beside: int
    slots: int
    per_page: int | None
    encoder: SegmentEncoder | None
    unit: int
    plain: int
    num_layers: int
    fixed: int
    excess: int

    @classmethod
    def of(cls, recipe: Recipe, policy: LayerPolicy, kv: LayerKV, num_layers: int, prompt_tokens: int) -> LayerRoom:
        """The room of one layer in a budget in bytes. prompt_tokens: of the whole prompt."""
        heads, dim, size = kv.num_kv_heads, kv.head_dim, kv.keys.element_size()
        layer_bytes = recipe.budget.layer_bytes(prompt_tokens * heads * 2 * dim * size, num_layers)
        counts = 4 if recipe.merge is not None and recipe.merge.counts_tokens else 0
        bounds = plain = 0
        fixed = heads * (-(-prompt_tokens // 8) + 4 * 8 * len(Column) + 8)  # bitmap, span table, offsets
        if recipe.access is not None and policy.selector is not None:
            bounds, once = recipe.access.index_bytes(dim, size)
            bounds += 1  # a page of the layout takes 8 bytes
            if Need.TOKEN_TEXT in policy.needs:
                fixed += 4 * prompt_tokens  # the sentence of each token, once for all layers
            fixed += heads * (once + 4 * 6 * 8 + 5 * 8) + 8  # the rest of the layout
        beside = bounds + counts
        dense = 2 * dim * size + beside
        for transform in recipe.transform:
            # a table of spans for each basis, and tokens that stay plain; a narrower basis may leave room
            own = transform.first_tokens + transform.recent_tokens
            fixed += heads * 24 + 8 + transform.basis_bytes(heads, dim, num_layers) + heads * own * dense
            plain += own
        if recipe.share is not None:
            fixed += heads * 24 + 8 + recipe.share.fixed_bytes(heads, dim, num_layers)
        fmt, encoder = policy.page_format, policy.encoder
        return cls(
            recipe=recipe,
            num_bytes=layer_bytes - fixed,
            num_tokens=kv.num_tokens,
            num_kv_heads=heads,
            head_dim=dim,
            dense=dense,
            beside=beside,
            slots=8 if policy.evictor is not None else 0,
            per_page=None if fmt is None else page_bytes(fmt, dim) + beside * PAGE_TOKENS,
            encoder=encoder,
            unit=encoder.chunk_tokens if encoder is not None else policy.residual_tokens,
            plain=plain,
            num_layers=num_layers,
            fixed=fixed,
            excess=num_layers // 2 if recipe.allocate is not None and recipe.allocate.by_layer else 0,
        )

    def sure_tokens(self) -> int:
        """The most tokens per head that surely fit, whichever they are; raises BudgetError if a method always keeps more."""
        tokens = bisect_right(range(1, self.num_bytes + 1), self.num_bytes, key=self._bytes_at_most)
        score = self.recipe.score
        least = 1 if score is None else max(1, min(score.min_tokens, self.num_tokens))
        if tokens < least and self.num_tokens:
            count = "one token" if score is None or least == 1 else f"the {least} tokens that {score.id} always keeps"
            raise BudgetError(
                f"a budget of {self.recipe.budget} is {self.num_bytes + self.fixed} bytes per layer, too little for {count} "
                f"per KV head: it must be at least {self.num_layers * (self.fixed + self._bytes_at_most(least))} bytes."
            )
        return tokens

    def most(self, attempt: Callable[[int], T | None], sure: int) -> T | None:
        """What `attempt` makes of the most tokens per head, above `sure`, with which it is not None; None: of no more.

        Looked for from above, as if nothing stayed dense, then in whole units, then by halves.
        """
        high = min(self.num_tokens, self._tokens_without_rest())
        best, low, whole = None, sure, high // self.unit * self.unit
        for i in range(ATTEMPTS + 2):
            tokens = (high, whole)[i] if i < 2 else (low + high) // 2
            if tokens <= low:
                continue
            found = attempt(tokens)
            if found is None:
                high = tokens
            elif tokens == high:
                return found
            else:
                best, low = found, tokens
        return best

    def bytes_of(self, lengths: Sequence[int], *, is_ragged: bool = False) -> int:
        """Bytes at most of heads that keep so many tokens. is_ragged: they are stored as if these differed."""
        unit = self.unit if len(set(lengths)) == 1 and not is_ragged else self._chunk
        wholes = [max(0, n - self.plain) // unit * unit for n in lengths]
        rest = sum(max(0, n - self.plain - whole) for n, whole in zip(lengths, wholes, strict=True))
        if not any(wholes):
            return rest * self.dense
        if self.per_page is None:
            return self._stored_bytes(-(-sum(wholes) // len(wholes)), len(wholes)) + rest * self.dense
        return sum(wholes) // PAGE_TOKENS * self.per_page + rest * self.dense

    @property
    def _chunk(self) -> int:
        return PAGE_TOKENS if self.encoder is None else self.encoder.chunk_tokens

    def _tokens_without_rest(self) -> int:
        if self.per_page is None:
            sizes = range(1, self.num_tokens + 1)
            return bisect_right(sizes, self.num_bytes, key=lambda n: self._stored_bytes(n, self.num_kv_heads))
        return max(0, self.num_bytes) * PAGE_TOKENS // (self.num_kv_heads * self.per_page)

    def _bytes_at_most(self, tokens: int) -> int:
        """What so many tokens per head, on average, need in the worst case; never less for more tokens."""
        heads, tokens = self.num_kv_heads, tokens + self.excess
        if self.per_page is None and self.encoder is None:
            return heads * (tokens + (1 if self.slots else 0)) * (self.dense + self.slots)
        # every head holds a dense remainder just below a chunk or a residual
        unit = max(self._chunk, self.unit)
        most = self._stored_bytes(tokens, heads) + heads * (unit - 1) * self.dense
        if tokens >= 2 * unit:
            return most
        # a few take no more than if all were dense, or each in the only chunk of its head where that takes more
        chunk = -(-self._stored_bytes(self._chunk, 1) // self._chunk)
        return min(most, heads * tokens * max(self.dense, chunk))

    def _stored_bytes(self, tokens: int, heads: int) -> int:
        """What pages or an encoder need for so many tokens per head, on average."""
        if self.per_page is not None:
            return -(-tokens // PAGE_TOKENS) * heads * self.per_page
        assert self.encoder is not None, "asked of a recipe that stores tokens"
        bound = self.encoder.bytes_bound(tokens, num_kv_heads=heads, head_dim=self.head_dim)
        if bound is None:
            name = self.recipe.quantize.id if self.recipe.quantize is not None else ""
            raise BudgetError(
                f"{name} cannot say how many bytes it needs, so a budget of {self.recipe.budget} cannot be kept: give "
                "tokens per KV head (`512`) or a share of the prompt (`20%`)."
            )
        return bound + tokens * heads * self.beside
