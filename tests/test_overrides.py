"""Overrides of the command line: texts are taken as typed, and every option given is read."""

import pytest
from hydra import compose
from omegaconf import OmegaConf

from llm2rec import config
from llm2rec.config import texts_of_command
from llm2rec.core.errors import ConfigError
from llm2rec.overrides import check_read, text_options

pytestmark = pytest.mark.usefixtures("hydra_open")


NUMBER_LIKE = ["1_0", "1e3", "1.50", "+5", "true", "007", "0", "-1", "NaN", "inf", "off", "null"]
TITLES = [
    "Alien (1979)",
    "Schindler's List",
    "Am\u00e9lie",
    'The "Burbs"',
    "$9.99",
    "M*A*S*H",
    "50% Off!",
    "[Rec]",
    "a=b",
    "a: b",
]


def composed(name, *arguments):
    return compose(name, overrides=texts_of_command(arguments, name))


@pytest.mark.parametrize("sign", ["", "+"])
def test_ids_and_titles_of_a_history_are_taken_as_typed(sign):
    names = [*NUMBER_LIKE, *TITLES]
    cfg = composed("recommend", "run=r", f"{sign}history=[{','.join(names)}]")
    assert list(cfg.history) == names
    cfg = composed("recommend", "run=r", f"history=[ {' , '.join(names)} ]")
    assert list(cfg.history) == names


def test_hydras_own_syntax_stays_in_lists():
    cfg = composed("recommend", "run=r", "history=[\"a, b\",'1_0',a\\,b,${run}]")
    assert list(cfg.history) == ["a, b", "1_0", "a,b", "r"]
    assert composed("recommend", "run=r", "history=null").history is None
    assert list(composed("recommend", "run=r", "history=[]").history) == []


@pytest.mark.parametrize("text", ["1_0", "1e3", "+5", "1.50", "true"])
def test_every_text_option_is_taken_as_typed(text):
    """Names, folders and columns alike."""
    options = ["dataset.name", "dataset.user_column", "llm.name", "llm.prompt.separator", "student.name", "resume"]
    options += ["distill.teacher_outputs", "paths.result_dir", "ensemble.name", "teacher.name"]
    cfg = composed("config", "dataset=csv", *(f"{option}={text}" for option in options), f"runs=[{text},{text}]")
    assert {option: OmegaConf.select(cfg, option) for option in options} == dict.fromkeys(options, text)
    assert list(cfg.runs) == [text, text]
    assert composed("recommend", f"run={text}", f"revision={text}").revision == text


def test_numbers_stay_numbers_and_null_stays_null():
    arguments = ["seed=1_0", "dataset.k_core=5", "resume=null", "teacher.adapter.target_modules=null", "--multirun"]
    assert texts_of_command(arguments) == arguments
    assert texts_of_command(["dataset.name=1_0,b,true", "runs=[1,a],[b]"]) == [
        'dataset.name="1_0",b,"true"',
        'runs=["1","a"],["b"]',
    ]


def test_a_number_is_short_for_the_share_of_a_member():
    assert composed("config", "ensemble.neighbours=0.5").ensemble.neighbours.share == 0.5
    assert composed("config", "ensemble.titles=null").ensemble.titles.share is None
    assert composed("config", "ensemble.titles={decay: 0.5}").ensemble.titles.decay == 0.5
    assert texts_of_command(["ensemble.students=0,0.2", "--help"]) == [
        "ensemble.students.share=0,0.2",
        "--help",
    ]


# ---- every option given is read --------------------------------------------------------------------------------------

FUSION_UNIT = "distill.embedding.fusion_unit"


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        (["llm.path=folder"], "llm.path"),
        (["llm.trust_remote_code=true"], "llm.trust_remote_code"),
        (["dataset.test_fraction=0.2"], "dataset.test_fraction"),
        (["dataset.ties=item", "dataset.ties_seed=1"], "dataset.ties_seed"),
        (["dataset=csv", "dataset.text_length=9"], "dataset.text_length"),
        (["metrics.candidates_seed=1"], "metrics.candidates_seed"),
        (["active=random", "active.budget=0.5", "active.over_epochs=3"], "active.over_epochs"),
        (["student.loss.dros.beta=2"], "student.loss.dros.beta"),
        (["distill.ranking.temperature=2"], "distill.ranking.temperature"),
        (["distill=listwise", "distill.ranking.beta=2"], "distill.ranking.beta"),
        (["distill.embedding.alignment=mse"], "distill.embedding.alignment"),
        (["distill.dros.in_ranking=per_row"], "distill.dros.in_ranking"),
        (["distill=listwise", "distill.embedding.id_dropout=0.2"], "distill.embedding.id_dropout"),
        (["distill=dllm2rec_code", "distill.embedding.whitening=0.5"], "distill.embedding.whitening"),
        (["distill=reading", "distill.embedding.fusion=frozen", "distill.embedding.fusion_unit=ids"], FUSION_UNIT),
    ],
)
def test_an_option_that_the_chosen_files_do_not_read_is_refused(overrides, option):
    with pytest.raises(ConfigError, match=f"`{option}` is given, but"):
        check_read(composed("config", *overrides), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["llm=minilm", "llm.path=folder"],
        ["dataset.split=global_time", "dataset.test_fraction=0.2"],
        ["dataset=csv", "dataset.text_columns=[note]", "dataset.text_length=9"],
        ["distill=listwise", "distill.ranking.temperature=2"],
        ["distill.embedding.alignment_weight=1", "distill.embedding.alignment=mse"],
        ["distill=listwise", "distill.embedding.fusion_scale=3", "distill.embedding.id_dropout=0.2"],
        ["distill=reading", "distill.embedding.fusion=frozen", "distill.embedding.components=32"],
        ["student=gru4rec", "student.model.dropout=0.1", "seed=1", "teacher.export.top_k=5"],
    ],
)
def test_options_that_are_read_are_accepted(overrides):
    check_read(composed("config", *overrides), overrides)


@pytest.mark.parametrize("deciding", ["distill.ranking.loss=ranknet", "distill=dllm2rec"])
def test_a_sweep_over_the_deciding_option_may_set_what_some_jobs_read(deciding):
    overrides = [deciding, "distill.ranking.temperature=2"]
    cfg = composed("config", *overrides)
    check_read(cfg, overrides, is_sweep=True)
    with pytest.raises(ConfigError, match="nothing reads it while"):
        check_read(cfg, overrides)


def test_ignored_options_exist():
    """A renamed option would otherwise drop out of the check."""
    for group, kinds in config._SCHEMAS.items():
        for kind in kinds.values():
            node = OmegaConf.structured(kind)
            for rule in getattr(kind, "IGNORED", ()):
                for name in (*rule.names, *([rule.option] if rule.option else [])):
                    *parents, last = name.split(".")
                    owner = OmegaConf.select(node, ".".join(parents)) if parents else node
                    assert last in owner, f"{group}.{name}"
    assert text_options({"": [config.Config]})["resume"] is False
