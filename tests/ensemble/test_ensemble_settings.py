"""Options of the ensemble that cannot work."""

import re
from pathlib import Path

import pytest

from llm2rec.core.errors import ConfigError
from llm2rec.ensemble.opening import vectors_to_export
from llm2rec.ensemble.runs import FinishedRun
from llm2rec.ensemble.settings import (
    EnsembleSettings,
    NeighboursSettings,
    SearchSettings,
    StudentsSettings,
    TeachersSettings,
    TitlesSettings,
)

KINDS = {
    "students": StudentsSettings,
    "neighbours": NeighboursSettings,
    "titles": TitlesSettings,
    "teachers": TeachersSettings,
    "search": SearchSettings,
}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"name": name} for name in ("", " ", "a/b", "a\\b", "a\nb", "..", "a" * 101)),
        {"top_k": 0},
        {"block_rows": 0},
        {"batch_rows": -3},
        *({f"{kind}.share": share} for kind in ("students", "neighbours", "titles", "teachers") for share in (2, -0.1)),
        *({f"{kind}.temperature": 0.0} for kind in ("students", "neighbours", "titles", "teachers")),
        {"titles.whitening": 1.5},
        {"titles.decay": 0.0},
        {"titles.history": 0},
        {"teachers.top_k": 0},
        {"search.rows": 0},
        {"search.rounds": 0},
        {"vectors": []},
        {"vectors": ["titles", "titles"]},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong):
    ((name, value),) = wrong.items()
    group, _, option = name.rpartition(".")
    with pytest.raises(ConfigError, match=re.escape(f"ensemble.{name} is {value!r}")):
        EnsembleSettings(**{group: KINDS[group](**{option: value})} if group else wrong)


def test_given_shares_are_at_most_the_whole():
    with pytest.raises(ConfigError, match=re.escape("`ensemble.titles.share=0.7` sum to 1.2, expected at most 1")):
        EnsembleSettings(neighbours=NeighboursSettings(share=0.5), titles=TitlesSettings(share=0.7))
    EnsembleSettings(neighbours=NeighboursSettings(share=0.3), titles=TitlesSettings(share=0.7))


def test_vectors_are_those_of_titles_else_of_students_else_of_teachers():
    folder = Path("result")
    student, other, teacher = (
        FinishedRun(folder, name, name, 1, is_teacher=name == "teacher") for name in ("first", "second", "teacher")
    )
    off, runs = TitlesSettings(share=0.0), [student, teacher, other]
    assert vectors_to_export(EnsembleSettings(), runs) == ["titles"]
    assert vectors_to_export(EnsembleSettings(titles=off), runs) == ["first", "second"]
    assert vectors_to_export(EnsembleSettings(titles=off), [teacher]) == ["teacher"]
    some = EnsembleSettings(vectors=["teacher", "students", "titles"], titles=off)
    assert vectors_to_export(some, runs) == ["teacher", "first", "second", "titles"]
    with pytest.raises(ConfigError, match="alone have no item vectors"):
        vectors_to_export(EnsembleSettings(titles=off), [])
    switched_off = EnsembleSettings(vectors=["teacher"], teachers=TeachersSettings(share=0.0))
    with pytest.raises(ConfigError, match="names 'teacher', expected some of titles, students, first, second"):
        vectors_to_export(switched_off, runs)
