r"""What is a language model worth to a small served student? Every arm gets as many tries, chosen on validation.

    .venv/bin/python benchmarks/language_study.py --llm-path FOLDER --office FOLDER --toys FOLDER --ml100k FOLDER \
        --json benchmarks/results/language_study.json

Leave-one-out, the whole catalogue ranked without what a user had before. All choices fall on NDCG@20 on validation: the
options of each trained arm by `llm2rec.tune` (Optuna, seeded), with the same number of tries for each arm; shares and
temperatures of mixtures by `llm2rec.ensemble`. ``--open-test`` then opens the test split, once. The arms:

- served without training: popularity, item neighbours, title neighbours of the language model, both;
- ``sasrec``: the student without a teacher, over losses, widths up to 256 and one or two blocks;
- ``blend``, ``blend + titles``: that student served together with neighbours (and title neighbours), nothing distilled:
  what a distilled student has to be worth, at several times its cost;
- ``distilled``: `listwise` from three of these students and neighbours, without a language model;
- ``distilled + titles``: the teacher holds title neighbours too;
- ``reading``: item vectors fused with the language model's, no teacher;
- ``reading, distilled``, ``reading, distilled + titles``: both, from the teacher without titles and with them;
- with ``--teacher-seeds``: ``ilora``, the trained language model without any student, and
  ``reading, distilled + ilora``, from a teacher that holds all kinds of members.

A study takes hours on two processors and goes on where it stopped: finished runs in ``--work`` are found again, and the
JSON file is written after each arm. ``--arms`` runs some arms only, so that several processes share the work; once they
are done, a run without it collects everything. ``--quick`` shows the same in a minute on generated data and a tiny
random model.
"""

import argparse
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import existing, write_result
from numpy.typing import NDArray

from llm2rec.core.files import read_json
from llm2rec.core.ranking import Catalogue, ranks_in_blocks
from llm2rec.core.statistics import holm, paired_difference, quantile_groups, row_values
from llm2rec.data import RecData, load
from llm2rec.evaluate.scoring.scoring import popularity, popularity_ranks
from llm2rec.evaluate.scoring.slices import slices
from llm2rec.launch import run
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.models import load_student
from llm2rec.tune import tune
from llm2rec.tune.process import validation_history

METRIC = "ndcg@20"
MEMBERS = 3  # students of the ensembles that teach
_TRAINING, _MODEL = "student.training", "student.model"
STUDENT = [
    "student=sasrec",
    "student.examples=sequences",
    "student.model.positions=oldest",
    "student.training.patience=5",
]
STUDENT_SPACE: dict[str, Sequence[Any]] = {
    f"{_TRAINING}.learning_rate": [1e-3, 2e-3, 4e-3],
    f"{_MODEL}.dropout": [0.2, 0.3, 0.4],
    f"{_MODEL}.width": [64, 128, 256],
    f"{_MODEL}.n_blocks": [1, 2],
    "student.loss.name": ["cross_entropy", "sampled_softmax", "gbce"],
    f"{_TRAINING}.weight_decay": [0.0, 0.1],
}
AROUND_SPACE: dict[str, Sequence[Any]] = {  # around the student's best options
    f"{_TRAINING}.learning_rate": [1e-3, 2e-3, 4e-3],
    f"{_MODEL}.dropout": [0.1, 0.2, 0.3, 0.4],
}
TAUGHT_SPACE: dict[str, Sequence[Any]] = {
    "distill.ranking.weight": [1.0, 3.0, 10.0],
    "distill.ranking.top_k": [50, 100],
}
READING_SPACE: dict[str, Sequence[Any]] = {
    "distill.embedding.fusion_scale": [2.0, 4.0, 8.0],
    "distill.embedding.whitening": [0.0, 0.5],
    "distill.embedding.id_dropout": [0.0, 0.2],
}


@dataclass(frozen=True)
class Arm:
    """A trained arm.

    Attributes:
        name: Its name.
        language: Whether a language model takes part.
        teacher: Ensemble whose outputs it reads; None for the student without a teacher.
        fixed: Overrides of every run.
        space: Values to choose from, by option.
    """

    name: str
    language: bool
    teacher: str | None
    fixed: tuple[str, ...]
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)


