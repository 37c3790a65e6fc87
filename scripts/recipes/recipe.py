"""A recipe: the settings of one table of a paper, read from ``recipe.yaml`` in its folder.

The file has these keys; ``extends`` names another recipe's folder, whose keys are taken where the file has none.
``sizes`` add up, and so do ``sources`` of the same paper; but what a size says of methods or columns is left where the
recipe has methods or columns of its own.

==============  ====================================================================================================
``title``       what is trained on what
``paper``       paper and table
``prepare``     script that prepares the data, in the folder of the recipe that has the key
``corpora``     folders below ``--data`` that it reads, looked for before anything is run; ``|`` stands between those
                one of which is enough, ``{name}`` for an option
``evaluate``    how a run is scored: a name in ``evaluations.EVALUATIONS``
``metric``      the score that the table shows: ``name``, ``better`` (higher or lower), ``unit``, ``digits``
``options``     what the preparation needs to know, by name
``evaluation``  what the evaluation needs to know, by name
``measures``    what is measured of the runs besides: by name in ``measures.MEASURES``, its settings; the run is the
                same as that of a table without measures
``flags``       fairseq-train's flags of all methods, without dashes; ``true`` for a flag without a value; ``{data}``
                stands for the folder of the prepared data
``flags_of``    ``glue``: the flags that the task in ``options`` needs come first; a name in ``FLAGS_OF``
``methods``     by name of the table's row, the flags of the method; the first is the baseline
``columns``     by name of the table's column (a task, a sampling rate), what differs: ``options``, ``evaluation``,
                ``measures``, ``flags``, ``methods``, ``metric``; without it there is one column
``rates``       shares of the training split: each column is there with each of them as the option ``rate``
``average``     ``true``: the table has the averages over its columns too
``seeds``       seeds of the runs
``shared_start``  ``true``: the epochs before ``sam-start-epoch`` are run once for all methods of a seed
``sizes``       ``mini`` and ``paper``: ``options``, ``evaluation``, ``measures``, ``flags``, ``methods`` (flags by
                method), ``rates`` and ``seeds`` that differ, ``columns``: those that the size has, default all, with
                what differs, and ``needs``: by name of an option, the folder of the recipe whose model it names,
                which is trained first; ``false`` for a size of the other recipe that this one has not
``sources``     where a setting is from, by flag, option or method
==============  ====================================================================================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FILE = "recipe.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times as fast, where it was built
KEYS = {
    "title", "paper", "extends", "prepare", "corpora", "evaluate", "metric", "options", "evaluation", "measures",
    "flags", "flags_of", "methods", "columns", "rates", "average", "seeds", "shared_start", "sizes", "sources",
}  # fmt: skip
COLUMN_KEYS = {"options", "evaluation", "measures", "flags", "methods", "metric"}
SIZE_KEYS = {*(COLUMN_KEYS - {"metric"}), "columns", "rates", "seeds", "needs"}

Flags = dict[str, Any]


class RecipeError(ValueError):
    """A recipe that cannot be read or does not have what is asked for."""


@dataclass(frozen=True)
class Metric:
    """The score that a table shows.

    Attributes:
        name: its key among the scores of an evaluation.
        better: ``higher`` or ``lower``.
        unit: what it is counted in, for the table's head.
        digits: digits after the point.
    """

    name: str
    better: str = "higher"
    unit: str = ""
    digits: int = 2

    def __post_init__(self) -> None:
        """Check the direction."""
        if self.better not in ("higher", "lower"):
            raise RecipeError(f"metric.better must be higher or lower, got {self.better!r}")


@dataclass(frozen=True)
class Recipe:
    """One column of a recipe at one size.

    Attributes:
        name: the folder's name.
        folder: where it is.
        size: ``mini`` or ``paper``.
        column: name of the table's column; empty where there is one only.
        prepare: the preparing script.
        evaluate: how a run is scored.
        options: what the preparation needs to know.
        evaluation: what the evaluation needs to know.
        measures: by name, the settings of what is measured besides.
        methods: fairseq-train's flags by method, those of all methods included.
        sources: where settings are from.
        shared_start: whether the epochs before the start epoch are run once for all methods.
        average: whether the table has the averages over its columns too.
        needs: by option, the recipe of the model that the preparation needs; its baseline is trained first.
        corpora: folders of the data that the preparation reads, each with its alternatives.
        changed: options that were changed from values of the recipe's own.
    """

    name: str
    folder: Path
    size: str
    column: str
    title: str
    paper: str
    prepare: Path
    evaluate: str
    metric: Metric
    options: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    methods: Mapping[str, Flags]
    seeds: Sequence[int]
    sources: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shared_start: bool = False
    average: bool = False
    needs: Mapping[str, "Recipe"] = field(default_factory=dict)
    corpora: Sequence[Sequence[str]] = ()
    changed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The size as tables of runs have it: with the options that are not those of the recipe."""
        return ", ".join([self.size, *(f"{name}={value}" for name, value in sorted(self.changed.items()))])

    @property
    def baseline(self) -> str:
        """The method that the others are compared with: the first."""
        return next(iter(self.methods))


