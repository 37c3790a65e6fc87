"""GLEU and MaxMatch against values worked out by hand."""

import math
import random

import pytest

from scripts.recipes.corrections import Annotated, Edit, gleu, max_match, read_m2

# -- GLEU --------------------------------------------------------------------------------------------------------------

SOURCE = "there is several reasons for this"
REFERENCE = "there are several reasons for this"


def test_the_reference_itself_and_the_source():
    assert gleu([REFERENCE], [[REFERENCE]], [SOURCE]) == pytest.approx(100.0)
    # Words: 5 shared, less `is`, which the reference has changed: 4 of 6. Pairs: 3 shared, less `there is` and
    # `is several`: 1 of 5. Threes: `several reasons for`, `reasons for this`, less two kept ones: 0 of 4.
    assert gleu([SOURCE], [[REFERENCE]], [SOURCE]) == 0.0


def test_a_correction_by_halves():
    """Source a b c d e f g h, reference A b c d E f g h; the hypothesis corrects a and keeps e."""
    source, reference, hypothesis = "a b c d e f g h", "A b c d E f g h", "A b c d e f g h"
    # Words: 7 shared, less e: 6 of 8. Pairs: 5 shared, less `d e` and `e f`: 3 of 7.
    # Threes: 3 shared (Abc bcd fgh), less cde def efg: 0.
    assert gleu([hypothesis], [[reference]], [source]) == 0.0
    # In a corpus the counts add up: with a sentence of 8 words without an error that is left as it is.
    clean = "s t u v w x y z"
    expected = (14 / 16 * 10 / 14 * 6 / 12 * 5 / 10) ** 0.25  # fours: 1 shared, less 4, is 0; 5 of the clean one
    assert gleu([hypothesis, clean], [[reference, clean]], [source, clean]) == pytest.approx(100 * expected)


def test_only_what_the_reference_lacks_counts_against():
    """A word that is wrongly left twice counts once as right, and not against: the reference has it."""
    found = gleu(["a a b c d e"], [["a b c d e f"]], ["a a b c d e"])
    # Words: a b c d e, 5 of 6; nothing of the source is missing from the reference.
    # Pairs: ab bc cd de, less `a a`: 3 of 5. Threes: abc bcd cde, less `a a b`: 2 of 4. Fours: 2 less 1: 1 of 3.
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_a_short_hypothesis_is_punished():
    reference = "a b c d e f g h"
    assert gleu(["a b c d"], [[reference]], [reference]) == pytest.approx(100 * math.exp(1 - 8 / 4))


def test_several_references_are_drawn():
    """Each sentence has one of two references; the mean over rounds is near that over all choices."""
    source = hypothesis = "a b c d e f"
    other = "a b c d X f"
    alone = [gleu([hypothesis], [[reference]], [source]) for reference in (hypothesis, other)]
    assert alone == [100.0, 0.0]
    found = gleu([hypothesis], [[hypothesis], [other]], [source])
    assert 40 < found < 60, "of 500 rounds about half have the first"
    assert found == gleu([hypothesis], [[hypothesis], [other]], [source]), "the draws are fixed"
    draws = [int(random.Random(101 * n).random() * 2) for n in range(7)]
    assert gleu([hypothesis], [[hypothesis], [other]], [source], rounds=7) == pytest.approx(100 * draws.count(0) / 7)
    assert gleu([hypothesis], [[other], [other]], [source]) == 0.0


def test_nothing_at_all_scores_nothing():
    assert gleu([""], [["a b"]], ["a b"]) == 0.0 and gleu(["a"], [["a"]], ["a"]) == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a"], [["a"]], ["a", "b"]), "1 hypotheses, 2 sources, 1 references"),
        (([], [[]], []), "0 hypotheses, 0 sources"),
        ((["a"], ["a"], ["a"]), "references must be a list of lists"),
        ((["a"], [], ["a"]), "references must be a list of lists"),
        ((["a"], [["a"], ["a"]], ["a"], 0), "rounds must be >= 1, got 0"),
    ],
)
def test_lists_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        gleu(*arguments)


# -- MaxMatch ----------------------------------------------------------------------------------------------------------


def annotated(source, *annotators):
    return Annotated(source, tuple(tuple(Edit(a, b, tuple(words)) for a, b, *words in edits) for edits in annotators))


def values(found):
    return found["precision"], found["recall"], found["f"]


def f(precision, recall, beta=0.5):
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def test_right_wrong_and_missed_edits():
    """Right: sat -> sits. Missed: the article. Wrong: mat -> hat."""
    gold = annotated("The cat sat on mat .", [(2, 3, "sits"), (4, 4, "the", "a")])
    assert values(max_match(["The cat sits on hat ."], [gold])) == pytest.approx((50.0, 50.0, 50.0))
    assert values(max_match(["The cat sits on a mat ."], [gold])) == pytest.approx((100.0, 100.0, 100.0))
    assert values(max_match(["The cat sits on mat ."], [gold])) == pytest.approx((100.0, 50.0, f(100, 50)))
    assert max_match(["The cat sits on mat ."], [gold], beta=1.0)["f"] == pytest.approx(200 / 3)


