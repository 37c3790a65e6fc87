"""Parts of pages that commands write, between two lines that are comments there."""


def put_between(page: str, begin: str, end: str, part: str) -> str:
    """Return a page with another part between two marks, with an empty line before and after it.

    Args:
        page: the page's text.
        begin: the mark before the part.
        end: the mark after it, the first one that follows.
        part: what stands between them.

    Raises:
        ValueError: if the page lacks the marks.
    """
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"expected the lines {begin} and {end}, between which a table goes")
    return f"{before}{begin}\n\n{part.strip()}\n\n{end}{after}"
