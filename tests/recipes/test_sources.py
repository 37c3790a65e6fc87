"""Every setting of a paper's size has a source, which names a place that has it, and is what the source says."""

import ast
import math
import re
from functools import cache

import pytest

from scripts.recipes.recipe import column_names, read_recipe
from tests.recipes import papers
from tests.recipes.papers import TABLES, numbers

# Not settings of an experiment: what fairseq needs to know, and where we follow its own recipes.
PLUMBING = {
    "task", "criterion", "num-classes", "best-checkpoint-metric", "maximize-best-checkpoint-metric", "num-workers",
    "no-epoch-checkpoints", "required-batch-size-multiple", "lr-scheduler", "sample-break-mode", "decoder-layers",
    "decoder-out-embed-dim", "ddp-backend", "max-target-positions", "optimizer",
    "init-token", "report-mcc", "report-acc-and-f1", "report-pearson-and-spearman", "regression-target", "valid-subset",
}  # fmt: skip

PLACE = rf"(?:appendix )?(?:{papers.SECTION}|(?:Table|Figure|equation) \d+)(?![\w.-])"
# Other places than the paper: what is named must be said.
ELSEWHERE = (
    r"ours: \S|none: \S|(?:BERT|RoBERTa|BART)-(?:base|large)$|(?:RoBERTa|BART|Mirror-BERT): \S|"
    r"(?:Mirror-BERT|fairseq)'s \w+|as BART's recipe in fairseq$|summary-level: \S"
)

NEEDS_PAPERS = pytest.mark.skipif(not papers.FOLDER.is_dir(), reason="the papers' texts are not beside the project")


@pytest.fixture(scope="module", params=TABLES)
def columns(request):
    """A recipe's columns."""
    return [read_recipe(request.param, "paper", column) for column in column_names(request.param, "paper")]


def settings_of(recipe, method):
    """Options, settings of the evaluation and flags of a method in a column."""
    return {**recipe.options, **recipe.evaluation, **recipe.methods[method]}


def source_of(recipe, name):
    """What is said of the paper's size."""
    return "; ".join(each for each in recipe.sources.get(name, "").split("; ") if not each.startswith("mini: "))


def sources_in_use(columns):
    """Those of settings and methods that a table has, by name; other recipes' sources are there too."""
    names = {"seeds", *columns[0].methods}
    names |= {name for recipe in columns for method in recipe.methods for name in settings_of(recipe, method)}
    return {name: source_of(columns[0], name) for name in sorted(names & columns[0].sources.keys())}


def assert_none(columns, contradictions):
    assert not contradictions, f"{columns[0].name}:\n" + "\n".join(dict.fromkeys(contradictions))


def test_every_setting_of_the_paper_has_a_source(columns):
    """Of each column and method; what a method has beside the baseline can be said of the method as a whole."""
    for recipe in columns:
        base, missing = recipe.methods[recipe.baseline], set(recipe.methods) - {recipe.baseline}
        for method, flags in recipe.methods.items():
            own = set() if method == recipe.baseline else {name for name in flags if flags[name] != base.get(name)}
            missing |= settings_of(recipe, method).keys() - own - PLUMBING
        missing -= recipe.sources.keys()
        assert not missing, f"{recipe.name}, {recipe.column}"


# -- places ------------------------------------------------------------------------------------------------------------


def statements(text):
    """What a source says: places in the paper, and what is said of them."""
    for part in text.split("; "):
        rest, places = part, []
        while found := re.match(f"({PLACE})(, (?={PLACE})|: |)", rest):
            places.append(found[1].removeprefix("appendix "))
            rest = rest[found.end() :]
            if found[2] != ", ":
                break
        yield places, rest.strip()


def test_sources_name_a_place(columns):
    for name, text in sources_in_use(columns).items():
        reference = re.fullmatch(r"as ([\w-]+)", text)
        is_named = re.match(f"{PLACE}|{ELSEWHERE}", text)
        assert is_named or (reference and reference[1] in columns[0].sources), f"{columns[0].name}, {name}: {text}"


