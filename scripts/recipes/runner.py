"""Run the jobs of a recipe, several at a time, and show how far they are."""

import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from scripts.recipes.jobs import MODEL, OUTPUT, SCORES, Job, data_folder, needed_jobs, progress_of
from scripts.recipes.locks import locked
from scripts.recipes.obtained import OBTAINED, all_scores, record_job, write_significance
from scripts.recipes.recipe import ROOT, Recipe, command_line

SHOWN_EVERY = 60.0  # seconds between two reports
DONE = "done"  # in the folder of prepared data: where they are from


class RunError(RuntimeError):
    """A command of a recipe failed."""


def run_table(
    recipes: Sequence[Recipe],
    *,
    data: Path,
    out: Path,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    num_jobs: int | None = None,
    cpu: bool = False,
    record: bool = False,
    dry_run: bool = False,
) -> None:
    """Prepare the data and run methods × seeds, after those of the recipes whose models are needed.

    Args:
        recipes: the columns of one recipe at one size.
        data: folder of the corpora.
        out: folder of all runs.
        methods: rows of the table, default all.
        seeds: default the recipe's.
        num_jobs: runs at a time, default one for each GPU, or one on the CPU.
        cpu: use the CPU even if there is a GPU.
        record: write ``obtained.tsv`` into the recipe's folder too.
        dry_run: print the commands only.

    Raises:
        RunError: if a method is unknown, or commands failed; the others are finished first.
    """
    data, out = data.resolve(), out.resolve()
    first = recipes[0]
    unknown = sorted(set(methods or ()) - set(first.methods))
    if unknown:
        raise RunError(f"--methods must be among {', '.join(first.methods)}, got {unknown[0]!r}")
    if not dry_run:
        for recipe in recipes:
            _find_corpora(recipe, data, out)
    for needed in {each.folder: each for recipe in recipes for each in recipe.needs.values()}.values():
        run_table(
            [needed], data=data, out=out, methods=[needed.baseline], seeds=needed.seeds[:1], cpu=cpu, dry_run=dry_run
        )
    num_gpus = 0 if cpu else torch.cuda.device_count()
    jobs = [
        Job(recipe, method, seed, out, cpu=not num_gpus)
        for seed in seeds or first.seeds
        for recipe in recipes
        for method in methods or recipe.methods
    ]
    firsts = [rows[0] for rows in _by_run(jobs)]
    if dry_run:
        preparations = {data_folder(recipe, out): preparation(recipe, data, out) for recipe in recipes}
        commands = [command for job in (*_starts(firsts), *firsts) for command in job.commands()]
        for command in (*preparations.values(), *commands):
            print(shlex.join(command))
        return
    for recipe in recipes:
        _prepare(recipe, data, out)
    if first.changed and record:
        raise RunError(f"--record writes down the recipe's own runs; leave it out, or --set {' '.join(first.changed)}")
    tables = [out / first.name / first.size / OBTAINED, *([first.folder / OBTAINED] if record else [])]
    _Runs(_starts(firsts), num_jobs or num_gpus or 1, num_gpus, []).run()
    _Runs(jobs, num_jobs or num_gpus or 1, num_gpus, tables).run()
    write_significance(jobs, tables)
    print(f"written: {', '.join(map(str, tables))}")


def preparation(recipe: Recipe, data: Path, out: Path) -> list[str]:
    """Return the command that prepares a recipe's data."""
    options = {**recipe.options, **{name: job.run / MODEL for name, job in needed_jobs(recipe, out).items()}}
    flags = {name.replace("_", "-"): value for name, value in options.items()}
    folders = ["--data", str(data), "--out", str(data_folder(recipe, out))]
    return [sys.executable, str(recipe.prepare), *folders, *command_line(flags)]


def _find_corpora(recipe: Recipe, data: Path, out: Path) -> None:
    """Look for what the preparation reads, which may come after hours of training a model that it needs."""
    if (data_folder(recipe, out) / DONE).exists():
        return
    for names in recipe.corpora:
        if not any((data / name).is_dir() for name in names):
            raise RunError(
                f"--data {data} has no folder {' or '.join(names)}, which {recipe.name} needs; examples/README.md says "
                "what belongs into it"
            )


def _prepare(recipe: Recipe, data: Path, out: Path) -> None:
    folder = data_folder(recipe, out)
    done = folder / DONE
    with locked(folder.parent / "preparation.lock"):  # another process may run a table on the same data
        if done.exists():
            source = done.read_text(encoding="utf-8").strip()
            if source and Path(source) != data:
                raise RunError(
                    f"{folder} was prepared from --data {source}, now it is {data}; remove that folder's parent to "
                    "start anew, or name another --out"
                )
            return
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted preparation has left
        folder.mkdir(parents=True)
        print(f"preparing {folder}", flush=True)
        if subprocess.run(preparation(recipe, data, out), cwd=ROOT).returncode:
            raise RunError(f"{recipe.prepare} failed; see above")
        done.write_text(f"{data}\n", encoding="utf-8")


def visible_device(number: int) -> str:
    """Return what CUDA_VISIBLE_DEVICES must be for a job on the `number`-th GPU that this process sees."""
    own = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return own[number] if own else str(number)


def last_words(output: Path) -> str:
    """The last line of a command's output that says what went wrong, else the last one."""
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines[-30:] if re.search(r"error", line, re.I) and not line.startswith("INFO")]
    return (errors or lines or [""])[-1]


