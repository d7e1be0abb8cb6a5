"""Imports point down (DESIGN section 2), nothing is unpickled, and importing the package costs nothing."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "llm2rec"
FILES = sorted(PACKAGE.rglob("*.py"))

BELOW = {
    "core": set(),
    "data": {"core"},
    "ilora": set(),
    "student": {"core", "data"},
    "teacher": {"core", "data", "ilora", "student"},
    "distill": {"core", "data", "student"},
    "ensemble": {"core", "data", "student", "teacher"},
    "evaluate": {"core", "data", "ilora", "student", "teacher", "ensemble", "distill"},
    "plan": {"core", "data", "ilora", "student", "teacher"},
    "recommend": {"core", "data", "ilora", "student", "teacher", "distill"},
    "share": {"core", "student", "recommend"},
}
TOP = {"config", "stage", "telling"}  # above all rooms; only the stages' `__main__` may import them
CONFIGURED = {"hydra", "omegaconf"}
PICKLING = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {
    "pd.read_pickle", "pandas.read_pickle", "eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load",
    "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
}  # fmt: skip
OPTIONAL = {"deepspeed", "bitsandbytes", "faiss", "onnx", "onnxruntime", "onnxscript"}


def is_stage(file):
    return file.name == "__main__.py"


def room_of(file):
    """The room of a file; None for the modules that lie above all rooms."""
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def imported(file):
    """Full names of all modules a file imports, anywhere in it, with what it takes from them."""
    package = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}"


def named(file):
    return str(file.relative_to(REPOSITORY))


@pytest.mark.parametrize("file", FILES, ids=named)
class TestEveryFile:
    def test_imports_point_down(self, file):
        room = room_of(file)
        ours = {name.split(".")[1] for name in imported(file) if name.startswith("llm2rec.")}
        if room is not None:
            allowed = BELOW[room] | {room} | (TOP if is_stage(file) else set())
            assert ours <= allowed
        elif file.name == "config.py":
            assert "stage" not in ours

    def test_nothing_comes_from_local_clones(self, file):
        assert "ref_repositories" not in file.read_text(encoding="utf-8")

    def test_only_stages_know_that_a_configuration_exists(self, file):
        if not is_stage(file) and file.stem not in TOP:
            assert not {name.split(".")[0] for name in imported(file)} & CONFIGURED

    def test_nothing_is_unpickled(self, file):
        assert not {name for name in imported(file) if name.split(".")[0] in PICKLING}
        # Under another name the calls below would not be seen.
        assert not {*imported(file)} & {
            f"{module}.load" for module in ("torch", "numpy", "yaml", "torch.jit", "torch.hub")
        }
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            called = ast.unparse(node.func)
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"line {node.lineno}"
            if called in {"np.load", "numpy.load"}:
                assert keywords.get("allow_pickle") == "False", f"line {node.lineno}"
            assert called not in UNSAFE, f"line {node.lineno}"
            assert "allow_pickle" not in keywords or keywords["allow_pickle"] == "False", f"line {node.lineno}"

    def test_code_of_models_runs_only_when_asked_for_by_name(self, file):
        """Every reader of a language model is told what ``llm.trust_remote_code`` says."""
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            said = {}
            if isinstance(node, ast.Call):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if re.fullmatch(r"(Auto\w+|kind)\.from_pretrained", ast.unparse(node.func)):
                    assert "trust_remote_code" in said, f"line {node.lineno}"
            elif isinstance(node, ast.Dict):
                said = {
                    key.value: ast.unparse(v)
                    for key, v in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant)
                }
            trusted = said.get("trust_remote_code", "False")
            assert trusted == "False" or trusted.endswith(".trust_remote_code"), f"line {node.lineno}"

    def test_archives_are_never_unpacked(self, file):
        """Members are read by name, so that none can be written outside of a folder."""
        assert not {name for name in imported(file) if name.split(".")[0] == "tarfile"}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in {"extract", "extractall", "unpack_archive"}, f"line {node.lineno}"

    def test_heavy_optional_libraries_are_imported_where_they_are_used(self, file):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        of_module = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if id(node) in of_module and isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {name.split(".")[0] for name in names} & OPTIONAL, f"line {node.lineno}"


def test_every_room_has_its_rule_and_says_what_it_is():
    packages = [file for file in FILES if file.name == "__init__.py"]
    assert {room_of(file) for file in packages} - {None} <= BELOW.keys()
    for file in packages:
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_the_rules_see_what_they_forbid(tmp_path, monkeypatch):
    """The reader of imports finds every way to write one."""
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    file = tmp_path / "llm2rec" / "student" / "models.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a.b as c\nfrom llm2rec import teacher\nfrom ..distill.x import y\nfrom . import z\n"
        "def f():\n    import hydra\n    from pickle import loads\n"
    )
    assert set(imported(file)) == {
        "a.b",
        "llm2rec.teacher",
        "llm2rec.distill.x.y",
        "llm2rec.student.z",
        "hydra",
        "pickle.loads",
    }


def test_no_file_of_the_configuration_trusts_code():
    for file in (REPOSITORY / "conf").rglob("*.yaml"):
        assert not re.search(r"trust_remote_code: *true", file.read_text(encoding="utf-8"), re.IGNORECASE), file.name


LOADED = "import sys, json; import {}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("llm2rec", {"torch", "numpy", "pandas", "datasets", "transformers", "peft", "accelerate", "hydra"}),
        ("llm2rec.core.errors", {"torch", "numpy", "datasets", "accelerate"}),
        ("llm2rec.student.settings", {"torch", "datasets", "accelerate"}),
        ("llm2rec.student.__main__", {"transformers", "peft"}),
        ("llm2rec.ensemble.__main__", {"transformers", "peft"}),
        ("llm2rec.distill.__main__", {"transformers", "peft"}),
        ("llm2rec.evaluate.__main__", {"transformers", "peft"}),
        ("llm2rec.recommend.__main__", {"transformers", "peft"}),
    ],
)
def test_importing_brings_in_nothing_it_does_not_need(module, absent):
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(module)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not set(json.loads(done.stdout)) & (absent | {"deepspeed", "bitsandbytes"})


def test_ilora_could_be_used_by_anyone():
    """No room of ours, no Hydra, no files (DESIGN section 2)."""
    for file in (PACKAGE / "ilora").glob("*.py"):
        names = set(imported(file))
        assert not {name for name in names if name.startswith("llm2rec.") and not name.startswith("llm2rec.ilora")}
        assert not {name.split(".")[0] for name in names} & {"hydra", "omegaconf", "accelerate", "pathlib", "datasets"}
        assert not re.search(r"recommend|movie|catalogue", file.read_text(encoding="utf-8"), re.IGNORECASE), file.name
