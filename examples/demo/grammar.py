"""A bilingual grammar: sentence pairs of two invented languages, for a translation task without any download.

The source language is verb-medial, with adjectives before nouns, articles, and verbs that agree with the subject in
number. The target language is verb-final; adjectives follow the noun and agree with it in class and number, nouns take
case endings, verbs agree with the class and number of the subject and with tense, and relative clauses stand before
the noun. A model must learn a lexicon, reordering and agreement over a distance.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "pr", "st", "tr")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
CODAS = ("", "", "n", "r", "s", "l", "m")
CLASSES = 3  # noun classes of the target language

CASES = {"subject": "", "object": "et", "place": "uno"}
ADJECTIVE_ENDINGS = (("o", "oi"), ("a", "ai"), ("u", "ui"))  # by class; singular, plural
VERB_ENDINGS = (("ke", "ken"), ("ka", "kan"), ("ki", "kin"))
TENSES = {"present": ("", "sel"), "past": ("did", "por"), "future": ("will", "var")}
ARTICLES = {"the": "na", "a": "", "this": "tis", "every": "olo"}
PLACES = {"near": "bi", "behind": "gor", "under": "sut"}


class Noun(NamedTuple):
    """A noun: source form, target stem, class of the target noun."""

    source: str
    target: str
    noun_class: int


class Word(NamedTuple):
    """A word that only the lexicon relates: source form and target stem."""

    source: str
    target: str


class Phrase(NamedTuple):
    """A noun phrase in both languages, with what agrees with it."""

    source: str
    target: str
    noun_class: int
    plural: bool


@dataclass(frozen=True)
class Grammar:
    """The lexicon. Build one with ``build_grammar``."""

    nouns: tuple[Noun, ...]
    adjectives: tuple[Word, ...]
    transitive: tuple[Word, ...]
    intransitive: tuple[Word, ...]
    adverbs: tuple[Word, ...]

    def sentence(self, rng: random.Random) -> tuple[str, str]:
        """Draw one sentence pair."""
        subject = self._noun_phrase(rng, "subject", depth=0)
        source, target = [subject.source], [subject.target]
        auxiliary, tense = TENSES[rng.choice(tuple(TENSES))]
        transitive = rng.random() < 0.7
        verb = rng.choice(self.transitive if transitive else self.intransitive)
        negated = rng.random() < 0.15
        source += [auxiliary, "never" if negated else "", verb.source + ("" if auxiliary or subject.plural else "s")]
        if rng.random() < 0.35:
            place = rng.choice(tuple(PLACES))
            ground = self._noun_phrase(rng, "place", depth=1)
            after = [place, ground.source]
            target += [ground.target, PLACES[place]]
        else:
            after = []
        if transitive:
            thing = self._noun_phrase(rng, "object", depth=0)
            source.append(thing.source)
            target.append(thing.target)
        source += after
        if rng.random() < 0.3:
            adverb = rng.choice(self.adverbs)
            source.append(adverb.source)
            target.insert(0, adverb.target)
        target += ["ne" if negated else "", self._verb_form(verb, tense, subject)]
        return " ".join(filter(None, source)) + ".", " ".join(filter(None, target)) + "."

    def _verb_form(self, verb: Word, tense: str, subject: Phrase) -> str:
        return verb.target + tense + VERB_ENDINGS[subject.noun_class][subject.plural]

    def _noun_phrase(self, rng: random.Random, case: str, depth: int) -> Phrase:
        noun = rng.choice(self.nouns)
        plural = rng.random() < 0.4
        article = rng.choice(("the", "the", "a", "this", "every"))
        if plural:
            article = "the" if article in ("a", "every") else article
        chosen = rng.sample(self.adjectives, rng.choice((0, 0, 1, 1, 2)))
        ending = ADJECTIVE_ENDINGS[noun.noun_class][plural]
        source = [article, *(a.source for a in chosen), noun.source + ("s" if plural else "")]
        # Adjectives follow the noun, the nearest one first: the mirror image of the source.
        target = [
            ARTICLES[article],
            noun.target + ("im" if plural else "") + CASES[case],
            *(a.target + ending for a in reversed(chosen)),
        ]
        if depth == 0 and rng.random() < 0.15:
            clause_source, clause_target = self._relative_clause(rng, noun, plural)
            source.append(clause_source)
            target.insert(0, clause_target)
        return Phrase(" ".join(source), " ".join(filter(None, target)), noun.noun_class, plural)

    def _relative_clause(self, rng: random.Random, noun: Noun, plural: bool) -> tuple[str, str]:
        verb = rng.choice(self.transitive)
        thing = self._noun_phrase(rng, "object", depth=1)
        head = Phrase("", "", noun.noun_class, plural)
        source = f"that {verb.source}{'' if plural else 's'} {thing.source}"
        return source, f"{thing.target} {self._verb_form(verb, TENSES['present'][1], head)} jo"


def build_grammar(seed: int = 1) -> Grammar:
    """Draw a lexicon.

    Args:
        seed: seed of the draw; the same seed gives the same languages.
    """
    rng = random.Random(seed)
    used: set[str] = set()

    def form(syllables: int) -> str:
        while True:
            word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)
            if word not in used:
                used.add(word)
                return word

    def words(count: int) -> tuple[Word, ...]:
        return tuple(Word(form(2), form(2)) for _ in range(count))

    nouns = tuple(Noun(form(2), form(2), rng.randrange(CLASSES)) for _ in range(90))
    return Grammar(nouns, words(40), words(40), words(15), words(12))


def sentence_pairs(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Draw sentence pairs, each source sentence once, so that a held-out part shares none with the rest.

    Args:
        count: how many.
        seed: seed of lexicon and sentences.

    Returns:
        Pairs of a source and a target sentence.
    """
    grammar, rng = build_grammar(seed), random.Random(seed + 1)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        source, target = grammar.sentence(rng)
        pairs.setdefault(source, target)
    return list(pairs.items())
