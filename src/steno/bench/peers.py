"""Other projects' caches on the same instances: `--peer kvpress:snapkv@25%`, `--peer transformers:quanto4`.

Each project has an environment of its own, `.peers/NAME` in the checkout, made by `make peers`, and a worker,
`benchmarks/peers/answer_NAME.py`, that reads token ids under a method and decodes from what is held. Tokenizer, template,
scoring and the figures against the full cache are ours, the same for all.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, repeat
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, final

import numpy as np
import torch

from steno.bench.measure import Reading, Spoken, forced_passes
from steno.bench.rows import PEER
from steno.context import ReadReport
from steno.errors import BadArgument, RecipeError, StenoError, nearest
from steno.recipe import Budget
from steno.session import LanguageModel

CHECKOUT = Path(__file__).resolve().parents[3]


class PeerError(StenoError):
    """Another project's code failed; the words are its own."""


@final
@dataclass(frozen=True, kw_only=True)
class Project:
    """methods: as its worker names them. takes_share: whether a method needs to be told how much to keep."""

    methods: tuple[str, ...]
    takes_share: bool


PROJECTS: Mapping[str, Project] = MappingProxyType({
    "transformers": Project(methods=("dynamic", "hqq2", "hqq4", "quanto2", "quanto4"), takes_share=False),
    "kvpress": Project(
        methods=(
            "adakv_expected_attention", "adakv_snapkv", "expected_attention", "keydiff", "knorm", "kvzip", "pyramidkv",
            "snapkv", "streaming_llm", "tova",
        ),
        takes_share=True,
    ),
})  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class PeerMethod:
    """One method of another project; its text is the recipe of its rows without `peer:`."""

    project: str
    method: str
    share: Fraction | None

    @classmethod
    def parse(cls, text: str) -> PeerMethod:
        """Raises BadArgument for an unknown project or method, or a share that is missing, not wanted or out of range."""
        name, _, budget = text.partition("@")
        project, _, method = (part.strip() for part in name.partition(":"))
        if project not in PROJECTS:
            raise BadArgument(f"unknown peer {project!r}; {nearest(project, PROJECTS)} Write `NAME:METHOD`.")
        known = PROJECTS[project]
        if method not in known.methods:
            raise BadArgument(f"unknown method {method!r} of {project}; {nearest(method, known.methods)}")
        if known.takes_share == (not budget):
            example = f"{project}:{method}@25%" if known.takes_share else f"{project}:{method}"
            raise BadArgument(
                f"{project} {'needs a' if known.takes_share else 'takes no'} share of the prompt: write `{example}`."
            )
        share = _share(budget) if budget else None
        return cls(project=project, method=method, share=share)

    def __str__(self) -> str:
        budget = "" if self.share is None else f"@{Budget(share=self.share)}"
        return f"{self.project}:{self.method}{budget}"

    @property
    def recipe(self) -> str:
        """What its rows have for a recipe."""
        return f"{PEER}{self}"


def _share(text: str) -> Fraction:
    try:
        share = Budget.parse(text).share
    except RecipeError as error:
        raise BadArgument(f"a peer's budget: {error}") from None
    if share is None or share == 1:
        raise BadArgument(f"a peer's budget is a share of the prompt below 100%, such as 25%; got {text.strip()}.")
    return Fraction(share)


class Peers:
    """The workers of one run, each started when it is first needed. A context manager: leaving it ends them."""

    def __init__(
        self, environments: Path = CHECKOUT / ".peers", workers: Path = CHECKOUT / "benchmarks" / "peers"
    ) -> None:
        self._environments, self._workers = environments, workers
        self._running: dict[str, Worker] = {}

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running.values():
            worker.close()
        self._running.clear()

    def installed(self, project: str) -> bool:
        return self._python(project).exists()

    def _python(self, project: str) -> Path:
        return self._environments / project / "bin" / "python"

    def worker(self, project: str, lm: LanguageModel) -> Worker:
        """The worker of a project with the model loaded.

        Raises PeerError if it cannot be started or does not have the methods that are known here.
        """
        if project in self._running and not self._running[project].alive:
            self._running.pop(project).close()
        if project not in self._running:
            command = [str(self._python(project)), str(self._workers / f"answer_{project}.py")]
            self._running[project] = Worker(project, command, lm)
        return self._running[project]