def _flags_of_glue(options: Mapping[str, Any]) -> Flags:
    from scripts.recipes import glue

    flags: Flags = {}
    for word in glue.training_flags(glue.TASKS[options["task"]]):
        if word.startswith("--"):
            flags[word[2:]] = True
        else:
            flags[next(reversed(flags))] = word
    return flags


FLAGS_OF: dict[str, Callable[[Mapping[str, Any]], Flags]] = {"glue": _flags_of_glue}


def read_recipe(folder: str | Path, size: str, column: str = "", changed: Mapping[str, Any] | None = None) -> Recipe:
    """Read a column of the recipe of a folder.

    Args:
        folder: the folder, or the name of one in ``examples``.
        size: ``mini`` or ``paper``.
        column: one of ``column_names``; default the first.
        changed: options that are other than the recipe's.

    Raises:
        RecipeError: names the file, the key and what it may be.
    """
    place = _found(folder)
    content = _content(place)
    columns = _columns(place, content, size)
    column = column or next(iter(columns))
    if column not in columns:
        allowed = (
            f"must be among {', '.join(columns)}" if any(columns) else "must be left out, the table has one column"
        )
        raise RecipeError(f"{place / FILE}: --columns {allowed}, got {column!r}")
    key, rate = columns[column]
    # What counts more comes later: a size's own column over the column, that over the size, that over all.
    at_size = content["sizes"][size] or {}
    layers = [content, at_size, *((part.get("columns") or {}).get(key) or {} for part in (content, at_size))]
    at_rate = {} if rate is None else {"rate": rate}
    known = {name for layer in (*layers, {"options": at_rate}) for name in layer.get("options") or {}}
    unknown = sorted(set(changed or {}) - known)
    if unknown:
        raise RecipeError(f"{place / FILE} has no option {unknown[0]!r} (--set); it has {', '.join(sorted(known))}")
    for layer, keys in zip(layers[1:], (SIZE_KEYS, COLUMN_KEYS, COLUMN_KEYS), strict=True):
        _check_layer(place, layer, keys, content["methods"])

    def merged(key: str) -> dict[str, Any]:
        return {name: value for layer in layers for name, value in (layer.get(key) or {}).items()}

    options = {**merged("options"), **at_rate}
    other = {name: _like(options.get(name), value) for name, value in (changed or {}).items()}
    own_values = {name: options.get(name) for name in other}
    options |= other
    flags = {**(FLAGS_OF[content["flags_of"]](options) if "flags_of" in content else {}), **merged("flags")}
    own = {name: [(layer.get("methods") or {}).get(name) or {} for layer in layers] for name in content["methods"]}
    return Recipe(
        name=place.name,
        folder=place,
        size=size,
        column=column,
        title=content["title"],
        paper=content["paper"],
        prepare=Path(content["prepare"]),
        evaluate=content["evaluate"],
        metric=Metric(**merged("metric")),
        options=options,
        evaluation=merged("evaluation"),
        methods={
            name: {**flags, **{flag: value for part in parts for flag, value in part.items()}}
            for name, parts in own.items()
        },
        seeds=list(at_size.get("seeds") or content.get("seeds") or [1]),
        sources=content.get("sources") or {},
        measures=merged("measures"),
        shared_start=bool(content.get("shared_start")),
        average=bool(content.get("average")),
        needs={
            name: read_recipe(needed, size)
            for name, needed in (at_size.get("needs") or {}).items()
            if name not in (changed or {})
        },
        corpora=[each.format(**options).split("|") for each in content.get("corpora") or ()],
        changed={name: value for name, value in other.items() if own_values[name] not in (None, value)},
    )


def _like(own: Any, value: Any) -> Any:
    """A changed option: words with commas between where the recipe has a list."""
    return value.split(",") if isinstance(own, list) and isinstance(value, str) else value


def size_names(folder: str | Path) -> list[str]:
    """The sizes that a recipe has."""
    return list(_content(_found(folder))["sizes"])


def column_names(folder: str | Path, size: str) -> list[str]:
    """The columns of a recipe's table at a size; one without a name where the recipe names none."""
    place = _found(folder)
    return list(_columns(place, _content(place), size))


