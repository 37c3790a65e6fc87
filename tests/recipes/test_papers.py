"""The papers' figures in ``expected.tsv`` are those of the row and the column that they are said to be of.

``PLACES`` says where the tables stand in the papers' texts, and what their heads and rows are called there.
"""

import csv
from decimal import Decimal

import pytest

from scripts.recipes.recipe import EXAMPLES, column_names, read_recipe
from scripts.recipes.tables import AVERAGE
from tests.recipes import papers
from tests.recipes.papers import WITH_FIGURES, Table


def _names(*words):
    return {word: (word,) for word in words}


# -- FSAM: heads have a line of tasks, whose names are broken up over two cells, and a line of scores ------------------

_TASKS = {
    "CoLA Mcc.": ("CoLA",), "MR Acc.": ("MRPC",), "RPC F1.": ("MRPC F1",), "ST Pear.": ("STS-B",),
    "S-B Spea.": ("STS-B Spearman",), "RTE Acc.": ("RTE",),
}  # fmt: skip
_MORE_TASKS = {
    **_TASKS, **{f"{task} Acc.": (task,) for task in ("CB", "BoolQ", "WSC", "WiC")}, "AVG.": (AVERAGE,),
}  # fmt: skip
_PLUS = {"SAM": "Adam+SAM", "FSAM": "Adam+FSAM"}
_WITH = {"SAM": "-w SAM", "FSAM": "-w FSAM"}
_FSAM1 = Table("fsam.txt", "Table 1: Experimental", "Method\tCoLA", _MORE_TASKS, _PLUS, "ERT-lar\tge", "ELECTRA", 2)
# This head has lost its cells; its words and the figures are in the same order.
_FSAM2 = Table(
    "fsam.txt", "Table 2: Experimental", "Method\t\tXSUM", {}, _PLUS, "BART-large", "BART-base", 2, by_words=True
)
_FSAM3 = Table(
    "fsam.txt", "Table 3: Results", "Method\tCoLA", {**_TASKS, "B RTE Acc.": ("RTE",)}, _WITH, "BERT-base", "RTa-bas", 2
)
_FSAM4 = Table(
    "fsam.txt", "Table 4: Average", "Method", {f"{n}": (f"Fi = {n}",) for n in (10, 50, 100, 200, 500)},
    {AVERAGE: "FSAM-BERT _{base}"}, turned=True,
)  # fmt: skip
# The head's last task is lost: RTE, as in the other tables.
_FSAM5 = Table(
    "fsam.txt", "Table 5: Results", "Method\tCoLA",
    {**_TASKS, "PC F1.": ("MRPC F1",), "STS-B Spea.": ("STS-B Spearman",), "Acc.": ("RTE",)}, _WITH,
    "AMSGrad", "Adagrad", 2,
)  # fmt: skip
# The head's line of tasks is shifted, that of scores is not. GSAM and F_GSAM stand on one line.
_FSAM6 = Table(
    "fsam.txt", "Table 6: Results", "Method\tCoLA",
    {"CoLA Mcc.": ("CoLA",), "CoLA MRPC Acc.": ("MRPC",), "F1.": ("MRPC F1",), "ST Pear.": ("STS-B",),
     "RTE Spea.": ("STS-B Spearman",), "Acc.": ("RTE",)},
    {"ESAM": "-w ESAM", "F_ESAM": "-w F_ESAM", "GSAM": "-w GSAM", "F_GSAM": "-w F GSAM"}, num_heads=2,
)  # fmt: skip
# Both models stand side by side.
_FSAM9 = Table(
    "fsam.txt", "Table 9: Results", "Method\tCoLA",
    {**_TASKS, "RPC F1 .": ("MRPC F1",), "MF Acc.": ("MRPC",), "AVG. AVG.": (AVERAGE,)}, _PLUS, end="AMSGr",
    num_heads=2, cells=slice(0, 7),
)  # fmt: skip
_FSAM9_LARGE = _FSAM9._replace(cells=slice(7, None))
_AMSGRAD = {"after": "Adam+FSAM\t63.2", "labels": {"SAM": "AMSGrad+SAM", "FSAM": "AMSGrad+FSAM"}, "end": ""}


