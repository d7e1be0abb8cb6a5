"""Every file under conf/ composes and becomes the settings it stands for; misspelt keys and wrong types do not."""

import copy
import dataclasses
import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from llm2rec.config import Config, MetricsConfig, register
from llm2rec.core.errors import ConfigError
from llm2rec.data import SCHEMAS
from llm2rec.distill.selection_policy import SelectionPolicy
from llm2rec.recommend.settings import RecommendSettings
from llm2rec.share.pushing import ShareSettings
from llm2rec.stage import build
from llm2rec.student.models import MODELS, build_model

REPOSITORY = Path(__file__).parents[1]
CONF = REPOSITORY / "conf"
FILES = sorted(file.relative_to(CONF) for file in CONF.rglob("*.yaml"))
# One option of a group is a file of a folder; anything else is covered by a test of its own, below.
OPTIONS = [(str(file.parent), file.stem) for file in FILES if len(file.parts) == 2 and file.parts[0] != "hydra"]
HYDRA = ["default.yaml", "help/llm2rec.yaml", "job_logging/run.yaml", "job_logging/terminal.yaml"]
NOT_OPTIONS = {
    Path("config.yaml"),
    Path("recommend.yaml"),
    Path("share.yaml"),
    Path("tune.yaml"),
    *(Path("hydra") / name for name in HYDRA),
}
INSTANTIATED = {"active": SelectionPolicy}
PATHS = ["paths.root=/somewhere"]  # stands for the folder of the launch, which only a launch knows


@pytest.fixture(autouse=True)
def _hydra():
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@functools.cache
def _composed(*overrides):
    return compose("config", overrides=[*overrides, *PATHS])


def composed(*overrides):
    return copy.deepcopy(_composed(*overrides))


def required(group, name):
    """Overrides that give a file's required values."""
    given = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    real = {"policy": "llm2rec.distill.selection_policy.SelectionPolicyAll"}  # imported when it is built
    missing = [f"{group}.{key}={real.get(key, 'given')}" for key, value in given.items() if value == "???"]
    return missing + ["teacher.recommender_run=given"] * (name in ("ilora_hybrid", "ilora_paper", "ilora_code"))


def stands_on(group, name):
    """A file's defaults: a schema, or another file of the group that it varies, and itself."""
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["defaults"]


def kinds():
    """The schema of each group that has one, by group."""
    return {field.name: field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)}


def test_every_file_is_covered():
    options = {Path(group) / f"{name}.yaml" for group, name in OPTIONS}
    assert options | NOT_OPTIONS == set(FILES)
    assert {group for group, _ in OPTIONS} == kinds().keys()
    assert len(OPTIONS) >= 17


def built(group, cfg):
    if group in INSTANTIATED:
        return instantiate(cfg[group])
    return instantiate(cfg[group]) if "_target_" in cfg[group] else build(cfg[group], kinds()[group])


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_becomes_its_settings_and_accepts_no_other_key_or_type(group, name):
    """All on one composition, which takes a while; the tests below compose with unknown keys and wrong types."""
    base, *others = stands_on(group, name)
    assert others == ["_self_"]
    while not base.startswith("base_"):  # a file that varies another one has that one's schema
        base, *_ = stands_on(group, base)
    cfg = composed(f"{group}={name}", *required(group, name))
    with pytest.raises(OmegaConfBaseException, match="mispelt"):
        OmegaConf.update(cfg[group], "mispelt", 1)
    typed = [key for key, value in leaves(cfg[group]) if isinstance(value, bool | int | float)]
    assert typed or group in ("active", "paths", "report")
    for key in typed:
        with pytest.raises(ValidationError):
            OmegaConf.update(cfg[group], key, "wrong")
    OmegaConf.resolve(cfg)
    assert not OmegaConf.missing_keys(cfg[group])
    assert isinstance(built(group, cfg), INSTANTIATED.get(group, kinds()[group]))


def leaves(node, prefix=""):
    """Dotted names and values of a configuration, interpolations and lists left out."""
    for key in node:
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if OmegaConf.is_dict(value):
            yield from leaves(value, f"{prefix}{key}.")
        elif not OmegaConf.is_list(value):
            yield f"{prefix}{key}", value


def test_the_recommender_composes_with_the_numbers_of_its_class():
    cfg = compose("recommend")
    assert OmegaConf.missing_keys(cfg) == {"run"}
    assert build(compose("recommend", overrides=["run=given"]), RecommendSettings) == RecommendSettings("given")
    with pytest.raises(HydraException, match="histroy"):
        compose("recommend", overrides=["histroy=[a]"])