SASREC = Arm("sasrec", False, None, (), STUDENT_SPACE)
DISTILLED = [
    Arm("distilled", False, "ids", ("distill=listwise",), {**AROUND_SPACE, **TAUGHT_SPACE}),
    Arm("distilled + titles", True, "titles", ("distill=listwise",), {**AROUND_SPACE, **TAUGHT_SPACE}),
    Arm("reading", True, "titles", ("distill=reading",), {**AROUND_SPACE, **READING_SPACE}),
    *(
        Arm(name, True, teacher, ("distill=listwise_reading",), {**AROUND_SPACE, **TAUGHT_SPACE, **READING_SPACE})
        for name, teacher in (("reading, distilled", "ids"), ("reading, distilled + titles", "titles"))
    ),
]
# The vectors of titles are exported whether titles take part or not, so that every teacher can be read.
WITHOUT_TITLES = ["ensemble.titles.share=0", "ensemble.vectors=[titles]"]
# The teacher holds trained language models too.
WITH_ILORA = replace(DISTILLED[-1], name="reading, distilled + ilora", teacher="ilora")
ILORA = [
    "llm.prompt.max_items=5",
    "teacher.popularity_prior=1.0",
    "teacher.training.epochs=1",
    "teacher.training.batch_size=64",
    "teacher.training.learning_rate=1e-3",
    "teacher.export.top_k=200",
]
QUICK_ARMS = ("distilled", "reading, distilled + titles")
# Ensembles that are served as they are: their overrides, and how many students they hold.
SERVED: dict[str, tuple[list[str], int]] = {
    "neighbours": (WITHOUT_TITLES, 0),
    "title neighbours": (["ensemble.neighbours.share=0"], 0),
    "neighbours + titles": ([], 0),
    "blend": (WITHOUT_TITLES, 1),
    "blend + titles": ([], 1),
}
TEACHERS: dict[str, list[str]] = {"ids": WITHOUT_TITLES, "titles": [], "ilora": []}