def _generated(**columns):
    """Both models of FSAM's table 2; the recipe's mini size is that of the smaller one."""
    large, base = (
        _FSAM2._replace(columns={word: (f"{model}{column}",) for column, word in columns.items()})
        for model in ("BART-large ", "BART-base ")
    )
    base = base._replace(first="BART-base", end="")
    return [large, base, base._replace(columns={word: (column,) for column, word in columns.items()})]


# -- δ-SAM ------------------------------------------------------------------------------------------------------------

_DELTA1 = Table(
    "delta-sam.txt", "## 5 Experiments", "Model\tavg.",
    {"avg.": (AVERAGE,), "MNLI Acc-m": ("MNLI",), "QQP Acc": ("QQP",), "RTE Acc": ("RTE",), "QNLI Acc": ("QNLI",),
     "MRPC Acc": ("MRPC",), "CoLA Mcc": ("CoLA",), "SST2 Acc": ("SST-2",), "STS-B Pearson": ("STS-B",)},
    {"Baseline": "BERT BASE"}, end="RoBERTa LARGE",
)  # fmt: skip
_NOISE = {f"+ {method} w/ noise": f"+ {method} w/ random noise" for method in ("SAM", "δ-SAM")}
_DELTA2 = Table(
    "delta-sam.txt", "## 5.2 GLUE Tasks", "Model\tavg.",
    _names("avg.", *(f"STS{year}" for year in range(12, 17)), "STS-B", "SICK-R"),
    {"Mirror": "Mirror-BERT BASE", **_NOISE}, end="Mirror-RoBERTa",
)  # fmt: skip
# In both columns of RTE the head's cell has the same word. Accuracies are medians and bests.
_DELTA4 = [
    Table("delta-sam.txt", "## 5.5 Analysis", "Method", columns, num_heads=2, cells=cells)
    for columns, cells in (
        ({"mathcal{L}_{text{adv}} MRPC": ("MRPC risk",), "RTE": ("RTE risk",)}, slice(0, 2)),
        ({"Acc MRPC": ("MRPC", "best MRPC"), "RTE": ("RTE", "best RTE")}, slice(2, None)),
    )
]

_DELTA6 = Table(
    "delta-sam.txt", "B Running Time", "Running time",
    {**_names("MNLI", "QQP", "RTE", "QNLI", "MRPC", "CoLA", "STS-B"), "SST2": ("SST-2",)},
    {"Per-instance perturbation": "Per-instance weight perturbation"}, end="RoBERTa", integers=True,
)  # fmt: skip

# -- GA-SAM: tables without cells; figures, each with its deviation, are in the order of the head's words --------------

_GA1 = Table(
    "ga-sam.txt", "ASAM (Kwon et al., 2021) adopts", "Approach", {},
    {"Baseline": "Baseline w/o SAM", "GA-SAM": "Proposed GA-SAM"}, end="Table 1:", by_words=True,
)  # fmt: skip
_GA2 = _GA1._replace(
    after="tation. Thus, GA-SAM outperforms base models",
    labels={"T = 1": "1", "T = ‖w‖/‖g‖": "∥w(i)∥2/∥g(i)∥2", "T = 1/‖g‖": "1/∥g(i)∥2", "T = ‖w‖/√n": "∥w(i)∥2/√n(i)",
            "T = ‖w‖": "∥w(i)∥2"}, end="Table 2:",
)  # fmt: skip
_GA3 = _GA1._replace(after="5.1 Ablation Study", labels={}, end="w/ diff. ϵ (L2)")
_GA4 = _GA1._replace(
    after="PTB-LM, the LSTM model with more drastic gra-",
    head="Corruption",
    columns={n: (n,) for n in ("Baseline", "GA-SAM")},
    end="Table 4:",
    labels={
        "no corruption": "w/o Corruption",
        **{
            f"{norm} {radius}": f"{name}, ϵ = {radius}"
            for norm, name, radii in (
                ("L2", "L2", ("0.05", "0.1", "0.2")),
                ("L∞", "L+∞", ("0.0001", "0.0002", "0.0005")),
            )
            for radius in radii
        },
    },
    turned=True,
)
_GA5 = _GA1._replace(after="can help find flat minima. We also adopt the Fisher", labels={}, end="Table 5:")


