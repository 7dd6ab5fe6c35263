"""`lookalike compare`: does every run of a study, those that are done already left out, and writes its report.

    DIR/study.json      whose folder it is
    DIR/runs/*.json     a run each: its settings and what it gave
    DIR/README.md, *.csv, *.png     the report, made anew from the runs

A run's file appears whole or not at all, when the run has ended. So a study that was stopped, however, goes on where it
stopped, and one whose file was changed does again what the change concerns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from rich.console import Console

from embedding.durable import replace_file
from embedding.errors import AlreadyExists, LookalikeError, StorageFailed
from embedding.runtime import tune_malloc
from training.progress import TrainingDisplay
from training.sections import tuples
from training.study.config import BatchConfig, ObjectiveConfig, Study, StudyData
from training.study.run import (
    RESULTS_OF,
    ComparisonResult,
    ComparisonRun,
    ConvergenceResult,
    ConvergenceRun,
    RunResult,
    StudyRun,
    load_images,
)

OWNER = "study.json"
RUNS = "runs"

_RUN: TypeAdapter[StudyRun] = TypeAdapter(Annotated[StudyRun, Field(discriminator="kind")])
_RESULT: TypeAdapter[ComparisonResult | ConvergenceResult] = TypeAdapter(RunResult)


@dataclass(frozen=True, kw_only=True)
class Done:
    """The results of a study, each in the place of its run."""

    study: Study
    runs: list[StudyRun]
    results: list[ComparisonResult | ConvergenceResult]

    def comparison(self, source: str, objective: ObjectiveConfig, batch: int) -> list[ComparisonResult]:
        """Results of a data set, objective and batch setting (by its place in the study), in the order of seeds."""
        setting = self.study.batches[batch]
        return [
            result
            for run, result in zip(self.runs, self.results, strict=True)
            if isinstance(run, ComparisonRun)
            and isinstance(result, ComparisonResult)
            and run.data.source == source
            and run.loss == objective.loss
            and (run.batch_size, run.learning_rate) == (setting.size, setting.learning_rate)
        ]

    def accuracies(self, source: str, objective: ObjectiveConfig, batch: int) -> list[float]:
        """Of `comparison`, on the test images."""
        return [result.accuracy for result in self.comparison(source, objective, batch)]

    def convergence(self, source: str, alpha: float) -> list[ConvergenceResult]:
        """Curves of a data set and share of cross-entropy, in the order of seeds."""
        return [
            result
            for run, result in zip(self.runs, self.results, strict=True)
            if isinstance(run, ConvergenceRun)
            and isinstance(result, ConvergenceResult)
            and run.data.source == source
            and run.alpha == alpha
        ]

    @property
    def seconds(self) -> float:
        """Processor time of all runs."""
        return sum(
            result.seconds
            if isinstance(result, ConvergenceResult)
            else result.encoder_seconds + result.classifier_seconds
            for result in self.results
        )


def compare(study: Study, *, out: Path, data_root: Path | None, device: str, workers: int, console: Console) -> Done:
    """Do what is left to do of a study, and write its report.

    Raises AlreadyExists when `out` is another study's, InvalidDataset when data are absent, StorageFailed.
    """
    done = perform(study, out=out, data_root=data_root, device=device, workers=workers, console=console)
    from training.study.report import write_report  # it draws, which workers need not

    write_report(done, out, hardware=hardware())
    return done


def perform(study: Study, *, out: Path, data_root: Path | None, device: str, workers: int, console: Console) -> Done:
    """`compare` without its report."""
    is_new = _is_free(out, study.name)
    runs = runs_of(study)
    results = _kept(out)
    todo = [run for run in runs if run.key not in results]
    # Every data set before the first run: what is absent shows at once, and not in an hour.
    for source in dict.fromkeys(run.data for run in todo):
        load_images(source, image_size=study.encoder.image_size, data_root=data_root, device=device)
    if is_new:
        write_atomically(out / OWNER, json.dumps({"name": study.name}) + "\n")
    with TrainingDisplay(console) as display:
        if kept := len(runs) - len(todo):
            display.say(f"{kept} of {len(runs)} runs are done already")
        display.start(done=kept, total=len(runs))
        for number, (run, result) in enumerate(_results(todo, data_root, device, workers), kept + 1):
            _write(out, run, result)
            results[run.key] = result
            display.step()
            display.say(f"{number}/{len(runs)}  {describe(run, study)}  {_outcome(result)}")
    return Done(study=study, runs=runs, results=[results[run.key] for run in runs])


def runs_of(study: Study) -> list[StudyRun]:
    """All runs, in the order in which they are done: every setting with one seed before any with the next, so that a
    study stopped early has something to say; what stands beside comes last."""
    seeded = [(seed, data) for seed in range(study.seeds) for data in study.data]
    runs: list[StudyRun] = []
    for seed, data in seeded:
        runs += [run for batch in study.batches if not batch.beside for run in _comparisons(study, data, batch, seed)]
        runs += _convergences(study, data, seed)
    for seed, data in seeded:
        runs += [run for batch in study.batches if batch.beside for run in _comparisons(study, data, batch, seed)]
    return runs


def _comparisons(study: Study, data: StudyData, batch: BatchConfig, seed: int) -> Iterator[ComparisonRun]:
    for objective in study.objectives:
        yield ComparisonRun(
            data=data,
            encoder=study.encoder,
            batch_size=batch.size,
            learning_rate=batch.learning_rate,
            epochs=study.encoder_stage.epochs,
            seed=seed,
            loss=objective.loss,
            classifier=None if objective.loss is None else study.classifier_stage,
            samples=seed == 0,
        )


def _convergences(study: Study, data: StudyData, seed: int) -> Iterator[ConvergenceRun]:
    convergence = study.convergence
    for alpha in (*convergence.alphas, 1.0):
        yield ConvergenceRun(
            data=data,
            encoder=study.encoder,
            batch_size=convergence.batch.size,
            learning_rate=convergence.batch.learning_rate,
            epochs=convergence.epochs,
            seed=seed,
            pair=convergence.pair,
            alpha=alpha,
            checks=convergence.checks,
        )


def describe(run: StudyRun, study: Study) -> str:
    """A run in a few words."""
    start = f"{run.data.source}, seed {run.seed}"
    if isinstance(run, ConvergenceRun):
        return f"{start}: convergence, α = {run.alpha:g}"
    label = next(objective.label for objective in study.objectives if objective.loss == run.loss)
    return f"{start}: {label}, batch {run.batch_size} at {run.learning_rate:g}"


def hardware() -> str:
    """What the runs were computed with, without the machine's name."""
    return (
        f"{os.cpu_count()} logical processors ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), "
        f"one thread a run, PyTorch {torch.__version__.partition('+')[0]}"
    )


