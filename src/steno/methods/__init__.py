"""The methods, one table per kind. What is listed here can stand in a recipe and is tested by the contracts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from steno.methods.access.all import All
from steno.methods.access.delta import DELTA
from steno.methods.access.double_sparsity import DoubleSparsity
from steno.methods.access.hylra import HyLRA
from steno.methods.access.moba import MoBA
from steno.methods.access.quest import Quest
from steno.methods.access.sentencekv import SentenceKV
from steno.methods.allocate.adakv import AdaKV
from steno.methods.allocate.ems_heads import EMSHeads
from steno.methods.allocate.one_threshold import OneThreshold
from steno.methods.allocate.prefixkv import PrefixKV
from steno.methods.allocate.pyramidkv import PyramidKV
from steno.methods.allocate.razorattention import RazorAttention
from steno.methods.allocate.uniform import Uniform
from steno.methods.allocate.zipvl import ZipVL
from steno.methods.interfaces import (
    Access,
    Allocator,
    Attender,
    Encoder,
    Evictor,
    Merger,
    Method,
    Propagator,
    Quantizer,
    Reader,
    Router,
    Scorer,
    Sharer,
    Transform,
)
from steno.methods.merge.chelsea import Chelsea
from steno.methods.merge.ems import EMS
from steno.methods.merge.evict import Evict
from steno.methods.merge.kvmerger import KVMerger
from steno.methods.merge.look_m import LookM
from steno.methods.merge.razor_compensation import RazorCompensation
from steno.methods.named import COMPOSITIONS, NAMED, Composition, NamedRecipe, stage_text
from steno.methods.propagate.fastkv import FastKV
from steno.methods.propagate.videollm_mod import VideoLLMMoD
from steno.methods.propagate.zipvl_attention import ZipVLAttention
from steno.methods.quantize.commvq import CommVQ
from steno.methods.quantize.fp8 import FP8
from steno.methods.quantize.gear import GEAR
from steno.methods.quantize.integer import Int2, Int4, Int8
from steno.methods.quantize.kivi import KIVI
from steno.methods.quantize.kvquant import KVQuant
from steno.methods.quantize.llamacpp import Q4_0, Q8_0
from steno.methods.quantize.nvfp4 import NVFP4
from steno.methods.quantize.turboquant import TurboQuant
from steno.methods.quantize.vidkv import VidKV, VidKVSTP
from steno.methods.quantize.zipcache import ZipCache
from steno.methods.score.expected_attention import ExpectedAttention
from steno.methods.score.global_local import GlobalLocal
from steno.methods.score.h2o import H2O
from steno.methods.score.heavy_hitters import HeavyHitters
from steno.methods.score.keydiff import KeyDiff
from steno.methods.score.keyformer import Keyformer
from steno.methods.score.kvzip import KVzip
from steno.methods.score.locret import Locret
from steno.methods.score.recency import Recency
from steno.methods.score.snapkv import SnapKV
from steno.methods.score.streaming_llm import StreamingLLM
from steno.methods.score.text_prior import TextPrior
from steno.methods.score.tova import TOVA
from steno.methods.score.trim_kv import TrimKV
from steno.methods.share.minicache import MiniCache
from steno.methods.share.xkv import XKV
from steno.methods.transform.cskv import CSKV
from steno.methods.transform.hadamard import Hadamard
from steno.methods.transform.palu import Palu
from steno.methods.transform.rotatekv import RotateKV
from steno.methods.transform.think import ThinK

KINDS = ("propagate", "score", "allocate", "merge", "share", "transform", "quantize", "access")
"""The kinds of stages, in the order in which a recipe names them."""

PROPAGATORS: dict[str, type[Propagator]] = {cls.id: cls for cls in (FastKV, VideoLLMMoD, ZipVLAttention)}
SCORERS: dict[str, type[Scorer]] = {
    cls.id: cls
    for cls in (
        StreamingLLM,
        SnapKV,
        TOVA,
        H2O,
        KeyDiff,
        ExpectedAttention,
        KVzip,
        Keyformer,
        Locret,
        TrimKV,
        Recency,
        HeavyHitters,
        GlobalLocal,
        TextPrior,
    )
}
ALLOCATORS: dict[str, type[Allocator]] = {
    cls.id: cls for cls in (Uniform, PyramidKV, AdaKV, OneThreshold, PrefixKV, RazorAttention, EMSHeads, ZipVL)
}
MERGERS: dict[str, type[Merger]] = {cls.id: cls for cls in (Evict, KVMerger, EMS, Chelsea, LookM, RazorCompensation)}
SHARERS: dict[str, type[Sharer]] = {cls.id: cls for cls in (MiniCache, XKV)}
TRANSFORMS: dict[str, type[Transform]] = {cls.id: cls for cls in (Hadamard, RotateKV, ThinK, Palu, CSKV)}
QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.id: cls
    for cls in (
        Int8,
        Int4,
        Int2,
        KIVI,
        FP8,
        NVFP4,
        Q8_0,
        Q4_0,
        TurboQuant,
        GEAR,
        VidKV,
        VidKVSTP,
        ZipCache,
        KVQuant,
        CommVQ,
    )
}
ACCESSORS: dict[str, type[Access]] = {
    cls.id: cls for cls in (All, Quest, DoubleSparsity, SentenceKV, DELTA, HyLRA, MoBA)
}
READERS: dict[str, type[Reader]] = {cls.id: cls for cls in (StreamingLLM, KeyDiff, Locret, TrimKV)}
METHODS: dict[str, type[Method]] = {
    **PROPAGATORS,
    **SCORERS,
    **ALLOCATORS,
    **MERGERS,
    **SHARERS,
    **TRANSFORMS,
    **QUANTIZERS,
    **ACCESSORS,
}

__all__ = [
    "ACCESSORS",
    "ALLOCATORS",
    "COMPOSITIONS",
    "CSKV",
    "DELTA",
    "EMS",
    "FP8",
    "GEAR",
    "H2O",
    "KINDS",
    "KIVI",
    "MERGERS",
    "METHODS",
    "NAMED",
    "NVFP4",
    "PROPAGATORS",
    "Q4_0",
    "Q8_0",
    "QUANTIZERS",
    "READERS",
    "SCORERS",
    "SHARERS",
    "TOVA",
    "TRANSFORMS",
    "XKV",
    "Access",
    "AdaKV",
    "All",
    "Allocator",
    "Attender",
    "Chelsea",
    "CommVQ",
    "Composition",
    "DoubleSparsity",
    "EMSHeads",
    "Encoder",
    "Evict",
    "Evictor",
    "ExpectedAttention",
    "FastKV",
    "GlobalLocal",
    "Hadamard",
    "HeavyHitters",
    "HyLRA",
    "Int2",
    "Int4",
    "Int8",
    "KVMerger",
    "KVQuant",
    "KVzip",
    "KeyDiff",
    "Keyformer",
    "Locret",
    "LookM",
    "Merger",
    "Method",
    "MiniCache",
    "MoBA",
    "NamedRecipe",
    "OneThreshold",
    "Palu",
    "PrefixKV",
    "Propagator",
    "PyramidKV",
    "Quantizer",
    "Quest",
    "RazorAttention",
    "RazorCompensation",
    "Reader",
    "Recency",
    "RotateKV",
    "Router",
    "Scorer",
    "SentenceKV",
    "Sharer",
    "SnapKV",
    "StreamingLLM",
    "TextPrior",
    "ThinK",
    "Transform",
    "TrimKV",
    "TurboQuant",
    "Uniform",
    "VidKV",
    "VidKVSTP",
    "VideoLLMMoD",
    "ZipCache",
    "ZipVL",
    "ZipVLAttention",
    "describe_methods",
    "stage_text",
    "whole_paper",
]


def describe_methods() -> list[dict[str, Any]]:
    """What each method says about itself, in the order of the kinds, then the named recipes; plain values, ready for JSON."""
    methods = [_row(cls, cls.kind, cls.title, (cls,), cls.differs) for cls in METHODS.values()]
    for named in NAMED.values():
        stages = whole_paper(METHODS[named.id]())
        methods.append(_row(METHODS[named.id], "recipe", _chain(stages), stages, named.differs))
    for ours in COMPOSITIONS.values():
        about = {"id": ours.id, "kind": "recipe", "title": _chain(ours.stages)}
        paper = {"paper": "(a recipe of this project)", "year": ours.year, "arxiv": ""}
        methods.append(about | paper | _of_stages(ours.stages) | {"differs": ours.differs, "parameters": {}})
    return methods


def _chain(stages: tuple[Method, ...]) -> str:
    return " | ".join(map(stage_text, stages))


def whole_paper(stage: Method) -> tuple[Method, ...]:
    """The stages of the recipe that `stage` alone stands for: itself, and what its paper has beside it."""
    beside = NAMED[stage.id].beside if stage.id in NAMED else ()
    return tuple(sorted((stage, *beside), key=lambda stage: KINDS.index(stage.kind)))


def _row(
    cls: type[Method], kind: str, title: str, stages: tuple[Method | type[Method], ...], differs: str
) -> dict[str, Any]:
    return {
        "id": cls.id,
        "kind": kind,
        "title": title,
        "paper": cls.paper,
        "year": cls.year,
        "arxiv": cls.arxiv,
        **_of_stages(stages),
        "differs": differs,
        "parameters": {field.name: field.default for field in fields(cast(Any, cls))},
    }


def _of_stages(stages: tuple[Method | type[Method], ...]) -> dict[str, Any]:
    return {
        "needs": sorted({need.name for stage in stages for need in stage.needs}),
        "frees_memory": any(stage.frees_memory for stage in stages),
        "trained": any(stage.trained for stage in stages),
    }
