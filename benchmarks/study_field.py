"""A dataset of the study of distillation: its stages and the teachers that all students share."""

import argparse
import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from shlex import join
from typing import Any

import torch
from ml100k import Stages
from study_earlier import Known
from study_plan import MIXTURES, SELECT_ON, SHUFFLED, Budget, Dataset, mixture_of
from study_plan import rows_of as labelled_rows
from study_plan import teachers as teachers_of

from llm2rec.core.files import read_json, replaced_folder, sha256_of_file, write_json
from llm2rec.data import load, title_agreement

__all__ = ["Field", "best", "one_line_each", "shuffle_vectors"]


class Field:
    """A dataset with its teachers, which all students share.

    Args:
        dataset: Where the study takes place.
        options: The command line.
        budget: How much is run.
    """

    def __init__(self, dataset: Dataset, options: argparse.Namespace, budget: Budget) -> None:
        self.dataset, self.budget, self.arms = dataset, budget, options.arms
        place = argparse.Namespace(**{**vars(options), "work": Path(options.work) / dataset.name})
        shared = ["metrics.mask_seen=true", f"metrics.select_on={SELECT_ON}", "logging.progress=false"]
        self.stages = Stages(place, [*dataset.common, *shared], list(dataset.paths))
        self.llm = next(each for each in dataset.common if each.startswith("llm=")).removeprefix("llm=")
        self.jobs, self._earlier, self.tries = options.jobs, options.earlier, options.tries

    def earlier(self, student: str) -> Known:
        """Earlier results of a student on this dataset."""
        return self._earlier.of(self.dataset.name, student)

    def record(self, stage: str, overrides: list[str]) -> dict[str, Any] | None:
        """What is known of a finished stage; None if it has not finished."""
        wanted = [*self.stages.common, *overrides]
        same = (r for r in self.stages.records if r["stage"] == stage and r["overrides"] == wanted)
        return next(same, None)

    def prepared(self) -> Path:
        """Folder of the prepared data."""
        (folder,) = (self.stages.folder / "data" / "processed").glob(f"{self.dataset.name}-*")
        return folder

    def outputs(self, teacher: str) -> str:
        """Folder of a teacher's outputs, from where stages run."""
        name = mixture_of(teacher) or f"{teacher}-{self.llm}"
        return f"data/teacher_outputs/{self.dataset.name}/{name}"

    def teach(self, teacher: str, members: list[str]) -> None:
        """Train a teacher and write its outputs, unless it has been done.

        Args:
            teacher: Its name in `study_plan.teachers` or among the mixtures.
            members: Runs of baselines of a SASRec: the ensemble, or the one that the hybrid teacher is given.
        """
        if teacher == SHUFFLED:
            self.teach("text", members)
            shuffle_vectors(*(self.stages.folder / self.outputs(each) for each in ("text", teacher)))
            return
        if (mixture := mixture_of(teacher)) is None:
            self.stages.run("teacher", self.teacher_overrides(teacher, *members))
            return
        runs = f"runs=[{','.join(f'result/{member}' for member in members)}]"
        fixed = [f"ensemble.neighbours.share={MIXTURES[mixture]}", "ensemble.titles.share=0"]
        fixed += ["ensemble.students.temperature=1"]
        if MIXTURES[mixture] > 0:
            fixed.append(f"ensemble.neighbours.temperature={2 / 3}")
        self.stages.run("ensemble", [f"ensemble.name={mixture}", *fixed, runs])

    def teacher_overrides(self, teacher: str, member: str = "") -> list[str]:
        """Overrides of a language-model teacher; ``member`` is the run that the hybrid one reads."""
        overrides = teachers_of(self.budget, f"result/{member}")[teacher]
        return [f"teacher.name={teacher}", *overrides, *labelled_rows(teacher, self.budget)]

    def teacher_runs(self) -> dict[str, dict[str, Any]]:
        """Records of the teachers that have finished, by name."""
        named = {each: f"teacher.name={each}" for each in ("titles", "text", "hybrid")}
        named |= {each: f"ensemble.name={each}" for each in MIXTURES}
        records = [record for record in self.stages.records if record["stage"] in ("teacher", "ensemble")]
        return {name: r for name, named_by in named.items() for r in records if named_by in r["overrides"]}

    def open_test(self, finals: list[str]) -> None:
        """Score the final runs of the students, and the teachers, on the test split.

        One command per teacher: a language model may take an hour, which is not repeated for further students.
        """
        for runs in (finals, *([record["run"]] for record in self.teacher_runs().values())):
            if runs:
                named = ",".join(f"result/{run}" for run in runs)
                self.stages.run("evaluate", ["metrics.ks=[5,10,20]", f"runs=[{named}]"])

    def about(self) -> dict[str, Any]:
        """Description of the dataset and its teachers."""
        teachers = {
            name: {
                "seconds": record["seconds"],
                "labelling": self.labelling(record["run"]),
                "validation": best(self.stages, record["run"]),
            }
            for name, record in self.teacher_runs().items()
        }
        earlier = self._earlier.samples.get(self.dataset.name, {})
        return {
            **earlier,
            "mask_seen": True,
            "select_on": SELECT_ON,
            "titles": self.titles,
            "teachers": {**earlier.get("teachers", {}), **teachers},
            "stages": one_line_each([*earlier.get("stages", []), *self.stages.records]),
        }

    def labelling(self, run: str) -> dict[str, float]:
        """What a teacher's labels took, and what labelling a part of the rows only has saved."""
        file = self.stages.folder / "result" / run / "metrics" / "labelling.json"
        return dict(read_json(file)) if file.is_file() else {}

    @cached_property
    def titles(self) -> dict[str, float]:
        """Whether titles predict the next item; if not, no teacher that reads them can."""
        return asdict(title_agreement(load(self.prepared())))


