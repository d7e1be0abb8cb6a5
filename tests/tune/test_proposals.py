"""What a search tries: the defaults first, nothing twice, and the same after an interruption."""

import math

import optuna
import pytest

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.tune.dimensions import Choice, Interval
from llm2rec.tune.proposals import Proposals
from llm2rec.tune.study import locked, open_study

SPACE = {
    "rate": Interval(1e-4, 1e-1, log=True),
    "dropout": Choice(("0.1", "0.2", "0.5")),
    "blocks": Interval(1, 4, whole=True),
}
DEFAULTS = {"rate": 2e-3, "dropout": "0.2", "blocks": 1}


def value(params):
    """Best at a rate of 0.01, a dropout of 0.2 and 3 blocks."""
    return -abs(math.log10(float(params["rate"])) + 2) - abs(float(params["dropout"]) - 0.2) - abs(params["blocks"] - 3)


def opened(file, space=SPACE, defaults=DEFAULTS, seed=0):
    return Proposals(open_study(file, "name", {"seed": seed}, prune=False), space, defaults, seed)


def in_memory(space=SPACE, defaults=DEFAULTS):
    return Proposals(optuna.create_study(direction="maximize"), space, defaults, 0)


def search(proposals, n_trials, waiting=()):
    """Run trials to the end; returns the overrides of each."""
    waiting, tried = list(waiting), []
    while len(tried) < n_trials:
        trial = waiting.pop(0) if waiting else proposals.next()
        if trial is None:
            break
        reached = value(trial.params)
        trial.set_user_attr("value", reached)
        proposals.study.tell(trial, reached)
        tried.append(proposals.overrides(trial))
    return tried


def test_the_defaults_come_first_and_inform_the_sampler():
    proposals = in_memory()
    assert search(proposals, 1) == [[]]
    assert proposals.study.trials[0].params == DEFAULTS


def test_a_search_that_was_interrupted_proposes_the_same(tmp_path):
    unbroken = search(in_memory(), 13)
    assert len({tuple(each) for each in unbroken}) == 13
    parts = search(opened(tmp_path / "a.db"), 11)
    killed = opened(tmp_path / "a.db")
    assert killed.unfinished() == []
    running = killed.next()
    again = opened(tmp_path / "a.db")
    (resumed,) = again.unfinished()
    assert (resumed.number, resumed.params) == (running.number, running.params)
    parts += search(again, 2, [resumed])
    assert parts == unbroken


def test_the_sampler_learns():
    proposals = in_memory()
    search(proposals, 40)
    values = [each.value for each in proposals.study.trials]
    assert sum(values[20:]) / 20 > sum(values[:10]) / 10 + 0.3


def test_nothing_is_tried_twice_and_a_small_space_is_tried_as_a_whole():
    space = {"rate": Choice(("0.01", "0.1")), "dropout": SPACE["dropout"], "blocks": Interval(1, 3, step=1, whole=True)}
    proposals = in_memory(space, {"rate": "0.01", "dropout": "0.2", "blocks": 1})
    tried = search(proposals, 100)
    assert len({tuple(each) for each in tried}) == len(tried) == 2 * 3 * 3
    repeated = [each for each in proposals.study.trials if each.user_attrs.get("status") == "repeated"]
    assert repeated
    for each in repeated:
        first = proposals.study.trials[each.user_attrs["same_as"]]
        assert (each.value, each.params) == (first.value, first.params)


def test_defaults_outside_of_the_space_are_tried_too():
    proposals = in_memory(defaults={"dropout": "0.2"})
    first = proposals.next()
    assert (proposals.overrides(first), first.params) == ([], {"dropout": "0.2"})
    proposals.study.tell(first, state=optuna.trial.TrialState.FAIL)
    second = proposals.next()
    assert [each.partition("=")[0] for each in proposals.overrides(second)] == list(SPACE)


def test_a_file_of_another_search_or_of_something_else_is_refused(tmp_path):
    opened(tmp_path / "a.db")
    with pytest.raises(ConfigError, match="'name' was started with another configuration: seed was 0, now 1"):
        opened(tmp_path / "a.db", seed=1)
    (tmp_path / "b.db").write_text("no database " * 100)
    with pytest.raises(CheckpointError, match=r"b\.db is not a file of a search"):
        opened(tmp_path / "b.db")


def test_a_folder_is_searched_by_one_process_at_a_time(tmp_path):
    with locked(tmp_path):
        with pytest.raises(ConfigError, match="is in use by another search"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
