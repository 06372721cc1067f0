"""The one loop of all decoders: propose, forward, accept, commit, roll back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, final

import torch
from torch import Tensor

from steno.decode.sampler import Sampler
from steno.errors import BadArgument

Proposer = Callable[[Sequence[int]], list[int]]
"""Called with all tokens so far; returns draft tokens for the next positions, maybe none."""


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward pass committed.

    token_ids: one token or more. text: what they add to the answer, empty while a character is incomplete.
    logprobs: `[n, V]` log-probabilities behind each token, before any filter of the sampler; None unless asked for.
    num_draft_tokens: how many tokens were proposed; nfe: forward passes so far in this answer.
    """

    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: Tensor | None = None
    num_draft_tokens: int = 0
    nfe: int = 1


def propose_nothing(history: Sequence[int]) -> list[int]:
    """The proposer of plain decoding."""
    return []


def decode_steps(
    model: Any,
    cache: Any,
    new_tokens: Sequence[int],
    *,
    history: Sequence[int] = (),
    sampler: Sampler,
    max_new_tokens: int,
    end_tokens: frozenset[int] = frozenset(),
    proposer: Proposer = propose_nothing,
    keep_logprobs: bool = False,
    announce: Callable[[list[int]], None] | None = None,
) -> Iterator[Step]:
    """Decodes after `new_tokens`, which enter the cache with the first pass. Mutates the cache.

    A draft token is accepted where the sampler draws the same token, so the result is that of plain decoding whatever the
    proposer is. An end token is committed and ends the loop. Closing the generator leaves the cache consistent. announce:
    called with the tokens of each pass before it.
    """
    tokens = list(history) + list(new_tokens)
    if not new_tokens:
        raise BadArgument("`new_tokens` must hold at least one token to continue from; got none.")
    pending, drafts = list(new_tokens), list[int]()
    drafting = proposer is not propose_nothing
    made = nfe = 0
    while made < max_new_tokens:
        if announce is not None:
            announce(pending + drafts)
        inputs = torch.tensor([pending + drafts], dtype=torch.long, device=model.device)
        with torch.inference_mode():
            logits = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=len(drafts) + 1).logits[
                0
            ]  # [K + 1, V]
        nfe += 1
        accepted = _accept(logits, drafts, tokens, sampler, end_tokens, max_new_tokens - made)
        if nfe > 1 and drafting:
            cache.crop(len(accepted) - 1 - len(drafts))  # 0 too: layers that record the past let go of it then
        made += len(accepted)
        logprobs = logits[: len(accepted)].float().log_softmax(-1) if keep_logprobs else None
        yield Step(token_ids=tuple(accepted), logprobs=logprobs, num_draft_tokens=len(drafts), nfe=nfe)
        if accepted[-1] in end_tokens:
            return
        if nfe == 1 and drafting:
            cache.activate_past_recording()
        pending, drafts = [accepted[-1]], proposer(tokens)[: max_new_tokens - made - 1]


def forced_steps(
    model: Any,
    cache: Any,
    new_tokens: Sequence[int],
    answer: Sequence[int],
    *,
    passes: Iterable[int] = repeat(1),
    announce: Callable[[list[int]], None] | None = None,
) -> Iterator[Step]:
    """Teacher forcing: decodes just the tokens of `answer`, with the log-probabilities behind each. Mutates the cache.

    passes: how many tokens of the answer each forward pass is behind, 1 or more; as many of them as it takes. announce: as
    in `decode_steps`. Raises BadArgument where the passes end before the answer, or one has no token.
    """
    pending, left, sizes, nfe = list(new_tokens), list(answer), iter(passes), 0
    while left:
        count = next(sizes, 0)
        if count < 1:
            raise BadArgument(f"`passes` must be numbers >= 1 that add up to the answer; {len(left)} tokens are left.")
        wanted, left = left[:count], left[count:]
        inputs = pending + wanted[:-1]
        if announce is not None:
            announce(inputs)
        ids = torch.tensor([inputs], dtype=torch.long, device=model.device)
        with torch.inference_mode():
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=len(wanted)).logits[0]  # [n, V]
        nfe += 1
        yield Step(token_ids=tuple(wanted), logprobs=logits.float().log_softmax(-1), nfe=nfe)
        pending = wanted[-1:]


def _accept(
    logits: Tensor, drafts: list[int], tokens: list[int], sampler: Sampler, end_tokens: frozenset[int], limit: int
) -> list[int]:
    """Draws position by position as long as the draft is what is drawn; appends to `tokens`."""
    accepted = []
    for i in range(min(len(drafts) + 1, limit)):
        token = sampler(logits[i], tokens)
        accepted.append(token)
        tokens.append(token)
        if token in end_tokens or i == len(drafts) or token != drafts[i]:
            break
    return accepted