def test_edits_of_several_words_match_as_a_whole():
    """The words that change fall into one edit, or several, as the annotator has it."""
    source, hypothesis = "He have many an friend here", "He has a good friend here"
    whole = annotated(source, [(1, 4, "has a good")])
    parts = annotated(source, [(1, 2, "has"), (2, 4, "a good")])
    assert values(max_match([hypothesis], [whole])) == pytest.approx((100.0, 100.0, 100.0))
    assert values(max_match([hypothesis], [parts])) == pytest.approx((100.0, 100.0, 100.0))


def test_an_edit_may_pass_over_two_words():
    source, hypothesis = "x a b y c", "X a b Y c"
    assert values(max_match([hypothesis], [annotated(source, [(0, 4, "X a b Y")])])) == (100.0, 100.0, 100.0)
    source, hypothesis = "x a b d y c", "X a b d Y c"
    found = max_match([hypothesis], [annotated(source, [(0, 5, "X a b d Y")])])
    assert values(found) == (0.0, 0.0, 0.0), "three words are too many"


def test_what_is_wrong_counts_as_few_edits():
    """Without a match, neighbouring changes are one edit."""
    gold = annotated("a b c d e f g h", [(7, 8, "H")])
    assert values(max_match(["A B c d e f g H"], [gold])) == pytest.approx((50.0, 100.0, f(50, 100)))
    assert values(max_match(["A b C d e f g H"], [gold])) == pytest.approx((50.0, 100.0, f(50, 100)))
    assert values(max_match(["A b c d E f g H"], [gold])) == pytest.approx((100 / 3, 100.0, f(100 / 3, 100)))


def test_a_word_that_is_inserted_twice_is_right_once():
    gold = annotated("He likes cat", [(2, 2, "the")])
    assert values(max_match(["He likes the the cat"], [gold])) == pytest.approx((50.0, 100.0, f(50, 100)))


def test_deletions():
    gold = annotated("He likes the the cat", [(2, 3, "")])
    assert values(max_match(["He likes the cat"], [gold])) == (100.0, 100.0, 100.0)


def test_the_best_annotator_of_each_sentence():
    first = annotated("a b c", [(0, 1, "A")], [(1, 2, "B")])
    second = annotated("d e", [(0, 1, "D")], [])
    assert values(max_match(["a B c", "d e"], [first, second])) == (100.0, 100.0, 100.0)
    assert values(max_match(["A B c", "d e"], [first, second])) == pytest.approx((50.0, 100.0, f(50, 100)))


def test_no_edits_at_all():
    nothing = annotated("a b", [])
    assert values(max_match(["a b"], [nothing])) == (100.0, 100.0, 100.0)
    assert values(max_match(["a X"], [nothing])) == (0.0, 100.0, 0.0)
    assert values(max_match(["a b"], [annotated("a b", [(0, 1, "A")])])) == (100.0, 0.0, 0.0)
    assert values(max_match([""], [annotated("", [])])) == (100.0, 100.0, 100.0)


def test_m2_files(tmp_path):
    path = tmp_path / "gold.m2"
    path.write_text(
        "S The cat sat at mat .\n"
        "A 4 4|||ArtOrDet|||the||a|||REQUIRED|||-NONE-|||0\n"
        "A 3 4|||Prep|||on|||REQUIRED|||-NONE-|||0\n"
        "A 0 1|||Det|||-NONE-|||REQUIRED|||-NONE-|||1\n\n"
        "S The dog .\n"
        "A -1 -1|||noop|||-NONE-|||REQUIRED|||-NONE-|||1\n"
        "A 1 2|||Nn|||dogs|||REQUIRED|||-NONE-|||0\n\n"
        "S Fine .\n"
    )
    assert read_m2(path) == [
        annotated("The cat sat at mat .", [(3, 4, "on"), (4, 4, "the", "a")], [(0, 1, "")]),
        annotated("The dog .", [(1, 2, "dogs")], []),
        annotated("Fine .", []),
    ]
    assert values(max_match(["A cat sat on the mat .", "The dog .", "Fine ."], read_m2(path))) == pytest.approx(
        (200 / 3, 100.0, f(200 / 3, 100))
    )


@pytest.mark.parametrize("line", ["A 1|||x|||y|||z|||-|||0", "A 0 1|||x|||y", "A 0 1|||x|||y|||z|||-|||no", "nonsense"])
def test_lines_that_are_not_m2(tmp_path, line):
    path = tmp_path / "gold.m2"
    path.write_text(f"S The cat .\n{line}\n")
    with pytest.raises(ValueError, match=r"gold.m2, line 2: "):
        read_m2(path)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="2 hypotheses, 1 annotated"):
        max_match(["a", "b"], [annotated("a", [])])
    with pytest.raises(ValueError, match="0 hypotheses"):
        max_match([], [])
    for beta in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="beta must be > 0"):
            max_match(["a"], [annotated("a", [])], beta=beta)
