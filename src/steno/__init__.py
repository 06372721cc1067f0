"""Steno writes an LLM's memory in shorthand: a KV cache that is smaller, measured, and read as it is.

Importing steno enters the name `steno` in transformers' attention and mask registries; it has no other side effect.
"""

from steno.context import Context as Context
from steno.decode.sampler import Sampling as Sampling
from steno.errors import StenoError as StenoError
from steno.models.host import register as _register
from steno.models.kvcache import KVCache as KVCache
from steno.recipe import Recipe as Recipe
from steno.recipe import parse_recipe as parse_recipe
from steno.session import LanguageModel as LanguageModel
from steno.session import load as load
from steno.store.store import Store as Store
from steno.version import VERSION

__version__ = VERSION

_register()