def _starts(jobs: Sequence[Job]) -> list[Job]:
    """The runs that unfinished jobs begin with, each once."""
    starts = [job.start for job in jobs if not job.is_scored]
    return list({start.run: start for start in starts if start is not None}.values())


def _by_run(jobs: Sequence[Job]) -> list[list[Job]]:
    """Rows of the tables by run: columns may differ by the metric alone, methods have the same settings."""
    found: dict[Any, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.key, []).append(job)
    return list(found.values())


def _outcome(job: Job, metrics: Sequence[str]) -> str:
    if not job.scores:
        return f"the first {job.until} epochs are done"
    scores = all_scores(job)
    return ", ".join(f"{metric} {scores[metric]:.4g}" for metric in metrics)


class _Runs:
    """Jobs on devices, those with the same settings once.

    Args:
        jobs: the jobs, in the order of their beginning.
        num_jobs: how many at a time.
        num_gpus: GPUs that they take turns on; 0 for the CPU, whose cores they share.
        tables: files that get a row for each finished job.
    """

    def __init__(self, jobs: Sequence[Job], num_jobs: int, num_gpus: int, tables: Sequence[Path]) -> None:
        self._rows = {rows[0]: rows for rows in _by_run(jobs)}
        self._num_jobs, self._tables = num_jobs, tables
        self._devices: queue.Queue[int | None] = queue.Queue()
        for number in range(num_jobs):
            self._devices.put(number % num_gpus if num_gpus else None)
        self._threads = max(1, (os.cpu_count() or 1) // num_jobs)
        self._running: dict[Job, subprocess.Popen[bytes]] = {}
        self._lock, self._stopped = threading.Lock(), False
        self._begin = time.monotonic()

    def run(self) -> None:
        for job in self._rows:
            if job.scores is not None:
                self._record(job)
        waiting = [job for job in self._rows if job.scores is None]
        total, failed = len(self._rows), []
        if not total:
            return
        kind = "shared beginnings" if next(iter(self._rows)).until is not None else "runs"
        print(f"{total} {kind}, {total - len(waiting)} of them done", flush=True)
        with ThreadPoolExecutor(self._num_jobs) as pool:
            futures: dict[Future[None], Job] = {pool.submit(self._run_job, job): job for job in waiting}
            try:
                while futures:
                    finished, _ = wait(futures, timeout=SHOWN_EVERY, return_when=FIRST_COMPLETED)
                    for future in finished:
                        job = futures.pop(future)
                        error = future.exception() or self._problem_of_recording(job)
                        if error is None:
                            metrics = dict.fromkeys(row.recipe.metric.name for row in self._rows[job])
                            self._show(job, _outcome(job, list(metrics)))
                        else:
                            failed.append(f"{job.method}, seed {job.seed}: {error}")
                            self._show(job, f"failed: {error}")
                    if not finished:
                        self._report(total - len(futures), total)
            except BaseException:
                self._stop(list(futures))
                raise
        if failed:
            raise RunError(
                f"{len(failed)} of {total} runs failed; the same command tries them again\n" + "\n".join(failed)
            )

    def _problem_of_recording(self, job: Job) -> Exception | None:
        try:
            self._record(job)
        except ValueError as error:
            return error
        return None

    def _record(self, job: Job) -> None:
        for row in self._rows[job]:
            record_job(row, self._tables)

    def _run_job(self, job: Job) -> None:
        device = self._devices.get()
        try:
            job.run.mkdir(parents=True, exist_ok=True)
            with locked(job.run / "run.lock") as lock:
                if job.scores is None:  # else another process has just done it
                    self._do(job, device, lock)
        finally:
            self._devices.put(device)

    def _do(self, job: Job, device: int | None, lock: int) -> None:
        if not job.is_scored:
            job.write_settings()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(self._threads)}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible_device(device)
        for command in job.commands():
            self._call(job, command, environment, lock)
        if job.until is not None:
            (job.run / SCORES).write_text("{}\n", encoding="utf-8")

    def _call(self, job: Job, command: list[str], environment: dict[str, str], lock: int) -> None:
        with (job.run / OUTPUT).open("ab") as output:
            with self._lock:
                if self._stopped:
                    raise RunError("stopped")
                process = subprocess.Popen(
                    command, stdout=output, stderr=output, env=environment, cwd=ROOT, pass_fds=(lock,)
                )
                self._running[job] = process
            status = process.wait()
            with self._lock:
                self._running.pop(job, None)
        if status:
            raise RunError(f"status {status}: {last_words(job.run / OUTPUT)} ({job.run / OUTPUT})")

    def _stop(self, futures: Sequence[Future[None]]) -> None:
        for future in futures:
            future.cancel()
        with self._lock:
            self._stopped = True
            for process in self._running.values():
                process.terminate()

    def _show(self, job: Job, text: str) -> None:
        clock = timedelta(seconds=int(time.monotonic() - self._begin))
        columns = {row.recipe.column for row in self._rows[job]}
        column = job.recipe.column if len(columns) == 1 else ""
        name = " ".join(part for part in (job.recipe.name, column, job.method) if part)
        print(f"[{clock}] {name}, seed {job.seed}: {text}", flush=True)

    def _report(self, num_done: int, total: int) -> None:
        with self._lock:
            running = list(self._running)
        shares = 0.0
        for job in running:
            share, text = progress_of(job.run, job.flags)
            shares += share
            self._show(job, f"{share:4.0%}, {text}")
        print(f"          {num_done} of {total} done, {(num_done + shares) / total:.0%} of all", flush=True)
