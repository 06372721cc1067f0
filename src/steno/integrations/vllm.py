"""vLLM's blocks in a store of steno: a KV connector, loaded by its module path (vLLM 0.32's `KVConnectorBase_V1`).

    LLM(model, kv_transfer_config=KVTransferConfig(
        kv_connector="StenoConnector", kv_connector_module_path="steno.integrations.vllm", kv_role="kv_both",
        kv_load_failure_policy="recompute", kv_connector_extra_config={"store": "/var/cache/steno"}))

Of `kv_connector_extra_config`: `store`, a folder or URL as `Store` takes it; optional `tenant`, `quota_bytes`, `key_file`, and
`model`, which names the weights where they lie in no local folder. A block is stored losslessly as it lies in memory, under the
address of its content: weights, layout, processor, tokens up to its end, and the `cache_salt` of its request. It is loaded before
the pass that needs it; one that is damaged is reported to vLLM, which computes it again (`recompute`) or fails the request
(`fail`), and taken out of the store.
Refused: tensor or pipeline parallelism, several kinds of caches in one model, quantized caches, and blocks of an unknown shape.
Left alone: requests with images, LoRA adapters or embeddings in place of tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from steno.errors import BadArgument, CacheError, DamagedFile, StoreError
from steno.integrations.blocks import block_parts, read_block, weights_fingerprint
from steno.store.address import CHUNK, next_address, root_of
from steno.store.store import Store, read_key

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A block that is to be loaded or stored: its name and place. before, tokens: what its name is made of, to store it."""

    name: str
    block_id: int
    before: bytes = b""
    tokens: tuple[int, ...] = ()