@NEEDS_PAPERS
def test_the_places_are_in_the_paper(columns):
    """Sections and tables, and the numbers that a source gives them."""
    file, wrong = papers.FILES[columns[0].paper.rpartition(", ")[0]], []
    for name, text in sources_in_use(columns).items():
        for places, said in statements(text):
            passages = {place: papers.passage(file, place) for place in places if not place.startswith("equation")}
            wrong += [f"{name}: there is no {place}" for place, passage in passages.items() if passage is None]
            if passages and None not in passages.values() and not text.startswith("ours: "):
                there = numbers("\n".join(passages.values()))
                stated = number_of(said)
                if stated is not None and not any(math.isclose(stated, each) for each in there):
                    wrong.append(f"{name}: {', '.join(places)} has no {stated:g}")
    assert_none(columns, wrong)


# -- values ------------------------------------------------------------------------------------------------------------

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
SIZES = {
    "base": {"encoder-layers": 12, "encoder-embed-dim": 768, "encoder-ffn-embed-dim": 3072,
             "encoder-attention-heads": 12},
    "large": {"encoder-layers": 24, "encoder-embed-dim": 1024, "encoder-ffn-embed-dim": 4096,
              "encoder-attention-heads": 16},
}  # fmt: skip
SHARED = {"max-positions": 512, "dropout": 0.1, "attention-dropout": 0.1}
NORMS = {"L-infinity": "linf", "L2": "l2", "L∞": "linf"}
SCALES = {
    "1": "one", "‖w‖/‖g‖": "weight_over_gradient", "1/‖g‖": "inverse_gradient", "‖w‖/√n": "weight_over_sqrt_n",
    "‖w‖": "weight_norm",
}  # fmt: skip
ROWS = {
    "Single-step": {"sam-descent": "last"}, "Element-wise": {"sam-granularity": "element"},
    "Model-wise": {"sam-granularity": "model"},
}  # fmt: skip
# What a source of a method calls its flags; several flags are those of several methods.
SYMBOLS = {
    "ρ": ["sam-epsilon"], "L-infinity,": ["sam-epsilon"], "L2,": ["sam-epsilon"], "η": ["sam-delta-eta"],
    "K =": ["sam-steps"], "start epoch": ["sam-start-epoch"], "scale": ["input-noise"], "m": ["sam-m"],
    "sparse ratio": ["sam-sparsity"], "interval": ["sam-mask-interval"], "β and γ": ["sam-sparsity", "sam-esam-gamma"],
    "α": ["rdrop-alpha", "sam-gsam-alpha"], "λ": ["r3f-lambda", "smart-lambda"],
}  # fmt: skip
NAMED = {"K": "sam-steps", "Fi": "sam-mask-interval", "s": "sam-sparsity", "ρ": "sam-epsilon", "m": "sam-m"}
DEFAULTS = {"sam-m": 1}


def number_of(said):
    """The number in what a source says of a setting, a percentage as its share; None if there is none, or several."""
    no_values = r"\([^()]*\)", r"\b(?:19|20)\d\d\b", r"(?:Table|Figure) \d+", rf"^ours: {papers.SECTION} (?=[a-z])"
    text = re.sub("|".join(no_values), "", said)  # remarks, years, places
    found = re.findall(rf"(?<![\w.\-]){NUMBER}(?: %|k\b)?", text)
    return min(numbers(found[0])) if len(found) == 1 and "one epoch" not in text else None


def value_of(name, said, settings):
    """The value of a setting that a source states; None if that is not clear."""
    number = number_of(said)
    if number is None or ("epochs" in said and name not in ("max-epoch", "force-anneal")):
        return None
    if name == "warmup-updates" and number < 1:
        return math.floor(number * settings["total-num-update"])
    if name == "update-freq" and "in all" in said:
        return number / settings["batch-size"]
    if name == "force-anneal":
        return number + 1  # the first epoch after those
    return number - 1 if "one for the end" in said else number


def claims(method, text, flags):
    """Flags of a method that its source states, and that its name does."""
    found = {}
    for symbol, names in SYMBOLS.items():
        stated = re.search(rf"(?<!\w){symbol} ({NUMBER})(?! in its script)", text)
        found |= {name: stated[1] for name in names if stated and name in {**DEFAULTS, **flags}}
    for pattern, name, value in (
        (r"L-infinity|L2", "sam-norm", lambda words: NORMS[words]),
        (r"one step", "sam-steps", lambda _: 1),
        (r"one view only", "perturb-one-view", lambda _: True),
        (r"a quarter of the batch", "sam-ascent-fraction", lambda _: 0.25),
        (r"smallest ρ a fifth", "sam-epsilon-min", lambda _: float(flags["sam-epsilon"]) / 5),
        (rf"(?<!\w)a {NUMBER}", "sam-ascent-fraction", lambda words: float(words[2:]) / flags["batch-size"]),
        (rf"as much as {NUMBER} here", "rdrop-alpha", lambda words: words.split()[3]),
    ):
        stated = re.search(pattern, text)
        found |= {name: value(stated[0])} if stated else {}
    word, _, value = method.rpartition(" = ")
    if word == "T":
        found["sam-scale"] = SCALES[value]
    elif word == "a":
        found["sam-ascent-fraction"] = float(value) / flags["batch-size"]
    elif word.endswith("ε"):
        found |= {"sam-norm": NORMS[word.partition(",")[0]], "sam-epsilon": value}
    elif word:
        found[NAMED[word]] = value
    return {**found, **ROWS.get(method, {})}


