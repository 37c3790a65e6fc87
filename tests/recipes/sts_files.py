"""Generated pairs of sentences in the layouts of the STS sets."""

import lzma

from scripts.recipes.sts import LAYOUTS, TRAINING

HEADS = {
    "sts": "task\tscore\tsentence1\tsentence2",
    "SICK": "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment",
    "GLUE": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
}


def pairs_of(name, number=24):
    """Sentences whose score is the share of words that they have in common; a quote that is never closed."""
    from grammar import sentence_pairs

    texts = [source for source, _ in sentence_pairs(2 * number, seed=sum(name.encode()))]
    rows = []
    for i in range(number):
        first, other = texts[2 * i].split(), texts[2 * i + 1].split()
        kept = i % (len(first) + 1)
        second = first[:kept] + other[kept:]
        rows.append((" ".join(['"quoted', *first]), " ".join(second), 5 * kept / len(first)))
    return rows


def line_of(layout, number, first, second, score):
    if layout.file.startswith("SICK"):
        return f"{number}\t{first}\t{second}\t{score}\tNEUTRAL"
    if layout.folder == "sts":
        return f"part{number % 2}\t{score}\t{first}\t{second}"
    if not layout.has_head:
        extra = "\tsource\tsource" if number % 2 else ""
        return f"genre\tfile\t2012test\t{number}\t{score}\t{first}\t{second}{extra}"
    return f"{number}\tgenre\tfile\t2012test\t0000\tnone\tnone\t{first}\t{second}\t{score}"


def write_sets(folder):
    """All sets, every other one compressed."""
    layouts = {**LAYOUTS, "STS-B train": TRAINING}
    for place, (name, layout) in enumerate(layouts.items()):
        head = HEADS["SICK" if layout.file.startswith("SICK") else "sts" if layout.folder == "sts" else "GLUE"]
        lines = [line_of(layout, i, *row) for i, row in enumerate(pairs_of(name))]
        text = "\n".join([*([head] if layout.has_head else []), *lines]) + "\n"
        (folder / layout.folder).mkdir(parents=True, exist_ok=True)
        path = folder / layout.folder / layout.file
        if place % 2:
            path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
    return folder
