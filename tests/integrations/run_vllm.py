"""One start of vLLM with the connector, in a process of its own and vLLM's environment: prints what came of it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("store")
    parser.add_argument("--prompts", type=json.loads, required=True, help="lists of token ids")
    parser.add_argument("--salt")
    parser.add_argument("--kv-dtype", default="auto")
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(
        kv_connector="StenoConnector",
        kv_connector_module_path="steno.integrations.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"store": arguments.store},
    )
    llm = LLM(
        arguments.model, dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=4, skip_tokenizer_init=True,
        kv_cache_dtype=arguments.kv_dtype, kv_transfer_config=transfer, block_size=32, enable_prefix_caching=False,
        max_num_batched_tokens=256,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": ids} | ({"cache_salt": arguments.salt} if arguments.salt else {})
        for ids in arguments.prompts
    ]
    outputs = [llm.generate(prompt, sampling, use_tqdm=False)[0] for prompt in prompts]
    told = [{"tokens": list(out.outputs[0].token_ids), "cached": out.num_cached_tokens} for out in outputs]
    print("RESULT " + json.dumps(told))


if __name__ == "__main__":
    sys.exit(main())