class Worker:
    """A process of another project's environment that holds the model."""

    def __init__(self, project: str, command: Sequence[str], lm: LanguageModel) -> None:
        self.project, self._lm = project, lm
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._folder = tempfile.TemporaryDirectory()
        self.logprobs = Path(self._folder.name) / "logprobs.npy"
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8"
        )
        dtype = str(lm.model.dtype).removeprefix("torch.")
        start = {"model": lm.loaded.source, "dtype": dtype, "threads": torch.get_num_threads()}
        try:
            hello = self.call(start)
            known = PROJECTS[project].methods
            if sorted(hello["methods"]) != sorted(known):
                raise PeerError(f"the worker of {project} has other methods: {', '.join(hello['methods'])}.")
        except BaseException:
            self.close()
            raise
        self.versions = {f"{project}: {name}": version for name, version in hello["versions"].items()}

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises PeerError if the worker fails or ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            last = [text for text in self._log.read().splitlines() if text.strip()][-1:]
            raise PeerError(f"the worker of {self.project} ended: {' '.join(last)[:300] or 'it said nothing'}")
        answer = dict(json.loads(line))
        if "error" in answer:
            raise PeerError(f"{self.project}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._folder.cleanup()

    def read(self, method: PeerMethod, document: str, question: str | None) -> Reading:
        """Reads a document, and a question with it where there is one, as `LanguageModel.read` does."""
        lm = self._lm
        tokens = lm.prompt_tokens(document)[0] + (lm.question_tokens(question) if question is not None else [])
        share = None if method.share is None else float(method.share)
        cost = self.call({"method": method.method, "share": share, "tokens": tokens})
        report = ReadReport(
            model=lm.name,
            dtype=str(lm.model.dtype).removeprefix("torch."),
            recipe=method.recipe,
            prompt_tokens=len(tokens),
            **cost,
        )
        return PeerReading(worker=self, lm=lm, cost=report)


@final
@dataclass(frozen=True, kw_only=True)
class PeerReading:
    """A document that a worker has read last."""

    worker: Worker
    lm: LanguageModel
    cost: ReadReport

    def report(self) -> ReadReport:
        return self.cost

    def ask(self, question: str | None, *, max_new_tokens: int, answer_prefix: str) -> Spoken:
        return self._decode(self._turn(question, answer_prefix), repeat(1, max_new_tokens), None)

    def follow_answer(self, answer: Sequence[int], question: str | None, *, answer_prefix: str) -> Spoken:
        passes = islice(forced_passes(timed=False), len(answer))  # nothing that a peer does here is done at every step
        return self._decode(self._turn(question, answer_prefix), passes, answer)

    def follow_text(self, continuation: Sequence[int]) -> Spoken:
        passes = islice(forced_passes(timed=True), len(continuation) - 1)
        return self._decode(list(continuation[:1]), passes, continuation[1:])

    def _turn(self, question: str | None, answer_prefix: str) -> list[int]:
        asked = [] if question is None else self.lm.question_tokens(question)
        return asked + self.lm.tokenize(self.lm.template.after + answer_prefix)

    def _decode(self, given: list[int], passes: Iterable[int], forced: Sequence[int] | None) -> Spoken:
        said = self.worker.call({
            "given": given, "end_tokens": sorted(self.lm.end_tokens),
            "forced": None if forced is None else list(forced), "passes": list(passes), "logprobs": str(self.worker.logprobs),
        })  # fmt: skip
        ids = said["token_ids"]
        return Spoken(
            text=self.lm.detokenize([i for i in ids if i not in self.lm.end_tokens]),
            token_ids=ids,
            logprobs=torch.from_numpy(np.load(self.worker.logprobs, allow_pickle=False)).to(self.lm.model.device),
            ttft_s=said["seconds"][0],
            step_s=[s for s in said["seconds"][1:] if s is not None],
            kv_bytes=said["kv_bytes"],
            kv_bytes_peak=said["kv_bytes_peak"],
        )