def _outcome(result: ComparisonResult | ConvergenceResult) -> str:
    if isinstance(result, ConvergenceResult):
        return f"{result.curve[-1][1]:.2%} in the end ({result.seconds:.0f} s)"
    return f"{result.accuracy:.2%} ({result.encoder_seconds + result.classifier_seconds:.0f} s)"


def _results(
    todo: Sequence[StudyRun], data_root: Path | None, device: str, workers: int
) -> Iterator[tuple[StudyRun, ComparisonResult | ConvergenceResult]]:
    """Runs with their results, as they end."""
    if workers == 1:
        tune_malloc()
        with _one_thread():
            for run in todo:
                yield run, _run(run, data_root, device)
        return
    # Spawned, because a fork would copy a process whose thread pools are in use.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        waiting: dict[Future[ComparisonResult | ConvergenceResult], StudyRun] = {
            pool.submit(_run, run, data_root, device): run for run in todo
        }
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise LookalikeError(
                "a worker was killed, most likely for want of memory; give fewer --workers and start again: what was "
                "done is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run(run: StudyRun, data_root: Path | None, device: str) -> ComparisonResult | ConvergenceResult:
    return run.run(load_images(run.data, image_size=run.encoder.image_size, data_root=data_root, device=device))


def _begin_worker() -> None:
    tune_malloc()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_free(out: Path, name: str) -> bool:
    """Whether the folder is new, or else this study's. Raises AlreadyExists when it holds something else."""
    owner = out / OWNER
    if owner.is_file():
        try:
            whose = json.loads(owner.read_text(encoding="utf-8"))["name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AlreadyExists(f"{owner} names no study; give another folder with --out") from error
        if whose != name:
            raise AlreadyExists(f"{out} holds the study {whose!r}; give another folder with --out")
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AlreadyExists(f"{out} exists and is no study's folder; give another with --out")
    return True


def _kept(out: Path) -> dict[str, ComparisonResult | ConvergenceResult]:
    """What earlier processes found, by the key that a run has today.

    Keys come from the settings that a file holds, not from its name: a setting that did not exist when it was written
    has its default, and the run is still the same. A file that is not whole, or is of other settings, counts as absent.
    """
    kept: dict[str, ComparisonResult | ConvergenceResult] = {}
    for path in sorted((out / RUNS).glob("*.json")):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            run = _RUN.validate_python(tuples(held["settings"]))
            if held["results_of"] == RESULTS_OF:
                kept[run.key] = _RESULT.validate_python(tuples(held["result"]))
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _write(out: Path, run: StudyRun, result: ComparisonResult | ConvergenceResult) -> None:
    held = {
        "results_of": RESULTS_OF,
        "settings": run.model_dump(mode="json"),
        "result": result.model_dump(mode="json"),
    }
    write_atomically(out / RUNS / f"{run.data.source}-{run.kind}-{run.key}.json", json.dumps(held) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash the old one or the new one is there. Raises StorageFailed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise StorageFailed(f"cannot write {path} ({error.strerror}); free space, or give another --out") from error
