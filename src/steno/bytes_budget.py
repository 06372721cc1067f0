"""How many tokens a budget in bytes allows: those that surely fit, and those that turn out to fit once they are chosen."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import TypeVar, final

from steno.cache.policy import LayerPolicy, SegmentEncoder
from steno.errors import BudgetError
from steno.kernels.attention.table import Column
from steno.kernels.quant import page_bytes
from steno.recipe import Recipe
from steno.types import PAGE_TOKENS, LayerKV, Need, PageFormat, Widths

ATTEMPTS = 5
"""How often the number of tokens between those that surely fit and the most is halved."""

T = TypeVar("T")


@final
@dataclass(frozen=True, kw_only=True)
class LayerRoom:
    """What the tokens of a layer may take of a budget in bytes, `num_bytes`, and what they take at most.

    plain: what a token is before it is stored. beside: bytes of a token of one head beside its numbers, in a page or chunk
    too; slots: of what an evictor holds of it. fmt, encoder: what stores tokens; none where they stay in a float format.
    unit: heads that all keep as many tokens store multiples of it, others of a page or chunk. num_plain: tokens of each
    head that a transform leaves as they are, which `num_bytes` counts already. num_sharing: layers that share what they
    store, this one included; 1 where it is stored for the layer alone, or where that is not known. fixed: bytes of the layer
    beside all these. excess: tokens per head that layers may keep more on average.
    """

    recipe: Recipe
    num_bytes: int
    num_tokens: int
    num_layers: int
    number_bytes: int
    plain: Widths
    beside: int
    slots: int
    fmt: PageFormat | None
    encoder: SegmentEncoder | None
    unit: int
    num_plain: int
    num_sharing: int
    fixed: int
    excess: int

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        policy: LayerPolicy,
        kv: LayerKV,
        num_layers: int,
        prompt_tokens: int,
        num_sharing: int | None = None,
    ) -> LayerRoom:
        """The room of one layer in a budget in bytes.

        prompt_tokens: of the whole prompt. num_sharing: layers that share, one if it does so with none; None: not known.
        """
        heads, dim, size = kv.num_kv_heads, kv.head_dim, kv.keys.element_size()
        layer_bytes = recipe.budget.layer_bytes(prompt_tokens * heads * 2 * dim * size, num_layers)
        counts = 4 if recipe.merge is not None and recipe.merge.counts_tokens else 0
        bounds = num_plain = 0
        fixed = heads * (-(-prompt_tokens // 8) + 4 * 8 * len(Column) + 8)  # bitmap, span table, offsets
        if recipe.access is not None and policy.selector is not None:
            bounds, once = recipe.access.index_bytes(dim, size)
            bounds += 1  # a page of the layout takes 8 bytes
            if Need.TOKEN_TEXT in policy.needs:
                fixed += 4 * prompt_tokens  # the sentence of each token, once for all layers
            fixed += heads * (once + 4 * 6 * 8 + 5 * 8) + 8  # the rest of the layout
        beside = bounds + counts
        plain = Widths(heads=heads, keys=dim, values=dim)
        widths = plain
        for transform in recipe.transform:
            # a table of spans for each basis, and tokens that stay plain
            own = transform.first_tokens + transform.recent_tokens
            fixed += heads * 24 + 8 + transform.basis_bytes(widths, num_layers, size)
            fixed += heads * own * (2 * dim * size + beside)
            num_plain += own
            widths = transform.stored(widths)
        if recipe.share is not None:
            fixed += heads * 24 + 8
            if num_sharing is None:
                fixed += recipe.share.fixed_bytes(plain, num_layers, size)
        encoder = policy.encoder
        return cls(
            recipe=recipe,
            num_bytes=layer_bytes - fixed,
            num_tokens=kv.num_tokens,
            num_layers=num_layers,
            number_bytes=size,
            plain=plain,
            beside=beside,
            slots=8 if policy.evictor is not None else 0,
            fmt=policy.page_format,
            encoder=encoder,
            unit=encoder.chunk_tokens if encoder is not None else policy.residual_tokens,
            num_plain=num_plain,
            num_sharing=num_sharing or 1,
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
        stored = self._tokens_at_best()
        high = min(self.num_tokens, self.num_plain + stored)
        best, low, whole = None, sure, min(self.num_tokens, self.num_plain + stored // self.unit * self.unit)
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

    def most_alike(self, sure: int) -> int:
        """The most tokens, at least `sure`, that fit where every head keeps as many."""
        heads = self.plain.heads
        return self.most(lambda n: n if self.bytes_of([n] * heads) <= self.num_bytes else None, sure) or sure

    def bytes_of(self, lengths: Sequence[int], *, is_ragged: bool = False) -> int:
        """Bytes at most of heads that keep so many tokens. is_ragged: they are stored as if these differed."""
        unit = self.unit if len(set(lengths)) == 1 and not is_ragged else self.chunk_tokens
        wholes = [max(0, n - self.num_plain) // unit * unit for n in lengths]
        rest = sum(max(0, n - self.num_plain - whole) for n, whole in zip(lengths, wholes, strict=True))
        return (self._whole_bytes(Fraction(sum(wholes), len(wholes))) if any(wholes) else 0) + rest * self._dense

    @property
    def chunk_tokens(self) -> int:
        """Whole numbers of so many tokens can be stored."""
        if self.encoder is not None:
            return self.encoder.chunk_tokens
        return 1 if self.fmt is None else PAGE_TOKENS

    @property
    def _dense(self) -> int:
        """Bytes of a token of one head that is not stored."""
        return (self.plain.keys + self.plain.values) * self.number_bytes + self.beside

    @property
    def _stores(self) -> bool:
        """Whether tokens take another form than that in which they wait."""
        recipe = self.recipe
        return recipe.quantize is not None or recipe.share is not None or bool(recipe.transform)

    def _tokens_at_best(self) -> int:
        """Those of each head that may be stored, with the rest that fits beside them as far as it fills no unit."""
        stored = bisect_right(range(1, self.num_tokens + 1), self.num_bytes, key=self._whole_bytes)
        left = self.num_bytes - (self._whole_bytes(stored) if stored else 0)
        return stored + max(0, min(self.unit - 1, left // (self.plain.heads * self._dense)))

    def _bytes_at_most(self, tokens: int) -> int:
        """What so many tokens per head, on average, need in the worst case; never less for more tokens."""
        heads, tokens = self.plain.heads, tokens + self.excess
        if not self._stores:
            return heads * (tokens + (1 if self.slots else 0)) * (self._dense + self.slots)
        # every head holds a dense remainder just below a chunk or a residual
        unit = max(self.chunk_tokens, self.unit)
        most = self._whole_bytes(tokens) + heads * (unit - 1) * self._dense
        if tokens >= 2 * unit:
            return most
        # a few take no more than if all were dense, or each in the only chunk of its head where that takes more
        chunk = -(-self._whole_bytes(self.chunk_tokens) // self.chunk_tokens)
        return min(most, tokens * max(heads * self._dense, chunk))

    def _whole_bytes(self, tokens: int | Fraction) -> int:
        """What pages, chunks or segments need for so many tokens per head, on average."""
        beside = ceil(tokens * self.plain.heads * self.beside)
        if self.recipe.share is not None and self.num_sharing > 1:  # all heads keep the same tokens
            return beside + self.recipe.share.shared_bytes(int(tokens), self.plain, self.num_sharing, self)
        return beside + self.stored_bytes(tokens, self.plain)

    def stored_bytes(self, num_tokens: int | Fraction, widths: Widths) -> int:
        """The most bytes of so many tokens of these widths per head, on average: transformed, and in pages or chunks."""
        bases = 0
        for transform in self.recipe.transform:
            if self.num_sharing > 1:  # fit to what is common, and beside that of the layer
                bases += transform.basis_bytes(widths, 1, self.number_bytes)
            widths = transform.stored(widths)
        beside = bases + ceil(num_tokens * widths.beside)
        if self.fmt is not None:
            pages = ceil(Fraction(num_tokens * widths.heads, PAGE_TOKENS))
            return beside + pages * page_bytes(self.fmt, widths.keys, widths.values)
        if self.encoder is None:
            return beside + ceil(num_tokens * widths.heads * (widths.keys + widths.values) * self.number_bytes)
        width = max(widths.keys, widths.values)  # an encoder takes no others
        bound = self.encoder.bytes_bound(ceil(num_tokens), num_kv_heads=widths.heads, head_dim=width)
        if bound is None:
            name = self.recipe.quantize.id if self.recipe.quantize is not None else ""
            raise BudgetError(
                f"{name} cannot say how many bytes it needs, so a budget of {self.recipe.budget} cannot be kept: give "
                "tokens per KV head (`512`) or a share of the prompt (`20%`)."
            )
        return beside + bound
