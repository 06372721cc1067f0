"""How answers are scored, 0 to 1: the published measures of RULER and LongBench."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence


def match_all(output: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the output, case ignored (RULER's string_match_all)."""
    return sum(a.lower() in output.lower() for a in answers) / len(answers)


def match_any(output: str, answers: Sequence[str]) -> float:
    """1 if any answer stands in the output, case ignored (RULER's string_match_part)."""
    return float(any(a.lower() in output.lower() for a in answers))


def normal_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD compares them; Chinese and Japanese by character."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    text = re.sub(r"([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", text)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(output: str, answers: Sequence[str]) -> float:
    """The best harmonic mean of word precision and recall over the answers (SQuAD)."""
    return max(_f1(normal_words(output), normal_words(a)) for a in answers)


def _f1(got: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(got) & Counter(wanted)).values())
    if not common:
        return float(not got and not wanted)
    return 2 * common / (len(got) + len(wanted))


def rouge_l(output: str, answers: Sequence[str]) -> float:
    """The best F-measure of the longest common subsequence of words over the answers (Lin 2004)."""
    return max(_rouge_l(output.lower().split(), a.lower().split()) for a in answers)


def _rouge_l(got: Sequence[str], wanted: Sequence[str]) -> float:
    longest = [0] * (len(wanted) + 1)
    for word in got:
        above = 0
        for j, other in enumerate(wanted, start=1):
            above, longest[j] = longest[j], above + 1 if word == other else max(longest[j], longest[j - 1])
    common = longest[-1]
    return 2 * common / (len(got) + len(wanted)) if common else 0.0


def first_number(output: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the output that are the right one (LongBench's count and retrieval scores)."""
    numbers = re.findall(r"\d+", output)
    right = {n for a in answers for n in re.findall(r"\d+", a)}
    return sum(n in right for n in numbers) / len(numbers) if numbers else 0.0


def code_similarity(output: str, answers: Sequence[str]) -> float:
    """Similarity of the first line of code, comments and fences left out, by difflib's ratio."""
    lines = [line for line in output.lstrip("\n").split("\n") if not any(x in line for x in ("`", "#", "//"))]
    line = lines[0] if lines else ""
    return max(difflib.SequenceMatcher(None, line, a, autojunk=False).ratio() for a in answers)
