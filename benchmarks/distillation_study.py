r"""Does distillation pay? Students with and without a teacher, each tuned with the same care, on real data.

    .venv/bin/python benchmarks/distillation_study.py --llm-path FOLDER --games-dir FOLDER --raw-dir FOLDER \
        --json benchmarks/results/distillation_study.json

Games and MovieLens, leave-one-out, ranked among the whole catalogue without what a user had before. Everything is
chosen by NDCG@20 on validation; only ``--parts test`` opens the test split, when all has been chosen. The arms:

- ``baseline``: the student's task loss. Its search: learning rate, dropout, width, weight decay, loss.
- ``collaborative``: listwise on the mean of item neighbours and a few baselines of other seeds (`llm2rec.ensemble`): a
  teacher without any language model, the control. What an LLM teaches has to be worth more. Variations of it measure
  what each half is worth.
- ``vectors``: the LLM's item vectors alone, which cost one reading of the titles: as a start, aligned, or added.
  ``vectors, aligned`` searches losses of alignment alone.
- ``hybrid``, ``listwise``: listwise on the top 100 of an LLM that is given a trained SASRec, or reads titles alone.
- ``dllm2rec``: the paper's losses on that same teacher; variations of it, without a search, show what each part adds,
  and whether it is what the item vectors know (``vectors shuffled``: each item has another one's).
- ``collaborative, paper's losses``, again with variations without each part, and ``collaborative, pairs`` (RankNet,
  margin): is it the teacher, or the loss?

Each arm of a student is searched with the same number of tries, drawn once from a stated space (`study_plan.py`), with
one seed. All go on from the best of the baseline's first tries: a distilled arm searches what is its own, the baseline
gets as many tries more around its best, and both have pilots where the plan names some. The best of each arm runs with
five seeds or more, that of the search among them.

A day is not enough on two processors, so that it goes on where it stopped: finished stages in ``--work`` are not run
again, begun ones continue from their checkpoint, and the JSON file is written after each stage with what is there.
``--parts`` alone gathers and runs nothing. ``--earlier RESULT`` goes on where the runs are no longer at hand: what an
earlier JSON file holds is not run again, and new arms are compared with the baseline's rows in the file beside it
(``.npz``: what each test row adds to NDCG@20, mean over seeds). ``--quick`` shows the same in a minute on generated
data and a tiny random model, of some arms. Beside the JSON file and its rows comes a figure, and tables are printed.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from harness import existing, write_result
from ml100k import command_line
from study_earlier import Earlier, Rows, common_once, row_name, write_rows
from study_field import Field, best
from study_findings import Findings, brief, figure, headline, tables
from study_plan import (
    ARMS,
    BASELINE,
    PILOTS,
    QUICK,
    QUICK_ARMS,
    SELECT_ON,
    STUDENTS,
    Arm,
    Budget,
    datasets,
    draw,
    fitting,
    further,
    mixture_of,
)
from study_plan import rows_of as labelled_rows

PARTS = ("search", "finals", "ablations", "test")
SEARCHED = [arm for arm in ARMS if arm.parent is None]
VARIATIONS = [arm for arm in ARMS if arm.parent is not None]


def main() -> None:
    """Run the chosen parts that are missing; write the JSON file, the figure and the tables."""
    options = parse()
    budget = QUICK if options.quick else Budget()
    if options.seeds is not None:
        budget = replace(budget, seeds=tuple(range(1, options.seeds + 1)))
    fields = [Field(dataset, options, budget) for dataset in datasets(options)]
    studies = [Study(field, student) for student in options.students for field in fields]

    def gathered(show: bool) -> dict[str, Any]:
        begun = [field for field in fields if field.stages.records]
        samples = options.earlier.samples | {field.dataset.name: field.about() for field in begun}
        rows = dict(options.earlier.rows)
        for study in (study for study in studies if study.field in begun):
            dataset, student = study.field.dataset.name, study.student
            samples[dataset][student], found = study.findings()
            rows |= {row_name(dataset, student, arm): each for arm, each in found.items()}
        samples = brief(common_once(samples))
        write_result(options, headline(samples), samples, show=show, earlier=options.earlier.sources)
        write_rows(options.json, rows)
        return samples

    for study in studies:
        for part in [part for part in PARTS if part in options.parts and part != "test"]:
            for _ in study.run(part):
                gathered(show=False)
    if "test" in options.parts:
        for field in fields:
            found = [study.finals() for study in studies if study.field is field]
            field.open_test([run for arms in found for seeds in arms.values() for run in seeds.values()])
    samples = gathered(show=True)
    options.json.with_suffix(".svg").write_text(figure(samples), encoding="utf-8")
    print(tables(samples))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__ or "")
    parser.set_defaults(work="result/distillation_study")
    parser.add_argument("--games-dir", type=existing, help="folder with interactions.csv and items.csv of Amazon games")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, help="sasrec, which teaches, and then gru4rec")
    parser.add_argument(
        "--arms", nargs="+", choices=[arm.name for arm in ARMS], help="all by default, in this order; with --quick some"
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="all by default; none only gathers what is there")
    parser.add_argument(
        "--tries",
        nargs=2,
        type=int,
        metavar=("FIRST", "MORE"),
        help="of the baseline, and of each arm from there, where there is less time: for students after the first, "
        "which teaches",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="final runs of each arm: 5 by default, and never fewer than it has had"
    )
    parser.add_argument("--earlier", type=existing, help="JSON file of a result whose runs are not here, to go on from")
    options = parser.parse_args()
    if not options.quick and not (options.llm_path and (options.raw_dir or options.games_dir)):
        parser.error("--llm-path is needed, and --games-dir or --raw-dir or both; or --quick")
    options.earlier = Earlier(options.earlier)
    options.students = options.students or ([*STUDENTS][:1] if options.quick else [*STUDENTS])
    options.parts = list(PARTS) if options.parts is None else options.parts
    options.arms = options.arms or (list(QUICK_ARMS) if options.quick else [arm.name for arm in ARMS])
    return options


class Study:
    """All arms of one student on one dataset.

    Args:
        field: The dataset with its teachers.
        student: Its name in `STUDENTS`.
    """

    def __init__(self, field: Field, student: str) -> None:
        self.field, self.student, self.budget = field, student, field.budget
        if field.tries and student != next(iter(STUDENTS)):
            self.budget = replace(self.budget, tries=field.tries[0], more_tries=field.tries[1])
        self.earlier = field.earlier(student)
        self.arms = {arm.name: arm for arm in ARMS if arm.name in field.arms or arm.name == BASELINE}

    def run(self, part: str) -> Iterator[None]:
        """Run a part, and stop when some runs have ended, for the results to be written.

        Args:
            part: ``search``, ``finals`` or ``ablations``.

        Yields:
            None, after each lot of runs that are new.
        """
        self.field.stages.run("data", [])
        first_seed, baseline = self.budget.seeds[:1], self.arms[BASELINE]
        if part == "search":
            yield from self.trained(baseline, self.untried(baseline, self.first_tries()), first_seed)
            searched = [arm for arm in SEARCHED if arm.name in self.arms]
            for arm, _ in product(searched, ("around the best of these", "pilots")):
                if configs := self.untried(arm, self.tries(arm) or []):
                    yield from self.taught(arm)
                    yield from self.trained(arm, configs, first_seed)
            return
        for arm in (arm for arm in (SEARCHED if part == "finals" else VARIATIONS) if arm.name in self.arms):
            if (chosen := self.chosen(arm)) is not None and not self.known_earlier(arm):
                yield from self.taught(arm)
                yield from self.trained(arm, [chosen], self.budget.seeds)

    def taught(self, arm: Arm) -> Iterator[None]:
        """Make the teacher of an arm, and before it the baselines of SASRec that it needs."""
        if arm.teacher is None:
            return
        first = Study(self.field, next(iter(STUDENTS)))
        config, baseline = first.best_of(first.first_tries()), first.arms[BASELINE]
        if config is None:
            raise SystemExit(f"{arm.name} has a teacher that needs trained SASRecs: search --students sasrec first")
        seeds = self.budget.members if mixture_of(arm.teacher) else ()
        if arm.teacher == "hybrid":
            seeds = self.budget.seeds[:1]
        yield from first.trained(baseline, [config], seeds)
        members = [record["run"] for seed in seeds if (record := first.done(baseline, config, seed))]
        self.field.teach(arm.teacher, members)
        yield

    def overrides(self, arm: Arm, config: dict[str, Any], seed: int) -> list[str]:
        """Overrides of the stage."""
        overrides = [*STUDENTS[self.student], f"student.training.patience={self.field.dataset.patience}"]
        overrides += [
            *self.budget.common,
            *(f"{name}={value}" for name, value in sorted(config.items())),
            f"seed={seed}",
        ]
        if arm.teacher is not None:
            overrides += [f"distill.teacher_outputs={self.field.outputs(arm.teacher)}"]
            overrides += labelled_rows(arm.teacher, self.budget) if arm.reads_labels else []
        return overrides

    def done(self, arm: Arm, config: dict[str, Any], seed: int) -> dict[str, Any] | None:
        """The record of a run; None if it has not finished."""
        return self.field.record("distill" if arm.teacher else "student", self.overrides(arm, config, seed))

    def trained(self, arm: Arm, configs: list[dict[str, Any]], seeds: tuple[int, ...]) -> Iterator[None]:
        """Train an arm's students that have not been, ``--jobs`` at once; yields after each such lot."""
        stage, jobs = "distill" if arm.teacher else "student", self.field.jobs
        wanted = [(config, seed) for config in configs for seed in seeds]
        missing = [self.overrides(arm, *each) for each in wanted if self.done(arm, *each) is None]
        for start in range(0, len(missing), jobs):
            self.field.stages.run_many(stage, missing[start : start + jobs])
            yield

    def untried(self, arm: Arm, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Configurations that no earlier result holds."""
        return [config for config in configs if self.earlier.tried(arm.name, config) is None]

    def known_earlier(self, arm: Arm) -> bool:
        """Whether an earlier result has the test rows of what would be run, of as many seeds."""
        return arm.name in self.earlier.rows and self.seeds_had(arm) >= len(self.budget.seeds)

    def seeds_had(self, arm: Arm) -> int:
        """Number of seeds of the same configuration in an earlier result."""
        searched = arm if arm.parent is None else self.searched(arm.parent)
        same = self.earlier.chosen.get(searched.name) == self.chosen(searched)
        return len(self.earlier.validation.get(arm.name, {})) if same else 0

    def searched(self, name: str) -> Arm:
        """The arm of this name."""
        return next(each for each in SEARCHED if each.name == name)

    def tried(self, arm: Arm, config: dict[str, Any]) -> dict[str, Any] | None:
        """Result of a try; None if it has not finished."""
        if (known := self.earlier.tried(arm.name, config)) is not None:
            return known  # even if it ran again here, as a member of a teacher: last digits differ between machines
        if (record := self.done(arm, config, self.budget.seeds[0])) is None:
            return None
        validation = best(self.field.stages, record["run"])
        return {"config": config, "seconds": record["seconds"], "validation": validation}

    def first_tries(self) -> list[dict[str, Any]]:
        """What the baseline's first tries are."""
        return draw(self.arms[BASELINE].space, self.budget.tries, f"{self.student} {BASELINE}")

    def tries(self, arm: Arm) -> list[dict[str, Any]] | None:
        """All tries of an arm; None while what they stand on is not known."""
        if arm.parent is not None:
            chosen = self.chosen(arm)
            return None if chosen is None else [chosen]
        start = self.best_of(self.first_tries())
        if start is None:
            return None
        if arm.name == BASELINE:
            around = draw(further(start), self.budget.more_tries + 1, f"{self.student} further")
            tries = [*self.first_tries(), *({**start, **config} for config in around[1:])]
        else:
            drawn = draw(arm.space, self.budget.more_tries, arm.name)
            tries = [fitting({**start, **arm.fixed, **config}) for config in drawn]
        if (best_drawn := self.best_of(tries, arm)) is not None:
            pilots = PILOTS.get((self.field.dataset.name, self.student, arm.name), ())
            tries += [{**best_drawn, **change} for change in pilots]
        return tries

    def best_of(self, configs: list[dict[str, Any]], arm: Arm | None = None) -> dict[str, Any] | None:
        """The configuration that validates best; None unless all have finished."""
        tried = [self.tried(arm or self.arms[BASELINE], config) for config in configs]
        scores = [each["validation"][SELECT_ON] for each in tried if each]
        return configs[scores.index(max(scores))] if len(scores) == len(configs) else None

    def chosen(self, arm: Arm) -> dict[str, Any] | None:
        """The configuration of an arm's final runs; None while it is not known."""
        if arm.parent is not None:
            parent = self.chosen(self.searched(arm.parent))
            return None if parent is None else {**parent, **arm.fixed}
        tries = self.tries(arm)
        return None if tries is None else self.best_of(tries, arm)

    def finals(self) -> dict[str, dict[int, str]]:
        """Runs that have finished with an arm's chosen configuration, by arm and seed: those of all arms that count.

        An arm counts when it has all seeds, and no fewer than an earlier result holds.
        """
        found: dict[str, dict[int, str]] = {}
        for arm in self.arms.values():
            if (chosen := self.chosen(arm)) is None:
                continue
            seeds = range(1, max(len(self.budget.seeds), self.seeds_had(arm)) + 1)
            records = [record for seed in seeds if (record := self.done(arm, chosen, seed))]
            if len(records) == len(seeds):
                found[arm.name] = {seed: record["run"] for seed, record in zip(seeds, records, strict=True)}
        return found

    def findings(self) -> tuple[dict[str, Any], Rows]:
        """What is known by now: tries and choices on validation, test scores and rows where they have been opened."""
        tries, chosen = dict(self.earlier.tries), dict(self.earlier.chosen)
        for arm in (arm for arm in self.arms.values() if arm.parent is None):
            configs = self.tries(arm) or (self.first_tries() if arm.name == BASELINE else [])
            tries[arm.name] = [tried for config in configs if (tried := self.tried(arm, config))]
            chosen[arm.name] = self.chosen(arm)
        earlier = self.earlier.without(
            {name for name, config in self.earlier.chosen.items() if chosen.get(name, config) not in (config, None)}
        )
        runs = self.finals()
        validation = {
            name: {str(seed): best(self.field.stages, run)[SELECT_ON] for seed, run in found.items()}
            for name, found in runs.items()
        }
        teachers = {name: {0: record["run"]} for name, record in self.field.teacher_runs().items()}
        scored = Findings(self.field.stages.folder, self.field.prepared(), self.budget.seeds)
        test, rows = scored.test(runs, teachers, earlier)
        found = {"tries": tries, "chosen": chosen, "validation": {**earlier.validation, **validation}, "test": test}
        return found, rows


if __name__ == "__main__":
    main()
