"""Rows as Ray tasks on a cluster that is there: an actor for each node, or for each GPU, holds the model."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from steno.bench.plan import FULL, Group
from steno.bench.rows import Row, append_row
from steno.bench.run import Bench, Tick
from steno.bench.summary import Subject
from steno.errors import BadArgument, StenoError
from steno.session import load

CONNECT_S = 10


@final
@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a worker loads."""

    model: str
    dtype: str | None
    device: str | None
    seed: int


class Worker:
    """Lives on the cluster and measures for one caller at a time."""

    def __init__(self, spec: Spec) -> None:
        lm = load(spec.model, dtype=spec.dtype, device=spec.device)
        self.bench = Bench(subject=Subject.of(lm, spec.model, spec.seed))

    def reference(self, group: Group) -> tuple[Row, Any]:
        """The full cache on a group: its row, and the references, which stay in the cluster's memory."""
        row, references = self.bench.reference(group, _quiet)
        return row, references

    def row(self, group: Group, recipe: str, references: Any) -> Row:
        return self.bench.row(group, recipe, references, _quiet)


def run_on_ray(
    address: str, spec: Spec, left: Sequence[tuple[Group, list[str]]], path: Path, tick: Tick
) -> Iterator[Row]:
    """Measures what is left on a cluster and yields each row after it is written, in the order in which they finish.

    Raises
    ------
    BadArgument
        If Ray is not installed, or there is no cluster at the address.
    StenoError
        If a worker fails.
    """
    try:
        import ray  # an extra
    except ImportError:
        raise BadArgument("--ray needs Ray: pip install 'stenokv[ray]'.") from None
    own = not ray.is_initialized()
    if own:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise BadArgument(f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:200]}") from None
    try:
        yield from _measure(ray, spec, left, path, tick)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, StenoError) else StenoError(f"a worker failed: {cause!r}") from error
    except ray.exceptions.RayError as error:
        raise StenoError(f"the cluster failed: {' '.join(str(error).split())[:300]}") from error
    finally:
        if own:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError if nothing answers at `host:port`; Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def _measure(ray: Any, spec: Spec, left: Sequence[tuple[Group, list[str]]], path: Path, tick: Tick) -> Iterator[Row]:
    """Hands out the full cache of each group first, then its recipes, to whichever worker is free."""
    idle = _workers(ray, spec)
    groups = {i: ray.put(group) for i, (group, _) in enumerate(left)}
    waiting: list[tuple[int, str, Any]] = [(i, FULL, None) for i in groups]
    busy: dict[Any, tuple[Any, int, str, Any]] = {}
    while waiting or busy:
        while waiting and idle:
            (i, recipe, references), worker = waiting.pop(0), idle.pop()
            if references is None:
                result, references = worker.reference.options(num_returns=2).remote(groups[i])
            else:
                result = worker.row.remote(groups[i], recipe, references)
            busy[result] = worker, i, recipe, references
        [done], _ = ray.wait(list(busy), num_returns=1)
        worker, i, recipe, references = busy.pop(done)
        row = ray.get(done)
        idle.append(worker)
        group, recipes = left[i]
        tick(sum(group.prompt_tokens))
        if recipe == FULL:
            # ahead of other groups, so that few references are kept at a time
            waiting[:0] = [(i, other, references) for other in recipes if other != FULL]
        if recipe in recipes:
            append_row(path, row)
            yield row


def _workers(ray: Any, spec: Spec) -> list[Any]:
    """An actor for each node with processors, or for each of its GPUs, with its share of the processors."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    workers = []
    for node in ray.nodes():
        cpus, gpus = node["Resources"].get("CPU", 0), int(node["Resources"].get("GPU", 0))
        if not node["Alive"] or cpus < 1:
            continue
        for _ in range(max(1, gpus)):
            options = {
                "num_cpus": max(1, int(cpus) // max(1, gpus)),
                "num_gpus": min(1, gpus),
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            }
            workers.append(ray.remote(Worker).options(**options).remote(spec))
    if not workers:
        raise BadArgument("the Ray cluster has no node with a free processor.")
    return workers


def _quiet(tokens: int) -> None:
    """Progress is told by the row."""