def _ga_sam(table, word):
    """A recipe's one column of a table."""
    return [table._replace(columns={word: ("",)})]


def _radii(word, methods, place):
    """GA-SAM's table 3: rows by K, and by the radius in two norms, as a multiple of what the norm's heading has."""
    tables = _ga_sam(_GA3, word)
    for norm, heading, units, end in (
        ("L2", "w/ diff. ϵ (L2): ×10−2 ×10−3", ("1e-2", "1e-3"), "w/ diff. ϵ (L+∞)"),
        ("L∞", "w/ diff. ϵ (L+∞): ×10−4 ×10−5", ("1e-4", "1e-5"), "Table 3:"),
    ):
        radii = {method: Decimal(method.partition("ε = ")[2]) for method in methods if method.startswith(norm)}
        labels = {method: f"ϵ = {float(radius / Decimal(units[place])):g}×" for method, radius in radii.items()}
        tables.append(tables[0]._replace(labels=labels, first=heading, end=end))
    return tables


# -- SAM for language models: CB, in Cyrillic letters, has F1 and accuracy, as the tasks of GLUE with two figures ------

_FILE, _HEAD = "sam-language-models.txt", "Model\tSGlue"
_COLUMNS = {"\u0421\u0412": ("CB F1", "CB"), "CoPA": ("COPA",), **_names("RTE", "WiC", "WSC")}
_BASE = {"Adafactor": "Base", "SAM": "Base + SAM (0.15)"}
_SUPERGLUE = Table(_FILE, "#### 4.1 Setup", _HEAD, {"SGlue BoolQ": ("all", "BoolQ"), **_COLUMNS}, _BASE)
_GLUE = Table(
    _FILE, "Table 1: Experimental", "Model\tGlue",
    {"CoLA": ("CoLA",), "SST": ("SST-2",), "MRPC": ("MRPC F1", "MRPC"), "STSB": ("STS-B Pearson", "STS-B Spearman"),
     "QQP": ("QQP F1", "QQP"), "MNLI": ("MNLI", "MNLI-mm"), **_names("QNLI", "RTE")}, _BASE,
)  # fmt: skip
_FEW = Table(_FILE, "#### 4.2 Full Data", _HEAD, {"BoolQ": ("BoolQ",), **_COLUMNS}, _BASE)


def _settings(methods):
    """Rows that are named by the setting that they change: ρ, a, m; the baseline stands in table 1."""
    labels = {method: f"Base + SAM ({method.rpartition(' ')[2]})" for method in methods if " = " in method}
    return [_SUPERGLUE, _FEW._replace(after="6.2 Impact of hyper-parameters", labels=labels)]


