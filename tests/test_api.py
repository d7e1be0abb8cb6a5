"""The names of `import llm2rec`, their documentation, and the example that uses them."""

import ast
import dataclasses
import inspect
import logging
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import llm2rec
from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.logging import Progress
from llm2rec.launch import StageError, run

ROOT = Path(__file__).resolve().parents[1]
TINY = ["dataset=toy", "dataset.n_users=30", "dataset.n_items=48", "dataset.n_worlds=4", "logging.tensorboard=false"]


def test_every_name_is_importable_documented_and_listed():
    for name in llm2rec.__all__:
        assert getattr(llm2rec, name).__doc__, name
        assert name in dir(llm2rec)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm2rec.nothing


def load_builder():
    """The script that writes the API page, as a module."""
    spec = spec_from_file_location("build_api_page", ROOT / "cmd" / "build_api_page.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILDER = load_builder()


def documented_callables():
    """Callables of the API page: (name, callable, its docstring and those of its bases)."""
    for name in llm2rec.__all__:
        thing = getattr(llm2rec, name)
        kinds = thing.__mro__ if inspect.isclass(thing) else [thing]
        text = "\n".join(each.__doc__ or "" for each in kinds if each.__module__.startswith("llm2rec."))
        yield name, thing, text
        if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
            for method_name, method in BUILDER.public_methods(thing):
                yield f"{name}.{method_name}", method, method.__doc__ or ""


CALLABLES = list(documented_callables())


def test_the_api_page_is_up_to_date():
    written = BUILDER.PAGE.read_text(encoding="utf-8")
    assert written == BUILDER.page(), "run `.venv/bin/python cmd/build_api_page.py`"
    assert all(f"## `llm2rec.{name}`" in written for name in llm2rec.__all__)


@pytest.mark.parametrize(("name", "thing", "text"), CALLABLES, ids=[name for name, _, _ in CALLABLES])
def test_docstrings_document_arguments_results_and_errors(name, thing, text):
    assert text.strip()
    if isinstance(thing, property):
        return
    signature = inspect.signature(thing)
    inherited = {
        field
        for base in (thing.__mro__ if inspect.isclass(thing) else ())
        if not base.__module__.startswith("llm2rec.")
        for field in getattr(base, "__dataclass_fields__", {})
    }
    parameters = {each for each in signature.parameters if not each.startswith("_")} - inherited - {"self"}
    assert [each for each in parameters if not re.search(rf"^ +{each}: \S", text, re.MULTILINE)] == []
    if not inspect.isclass(thing) and signature.return_annotation not in (None, "None"):
        assert "Returns:\n" in text
    if inspect.isfunction(thing) or inspect.ismethod(thing):
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        raised = {
            node.exc.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        }
        assert [error for error in raised if f"    {error}: " not in text.split("Raises:")[-1]] == []


def test_run_returns_the_folder_of_the_run(tmp_path, capfd):
    folder = run("data", *TINY, folder=tmp_path)
    assert folder.parent == tmp_path / "result"
    assert (folder / "run.json").is_file()
    assert f", see result/{folder.name}" in capfd.readouterr().out
    assert run("data", *TINY, f"resume={folder}", folder=tmp_path, quiet=True) == folder
    assert run("data", *TINY, "reuse=true", "hydra/job_logging=disabled", folder=tmp_path, quiet=True) == folder
    assert capfd.readouterr().out == ""


@pytest.fixture
def no_new_process(monkeypatch):
    class NoPython(subprocess.Popen):
        def __init__(self, command, *arguments, **options):
            assert command[0] != sys.executable  # git is fine
            super().__init__(command, *arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", NoPython)


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("dataset.n_users=-1", ConfigError, "n_users"),
        ("seed=-1", ConfigError, "`seed` is -1"),
        ("dataset.n_user=1", ConfigError, "did you mean `dataset.n_users`"),
        ("resume=nothing", CheckpointError, "`resume` is 'nothing'"),
        ("--help", StageError, "without a run"),
    ],
)
def test_a_failed_stage_raises_its_own_error(tmp_path, no_new_process, override, kind, message):
    with pytest.raises(kind, match=message):
        run("data", "dataset=toy", override, folder=tmp_path, quiet=True)


def test_a_sweep_and_a_call_from_a_thread_have_a_process_of_their_own(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        folder = pool.submit(run, "data", *TINY, folder=tmp_path, quiet=True).result()
    assert (folder / "run.json").is_file()
    with pytest.raises(StageError, match=r"(?s)ended with exit code 1; .*n_users"):
        run("data", "--multirun", *TINY, "dataset.n_users=-1,-2", folder=tmp_path, quiet=True)


def state():
    """What a caller would notice if a stage left it changed."""
    root = logging.getLogger()
    loggers = ("llm2rec", "httpx", "datasets", "matplotlib")
    return {
        "folder": os.getcwd(),
        "arguments": list(sys.argv),
        "environment": dict(os.environ),
        "logging": [root.level, *root.handlers, *(logging.getLogger(name).level for name in loggers)],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "hydra": (GlobalHydra.instance().hydra, HydraConfig.initialized(), sorted(ConfigStore.instance().repo)),
        "resolver": OmegaConf.has_resolver("run_folder"),
        "warnings": warnings.filters[:],
        "torch": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "threads": torch.get_num_threads(),
        "accelerate": [dict(kind._shared_state) for kind in (PartialState, AcceleratorState)],
        "bars": (Progress.enabled, datasets.are_progress_bars_disabled()),
        "streams": (sys.stdout, sys.stderr),
        "numbers": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    }


def test_a_stage_in_this_process_gives_the_same_result_and_leaves_no_trace(tmp_path, no_new_process, monkeypatch):
    student = [*TINY, "student.training.epochs=2", "student.training.batch_size=16"]
    for name in ("here", "apart", "given"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "given")
    GlobalHydra.instance().clear()
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_default_dtype(torch.float64)
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test of this process may have one
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        with torch.no_grad(), initialize_config_dir(str(tmp_path), version_base="1.3"):
            before = state()
            here = run("student", *student, folder="../here", quiet=True)
            for name, value in state().items():
                assert value == before[name], name
        assert accelerator.mixed_precision == "bf16"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    command = [sys.executable, "-m", "llm2rec.student", *student]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, cwd=tmp_path / "apart", env=environment, check=True, capture_output=True)
    (apart,) = (tmp_path / "apart" / "result").iterdir()
    for name in ("student/model.safetensors", "metrics/validation.json"):
        assert (here / name).read_bytes() == (apart / name).read_bytes(), name
    assert {file.relative_to(here) for file in here.rglob("*") if "events" not in file.name} == {
        file.relative_to(apart) for file in apart.rglob("*") if "events" not in file.name
    }


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / "notebook.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.count("teacher  ") == printed.count("student  ") == 3
    assert "SASRec, " in printed
    assert "sasrec + dllm2rec" in printed
