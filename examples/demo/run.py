#!/usr/bin/env python3
"""The main job in a few minutes and without a download: Adam against GA-SAM on a generated translation task.

generate text -> sentencepiece -> fairseq-preprocess -> fairseq-train (Adam, GA-SAM) -> average checkpoints
-> fairseq-generate -> sacreBLEU -> table

Each finished step is remembered in the output folder; starting again continues where the last run stopped.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

SPLITS = {"train": 4000, "valid": 300, "test": 500}
LANGUAGES = ("src", "tgt")
SUBWORDS = 1000
NUM_AVERAGED = 3
SHARPNESS_RADIUS = 0.5  # L2, about 1 % of the norm of the trained weights

TRAINING = [
    *(
        "--arch transformer --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 128 --decoder-embed-dim 128 "
        "--encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256 "
        "--encoder-attention-heads 4 --decoder-attention-heads 4 "
        "--share-all-embeddings --dropout 0.1 --criterion label_smoothed_cross_entropy --label-smoothing 0.1 "
        "--lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 200 --weight-decay 1e-4 --max-tokens 1200 "
        "--max-epoch 10 --seed 1 --cpu --num-workers 0"
    ).split(),
    "--adam-betas",
    "(0.9, 0.98)",
]
METHODS = {
    "adam": "--optimizer adam".split(),
    # GA-SAM's flags for En-Vi (C.2.3) with K = 1 and the start past the first half of the run; epsilon is such that the
    # largest change of a weight, sam_eps in the log, is of the size that the paper gives SAM there (1.2e-3).
    "ga_sam": (
        "--optimizer ga_sam --base-optimizer adam --sam-epsilon 0.2 --sam-norm linf --sam-gradient sum "
        "--sam-start-epoch 6"
    ).split(),
}
LABELS = {"adam": "Adam", "ga_sam": "GA-SAM"}


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    method: str
    bleu: float
    signature: str
    loss: float
    sharpness: float
    passes: float
    seconds: float


class Steps:
    """Runs named steps once, and says what is going on.

    Args:
        folder: where results and marks of finished steps live.
        total: number of steps, for the progress lines.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self._folder = folder / "steps"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._total, self._number = total, 0
        self._start = time.monotonic()

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Any:
        """Announce a step; yields whether it is still to do, and marks it done if nothing is raised."""
        self._number += 1
        mark = self._folder / name
        to_do = not mark.exists()
        note = "" if to_do else " (done before)"
        print(f"[{self._number}/{self._total}] {time.monotonic() - self._start:5.0f} s  {text}{note}", flush=True)
        yield to_do
        mark.touch()


def run(command: Sequence[str], log: Path) -> None:
    """Run a Python command with its output in a log; on failure show the log's end and stop."""
    with log.open("w") as stream:
        code = subprocess.run([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT, env=_env())
    if code.returncode:
        _fail(command, log, code.returncode)


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _fail(command: Sequence[str], log: Path, code: int) -> None:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise SystemExit(f"error: {' '.join(command[:2])} ended with status {code}; the end of {log}:\n{tail}")


def write_text(folder: Path) -> None:
    """Generate the splits and encode them with one subword model for both languages."""
    import sentencepiece
    from grammar import sentence_pairs

    folder.mkdir(parents=True, exist_ok=True)
    pairs = iter(sentence_pairs(sum(SPLITS.values())))
    raw: dict[tuple[str, str], list[str]] = {}
    for split, count in SPLITS.items():
        chosen = [next(pairs) for _ in range(count)]
        for language, side in zip(LANGUAGES, zip(*chosen, strict=True), strict=True):
            raw[split, language] = list(side)
            (folder / f"{split}.raw.{language}").write_text("\n".join(side) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(raw["train", "src"] + raw["train", "tgt"]),
        model_prefix=str(folder / "subwords"),
        vocab_size=SUBWORDS,
        model_type="unigram",
        character_coverage=1.0,
        minloglevel=2,
    )
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(folder / "subwords.model"))
    for (split, language), lines in raw.items():
        pieces = [" ".join(encoder.encode(line, out_type=str)) for line in lines]
        (folder / f"{split}.{language}").write_text("\n".join(pieces) + "\n")


def preprocess(out: Path) -> None:
    """Binarise the text."""
    text = out / "text"
    command = ["-m", "fairseq_cli.preprocess", "--source-lang", "src", "--target-lang", "tgt", "--joined-dictionary"]
    for split in SPLITS:
        command += [f"--{split}pref", str(text / split)]
    shutil.rmtree(out / "data-bin", ignore_errors=True)
    run([*command, "--destdir", str(out / "data-bin")], out / "preprocess.log")


