"""A place in Redis or Valkey, an extra (`stenokv[redis]`): an entry is written, and others make room for it, in one script."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import numpy as np

from steno.errors import BadArgument, StoreError
from steno.store.place import Entry, victims

WRITE = """
local used, sizes, pins, prefix = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
local name, bytes, quota = ARGV[2], #ARGV[3], tonumber(ARGV[4])
local excess, gone = bytes - quota, {}
if quota >= 0 then
  local all = redis.call('HGETALL', sizes)
  for i = 1, #all, 2 do if all[i] ~= name then excess = excess + tonumber(all[i + 1]) end end
  for _, other in ipairs(redis.call('ZRANGE', used, 0, -1)) do
    if excess <= 0 then break end
    if other ~= name and redis.call('SISMEMBER', pins, other) == 0 then
      excess = excess - tonumber(redis.call('HGET', sizes, other) or 0)
      gone[#gone + 1] = other
    end
  end
  if excess > 0 then return excess end
end
for _, other in ipairs(gone) do
  redis.call('DEL', prefix .. other)
  redis.call('HDEL', sizes, other)
  redis.call('ZREM', used, other)
end
redis.call('SET', prefix .. name, ARGV[3])
redis.call('HSET', sizes, name, bytes)
redis.call('ZADD', used, ARGV[5], name)
return 0
"""
"""Returns the bytes that are missing, 0 if the entry was written."""

T = TypeVar("T")


@final
class RedisPlace:
    """Entries as strings under `{steno:FOLDER}`; beside them a sorted set of when each was used, and their sizes.

    Raises `BadArgument` if the package `redis` is not installed or the URL cannot be read.
    """

    def __init__(self, url: str, folder: str) -> None:
        try:
            import redis
        except ImportError:
            raise BadArgument(
                f"a store at {url.split('@')[-1]} needs the package redis: pip install 'stenokv[redis]'."
            ) from None
        self._error: type[Exception] = redis.RedisError
        try:
            self._client: Any = redis.Redis.from_url(url.replace("valkey", "redis", 1), socket_timeout=60)
        except ValueError as error:
            raise BadArgument(f"the address of a store cannot be read: {error}") from None
        base = f"{{steno:{folder}}}"  # braces: all keys of a folder lie on one server of a cluster
        self._used, self._sizes, self._pins, self._prefix = (base + x for x in (":used", ":sizes", ":pins", ":data:"))

    def read(self, name: str) -> np.ndarray | None:
        data = self._do(lambda: self._client.get(self._prefix + name))
        return None if data is None else np.frombuffer(data, np.uint8)

    def write(self, name: str, parts: Sequence[bytes], quota_bytes: int | None) -> None:
        data = b"".join(parts)
        quota = -1 if quota_bytes is None else quota_bytes
        keys = (self._used, self._sizes, self._pins)
        missing = self._do(
            lambda: self._client.eval(WRITE, len(keys), *keys, self._prefix, name, data, quota, time.time())
        )
        if missing:
            victims([], quota_bytes, new=name, new_bytes=quota + int(missing))  # says what is missing

    def remove(self, name: str) -> None:
        with self._client.pipeline(transaction=True) as together:
            together.delete(self._prefix + name).hdel(self._sizes, name).zrem(self._used, name).srem(self._pins, name)
            self._do(together.execute)

    def touch(self, names: Sequence[str]) -> None:
        now = time.time()
        if names:
            scores = {name: now - i * 1e-5 for i, name in enumerate(names)}
            self._do(lambda: self._client.zadd(self._used, scores, xx=True))

    def pin(self, name: str, pinned: bool) -> None:
        change = self._client.sadd if pinned else self._client.srem
        self._do(lambda: change(self._pins, name))

    def entries(self) -> list[Entry]:
        with self._client.pipeline(transaction=True) as together:
            together.zrange(self._used, 0, -1, withscores=True).hgetall(self._sizes).smembers(self._pins)
            used, sizes, pins = self._do(together.execute)
        return [
            Entry(name=name.decode(), num_bytes=int(sizes.get(name, 0)), used_at=at, is_pinned=name in pins)
            for name, at in used
        ]

    def sweep(self, quota_bytes: int | None) -> list[str]:
        """Removes, too, what the server itself has dropped for want of memory."""
        present = self.entries()
        lost = [entry for entry in present if not self._do(lambda e=entry: self._client.exists(self._prefix + e.name))]  # type: ignore[misc]
        kept = [entry for entry in present if entry not in lost]
        gone = [entry.name for entry in victims(kept, quota_bytes)]
        for name in [entry.name for entry in lost] + gone:
            self.remove(name)
        return gone

    def _do(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except self._error as error:
            raise StoreError(f"the store in Redis cannot be used: {str(error)[:300]}") from None