def _columns(place: Path, content: Mapping[str, Any], size: str) -> dict[str, tuple[str, float | None]]:
    """By their names, the keys of the table's columns, and the rates."""
    sizes = content["sizes"]
    if size not in sizes:
        raise RecipeError(f"{place / FILE}: --size must be one of {', '.join(sizes)}, got {size!r}")
    named = content.get("columns") or {}
    chosen = (sizes[size] or {}).get("columns")
    rates = (sizes[size] or {}).get("rates") or content.get("rates")
    unknown = sorted(set(chosen or {}) - set(named))
    if unknown:
        raise RecipeError(f"{place / FILE}: sizes.{size}.columns has {unknown[0]!r}, which is no column of the recipe")
    keys = list(chosen if chosen is not None else named) or [""]
    if not rates:
        return {key: (key, None) for key in keys}
    return {f"{key} {rate:.0%}".lstrip(): (key, rate) for key in keys for rate in rates}


def _check_layer(place: Path, layer: Mapping[str, Any], allowed: set[str], methods: Mapping[str, Any]) -> None:
    unknown = sorted(set(layer) - allowed)
    if unknown:
        known = ", ".join(sorted(allowed))
        raise RecipeError(f"{place / FILE}: a size or column has {unknown[0]!r}; it may have {known}")
    strangers = sorted(set(layer.get("methods") or {}) - set(methods))
    if strangers:
        raise RecipeError(f"{place / FILE}: a size or column has the method {strangers[0]!r}, which the recipe has not")


def recipe_folders() -> list[Path]:
    """All folders of ``examples`` that hold a recipe."""
    return sorted(path.parent for path in EXAMPLES.glob(f"*/{FILE}"))


def command_line(flags: Flags) -> list[str]:
    """Words of a command line; a flag that is false or null is left out."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += [str(each) for each in value]
        elif value is not True:
            words.append(str(value))
    return words


def _found(folder: str | Path) -> Path:
    for place in (Path(folder), EXAMPLES / folder):
        if (place / FILE).is_file():
            return place.resolve()
    known = ", ".join(path.name for path in recipe_folders())
    raise RecipeError(f"{folder} holds no {FILE}; the recipes are {known}")


def _content(place: Path) -> dict[str, Any]:
    try:
        content = yaml.load((place / FILE).read_text(encoding="utf-8"), Loader=LOADER)
    except yaml.YAMLError as error:
        raise RecipeError(f"{place / FILE} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{place / FILE} must hold keys and values, got {type(content).__name__}")
    unknown = sorted(set(content) - KEYS)
    if unknown:
        raise RecipeError(f"{place / FILE} has {unknown[0]!r}; the keys are {', '.join(sorted(KEYS))}")
    if "prepare" in content:
        content["prepare"] = place / content["prepare"]
    for size in (content.get("sizes") or {}).values():
        if size and "needs" in size:
            size["needs"] = {name: place / folder for name, folder in size["needs"].items()}
    if "extends" in content:
        base = _content(_found(place / content.pop("extends")))
        if "prepare" in content:
            base.pop("corpora", None)  # it reads its own
        sources = {**_sources_of_same_paper(base, content), **(content.get("sources") or {})}
        sizes = _merged(base["sizes"], content.get("sizes") or {}, {"methods", "columns"} - set(content))
        content = {**base, **content, "sizes": sizes, "sources": sources}
    missing = sorted({"title", "paper", "prepare", "evaluate", "metric", "methods", "sizes"} - set(content))
    if missing:
        raise RecipeError(f"{place / FILE} needs the key {missing[0]!r}")
    return content


def _sources_of_same_paper(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """The sources that a recipe takes over: sections and tables mean others in another paper."""
    papers = [content.get("paper", base["paper"]).partition(",")[0] for content in (base, own)]
    return dict(base.get("sources") or {}) if papers[0] == papers[1] else {}


def _merged(base: Mapping[str, Any], own: Mapping[str, Any], inherited: set[str]) -> dict[str, Any]:
    """The sizes of both recipes.

    Options and flags add up; methods and columns do where they are inherited, but there are the columns that the
    recipe itself chooses.
    """
    merged = {}
    for size in (*base, *(size for size in own if size not in base)):
        if own.get(size) is False:
            continue
        first, second = base.get(size) or {}, own.get(size) or {}
        parts: dict[str, Any] = {}
        for key in ("options", "evaluation", "measures", "flags"):
            parts[key] = {**(first.get(key) or {}), **(second.get(key) or {})}
        for key in ("rates", "seeds", "needs"):
            parts[key] = second.get(key, first.get(key))
        for key in ("methods", "columns"):
            parts[key] = second.get(key)
        if "methods" in inherited:
            parts["methods"] = _added(first.get("methods"), second.get("methods"))
        if "columns" in inherited and first.get("columns"):
            chosen = second.get("columns", first["columns"])
            parts["columns"] = {name: _added(first["columns"].get(name), chosen[name]) for name in chosen}
        merged[size] = {key: value for key, value in parts.items() if value}
    return merged


def _added(base: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Two mappings of mappings; the second counts more."""
    first, second = base or {}, own or {}
    return {key: {**(first.get(key) or {}), **(second.get(key) or {})} for key in {**first, **second}}