class Study:
    """The study on one data set.

    Args:
        name: Its name.
        overrides: Overrides of all its stages.
        options: The command line.
    """

    def __init__(self, name: str, overrides: Sequence[str], options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.folder = options.work.resolve() / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common = [
            *overrides,
            f"metrics.select_on={METRIC}",
            "metrics.mask_seen=true",
            "logging.progress=false",
            *options.training,
        ]
        self.arms = [arm for arm in DISTILLED if not options.quick or arm.name in QUICK_ARMS]
        self.arms += [WITH_ILORA] * (options.teacher_seeds > 0)
        self.wanted = options.arms or ["ilora", *SERVED, *(arm.name for arm in self.arms)]
        self.runs: dict[str, dict[int, Path]] = {}
        self.chosen: dict[str, dict[str, Any]] = {}

    def stage(self, stage: str, *overrides: str) -> Path:
        """The folder of a finished run, found again or run; scores of an evaluation are found again in any case."""
        reuse = [] if stage == "evaluate" else ["reuse=true"]
        return run(stage, *self.common, *overrides, *reuse, folder=self.folder, quiet=True)

    def train(self, arm: Arm) -> None:
        """Choose an arm's options on validation with the first seed, and train it with every seed."""
        stage = "student" if arm.teacher is None else "distill"
        fixed = [*STUDENT, *arm.fixed]
        if arm.teacher is not None:
            fixed += [*self.chosen[SASREC.name]["overrides"], f"distill.teacher_outputs={self.outputs(arm.teacher)}"]
        found = tune(
            stage,
            [*self.common, *fixed, f"seed={self.options.seeds[0]}"],
            {key: list(values) for key, values in arm.space.items()},
            n_trials=self.options.tries,
            folder=self.folder,
            name=plain(arm.name),
        )
        best = list(found.overrides)  # none if the defaults are best
        self.chosen[arm.name] = {"overrides": best, "tries": len(found.trials), "validation": found.value}
        searched = {each.partition("=")[0] for each in best}
        kept = [each for each in fixed if each.partition("=")[0] not in searched]
        self.runs[arm.name] = {seed: self.stage(stage, *kept, *best, f"seed={seed}") for seed in self.options.seeds}

    def mix(self, name: str, overrides: Sequence[str], seeds: Sequence[int], teachers: Sequence[Path] = ()) -> Path:
        """An ensemble of the students of some seeds, and LLM teachers; its shares are chosen by the stage."""
        members = ",".join(map(str, [*(self.runs[SASREC.name][seed] for seed in seeds), *teachers]))
        return self.stage("ensemble", f"ensemble.name={name}", f"runs=[{members}]", *overrides)

    def outputs(self, teacher: str) -> str:
        """Outputs of an ensemble that teaches."""
        (folder,) = (self.folder / "data" / "teacher_outputs").glob(f"*/{teacher}")
        return str(folder)

    def go_on(self) -> Iterator[str]:
        """Run what is missing, arm by arm; yields the name of each arm that is there."""
        self.stage("data")
        teacher_seeds = self.options.seeds[: self.options.teacher_seeds]
        if teacher_seeds and "ilora" in self.wanted:
            self.runs["ilora"] = {seed: self.stage("teacher", *ILORA, f"seed={seed}") for seed in teacher_seeds}
            yield "ilora"
        if self.wanted == ["ilora"]:
            return
        self.train(SASREC)
        yield SASREC.name
        for name, (overrides, n_students) in SERVED.items():
            if name not in self.wanted:
                continue
            seeds = self.options.seeds if n_students else self.options.seeds[:1]
            self.runs[name] = {
                seed: self.mix(f"{plain(name)}_{seed}", overrides, [seed][:n_students]) for seed in seeds
            }
            yield name
        arms = [arm for arm in self.arms if arm.name in self.wanted]
        for teacher in dict.fromkeys(arm.teacher for arm in arms if arm.teacher is not None):
            runs = list(self.runs["ilora"].values()) if teacher == "ilora" else []
            mixed = self.mix(teacher, TEACHERS[teacher], self.options.seeds[:MEMBERS], runs)
            self.runs[f"teacher: {teacher}"] = {0: mixed}
        for arm in arms:
            self.train(arm)
            yield arm.name

    def validation(self) -> dict[str, Any]:
        """What was chosen, and validation and seconds of every run, by arm."""
        return {
            arm: {
                **self.chosen.get(arm, {}),
                "by_seed": {seed: validated(folder) for seed, folder in runs.items()},
                "seconds": {seed: read_json(folder / "metrics" / "time.json") for seed, folder in runs.items()},
                "parameters": read_json(next(iter(runs.values())) / "run.json")["parameters"],
            }
            for arm, runs in self.runs.items()
        }

    def test(self) -> dict[str, Any]:
        """Open the test split: comparisons, and cost of serving."""
        folders = [folder for runs in self.runs.values() for folder in runs.values()]
        scored = self.stage("evaluate", f"runs=[{','.join(map(str, folders))}]", "report.baseline=null")
        data = self.data()
        ranks = {arm: np.stack([test_ranks(each) for each in runs.values()]) for arm, runs in self.runs.items()}
        ranks["popularity"] = popularity_ranks(data, popularity(data), mask_seen=True).numpy()[None]
        best, values = self.best_student(language=True), values_of(ranks)
        return {
            **self.compared(data, "test", ranks),
            "over_blend": {
                name: vars(paired_difference(values[best], values[name])) for name in ("blend", "blend + titles")
            },
            "milliseconds": {
                arm: read_json(next(iter(runs.values())) / "metrics" / "test.json")["milliseconds"]
                for arm, runs in self.runs.items()
            },
            "report": scored.name,
        }

    def students_on_validation(self) -> dict[str, Any]:
        """The same comparisons of the trained students on validation, which chose their options: optimistic."""
        data = self.data()
        arms = [arm.name for arm in (SASREC, *self.arms)]
        ranks = {arm: np.stack([validation_ranks(each, data) for each in self.runs[arm].values()]) for arm in arms}
        return self.compared(data, "validation", ranks)

    def data(self) -> RecData:
        """The prepared data set."""
        (prepared,) = (self.folder / "data" / "processed").glob("*")
        return load(prepared)

    def compared(self, data: RecData, split: str, ranks: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
        """Metrics by arm, gains with intervals over rows and seeds, and slices.

        Args:
            data: The data set.
            split: ``validation`` or ``test``.
            ranks: 0-based ranks of the targets of its M rows by arm, shape ``(runs, M)``.
        """
        values = values_of(ranks)
        gains = {
            arm: paired_difference(each, values[SASREC.name]) for arm, each in values.items() if arm != SASREC.name
        }
        adjusted = holm([gain.p for gain in gains.values()])
        with_it, without = (self.best_student(language) for language in (True, False))
        return {
            "metrics": {
                arm: {
                    metric: [float(row_values(each, metric).mean()) for each in found]
                    for metric in ("ndcg@10", "hr@10", "ndcg@20", "hr@20")
                }
                for arm, found in ranks.items()
            },
            "gains_over_sasrec": {
                arm: {**vars(gain), "p_holm": p} for (arm, gain), p in zip(gains.items(), adjusted, strict=True)
            },
            "language_model": {
                "with": with_it,
                "without": without,
                **vars(paired_difference(values[with_it], values[without])),
            },
            "slices": slices_of(data, split, ranks),
        }

    def best_student(self, language: bool) -> str:
        """The student that validates best among those with, or without, a language model."""
        arms = [arm.name for arm in (SASREC, *self.arms) if arm.language == language]
        return max(arms, key=lambda arm: statistics.mean(map(validated, self.runs[arm].values())))


def values_of(ranks: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
    """NDCG@20 of each run and row, by arm."""
    return {arm: np.stack([row_values(each, METRIC) for each in found]) for arm, found in ranks.items()}


def slices_of(data: RecData, split: str, ranks: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """NDCG@20 and HR@20 by arm: thirds of popularity and of history length, and the slices of the evaluation."""
    values, table = values_of(ranks), data.splits[split].with_format("numpy")
    numbers = {
        "popularity": popularity(data)[np.asarray(table["target"][:])].astype(np.int64),
        "history": np.asarray(table["position"][:], np.int64),
    }
    groups = {
        f"{name} {each[rows].min()} to {each[rows].max()}": rows
        for name, each in numbers.items()
        for rows in quantile_groups(each, 3)
    }
    return {
        name: {
            "rows": len(rows),
            METRIC: {arm: float(each[:, rows].mean()) for arm, each in values.items()},
            "hr@20": {arm: float((each[:, rows] < 20).mean()) for arm, each in ranks.items()},
        }
        for name, rows in {**groups, **{part.name: part.rows for part in slices(data, split)}}.items()
    }


def plain(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"\W+", "_", name)


def validated(folder: Path) -> float:
    """Best validation metric of a run."""
    return max(validation_history(folder))


@torch.inference_mode()
def validation_ranks(folder: Path, data: RecData) -> NDArray[np.int64]:
    """0-based ranks of the validation targets by the student of a run, seen items left out, shape ``(M,)``."""
    model = load_student(folder)
    rows, catalogue = Rows.of(data, "validation", model.max_length), Catalogue(model.output_items.vectors())
    seen = SeenItems(rows)
    found = []
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // 512)):
        batch = rows.batch(part)
        found.append(ranks_in_blocks(model(*batch.inputs), catalogue, batch.targets, seen.pairs(part)))
    return torch.cat(found).numpy()


def test_ranks(folder: Path) -> NDArray[np.int64]:
    """0-based ranks of the test targets, shape ``(M,)``, as scoring left them."""
    return np.load(folder / "metrics" / "test_ranks.npy", allow_pickle=False)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="where to write the result")
    parser.add_argument("--work", type=Path, default=Path("language_study"), help="folder of the runs")
    parser.add_argument("--llm-path", type=existing, help="folder of MiniLM")
    for name in ("office", "toys"):
        parser.add_argument(f"--{name}", type=existing, help="folder with interactions.csv and items.csv")
    parser.add_argument("--ml100k", type=existing, help="folder with u.data and u.item")
    parser.add_argument("--tries", type=int, default=10, help="tries of each trained arm")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each arm's best")
    parser.add_argument("--teacher-seeds", type=int, default=0, help="seeds of iLoRA, hours each without a GPU")
    parser.add_argument(
        "--arms", type=lambda text: text.split(";"), help="arms to run, separated by ';'; all if not given"
    )
    parser.add_argument("--open-test", action="store_true", help="open the test split of what is there")
    parser.add_argument("--quick", action="store_true", help="toy data, a tiny random model, a minute")
    options = parser.parse_args()
    if options.open_test and options.arms:
        parser.error("--open-test opens the test split of all arms at once; leave out --arms")
    known = {SASREC.name, "ilora", *SERVED, *(arm.name for arm in (*DISTILLED, WITH_ILORA))}
    if unknown := set(options.arms or []) - known:
        parser.error(f"--arms has {sorted(unknown)}, expected some of {sorted(known)}")
    options.tries, n_seeds = (1, 2) if options.quick else (options.tries, options.seeds)
    options.seeds = list(range(1, n_seeds + 1))
    options.training = ["student.training.epochs=2"] if options.quick else []
    if not options.quick and (options.llm_path is None or not (options.office or options.toys or options.ml100k)):
        parser.error("give --llm-path and at least one of --office, --toys, --ml100k, or --quick")
    return options


def studies(options: argparse.Namespace) -> list[Study]:
    """The data sets of the command line."""
    if options.quick:
        return [Study("toy", ["dataset=toy", "llm=tiny_random"], options)]
    llm = ["llm=minilm", f"llm.path={options.llm_path.resolve()}"]
    tables = {name: getattr(options, name) for name in ("office", "toys") if getattr(options, name)}
    found = {
        name: [
            "dataset=csv",
            f"dataset.name={name}",
            f"dataset.interactions={folder.resolve() / 'interactions.csv'}",
            f"dataset.items={folder.resolve() / 'items.csv'}",
            "dataset.history_length=20",
        ]
        for name, folder in tables.items()
    }
    if options.ml100k:
        raw = f"dataset.raw_dir={options.ml100k.resolve()}"
        found["ml100k"] = ["dataset=movielens", raw, "dataset.history_length=50"]
    return [Study(name, [*overrides, *llm], options) for name, overrides in found.items()]


def main() -> None:
    """Run what is missing and write the JSON file after each arm."""
    options = parse()
    results: dict[str, Any] = {}
    plan = {
        "chosen_by": f"{METRIC} on validation",
        "tries": options.tries,
        "seeds": options.seeds,
        "student": STUDENT,
        "arms": [vars(arm) for arm in (SASREC, *DISTILLED, WITH_ILORA)],
        "ilora": ILORA,
        "served": {name: {"overrides": each, "students": n} for name, (each, n) in SERVED.items()},
        "teachers": TEACHERS,
    }

    def write() -> None:
        headline = {
            f"{name}: {arm}": round(statistics.mean(found["by_seed"].values()), 5)
            for name, each in results.items()
            for arm, found in each["validation"].items()
        }
        for name, each in results.items():
            if test := each.get("test"):
                headline[f"{name}: share of the language model"] = round(test["language_model"]["relative"], 5)
        write_result(options, headline, results, show=False, plan=plan)

    for study in studies(options):
        for arm in study.go_on():
            results[study.name] = {"validation": study.validation()}
            write()
            by_seed = results[study.name]["validation"][arm]["by_seed"]
            print(f"{study.name}: {arm}: {statistics.mean(by_seed.values()):.4f} on validation", flush=True)
        if options.arms is None:
            results[study.name]["students_on_validation"] = study.students_on_validation()
            write()
        if options.open_test:
            results[study.name]["test"] = study.test()
            write()


if __name__ == "__main__":
    main()
