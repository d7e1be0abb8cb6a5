"""The names of `import llm2rec`, their documentation, and the example that uses them."""

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import llm2rec
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


def test_a_failed_stage_raises_its_message(tmp_path):
    with pytest.raises(StageError, match=r"(?s)ended with exit code 1; .*n_users"):
        run("data", "dataset=toy", "dataset.n_users=-1", folder=tmp_path, quiet=True)


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
