"""What a command says of a configuration that cannot be composed, and its ``--help``."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose

import llm2rec
from llm2rec.command_help import TOPICS, describe, descriptions, help_text
from llm2rec.composition import check_added, check_flags, explained, options_of
from llm2rec.config import schemas_of, texts_of_command
from llm2rec.core.errors import ConfigError
from llm2rec.tune.__main__ import split_arguments

pytestmark = pytest.mark.usefixtures("hydra_open")


def composed(name, *arguments):
    with explained(schemas_of(name)):
        return compose(name, overrides=texts_of_command(arguments, name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student.traning.epochs=1"], "there is no option `student.traning.epochs`; did you mean "
         "`student.training.epochs`?"),
        (["datset=toy"], "there is no option `datset`; did you mean `dataset`?"),
        (["student.epochs=1"], "there is no option `student.epochs`; did you mean `student.training.epochs` or "
         "`teacher.training.epochs`?"),
        (["~student.traning"], "there is no option `student.traning`; did you mean `student.training`?"),
        (["xyzzy=1"], "there is no option `xyzzy`; --cfg job shows all options."),
        (["student=sasrek"], "`student=sasrek` does not exist, expected one of caser, gru4rec, sasrec. Did you mean "
         "`student=sasrec`?"),
        (["student.model.hidden_width=8"], "the chosen `student` has no option `student.model.hidden_width`, which is "
         "one of student=gru4rec."),
        (["student.training.epochs=many"], "`student.training.epochs=many`: Value 'many' of type 'str' could not be "
         "converted to Integer."),
        (["metrics.ks=a(b"], "`metrics.ks=a(b` cannot be read: ( is syntax of overrides. Quote the value, and all of "
         "it for the shell: 'metrics.ks=\"a(b\"'."),
        (["runs=[a"], "`runs=[a` is a list without its end; the shell splits at spaces, so quote the whole of it: "
         "'runs=[a, b]'."),
        (["+seed=3"], "`seed` exists already; leave out the `+` before it."),
        (["seed"], "`seed` is not of the form option=value; a value with a space needs quotes: 'option=a b'."),
        (["dataset.name=a,b"], "`dataset.name=a,b` holds a comma, which separates the values of a sweep (--multirun). "
         "Quote a text: 'dataset.name=\"a,b\"'; write a list with brackets: 'dataset.name=[a,b]'."),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_composed_is_explained(arguments, message):
    with pytest.raises(ConfigError) as error:
        composed("config", *arguments)
    assert str(error.value) == message


def test_questions_explain_their_options_too():
    with pytest.raises(ConfigError, match="there is no option `histroy`; did you mean `history`"):
        composed("recommend", "histroy=[a]")


@pytest.mark.parametrize("text", ["a (1)", "a(b", "{a", "it's", "a=b", "x]", "C:\\a(b\\", '5" (a\\"', "a: {b}"])
def test_text_with_syntax_of_hydra_is_taken_as_typed(text):
    assert composed("config", f"llm.name={text}").llm.name == text
    if "\\" not in text:  # which escapes a comma in a list
        assert list(composed("config", f"runs=[{text}]").runs) == [text]


@pytest.mark.parametrize("text", ["choice(a,b)", "a,b", "glob(*)"])
def test_sweeps_over_texts_stay_sweeps(text):
    assert texts_of_command([f"llm.name={text}", "-m"]) == [f"llm.name={text}", "-m"]


def test_the_quotes_that_a_message_names_work():
    with pytest.raises(ConfigError) as error:
        composed("config", "llm.name=a,b")
    (quoted,) = shlex.split(re.search(r"a text: (.*);", str(error.value))[1])
    assert composed("config", quoted).llm.name == "a,b"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--student.training.epochs=3", "did you mean `student.training.epochs=VALUE`?"),
        ("--mask-seen", "did you mean `metrics.mask_seen=VALUE`?"),
        ("--xyzzy", "`--xyzzy` is not a flag of this command; options are written option=value."),
    ],
)
def test_a_flag_that_does_not_exist_names_the_option(argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_flags([argument], schemas_of())
    check_flags(["--multirun", "--cfg=job", "--cfg", "job", "-m", "--multi", "seed=--x"], schemas_of())


def test_added_options_that_nothing_reads_are_refused():
    for key in ("student.trainin", "sed"):
        cfg = compose("config", overrides=[f"+{key}=1"])
        with pytest.raises(ConfigError, match=f"there is no option `{key}`; did you mean"):
            check_added(cfg, [f"+{key}=1"], schemas_of())
    allowed = ["active=custom", "active.policy=a.B", "+active.arguments.power=2", "+hydra.job.name=x"]
    check_added(compose("config", overrides=allowed), allowed, schemas_of())


OF_THEIR_OWN = ("recommend", "share", "tune")  # commands with a configuration of their own


@pytest.mark.parametrize("name", TOPICS)
def test_help_shows_example_and_options_with_their_descriptions(name):
    config = name if name in OF_THEIR_OWN else "config"
    cfg = compose(config, overrides=["dataset=csv", "active=confidence"] if config == "config" else [],
                  return_hydra_config=True)  # fmt: skip
    shown = help_text(cfg, name, "``python -m``: do it.")
    assert shown.startswith("`python -m`: do it.\n\nExample:\n  python -m llm2rec." + name)
    for option in TOPICS[name].options:
        if describe(cfg, option) is not None:
            entry = re.search(rf"^  {re.escape(option)}(=.*?| \(required\))\s{{2,}}\S", shown, re.MULTILINE | re.DOTALL)
            assert entry, option
    assert max(map(len, shown.splitlines())) <= 120
    assert "None" not in shown
    example = shlex.split(TOPICS[name].example)
    composed(config, *(split_arguments(example)[0] if name == "tune" else example))


def test_every_option_of_help_exists_and_every_option_is_described():
    known = {name for named in schemas_of().values() for kind in named.values() for name in options_of(kind)}
    for group, named in schemas_of().items():
        for kind in named.values():
            known |= {f"{group}.{name}" for name in options_of(kind)}
            assert all(descriptions(kind).values())
    for name, topic in TOPICS.items():
        allowed = known | set(options_of(schemas_of(name)[""][name])) if name in OF_THEIR_OWN else known
        assert set(topic.options) <= allowed, name


def test_help_follows_the_chosen_files():
    shown = help_text(
        compose("config", overrides=["llm=minilm", "teacher.adapter.r=8"], return_hydra_config=True), "teacher", "x"
    )
    assert re.search(r"^  teacher\.adapter\.r=8 +Total rank R over all experts", shown, re.MULTILINE)
    assert re.search(r"^  llm\.path=\S+\s+Folder, or id", shown, re.MULTILINE)
    assert "  llm.path" not in help_text(compose("config", return_hydra_config=True), "teacher", "x")


def test_every_command_has_a_topic():
    package = Path(llm2rec.__file__).parent
    commands = {".".join(file.parent.relative_to(package).parts) for file in package.rglob("__main__.py")}
    assert commands == TOPICS.keys()