def test_sharing_composes_with_the_numbers_of_its_class_and_takes_no_token():
    assert OmegaConf.missing_keys(compose("share")) == {"run", "repo"}
    given = ["run=given", "repo=user/name"]
    assert build(compose("share", overrides=given), ShareSettings) == ShareSettings("given", "user/name")
    with pytest.raises(HydraException, match="token"):
        compose("share", overrides=["token=hf_x"])


def test_main_composes_with_its_defaults():
    cfg = composed()
    OmegaConf.resolve(cfg)
    assert OmegaConf.missing_keys(cfg) == set()
    assert (cfg.seed, cfg.resume, cfg.runs) == (42, None, "latest")
    assert cfg.distill.teacher_outputs == "data/teacher_outputs/toy/ilora-tiny_random"


@pytest.mark.parametrize("override", ["sead=1", "student.training.epoch=3", "teacher.adapter.rank=4"])
def test_unknown_keys_are_refused_at_every_depth(override):
    with pytest.raises(
        (HydraException, OmegaConfBaseException), match=override.strip("+").split("=")[0].rsplit(".", 1)[-1]
    ):
        composed(override)


@pytest.mark.parametrize("override", ["seed=many", "student.training.batch_size=8.5", "metrics.ks=[1,x]", "dataset=no"])
def test_wrong_types_are_refused_at_every_depth(override):
    with pytest.raises((HydraException, OmegaConfBaseException)):
        composed(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.training.batch_size=0", "`batch_size` is 0"),
        ("distill.ranking.beta=0", "beta > 0"),
        ("student.loss.name=bpr", "student.loss.name is 'bpr', expected 'cross_entropy', 'sampled_softmax', 'bce' or"),
        ("student.item_optimizer=sgd", "student.item_optimizer is 'sgd', expected 'adamw' or 'rowwise'"),
        ("llm.pooling=max", "llm.pooling is 'max'"),
        ("llm=minilm llm.path=???", "path"),
        ("teacher.precision=float8", "teacher.precision is 'float8'"),
        ("metrics.select_on=ndcg@7", r"metrics.select_on is 'ndcg@7', expected one of hr@1, ndcg@1"),
        ("metrics.ks=[0]", r"metrics.ks is \[0\], expected cut-offs of at least 1"),
        ("metrics.ks=[]", r"metrics.ks is \[\]"),
    ],
)
def test_values_that_cannot_work_are_refused_when_the_settings_are_built(override, message):
    cfg = composed(*override.split())
    group = re.split(r"[.=]", override)[0]
    with pytest.raises(ConfigError, match=message):
        build(cfg[group], kinds()[group])


# What a file sets on purpose other than the class that it configures.
MEANT = {"dataset": {"k_core", "name", "domain", "category"}}  # the usual 5-core, and which Amazon data


@pytest.mark.parametrize(
    ("group", "name"),
    [
        option
        for option in OPTIONS
        if option[0] not in ("llm", "active", "paths") and stands_on(*option)[0].startswith("base_")
    ],
)
def test_a_file_says_what_its_class_says(group, name):
    """Whoever uses the library without Hydra gets the same numbers."""
    cfg = composed(f"{group}={name}")
    schema = OmegaConf.structured(SCHEMAS[name] if group == "dataset" else OmegaConf.get_type(cfg[group]))
    defaults = dict(leaves(schema))
    differing = {key for key, value in leaves(cfg[group]) if key in defaults and defaults[key] != value}
    differing = {key for key in differing if not key.startswith("training.")}  # tuned for each model
    assert differing <= MEANT.get(group, set())


def test_the_released_program_differs_from_the_paper_in_named_switches_only():
    paper, program = (dict(leaves(composed(f"distill={name}").distill)) for name in ("dllm2rec", "dllm2rec_code"))
    assert paper.keys() == program.keys()
    assert {key: value for key, value in program.items() if paper[key] != value} == {
        "name": "dllm2rec_code",
        "task_loss": "sampled_bce",
        "dros.weight": 0.5,
        "dros.in_ranking": "broadcast",
        "ranking.weight": 0.7,
        "ranking.confidence": "per_candidate",
        "ranking.weight_floor": 1e-8,
        "ranking.renormalise": True,
        "ranking.negative": "one_minus_score",
        "embedding.fusion_sides": "input",
        "embedding.standardise": False,
    }


def test_the_released_ilora_differs_from_the_paper_in_named_switches_only():
    run = "teacher.recommender_run=given"
    paper, program = (dict(leaves(composed(f"teacher={name}", run).teacher)) for name in ("ilora_paper", "ilora_code"))
    assert {key: value for key, value in program.items() if paper[key] != value} == {
        "name": "ilora_code",
        "curriculum": "linear_per_epoch",
        "gate_learning_rate_ratio": 0.3,
        "gate_weight_decay": 1e-5,
        "projector_weight_decay": 1e-5,
        "adapter.scaling": "per_expert",
        "adapter.gate": "conv",
        "title.n_candidates": 20,
        "title.redraw_candidates": True,
        "title.hit_rule": "released",
        "training.learning_rate": 8e-4,
        "training.max_grad_norm": 0.0,
        "training.patience": 10,
    }
    for name in ("ilora_paper", "ilora_code"):
        with pytest.raises(ConfigError, match=r"teacher.gate_input=sequence and teacher.prompts=hybrid need a trained"):
            build(composed(f"teacher={name}").teacher, kinds()["teacher"])


