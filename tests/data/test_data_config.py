"""The dataset configs compose against their schemas and build what they say."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import instantiate
from omegaconf.errors import MissingMandatoryValue

from llm2rec.core.errors import ConfigError
from llm2rec.data import SCHEMAS, Amazon2014, CsvTables, MovieLens100K, Toy

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def _schemas():
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(group="dataset", name=f"base_{name}", node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides):
    return compose(overrides=[f"+{overrides[0]}", *overrides[1:]])


def test_each_file_has_a_schema_and_each_schema_a_file():
    assert sorted(path.stem for path in (CONF / "dataset").glob("*.yaml")) == sorted(SCHEMAS)


@pytest.mark.parametrize(
    ("name", "required"),
    [
        ("toy", []),
        ("movielens", []),
        ("csv", ["dataset.interactions=a.csv", "dataset.items=b.csv"]),
        ("amazon_games", ["dataset.reviews=a", "dataset.metadata=b"]),
        ("amazon_toys", []),
        ("amazon_beauty", []),
        ("amazon_office", []),
        ("amazon_sports", []),
    ],
)
def test_each_config_builds_its_dataset(name, required):
    spec = instantiate(composed(f"dataset={name}", *required).dataset)
    assert type(spec) is SCHEMAS[name]
    assert spec.name == name


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_each_yaml_says_what_its_schema_says(name):
    shown = composed(f"dataset={name}").dataset
    default = {each.name: each.default if each.default_factory is MISSING else [] for each in fields(SCHEMAS[name])}
    differing = {key for key, value in default.items() if shown._get_node(key) != value}
    named = {"name", "domain", "category"} if SCHEMAS[name] is Amazon2014 else set()
    assert differing <= {"k_core", *named}  # the usual 5-core of the Amazon data


def test_overrides_reach_the_dataset():
    spec = instantiate(composed("dataset=movielens", "dataset.raw_dir=../ml", "dataset.min_rating=4").dataset)
    assert (spec.raw_dir, spec.min_rating) == ("../ml", 4.0)
    assert spec.with_base(Path("/base/here")).raw_dir == "/base/here/../ml"


def test_misspelt_key_is_refused_at_composition():
    with pytest.raises(HydraException, match="k_cores"):
        composed("dataset=csv", "dataset.k_cores=3")


def test_wrong_type_is_refused_at_composition():
    with pytest.raises((ConfigCompositionException, HydraException), match="history_length"):
        composed("dataset=toy", "dataset.history_length=many")


def test_required_path_left_out_is_named():
    with pytest.raises(MissingMandatoryValue, match=r"interactions"):
        instantiate(composed("dataset=csv").dataset)
    with pytest.raises(ConfigError, match=r"`dataset.interactions` is not set.*`dataset.items` is not set"):
        CsvTables()


def test_problems_are_named_together():
    with pytest.raises(ConfigError, match=r"`split` must be one of.*`history_length` must be at least 1"):
        MovieLens100K(split="random", history_length=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, "`name` must be"),
        ({"min_interactions": 2}, "`min_interactions` must be at least 3"),
        ({"missing_title": "guess"}, "`missing_title` must be one of error, drop, id"),
        ({"ties": "random"}, "`ties` must be one of source, item, shuffle, got 'random'"),
        ({"split": "global_time", "test_fraction": 1.0}, "sum to less than 1"),
        ({"domain": " "}, "`domain` is blank"),
        ({"n_items": 7}, "`n_items` must be a multiple"),
        ({"n_worlds": 41}, "`n_worlds` must be from 1 to 40"),
        ({"n_items": 7206}, "`n_items` must be at most"),
        ({"same_world_probability": 0.9}, "sum to at most 1"),
        ({"max_length": 3}, "`min_length` and `max_length`"),
    ],
)
def test_values_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Toy(**settings)


def test_with_base_keeps_absolute_and_unset_paths(tmp_path):
    spec = CsvTables(interactions=str(tmp_path / "a.csv"), items="b.csv").with_base(Path("/base"))
    assert (spec.interactions, spec.items) == (str(tmp_path / "a.csv"), "/base/b.csv")
    assert MovieLens100K().with_base(Path("/base")).raw_dir is None


def test_settings_hold_no_paths_and_no_ways_of_working():
    spec = CsvTables(interactions="/secret/a.csv", items="/secret/b.csv", num_proc=2)
    assert "secret" not in str(spec.settings())
    assert "num_proc" not in spec.settings()
    assert spec.settings()["title_column"] == "title"
