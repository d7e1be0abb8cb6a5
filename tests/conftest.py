"""No network, no tokenizer threads, one torch thread per worker; and `--json` for the bad inputs and the kills."""

import collections
import json
import logging
import os
import shlex
from pathlib import Path

import pytest

# Before any test imports a Hugging Face library, which reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers that each take all cores are slower than one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def hydra_open():
    """Hydra with our schemas and configuration, for tests that compose."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from llm2rec.config import register
    from llm2rec.core.paths import conf_folder

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


def pytest_addoption(parser):
    parser.addoption("--json", type=Path, help="write the bad inputs or kills that were tried to this file")
    parser.addoption("--kills", type=int, default=1, help="kills of each part in test_chaos.py (default: 1)")


# Tests that train, run a stage, start a process or try many models, by the start of their path.
INTEGRATION = (
    "benchmarks/test_distillation_study.py",
    "core/test_stepper.py",
    "data/test_agreement.py",
    "data/test_larger_than_memory.py",
    "data/test_prepare.py",
    "distill/test_selection_policies.py",
    "distill/test_train_distilled.py",
    "evaluate/test_report.py",
    "evaluate/test_title_teachers.py",
    "ilora/test_ilora_compile.py",
    "ilora/test_ilora_fold.py",
    "ilora/test_ilora_generation.py",
    "ilora/test_ilora_matrix.py",
    "ilora/test_ilora_registration.py",
    "integration/",
    "plan/test_plan_measure.py",
    "plan/test_plan_stage.py",
    "recommend/test_export.py",
    "recommend/test_teacher_answers.py",
    "scripts/",
    "student/test_task_loss.py",
    "student/test_segments.py",
    "student/test_student_stage.py",
    "student/test_train_baseline.py",
    "teacher/test_hybrid_teacher.py",
    "teacher/test_teacher_gate",
    "teacher/test_teacher_heads.py",
    "teacher/test_teacher_training.py",
    "teacher/test_teacher_tunings.py",
    "teacher/test_title_model.py",
    "teacher/test_title_objective.py",
    "tune/",
    "test_api.py",
    "test_extending.py",
)


@pytest.fixture
def progress_lines(monkeypatch, caplog):
    """Call it for the last line of each phase that shows progress, by the phase: ``10 of 10 rows, ...``."""
    monkeypatch.setattr("llm2rec.core.logging._SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO, "llm2rec.core.logging")
    return lambda: dict(each.message.split(": ", 1) for each in caplog.records if each.message.endswith(" left"))


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items):
    """Mark tests of the files above as `integration`, and as `unit` all that are not integration, slow or gpu."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(INTEGRATION):
            item.add_marker("integration")
        if not any(item.get_closest_marker(name) for name in ("integration", "slow", "gpu")):
            item.add_marker("unit")


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("--kills")))


def pytest_configure(config):
    if config.getoption("--json") and not hasattr(config, "workerinput"):  # workers send their reports
        config.pluginmanager.register(ResultWriter(config))


class ResultWriter:
    """Collects what tests record as `bad_input` or `kill`, and writes it in the form of the benchmarks' files."""

    def __init__(self, config):
        self.config = config
        self.samples = {"bad_input": [], "kill": []}

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            for name, value in report.user_properties:
                if name in self.samples:
                    self.samples[name].append(value)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(json.dumps(self.headline()))

    def headline(self):
        """What others read of the file."""
        inputs, kills = self.samples["bad_input"], self.samples["kill"]
        headline = {}
        if inputs:
            unclear = sum(each["why_unclear"] is not None for each in inputs)
            headline |= {"tried": len(inputs), "unclear": unclear}
        if kills:
            headline |= {"kills": len(kills)}
            headline |= {key: sum(bool(each[key]) for each in kills) for key in ("lost", "unequal")}
            parts = collections.Counter(each["part"] for each in kills)
            headline |= {f"kills_{part}": count for part, count in parts.items()}
        return headline

    def pytest_sessionfinish(self):
        from llm2rec.core.git_info import git_state, library_versions

        file = self.config.getoption("--json")
        arguments = [each for each in self.config.invocation_params.args if each != str(file)]
        result = {
            "headline": self.headline(),
            "samples": [*self.samples["bad_input"], *self.samples["kill"]],
            "command": shlex.join(["python", "-m", "pytest", *map(str, arguments), file.name]),
            "commit": git_state(),
            "environment": {**library_versions(), "device": "cpu", "cpus": os.cpu_count()},
        }
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