def test_sizes_that_must_agree_are_written_once():
    for name in MODELS:
        assert composed(f"student={name}", "dataset.history_length=7").student.model.max_length == 7
    assert composed("seed=9", "active=random").active.seed == 9


@pytest.mark.parametrize("name", MODELS)
def test_every_student_has_a_file_with_the_numbers_of_its_constructor(name):
    settings = build(composed(f"student={name}").student, kinds()["student"])
    assert settings.name == name
    defaults = {key: value.default for key, value in inspect.signature(MODELS[name]).parameters.items()}
    assert dataclasses.asdict(settings.model) | {"n_items": inspect.Parameter.empty} == defaults


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student=caser", "student.examples=sequences"], "which Caser is not; use `student.examples=windows`"),
        (
            ["student=sasrec", "student.examples=sequences"],
            "needs `student.model.positions=oldest`, but it is .recent.",
        ),
        (["student=gru4rec", "student.examples=rows"], "student.examples is 'rows', expected 'windows' or 'sequences'"),
    ],
)
def test_examples_that_a_student_cannot_read_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(composed(*overrides).student, kinds()["student"])


def test_students_that_read_sequences_are_known():
    for overrides in (["student=gru4rec"], ["student=sasrec", "student.model.positions=oldest"]):
        settings = build(composed(*overrides, "student.examples=sequences").student, kinds()["student"])
        assert settings.examples == "sequences"


def test_caser_takes_the_heights_of_the_released_program():
    settings = build(composed("student=caser", "student.model.heights=[2,3,4]").student, kinds()["student"])
    model = build_model(settings.name, n_items=9, **dataclasses.asdict(settings.model))
    assert [layer.kernel_size for layer in model.horizontal] == [(2,), (3,), (4,)]
    with pytest.raises(HydraException, match="heights"):
        composed("student=caser", "student.model.heights=[two]")


def test_build_names_what_is_missing():
    with pytest.raises(ConfigError, match=r"`dataset\.interactions`, `dataset\.items` must be given: add"):
        build(composed("dataset=csv").dataset, kinds()["dataset"])


def test_registering_again_changes_nothing():
    register()
    register()
    assert "base_config.yaml" in ConfigStore.instance().list("")
    assert composed().metrics.select_on == MetricsConfig().select_on


def command(*arguments, cwd, path, **environment):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_an_installed_package_carries_its_configuration(tmp_path):
    """As pyproject.toml lays the wheel out: conf/ inside the package, and no checkout around it."""
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "llm2rec", site / "llm2rec", ignore=ignored)
    shutil.copytree(CONF, site / "llm2rec" / "conf", ignore=ignored)
    work = tmp_path / "anywhere"
    work.mkdir()
    shown = command("llm2rec.data", "--cfg", "job", "dataset=movielens", cwd=work, path=site)
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["dataset"]["_target_"] == "llm2rec.data.movielens.MovieLens100K"
    assert "result" not in os.listdir(work)  # showing a configuration makes no run

    where = "import llm2rec.core.paths as p; print(p.__file__); print(p.conf_folder())"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [str(site / "llm2rec/core/paths.py"), str(site / "llm2rec/conf")]

    toy = ["dataset.n_users=20", "dataset.n_items=60", "dataset.n_worlds=5"]
    made = command("llm2rec.data", *toy, cwd=work, path=site)
    assert made.returncode == 0, made.stderr
    (run,) = (work / "result").iterdir()
    assert (run / "metrics" / "statistics.json").is_file()
    assert [folder.name.split("-")[0] for folder in (work / "data" / "processed").iterdir()] == ["toy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student.trainig.epochs=3"], "trainig"),
        (["resume=result/never"], "`resume` is 'result/never', which has no run.json"),
        (["metrics.select_on=ndcg@7"], "metrics.select_on is 'ndcg@7'"),
        (["dataset=csv", "dataset.interactions=gone.csv", "dataset.items=gone.csv"], "gone.csv"),
    ],
)
def test_a_command_names_what_is_wrong_and_fails(tmp_path, arguments, message):
    done = command("llm2rec.student", *arguments, cwd=tmp_path, path=REPOSITORY)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr  # Hydra reports the run folder itself, on stdout
    assert "Traceback" not in done.stdout + done.stderr