def is_same(value, stated):
    if isinstance(stated, bool) or not all(re.fullmatch(NUMBER, str(each)) for each in (value, stated)):
        return value == stated
    return value is not None and math.isclose(float(value), float(str(stated).replace(",", "")))


def test_methods_are_what_their_sources_say(columns):
    wrong = []
    for recipe in columns:
        for method in recipe.methods:
            flags, text = recipe.methods[method], source_of(recipe, method)
            for name, stated in claims(method, text, flags).items():
                value = flags.get(name, DEFAULTS.get(name))
                if not is_same(value, stated):
                    wrong.append(f"{method}, {recipe.column}: {name} is {value}, the source says {stated}: {text}")
            grid = re.search(r"ρ from \{([^}]*)\}", text)
            if grid and not any(is_same(flags["sam-epsilon"], each) for each in grid[1].split(", ")):
                wrong.append(f"{method}, {recipe.column}: sam-epsilon is {flags['sam-epsilon']}: {text}")
    assert_none(columns, wrong)


def test_settings_are_what_their_sources_say(columns):
    """Of methods, only where these have no value of their own."""
    wrong = []
    for recipe in columns:
        base = settings_of(recipe, recipe.baseline)
        for method in recipe.methods:
            settings = settings_of(recipe, method)
            for name in settings.keys() - {"optimizer"}:
                value, text = settings[name], source_of(recipe, name)
                is_own = value != base.get(name) and method in recipe.sources
                if value is None or isinstance(value, bool | list) or is_own:
                    continue
                for stated in stated_values(name, text, settings):
                    if not is_same(value, stated):
                        wrong.append(f"{name}, {recipe.column}: it is {value}, the source says {stated}: {text}")
        number = value_of("seeds", next(statements(source_of(recipe, "seeds")))[1], {})
        if number is not None and len(recipe.seeds) != number:
            wrong.append(f"seeds: there are {len(recipe.seeds)}: {recipe.sources['seeds']}")
    assert_none(columns, wrong)


def stated_values(name, text, settings):
    """What a setting must be."""
    own = text.split("; ")[:1] if text.startswith("ours: ") else [said for _, said in statements(text)]
    reference, model = re.fullmatch(r"as ([\w-]+)", text), re.fullmatch(r"(?:Ro)?BERTa?-(base|large)", text)
    if reference:
        yield settings[reference[1]]
    elif model:
        yield from (each[name] for each in (SIZES[model[1]], SHARED) if name in each)
    elif name == "adam-betas":
        stated = dict(re.findall(rf"β([12]) ({NUMBER})", text))
        values = ast.literal_eval(settings[name])
        if any(not is_same(values[int(place) - 1], value) for place, value in stated.items()):
            yield str(stated)
    elif name == "arch":
        families = re.findall(r"(?<!\w)(BERT|RoBERTa|BART)-(base|large)", text)
        names = {f"bart_{size}" if family == "BART" else family.lower() for family, size in families}
        if names and settings[name] not in names:
            yield " or ".join(sorted(names))
    elif name not in ("keep-interval-updates", "lr-scheduler"):  # the text's number is another setting's
        yield from (value for said in own if (value := value_of(name, said, settings)) is not None)


# -- tables and lists of settings in the papers ------------------------------------------------------------------------

FINE_TUNED = [name for name in TABLES if re.match(r"fsam_(table[134569]|figure[12])", name)]