@dataclass
class Transfers(KVConnectorMetadata):
    """What the worker is to do around one pass."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)


@dataclass
class Tracked:
    """A request as the scheduler knows it. addresses: before each whole block of its prompt, and behind the last."""

    tokens: list[int]
    addresses: list[bytes]
    block_ids: list[int] = field(default_factory=list)
    loads: range = range(0)

    @property
    def num_blocks(self) -> int:
        return len(self.addresses) - 1


class StenoConnector(KVConnectorBase_V1):
    """Stores and loads whole blocks of prompts. Raises `BadArgument` or `CacheError` for what it does not know."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        options = self._kv_transfer_config.get_from_extra_config
        source = options("store", None)
        if not source:
            raise BadArgument("`kv_connector_extra_config` must say where the `store` is.")
        key_file = options("key_file", None)
        self._store = Store(
            source,
            tenant=options("tenant", ""),
            quota_bytes=options("quota_bytes", None),
            key=read_key(Path(key_file)) if key_file else None,
        )
        self._block_tokens = _checked_block_tokens(vllm_config, kv_cache_config)
        self._about = _about(vllm_config, options("model", None), self._block_tokens)
        self._requests: dict[str, Tracked] = {}
        self._present: set[str] = set()  # as far as the scheduler knows
        self._layers: list[Tensor] = []  # [blocks, H, N, C] of each layer
        self._failed: set[int] = set()

    # the scheduler's side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens behind those computed the store has, in whole blocks; one token at least is left to compute."""
        tracked = self._track(request)
        if tracked is None:
            return 0, False
        try:
            self._present = {entry.name for entry in self._store.entries()}
        except StoreError as error:
            logger.warning("requests are computed without their store: %s", error)
            return 0, False
        most = (len(tracked.tokens) - 1) // self._block_tokens
        first = num_computed_tokens // self._block_tokens
        last = first
        while last < min(most, tracked.num_blocks) and _name(tracked.addresses[last + 1]) in self._present:
            last += 1
        tracked.loads = range(first, last)
        return (last - first) * self._block_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Keeps of what was found as many blocks as vLLM wants."""
        tracked = self._requests.get(request.request_id)
        if tracked is not None:
            first = tracked.loads.start
            tracked.loads = range(first, first + num_external_tokens // self._block_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        """The blocks to load before the next pass, and those that are complete behind it."""
        found, scheduled = Transfers(), scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            if (tracked := self._requests.get(new.req_id)) is not None:
                tracked.block_ids = list(new.block_ids[0])
                self._add(found, tracked, new.num_computed_tokens, scheduled[new.req_id])
        going_on = scheduler_output.scheduled_cached_reqs
        for i, req_id in enumerate(going_on.req_ids):
            if (tracked := self._requests.get(req_id)) is None:
                continue
            new_ids = going_on.new_block_ids[i]
            if new_ids is not None:
                before = [] if req_id in going_on.resumed_req_ids else tracked.block_ids
                tracked.block_ids = [*before, *new_ids[0]]
            self._add(found, tracked, going_on.num_computed_tokens[i], scheduled[req_id])
        return found

    def _add(self, found: Transfers, tracked: Tracked, num_computed: int, num_scheduled: int) -> None:
        for i in tracked.loads:
            found.loads.append(Transfer(name=_name(tracked.addresses[i + 1]), block_id=tracked.block_ids[i]))
        tracked.loads = range(0)
        size = self._block_tokens
        for i in range(num_computed // size, min((num_computed + num_scheduled) // size, tracked.num_blocks)):
            name = _name(tracked.addresses[i + 1])
            tokens = tuple(tracked.tokens[i * size : (i + 1) * size])
            found.saves.append(
                Transfer(name=name, block_id=tracked.block_ids[i], before=tracked.addresses[i], tokens=tokens)
            )

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forgets a request; its blocks may be used again at once."""
        self._requests.pop(request.request_id, None)
        return False, None

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # what is not stored is computed again

    def _track(self, request: Any) -> Tracked | None:
        if request.request_id in self._requests:
            return self._requests[request.request_id]
        if request.mm_features or request.lora_request is not None or not request.prompt_token_ids:
            return None
        tokens, size = list(request.prompt_token_ids), self._block_tokens
        about = self._about | {"salt": getattr(request, "cache_salt", None)}
        addresses = [root_of(about, "full", self._store.tenant, self._store.secret)]
        for first in range(0, len(tokens) // size * size, size):
            addresses.append(next_address(addresses[-1], tokens[first : first + size]))
        tracked = self._requests[request.request_id] = Tracked(tokens=tokens, addresses=addresses)
        return tracked

    # the worker's side

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Takes the caches of all layers, `[blocks, H, N, C]`; raises `CacheError` for any other shape."""
        for name, x in kv_caches.items():
            if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2] != self._block_tokens or x.dtype not in DTYPES:
                what = f"{x.dtype} {[*x.shape]}" if isinstance(x, Tensor) else type(x).__name__
                raise CacheError(
                    f"the cache of {name} must be [blocks, heads, {self._block_tokens}, numbers] of 16- or 32-bit floats; it is "
                    f"{what}: this layout cannot be stored."
                )
        self._layers = [kv_caches[name] for name in sorted(kv_caches, key=_layer_order)]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads the blocks of this pass; those that cannot be are told in `get_block_ids_with_load_errors`."""
        for load in self._transfers().loads:
            try:
                data = self._store.get(load.name)
                if data is None:
                    raise DamagedFile(f"{load.name} is gone.")
                numbers = read_block(load.name, data, like=[x[0] for x in self._layers])
            except (DamagedFile, StoreError) as error:
                logger.warning("a block cannot be loaded and is left to vLLM: %s", error)
                self._failed.add(load.block_id)
                self._forget(load.name)
                continue
            for x, layer in zip(numbers, self._layers, strict=True):
                layer[load.block_id].copy_(x)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything was loaded before the pass began."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing yet: a block is stored with all of its layers."""

    def wait_for_save(self) -> None:
        """Stores the blocks that this pass has completed, unless they are there."""
        if self._failed_in_this_pass:
            return  # what was computed from a block that was not loaded is computed again, and stored then
        for save in self._transfers().saves:
            try:
                if self._store.get(save.name) is None:
                    layers = [layer[save.block_id].cpu() for layer in self._layers]
                    self._store.put(save.name, block_parts(save.before, save.tokens, layers, self._about))
            except (DamagedFile, StoreError) as error:
                logger.warning("a block is not stored: %s", error)

    def get_block_ids_with_load_errors(self) -> set[int]:
        found, self._failed = self._failed, set()
        return found

    @property
    def _failed_in_this_pass(self) -> bool:
        return bool(self._failed)

    def _forget(self, name: str) -> None:
        try:
            self._store.remove(name)
        except StoreError as error:
            logger.warning("a damaged block stays in the store: %s", error)

    def _transfers(self) -> Transfers:
        found = self._get_connector_metadata()
        assert isinstance(found, Transfers), "the scheduler's side made it"
        return found


def _name(address: bytes) -> str:
    return address.hex() + CHUNK


def _layer_order(name: str) -> list[tuple[int, str]]:
    """`model.layers.10.…` after `model.layers.9.…`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _checked_block_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens of a block; raises `CacheError` for an engine whose blocks are not known."""
    parallel, groups = vllm_config.parallel_config, kv_cache_config.kv_cache_groups
    if parallel.tensor_parallel_size != 1 or parallel.pipeline_parallel_size != 1:
        raise CacheError(
            "the connector stores the blocks of one worker; run vLLM without tensor or pipeline parallelism."
        )
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        kinds: Sequence[str] = [type(group.kv_cache_spec).__name__ for group in groups]
        raise CacheError(f"the connector knows models of full attention alone; this one has {', '.join(kinds)}.")
    if vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"):
        raise CacheError(
            f"the connector stores plain caches; got kv_cache_dtype={vllm_config.cache_config.cache_dtype!r}."
        )
    return int(groups[0].kv_cache_spec.block_size)


def _about(vllm_config: Any, named: str | None, block_tokens: int) -> dict[str, Any]:
    """What the numbers of a block depend on beside its tokens; raises `BadArgument` if the weights cannot be told."""
    import vllm

    model = vllm_config.model_config
    weights = named or weights_fingerprint(Path(model.model))
    if not weights:
        raise BadArgument(
            f"the weights of {model.model} lie in no local folder: name them in `kv_connector_extra_config`, e.g. by the commit "
            "on the hub: model='org/name@commit'."
        )
    return {
        "engine": f"vllm {vllm.__version__}",
        "weights": weights,
        "quantization": model.quantization,
        "dtype": str(model.dtype).removeprefix("torch."),
        "block_tokens": block_tokens,
        "config": model.compute_hash(),
        "processor": sorted(name for name, there in torch.cpu.get_capabilities().items() if there),
        "device": str(vllm_config.device_config.device_type),
    }
