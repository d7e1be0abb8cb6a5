"""Search spaces: Hydra's syntax of sweeps, and what a stage refuses before the first trial."""

import pytest
from hydra.core.global_hydra import GlobalHydra

from llm2rec.core.errors import ConfigError
from llm2rec.search_space import checked_space, split_space
from llm2rec.tune import Interval
from llm2rec.tune.__main__ import split_arguments
from llm2rec.tune.dimensions import Choice

RATE = "student.training.learning_rate"


def test_sweeps_of_the_command_line_become_dimensions():
    fixed, space = split_space(
        [
            "dataset=toy",
            "runs=[a,b]",
            f"{RATE}=tag(log,interval(1e-4,1e-2))",
            "student=sasrec,gru4rec",
            "student.model.dropout=interval(0,1)",
            "student.model.n_blocks=range(1,5)",
            "student.model.heights=[1,2],null",
        ],
        {"student.model.width": [32, 64], "student.model.tie_items": (True, False), "seed": "range(0.5, 1, 0.25)"},
    )
    assert fixed == ["dataset=toy", "runs=[a,b]"]
    assert space == {
        RATE: Interval(1e-4, 1e-2, log=True),
        "student": Choice(("sasrec", "gru4rec")),
        "student.model.dropout": Interval(0, 1),
        "student.model.n_blocks": Interval(1, 4, step=1),
        "student.model.heights": Choice(("[1,2]", "null")),
        "seed": Interval(0.5, 0.75, step=0.25),
        "student.model.width": Choice(("32", "64")),
        "student.model.tie_items": Choice(("true", "false")),
    }


@pytest.mark.parametrize(
    ("overrides", "space", "message"),
    [
        (["dataset=toy"], {}, "there is nothing to search"),
        (["seed=choice()"], {}, r"`seed=choice\(\)` cannot be read"),
        (["seed=1,1"], {}, "a value of `seed` twice"),
        (["seed=interval(2,1)"], {}, r"interval of `seed` is interval\(2, 1\), expected a lower bound below"),
        (["seed=range(3,3)"], {}, "empty range"),
        (["seed=tag(log,interval(0,1))"], {}, "on a logarithmic scale low > 0"),
        (["seed=tag(loud,interval(0,1))"], {}, "has the tag 'loud'"),
        (["student=glob(*)"], {}, "cannot be searched"),
        (["seed=1,2"], {"seed": [3]}, "names `seed` twice"),
        (["seed=1,2", "resume=x"], {}, "`resume` is set by the search itself"),
        (["seed=1,2", "hydra.run.dir=x"], {}, "`hydra.run.dir` is set by the search itself"),
        (["metrics.select_on=hr@10,ndcg@10"], {}, "decides how trials are compared"),
        ([], {"seed": []}, "holds no value of `seed`"),
        ([], {"seed": 3}, "expected a list of values or an `Interval`"),
        ([], {"seed": "3"}, "`seed=3` is a single value"),
    ],
)
def test_spaces_that_cannot_be_searched_are_refused(overrides, space, message):
    with pytest.raises(ConfigError, match=message):
        split_space(overrides, space)


def test_numbers_are_written_within_their_bounds():
    exact = Interval(1.2345641, 2.3456789)
    assert exact.text(1.2345641) == "1.2345641"  # 6 digits would be below the bound
    assert exact.text(2.0000001) == "2.0"
    assert Interval(1, 8, whole=True).text(3.0) == "3"
    assert Interval(0.1, 0.4, step=0.1).listed() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert Interval(0.1, 0.4, step=0.1).holds(0.3)
    assert not Interval(0.1, 0.4, step=0.1).holds(0.25)
    assert Interval(0, 1).size is None


def checked(folder, *overrides, stage="student"):
    return checked_space(stage, *split_space(overrides, {}), folder)


def test_types_and_defaults_come_from_the_stage(tmp_path):
    given = ["student.model.width=interval(32,128)", "student.model.dropout=0.20,0.4", "student=gru4rec,sasrec"]
    GlobalHydra.instance().clear()
    found = checked(tmp_path, *given, f"{RATE}=interval(0.1,1)", "paths.result_dir=there", "metrics.select_on=hr@5")
    assert found.space["student.model.width"] == Interval(32, 128, whole=True)
    assert found.defaults == {"student.model.width": 64, "student.model.dropout": "0.2", "student": "sasrec"}
    assert (found.result_dir, found.select_on) == (tmp_path / "there", "hr@5")
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.model.dropou=0.1,0.2"], "dropou"),
        (["student.model.dropout=0.1,much"], "`student.model.dropout=much`: "),
        (["student.training.batch_size=8,0"], "`student.training.batch_size=0`, which student refuses: .* is 0"),
        (["student.model.width=interval(0.5,8)"], "`student.model.width` is a whole number"),
        (["student.loss.name=interval(0,1)"], "`student.loss.name` is not a number"),
        (["student.loss.n_negatives=1,2"], "n_negatives is 1, which cross_entropy does not read"),
        (["seed=1,2", "student.training.batch_size=0"], "`batch_size` is 0"),
        (["seed=1,2", "dataset=csv"], "`dataset.interactions`.* must be given"),
    ],
)
def test_what_the_stage_refuses_is_refused_before_the_first_trial(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, *overrides)


def test_only_stages_that_validate_are_searched(tmp_path):
    with pytest.raises(
        ConfigError, match="stage is 'evaluate', expected 'student', 'distill', 'teacher' or 'ensemble'"
    ):
        checked(tmp_path, "seed=1,2", stage="evaluate")


def test_the_command_line_is_split():
    own = ["stage=student", "n_trials=3", "--cfg", "hydra/job_logging=disabled", "search_seed=2"]
    of_stage = ["dataset=toy", "seed=3", "student.model.dropout=0.1,0.2"]
    assert split_arguments([own[0], *of_stage, *own[1:]]) == (own, of_stage)
