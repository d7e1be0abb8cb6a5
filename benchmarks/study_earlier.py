"""Results of an earlier distillation study, whose runs are not repeated."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_plan import ARMS, BASELINE

from llm2rec.core.files import read_json, replaced_file

__all__ = ["Earlier", "Known", "Rows", "common_once", "row_name", "rows_file", "spelt_out", "write_rows"]

Rows = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Known:
    """What is known of one student on one dataset.

    Attributes:
        tries: Of each searched arm, its tries: ``config``, ``seconds`` and ``validation``.
        chosen: Of each searched arm, the configuration of its final runs.
        validation: Of each arm, validation scores of its final runs, by seed.
        test: As `study_findings.Findings.test` gives it; empty where the test split was not opened.
        rows: Of each arm, what each test row adds to the metric, mean over seeds, shape ``(M,)``.
    """

    tries: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    chosen: Mapping[str, dict[str, Any] | None] = field(default_factory=dict)
    validation: Mapping[str, dict[str, float]] = field(default_factory=dict)
    test: Mapping[str, Any] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)

    def tried(self, arm: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Result of a try; None if it is not known."""
        return next((each for each in self.tries.get(arm, []) if each["config"] == config), None)

    def without(self, changed: Collection[str]) -> "Known":
        """The same without the final runs of arms that have another configuration now, and of their variations.

        Args:
            changed: Searched arms. Gains over the baseline go with it, and groups of rows with any of them.
        """
        gone = {*changed, *(arm.name for arm in ARMS if arm.parent in changed)}
        if not gone:
            return self

        def kept(found: Mapping[str, Any]) -> dict[str, Any]:
            return {name: each for name, each in found.items() if name not in gone}

        test = {kind: kept(self.test.get(kind, {})) for kind in ("metrics", "gains", "variations")}
        if BASELINE in gone:
            test["gains"] = {}
        test["teachers"] = self.test.get("teachers", {})
        return replace(self, validation=kept(self.validation), rows=kept(self.rows), test=test if self.test else {})


class Earlier:
    """A result of `distillation_study.py` with the rows beside it, or nothing.

    Args:
        file: The JSON file; None for a study that begins.
    """

    def __init__(self, file: Path | None) -> None:
        result = read_json(file) if file is not None else {}
        self.samples: dict[str, Any] = spelt_out(result.get("samples", {}))
        self.sources = (
            [*result.get("earlier", []), {key: result[key] for key in ("command", "commit")}] if result else []
        )
        self.rows: Rows = {}
        if file is not None and rows_file(file).is_file():
            with np.load(rows_file(file), allow_pickle=False) as rows:
                self.rows = {name: rows[name] for name in rows.files}

    def of(self, dataset: str, student: str) -> Known:
        """Results of one student on one dataset."""
        found = self.samples.get(dataset, {}).get(student)
        if found is None:
            return Known()
        start = row_name(dataset, student, "")
        rows = {name.removeprefix(start): each for name, each in self.rows.items() if name.startswith(start)}
        return Known(found["tries"], found["chosen"], found["validation"], found["test"], rows)


def common_once(samples: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the overrides that all stages of a dataset share stored once, as ``common``."""
    found = {}
    for dataset, about in samples.items():
        words = [each["overrides"].split(" ") for each in about["stages"]]
        shared = [word for word, *_ in takewhile(lambda same: len(set(same)) == 1, zip(*words, strict=False))]
        rest = [" ".join(each[len(shared) :]) for each in words]
        stages = [{**each, "overrides": line} for each, line in zip(about["stages"], rest, strict=True)]
        found[dataset] = {**about, "common": " ".join(shared), "stages": stages}
    return found


def spelt_out(samples: Mapping[str, Any]) -> dict[str, Any]:
    """What `common_once` has written, as it was; what is without ``common`` is so already."""
    found = {}
    for dataset, about in samples.items():
        common = about.get("common", "")
        stages = [{**each, "overrides": f"{common} {each['overrides']}".strip()} for each in about.get("stages", [])]
        found[dataset] = {**{key: each for key, each in about.items() if key != "common"}, "stages": stages}
    return found


def row_name(dataset: str, student: str, arm: str) -> str:
    """The name of an arm's rows in the file of rows."""
    return f"{dataset}/{student}/{arm}"


def rows_file(file: Path) -> Path:
    """Where the rows of a result lie."""
    return file.with_suffix(".npz")


def write_rows(file: Path, rows: Rows) -> None:
    """Write what test rows add beside their result, for a later study to compare with.

    Args:
        file: The JSON file of the result.
        rows: By `row_name`.
    """
    if rows:
        with replaced_file(rows_file(file)) as aside, open(aside, "wb") as opened:
            np.savez_compressed(opened, allow_pickle=False, **rows)