METHODS = {name: list(read_recipe(name, "paper").methods) for name in WITH_FIGURES}
PLACES = {
    "delta_sam_table1_bert_base": [_DELTA1],
    "delta_sam_table1_roberta_large": [
        _DELTA1._replace(labels={"Baseline": "RoBERTa LARGE"}, first="RoBERTa LARGE", end="")
    ],
    "delta_sam_table2_mirror_bert": [_DELTA2],
    "delta_sam_table2_mirror_roberta": [
        _DELTA2._replace(labels={"Mirror": "Mirror-RoBERTa BASE", **_NOISE}, first="Mirror-RoBERTa", end="")
    ],
    "delta_sam_table4": _DELTA4,
    "delta_sam_table6_bert_base": [_DELTA6],
    "delta_sam_table6_roberta_large": [_DELTA6._replace(first="RoBERTa", end="Table 6")],
    "delta_sam_table3_cnndm": [
        Table("delta-sam.txt", "### 5.3 Self-supervised STS", "Model\tRG-1", _names("RG-1", "RG-2", "RG-L"))
    ],
    "fsam_table1_bert_large": [_FSAM1],
    "fsam_table1_roberta_large": [_FSAM1._replace(first="BERTa-la", end="")],
    "fsam_table2_conll": _generated(P="Precision", R="Recall", **{"F0.5": "F_0.5"}),
    "fsam_table2_xsum": _generated(**{f"Rouge-{n}": f"Rouge_{n}" for n in "12L"}),
    "fsam_table3_bert_base": [_FSAM3],
    "fsam_table3_roberta_base": [_FSAM3._replace(first="RTa-bas", end="")],
    "fsam_table4_bert_base": [_FSAM4],
    "fsam_table4_roberta_base": [_FSAM4._replace(labels={AVERAGE: "FSAM-RoBERTa _{base}"})],
    "fsam_table5_adagrad": [_FSAM5._replace(first="Adagrad", end="")],
    "fsam_table5_amsgrad": [_FSAM5],
    "fsam_table6": [_FSAM6],
    "fsam_table9_roberta_base": [_FSAM9],
    "fsam_table9_roberta_base_amsgrad": [_FSAM9._replace(**_AMSGRAD)],
    "fsam_table9_roberta_large": [_FSAM9_LARGE],
    "fsam_table9_roberta_large_amsgrad": [_FSAM9_LARGE._replace(**_AMSGRAD)],
    "ga_sam_table1_deen": _ga_sam(_GA1, "De-En"),
    "ga_sam_table1_envi": _ga_sam(_GA1, "En-Vi"),
    "ga_sam_table1_imdb": _ga_sam(_GA1, "IMDB"),
    "ga_sam_table1_ptb": _ga_sam(_GA1, "PTB-LM"),
    "ga_sam_table2_imdb": _ga_sam(_GA2, "IMDB"),
    "ga_sam_table2_ptb": _ga_sam(_GA2, "PTB-LM"),
    "ga_sam_table3_imdb": _radii("IMDB", METHODS["ga_sam_table3_imdb"], 0),
    "ga_sam_table3_ptb": _radii("PTB-LM", METHODS["ga_sam_table3_ptb"], 1),
    "ga_sam_table4_envi": [_GA4],
    "ga_sam_table5_deen": _ga_sam(_GA5, "De-En"),
    "ga_sam_table5_envi": _ga_sam(_GA5, "En-Vi"),
    "sam_language_models_table1": [_SUPERGLUE],
    "sam_language_models_table2": [_GLUE],
    "sam_language_models_table6": [_FEW],
    "sam_language_models_table9": _settings(METHODS["sam_language_models_table9"]),
}


def rows_of(name):
    """Rows of a recipe's ``expected.tsv``."""
    with (EXAMPLES / name / "expected.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("name", WITH_FIGURES)
def test_every_row_has_a_figure(name):
    """Each column and method once; averages where the table has them."""
    recipe, columns, rows = read_recipe(name, "paper"), column_names(name, "paper"), rows_of(name)
    if all(row.get("column") == AVERAGE for row in rows):
        columns = [AVERAGE]
    wanted = {(column, method) for column in columns for method in recipe.methods}
    found = [(row.get("column", ""), row["method"]) for row in rows]
    assert wanted <= set(found) and len(set(found)) == len(found)
    assert recipe.average or AVERAGE not in dict(found)


@pytest.mark.parametrize("name", sorted(set(papers.TABLES) - set(WITH_FIGURES)))
def test_plots_have_no_figures(name):
    assert not (EXAMPLES / name / "expected.tsv").exists() or not rows_of(name)


@pytest.mark.skipif(not papers.FOLDER.is_dir(), reason="the papers' texts are not beside the project")
@pytest.mark.parametrize("name", WITH_FIGURES)
def test_the_paper_s_figures_are_the_paper_s(name):
    """Each is that of its row and column, and its line is the one that the source names."""
    for row in rows_of(name):
        own = f"{row['mean']}±{row['std']}" if row["std"] else row["mean"]
        found = papers.figure(PLACES[name], row.get("column", ""), row["method"])
        assert (own, row["source"]) == found, f"{name}, {row.get('column', '')}, {row['method']}"