def shuffle_vectors(outputs: Path, folder: Path) -> None:
    """Copy a teacher's outputs with item vectors that belong to other items, unless it has been done."""
    if folder.is_dir():
        return
    with replaced_folder(folder) as aside:
        shutil.copytree(outputs, aside, dirs_exist_ok=True)
        path, manifest = aside / "all_embeddings.pt", read_json(aside / "manifest.json")
        vectors, generator = torch.load(path, weights_only=True), torch.Generator().manual_seed(0)
        torch.save(vectors[torch.randperm(len(vectors), generator=generator)], path)
        hashes = {**manifest["sha256"], path.name: sha256_of_file(path)}
        write_json(aside / "manifest.json", {**manifest, "teacher": folder.name, "sha256": hashes})


def one_line_each(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of stages, each once, as they are typed, with phases of a second and more and the commit in a word.

    An earlier result may hold the same ones in this format.
    """
    lines = [
        {
            **each,
            "overrides": each["overrides"] if isinstance(each["overrides"], str) else join(each["overrides"]),
            "seconds": {phase: seconds for phase, seconds in each["seconds"].items() if seconds >= 1},
            "git": each["git"] if isinstance(each["git"], str) else commit_in_a_word(**each["git"]),
        }
        for each in records
    ]
    return list({(each["run"], each["overrides"]): each for each in lines}.values())


def commit_in_a_word(commit: str | None, dirty: bool | None) -> str:
    """The start of a commit's hash, with ``+`` behind it where the checkout had changes; ``unknown`` without git."""
    return f"{(commit or 'unknown')[:12]}{'+' if dirty else ''}"


def best(stages: Stages, run: str) -> dict[str, float]:
    """Validation metrics of the weights that a run has kept, and when they were best; empty for what is not trained."""
    file = stages.folder / "result" / run / "metrics" / "validation.json"
    if not file.is_file():
        return {}
    validation = read_json(file)
    at = next(each for each in validation["history"] if each["step"] == validation["best_step"])
    kept = {name.removeprefix("val/"): value for name, value in at.items() if name.startswith("val/")}
    return {**kept, "evaluations": len(validation["history"]), "best_evaluation": validation["history"].index(at) + 1}