@cache
def fine_tuning():
    """FSAM's table 10: rate, length and warm-up by model and task."""
    rows, found = papers.passage("fsam.txt", "Table 10").split("\n"), []
    for row in rows:
        cells = [cell for cell in row.split("\t") if cell]
        if re.search(r"\de-\d", row):
            found.append(cells[-4:])
    models = ("bert", "electra", "albert", "roberta")
    return {(models[place // 8], task): settings for place, (task, *settings) in enumerate(found)}


@NEEDS_PAPERS
@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_is_that_of_the_paper(name):
    """Epochs are told by the sizes of the training sets in table 7, which are rounded."""
    sizes = dict(re.findall(r"(?:\t|^)([\w-]+)\t[a-z -]+\t([\d.]+K?)\t", papers.passage("fsam.txt", "Table 7"), re.M))
    for column in column_names(name, "paper"):
        recipe = read_recipe(name, "paper", column)
        flags, task = recipe.methods[recipe.baseline], recipe.options["task"]
        rate, length, warmup = fine_tuning()[flags["arch"], task]
        if not recipe.sources["lr"].startswith("ours: "):
            assert float(flags["lr"]) == float(rate), column
        number, updates = float(length.split()[0]), flags["total-num-update"]
        if "epochs" in length:
            whole = float(sizes[task].rstrip("K")) * (1000 if "K" in sizes[task] else 1)
            assert updates == pytest.approx(number * whole / flags["batch-size"], rel=0.12), column
            assert flags["warmup-updates"] == math.floor(updates * float(warmup.rstrip("%")) / 100), column
        else:
            assert (updates, flags["warmup-updates"]) == (number, float(warmup.split()[0])), column


@NEEDS_PAPERS
@pytest.mark.parametrize(("name", "model"), [("bert_base", "BERT"), ("roberta_large", "RoBERTa")])
def test_radii_of_delta_sam_are_those_of_the_paper(name, model):
    """δ-SAM's table 5, by task."""
    lines = papers.passage("delta-sam.txt", "Table 5").split("\n")
    tasks = next(line for line in lines if line.startswith("Hyperparameter")).replace("SST2", "SST-2").split("\t")
    start = next(number for number, line in enumerate(lines) if line.startswith(model))
    rows = {line.split("\t")[0]: line.split("\t") for line in lines[start + 1 : start + 3]}
    for task in tasks[1:]:
        recipe, place = read_recipe(f"delta_sam_table1_{name}", "paper", task), tasks.index(task)
        assert {float(recipe.methods[method]["sam-epsilon"]) for method in ("SAM", "δ-SAM")} == {
            float(rows["rho"][place])
        }
        assert float(recipe.methods["δ-SAM"]["sam-delta-eta"]) == float(rows["eta"][place])


OF_TEXT = {
    "Single-step": "single-step", "Element-wise": "element-wise", "Model-wise": "model-wise",
    "T = ‖w‖/‖g‖": "∥w(i)∥2/∥g(i)∥2", "T = 1/‖g‖": "1/∥g(i)∥2", "T = ‖w‖/√n": "∥w(i)∥2/√n(i)", "T = ‖w‖": "∥w(i)∥2",
    "T = 1": "Multi-step Defense",
}  # fmt: skip
SECTIONS = {"imdb": ("C.2.1", "C.3.1"), "ptb": ("C.2.2", "C.3.2"), "envi": ("C.2.3",), "deen": ("C.2.4",)}


@NEEDS_PAPERS
@pytest.mark.parametrize("name", [name for name in TABLES if re.match(r"ga_sam_table[125]", name)])
def test_radii_of_ga_sam_are_those_of_the_paper(name):
    """Norm and ε that the appendix has for each method."""
    recipe = read_recipe(name, "paper")
    text = "\n".join(papers.passage("ga-sam.txt", place) for place in SECTIONS[name.rpartition("_")[2]])
    text = re.sub(r"(?<=implemen)-|(?<=im)-(?=\n)", "", text).replace("-\n", "-")
    text = " ".join(text.split())
    stated = re.findall(r"(?:On|For T\(i\) =) ([^,.]+), L(2|\+∞), ϵ = ([^.]+(?:\.\d[^.]*)?)\.", text)
    radii = {words.partition(" im")[0]: (norm, min(numbers(radius))) for words, norm, radius in stated}
    for method in recipe.methods.keys() - {recipe.baseline, "FreeLB"}:
        norm, radius = radii[OF_TEXT.get(method, method)]
        flags = recipe.methods[method]
        assert (flags["sam-norm"], float(flags["sam-epsilon"])) == ({"2": "l2"}.get(norm, "linf"), radius), method