def train(out: Path, method: str) -> None:
    """Train one model, with a line per epoch; continues from its last checkpoint."""
    save_dir = out / method
    command = [
        "-m", "fairseq_cli.train", str(out / "data-bin"), "--user-dir", str(ROOT / "fairseq_sam"),
        "--save-dir", str(save_dir), *TRAINING, *METHODS[method], "--keep-last-epochs", str(NUM_AVERAGED),
        "--log-format", "json", "--log-interval", "20",
    ]  # fmt: skip
    log = out / f"{method}.log"
    with log.open("a") as stream:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_env()
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                stream.write(line)
                _show_progress(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
            process.wait()
    if process.returncode:
        _fail(command, log, process.returncode)


def _show_progress(line: str) -> None:
    record = _record(line)
    if "valid_loss" in record:
        print(
            f"\r      epoch {record['epoch']:>2}: validation loss {float(record['valid_nll_loss']):6.3f}   ", flush=True
        )
    elif "train_loss" not in record and "loss" in record and sys.stdout.isatty():
        print(f"\r      epoch {record['epoch']:>2}, update {record['num_updates']:>5}: loss {record['loss']}  ", end="")


def _record(line: str) -> dict[str, Any]:
    """The JSON object of a log line, or an empty one."""
    _, brace, rest = line.partition("{")
    try:
        return dict(json.loads(brace + rest)) if brace else {}
    except ValueError:
        return {}


def epochs_of(log: Path) -> list[dict[str, Any]]:
    """The training record of each epoch, the latest where an epoch was run again."""
    records = (_record(line) for line in log.read_text(errors="replace").splitlines())
    return list({record["epoch"]: record for record in records if "train_loss" in record}.values())


def translate(out: Path, method: str) -> None:
    """Average the last checkpoints, translate the test set, restore its order."""
    save_dir = out / method
    average = [str(ROOT / "scripts" / "average_checkpoints.py"), "--inputs", str(save_dir)]
    average += ["--num-epoch-checkpoints", str(NUM_AVERAGED), "--output", str(save_dir / "averaged.pt")]
    run(average, out / f"{method}.average.log")
    log = out / f"{method}.generate.log"
    run(
        [
            "-m",
            "fairseq_cli.generate", str(out / "data-bin"), "--user-dir", str(ROOT / "fairseq_sam"),
            "--path", str(save_dir / "averaged.pt"), "--beam", "5", "--remove-bpe", "sentencepiece",
            "--max-tokens", "8000", "--required-batch-size-multiple", "1", "--cpu",
        ],
        log,
    )  # fmt: skip
    hypotheses = {}
    for line in log.read_text().splitlines():
        if line.startswith("H-"):
            number, _, sentence = line[2:].split("\t")
            hypotheses[int(number)] = sentence
    lines = [hypotheses[number] for number in range(SPLITS["test"])]
    (out / f"{method}.hypotheses.txt").write_text("\n".join(lines) + "\n")


def score(out: Path, method: str) -> tuple[float, str]:
    """SacreBLEU and its signature."""
    import sacrebleu

    hypotheses = (out / f"{method}.hypotheses.txt").read_text().splitlines()
    references = (out / "text" / "test.raw.tgt").read_text().splitlines()
    metric = sacrebleu.BLEU()
    return metric.corpus_score(hypotheses, [references]).score, str(metric.get_signature())


def measure(out: Path, method: str) -> tuple[float, float]:
    """Test loss (bits per subword) of the averaged model, and its rise along the steepest direction."""
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    from fairseq_sam.adapter.measure import checkpoint_sharpness

    checkpoint = out / method / "averaged.pt"
    found = checkpoint_sharpness(checkpoint, out / "data-bin", epsilon=SHARPNESS_RADIUS, cpu=True)
    return found.loss, found.sharpness


def result(out: Path, method: str) -> Result:
    """Gather one row."""
    epochs = epochs_of(out / f"{method}.log")
    updates, passes, done = 0.0, 0.0, 0.0
    for record in epochs:
        new = float(record["train_num_updates"]) - done
        done = float(record["train_num_updates"])
        updates, passes = updates + new, passes + new * float(record.get("train_sam_passes", 1))
    seconds = sum(float(record["train_train_wall"]) for record in epochs)
    bleu, signature = score(out, method)
    loss, sharpness = measure(out, method)
    return Result(LABELS[method], bleu, signature, loss, sharpness, passes / updates, seconds)


def table(results: Iterable[Result]) -> str:
    """The results as Markdown."""
    rows = [
        "| method | BLEU | test loss | sharpness | passes per update | training time |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {r.method} | {r.bleu:.2f} | {r.loss:.3f} | {r.sharpness:.3f} | {r.passes:.2f} | {r.seconds:.0f} s |"
        for r in results
    ]
    return "\n".join(rows)


def version_of_task() -> str:
    """Fingerprint of what the results depend on: settings and grammar."""
    text = repr((SPLITS, SUBWORDS, NUM_AVERAGED, TRAINING, METHODS)) + (HERE / "grammar.py").read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def fresh_folder(out: Path, restart: bool) -> None:
    """Make the output folder; empty it if asked to, or if it holds results of other settings."""
    mark = out / "settings.sha256"
    other = out.exists() and (not mark.exists() or mark.read_text() != version_of_task())
    if other and any(out.iterdir()) and not mark.exists():
        raise SystemExit(f"error: --out {out} is not empty and not a demo folder; name another one")
    if restart or other:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(version_of_task())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help="folder for everything that the demo writes")
    parser.add_argument("--restart", action="store_true", help="forget an earlier run")
    args = parser.parse_args()
    out: Path = args.out.resolve()
    fresh_folder(out, args.restart)
    steps = Steps(out, 3 + 2 * len(METHODS))
    jobs = [("text", "generating sentence pairs and a subword model", functools.partial(write_text, out / "text"))]
    jobs.append(("preprocess", "fairseq-preprocess", functools.partial(preprocess, out)))
    jobs += [(f"train-{m}", f"fairseq-train with {LABELS[m]}", functools.partial(train, out, m)) for m in METHODS]
    jobs += [
        (f"translate-{m}", f"averaging and fairseq-generate for {LABELS[m]}", functools.partial(translate, out, m))
        for m in METHODS
    ]
    for name, text, job in jobs:
        with steps.step(name, text) as to_do:
            if to_do:
                job()
    with steps.step("score", "sacreBLEU, test loss and sharpness"):
        results = [result(out, method) for method in METHODS]
    text = table(results)
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n")
    print(f"sacreBLEU: {results[0].signature}")
    print(f"test loss: bits per subword; sharpness: its rise when the weights move {SHARPNESS_RADIUS} (L2) uphill")
    print(f"everything is in {out}; the training logs are adam.log and ga_sam.log")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None
