"""steno as a model of lm-evaluation-harness: every context is read under a recipe, then scored or continued.

`python -m steno.bench.lm_eval --model steno --model_args "pretrained=smollm2-135m,recipe=kvzip @ 50%" --tasks …` is the
harness's own command with one more model type; the harness finds no types in other packages by itself. A comma separates
model arguments there, so a recipe on this line cannot have a stage with two arguments.
The last token of a context is read after compression: it is what the first token is predicted from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, final

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from steno.context import Context
from steno.decode.sampler import Sampling
from steno.errors import BadArgument
from steno.models.load import DEFAULT_MODEL
from steno.recipe import parse_recipe
from steno.session import load

MAX_NEW_TOKENS = 256


@register_model("steno")
@final
class StenoLM(TemplateLM):
    """A model under a recipe. Requests are answered one by one; a context that repeats is read once."""

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        recipe: str = "full",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.recipe = parse_recipe(recipe)
        # the harness asks for cuda:0 where nobody asked for a device
        is_default = device == "cuda:0" and not torch.cuda.is_available()
        self.lm = load(pretrained, dtype=dtype, device=None if is_default else device)
        self.tokenizer = self.lm.tokenizer
        self._last: tuple[tuple[int, ...], Context] | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self.lm.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.lm.tokenize(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for pair, context, continuation in tqdm(requests, disable=disable_tqdm, desc="log-likelihoods"):
            logprobs = self._logprobs(context, continuation)
            wanted = torch.tensor(continuation, device=logprobs.device)
            result = float(logprobs.gather(1, wanted[:, None]).sum()), bool((logprobs.argmax(-1) == wanted).all())
            found.append(result)
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def _logprobs(self, context: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Log-probabilities `[n, V]` behind each token of a continuation."""
        if len(context) > 1:
            steps = self._read(context[:-1]).follow_text([context[-1], *continuation])
            return torch.cat([step.logprobs for step in steps if step.logprobs is not None])
        # one token is nothing to compress
        tokens = torch.tensor([[*context, *continuation[:-1]]], device=self.lm.model.device)
        with torch.inference_mode():
            logits: torch.Tensor = self.lm.model(tokens, use_cache=False).logits[0, len(context) - 1 :]
        return logits.float().log_softmax(-1)

    def _read(self, tokens: Sequence[int]) -> Context:
        if self._last is None or self._last[0] != tuple(tokens):
            self._last = tuple(tokens), self.lm.read_tokens(tokens, self.recipe)
        return self._last[1]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise BadArgument(
            "rolling windows have no context that could be compressed; use `steno bench --task perplexity` or a task of "
            "another kind."
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="answers"):
            text, options = request.args
            tokens = self.tok_encode(text)
            if len(tokens) < 2:
                raise BadArgument(f"a context needs at least 2 tokens; got {text!r}.")
            stop = options.get("until") or []
            sampling = Sampling(temperature=options.get("temperature", 0.0) if options.get("do_sample") else 0.0)
            steps = self._read(tokens[:-1]).go_on(
                tokens[-1:],
                max_new_tokens=options.get("max_gen_toks", MAX_NEW_TOKENS),
                sampling=sampling,
                stop=[stop] if isinstance(stop, str) else [words for words in stop if words],
            )
            found.append("".join(step.text for step in steps))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found


if __name__ == "__main__":
    sys.exit(cli_evaluate())
