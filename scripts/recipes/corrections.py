"""Scores of grammatical error correction: GLEU (JFLEG) and MaxMatch, also called M2 (CoNLL-2014).

No maintained package has them: of GLEU there is one without an interface for programs, not touched since 2023; the
MaxMatch scorer is no package; ERRANT, whose F0.5 is another score, needs a spaCy model that is not on PyPI. So both are
written from their papers, and count like the authors' scripts where the papers leave a choice open. The tests compare
them with values worked out by hand. On JFLEG, GLEU gives the corpus's own figures for the uncorrected text (38.21 on
dev, 40.54 on test).
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fairseq_sam.analysis.scores import check_lengths
from scripts.recipes.scores import Texts

M2, ANNOTATORS = "test.m2", "references"  # beside prepared data: annotated edits, or a folder of references
ORDERS = range(1, 5)  # lengths of the n-grams of GLEU
MAX_UNCHANGED = 2  # words that an edit may pass over in MaxMatch

# -- GLEU --------------------------------------------------------------------------------------------------------------


class _Matches(NamedTuple):
    """What GLEU counts of a hypothesis and one reference; all add up over sentences.

    Attributes:
        hypothesis: words.
        reference: words.
        right: by order, n-grams shared with the reference, less those kept from the source that it has changed.
        found: by order, n-grams of the hypothesis.
    """

    hypothesis: int
    reference: int
    right: tuple[int, ...]
    found: tuple[int, ...]


def gleu(hypotheses: Texts, references: Sequence[Texts], sources: Texts, rounds: int = 500) -> float:
    """Return corpus GLEU, 0 to 100 (Napoles et al. 2015, without tuning: Napoles et al. 2016).

    Like BLEU, but n-grams that the hypothesis has kept from the source and that are not in the reference count against
    it. With several references, one is drawn for each sentence, and the score is the mean over many rounds; the draws
    are those of the authors' script, so the score is the same in every run.

    Args:
        hypotheses: corrected sentences, tokenised.
        references: lists of references, each as long as the hypotheses.
        sources: the sentences before.
        rounds: how often references are drawn, >= 1.

    Raises:
        ValueError: if the lists differ in length or are empty, or `rounds` is out of range.
    """
    if not references or isinstance(references[0], str):
        raise ValueError("references must be a list of lists, each as long as the hypotheses")
    lists = {f"references[{n}]": each for n, each in enumerate(references)}
    check_lengths(hypotheses=hypotheses, sources=sources, **lists)
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    rows = [
        [_matches(found.split(), wanted.split(), source.split()) for wanted in each]
        for found, source, *each in zip(hypotheses, sources, *references, strict=True)
    ]
    if len(references) == 1:
        return 100.0 * _gleu_of([row[0] for row in rows])
    scores = []
    for number in range(rounds):
        draw = random.Random(number * 101)
        scores.append(_gleu_of([row[int(draw.random() * len(row))] for row in rows]))
    return 100.0 * sum(scores) / rounds


def _matches(hypothesis: list[str], reference: list[str], source: list[str]) -> _Matches:
    right = []
    for order in ORDERS:
        found, wanted, before = (_ngrams(words, order) for words in (hypothesis, reference, source))
        kept = Counter({ngram: count for ngram, count in before.items() if ngram not in wanted})
        right.append(max((found & wanted).total() - (found & kept).total(), 0))
    counts = tuple(max(len(hypothesis) + 1 - order, 0) for order in ORDERS)
    return _Matches(len(hypothesis), len(reference), tuple(right), counts)


def _ngrams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) + 1 - order))


def _gleu_of(rows: Sequence[_Matches]) -> float:
    right = [sum(counts) for counts in zip(*(row.right for row in rows), strict=True)]
    found = [sum(counts) for counts in zip(*(row.found for row in rows), strict=True)]
    if 0 in right:
        return 0.0
    precision = sum(math.log(a / b) for a, b in zip(right, found, strict=True)) / len(ORDERS)
    length, wanted = sum(row.hypothesis for row in rows), sum(row.reference for row in rows)
    return math.exp(min(0.0, 1.0 - wanted / length) + precision)


# -- MaxMatch ----------------------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """A correction by an annotator.

    Attributes:
        start: first word of the source.
        end: the word behind the last one; `start` for an insertion.
        corrections: what may stand there, words with single spaces; empty for a deletion.
    """

    start: int
    end: int
    corrections: tuple[str, ...]


class Annotated(NamedTuple):
    """A sentence of an M2 file.

    Attributes:
        source: the sentence, tokenised.
        edits: of each annotator, at least one.
    """

    source: str
    edits: tuple[tuple[Edit, ...], ...]


def read_m2(path: str | Path) -> list[Annotated]:
    """Read a file in M2 format.

    Raises:
        ValueError: names the line that cannot be read.
    """
    sentences: list[tuple[str, dict[int, list[Edit]]]] = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.startswith("S ") or line == "S":
            sentences.append((line[2:].strip(), {}))
        elif line.startswith("A ") and sentences:
            fields = line[2:].split("|||")
            try:
                start, end = map(int, fields[0].split())
                edits = sentences[-1][1].setdefault(int(fields[5]), [])
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: not an annotation of M2: {line!r}") from error
            if start >= 0 and fields[1] != "noop":
                words = ("" if each.strip() == "-NONE-" else each.strip() for each in fields[2].split("||"))
                edits.append(Edit(start, end, tuple(words)))
        elif line.strip():
            raise ValueError(f"{path}, line {number}: expected a line of M2 with S or A, got {line!r}")
    return [
        Annotated(source, tuple(tuple(sorted(edits)) for _, edits in sorted(annotators.items())) or ((),))
        for source, annotators in sentences
    ]


def max_match(hypotheses: Texts, annotated: Sequence[Annotated], beta: float = 0.5) -> dict[str, float]:
    """Return the MaxMatch scores of corrected sentences (Dahlmeier and Ng 2012), %.

    Of all ways to turn the source into the hypothesis by edits, the one that has most of an annotator's edits counts.
    Of several annotators, each sentence has the one that makes the F of all sentences so far the highest.

    Args:
        hypotheses: corrected sentences, tokenised.
        annotated: source and annotators' edits of each, from ``read_m2``.
        beta: weight of recall, > 0; 0.5 as CoNLL-2014.

    Returns:
        ``precision``, ``recall``, ``f``.

    Raises:
        ValueError: if the lists differ in length or are empty, or `beta` is out of range.
    """
    check_lengths(hypotheses=hypotheses, annotated=annotated)
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta:g}")
    sums = _Counts(0, 0, 0)
    for hypothesis, (source, annotators) in zip(hypotheses, annotated, strict=True):
        lattice = _Lattice(source.split(), hypothesis.split())
        sums = max((sums.plus(lattice.best(edits)) for edits in annotators), key=lambda each: each.rank(beta))
    precision = sums.right / sums.proposed if sums.proposed else 1.0
    recall = sums.right / sums.wanted if sums.wanted else 1.0
    divisor = beta**2 * precision + recall
    f = (1 + beta**2) * precision * recall / divisor if divisor else 0.0
    return {"precision": 100.0 * precision, "recall": 100.0 * recall, "f": 100.0 * f}


class _Counts(NamedTuple):
    """Edits that are right, that the hypothesis has, and that the annotator has."""

    right: int
    proposed: int
    wanted: int

    def plus(self, other: "_Counts") -> "_Counts":
        return _Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def rank(self, beta: float) -> tuple[float, int, float]:
        """What makes an annotator the best: F, then right edits, then few edits."""
        divisor = beta**2 * self.wanted + self.proposed
        f = (1 + beta**2) * self.right / divisor if divisor else 1.0
        return f, self.right, -divisor


Node = tuple[int, int]  # words of the source and of the hypothesis that are done


class _Arc(NamedTuple):
    """A step from one node to another.

    Attributes:
        end: where it leads.
        length: number of single steps that it stands for.
        is_edit: whether it changes anything.
    """

    end: Node
    length: int
    is_edit: bool


class _Lattice:
    """The shortest ways from a source to a hypothesis, with edits of several words.

    The ways are those with substitutions at the cost of one other step, and at that of two.

    Args:
        source: words.
        hypothesis: words.
    """

    def __init__(self, source: list[str], hypothesis: list[str]) -> None:
        self._source, self._hypothesis = source, hypothesis
        steps = {step for cost in (1, 2) for step in _shortest_steps(source, hypothesis, cost)}
        following: dict[Node, list[Node]] = {}
        for start, end in sorted(steps):
            following.setdefault(start, []).append(end)
        self._following = following
        self._arcs = {start: list(self._arcs_from(start)) for start in sorted(following)}

    def best(self, edits: Sequence[Edit]) -> _Counts:
        """Compare with an annotator's edits.

        Of the ways with most right edits, those count that have the fewest single steps outside of them, and of these
        the one with the fewest edits. An edit of the annotator is right once.
        """
        costs: dict[tuple[Node, int], tuple[int, int, int]] = {((0, 0), 0): (0, 0, 0)}
        ends = []
        for node in sorted({*self._arcs, (len(self._source), len(self._hypothesis))}):
            for used in range(len(edits) + 1):
                cost = costs.get((node, used))
                if cost is None:
                    continue
                if node == (len(self._source), len(self._hypothesis)):
                    ends.append(cost)
                for arc in self._arcs.get(node, ()):
                    next_used, added = used, (0, arc.length, int(arc.is_edit))
                    match = self._match(node, arc, edits, used) if arc.is_edit else None
                    if match is not None:
                        next_used, added = match + 1, (-1, 0, 0)
                    total = (cost[0] + added[0], cost[1] + added[1], cost[2] + added[2])
                    key = (arc.end, next_used)
                    costs[key] = min(costs.get(key, total), total)
        right, _, wrong = min(ends)
        return _Counts(-right, -right + wrong, len(edits))

    def _match(self, start: Node, arc: _Arc, edits: Sequence[Edit], used: int) -> int | None:
        """The first of the annotator's edits behind those that are used that the arc makes."""
        words = " ".join(self._hypothesis[start[1] : arc.end[1]])
        for number in range(used, len(edits)):
            edit = edits[number]
            if (edit.start, edit.end) == (start[0], arc.end[0]) and words in edit.corrections:
                return number
        return None

    def _is_same(self, start: Node, end: Node) -> bool:
        """Whether a single step leaves its word as it is."""
        return end == (start[0] + 1, start[1] + 1) and self._source[start[0]] == self._hypothesis[start[1]]

    def _arcs_from(self, start: Node) -> Iterator[_Arc]:
        """Single steps, and edits of several steps that pass over at most MAX_UNCHANGED words that stay."""
        lengths: dict[Node, dict[int, int]] = {start: {0: 0}}  # by node and words that stay
        for node in sorted(self._following):
            for unchanged, length in lengths.get(node, {}).items():
                for end in self._following[node]:
                    more = unchanged + self._is_same(node, end)
                    if more <= MAX_UNCHANGED:
                        known = lengths.setdefault(end, {})
                        known[more] = min(known.get(more, length + 1), length + 1)
        for end, found in lengths.items():
            unchanged, length = min(found.items(), key=lambda item: item[1])
            if end != start and (length == 1 or unchanged < length):
                yield _Arc(end, length, is_edit=unchanged < length)


def _shortest_steps(source: list[str], hypothesis: list[str], substitution: int) -> Iterator[tuple[Node, Node]]:
    """Single steps of all shortest ways, with a substitution at the given cost and other steps at 1."""
    distance: dict[Node, int] = {(0, 0): 0}
    back: dict[Node, list[Node]] = {}
    for i in range(len(source) + 1):
        for j in range(len(hypothesis) + 1):
            costs = {}
            if i and j:
                costs[i - 1, j - 1] = distance[i - 1, j - 1] + (source[i - 1] != hypothesis[j - 1]) * substitution
            if i:
                costs[i - 1, j] = distance[i - 1, j] + 1
            if j:
                costs[i, j - 1] = distance[i, j - 1] + 1
            if costs:
                distance[i, j] = min(costs.values())
                back[i, j] = [node for node, cost in costs.items() if cost == distance[i, j]]
    waiting, seen = [(len(source), len(hypothesis))], set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += back.get(node, [])
            yield from ((before, node) for before in back.get(node, []))
