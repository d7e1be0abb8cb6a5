"""Rules that every file of the package keeps: what it may import, what it never calls, which words it avoids.

Each rule is one test over all files, which are parsed once; its failure lists `file:line` of every place.
"""

import ast
import functools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "llm2rec"

BELOW = {
    "core": set(),
    "data": {"core"},
    "ilora": set(),
    "student": {"core", "data"},
    "teacher": {"core", "data", "ilora", "student"},
    "distill": {"core", "data", "student"},
    "ensemble": {"core", "data", "student", "teacher", "distill"},
    "evaluate": {"core", "data", "ilora", "student", "teacher", "ensemble", "distill"},
    "plan": {"core", "data", "ilora", "student", "teacher"},
    "recommend": {"core", "data", "ilora", "student", "teacher", "distill"},
    "share": {"core", "student", "recommend"},
    "tune": {"core", "launch", "overrides", "search_space"},
}
# Above all packages; only the stages' `__main__` may import them.
TOP = {
    "cards",
    "command",
    "command_help",
    "composition",
    "config",
    "overrides",
    "process_state",
    "reporting",
    "search_space",
    "stage",
}
CONFIGURED = {"hydra", "omegaconf"}
PICKLING = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Under another name these calls are not recognised.
LOADERS = {f"{module}.load" for module in ("torch", "numpy", "yaml", "torch.jit", "torch.hub")}
UNSAFE = {
    "pd.read_pickle", "pandas.read_pickle", "eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load",
    "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
}  # fmt: skip
OPTIONAL = {"deepspeed", "bitsandbytes", "faiss", "onnx", "onnxruntime", "onnxscript"}
SUFFIXES = {".py", ".yaml", ".md", ".sh"}
WORDS = re.compile(
    r"(?<![a-z])(told|tells?|telling|resting|undivided|rehears(?:ed|es|al|ing)|spikewatch|own[ _]loss)(?![a-z])", re.I
)
# How many of these words are left, by folder: recorded output in docs/day.md, and Optuna's `Study.tell`. Numbers never
# go up.
WORDS_LEFT: dict[str, int] = {"docs": 2, "llm2rec/tune": 3}


@dataclass(frozen=True)
class Source:
    """A parsed file: what it imports as (line, full name), and its nodes."""

    file: Path
    text: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]
    imports: tuple[tuple[int, str], ...]

    @property
    def package(self):
        """The subpackage of the file; None for the modules directly in `llm2rec`."""
        parts = self.file.relative_to(PACKAGE).parts
        return parts[0] if len(parts) > 1 else None

    @property
    def is_stage(self):
        return self.file.name == "__main__.py"

    def calls(self):
        """Each call with its function and its keywords as text."""
        for node in self.nodes:
            if isinstance(node, ast.Call):
                yield node, ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}

    def at(self, line, what):
        return f"{self.file.relative_to(REPOSITORY)}:{line} {what}"


def parse(file, root=REPOSITORY):
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    nodes = tuple(ast.walk(tree))
    package = file.relative_to(root).with_suffix("").parts[:-1]
    return Source(file, text, tree, nodes, tuple(imported(nodes, package)))


def imported(nodes, package):
    """Full names of all that is imported, anywhere in a file, with its line."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@functools.cache
def sources():
    return [parse(file) for file in sorted(PACKAGE.rglob("*.py"))]


def fail_if_any(places):
    places = list(places)
    assert not places, "\n" + "\n".join(places)


def test_imports_point_down():
    def wrong():
        for source in sources():
            allowed = None
            if source.package is not None:
                allowed = BELOW[source.package] | {source.package} | (TOP if source.is_stage else set())
            for line, name in source.imports:
                if name.startswith("llm2rec."):
                    ours = name.split(".")[1]
                    if (allowed is not None and ours not in allowed) or (source.file.name, ours) == (
                        "config.py",
                        "stage",
                    ):
                        yield source.at(line, name)

    fail_if_any(wrong())


def test_only_stages_know_that_a_configuration_exists():
    fail_if_any(
        source.at(line, name)
        for source in sources()
        if not source.is_stage and source.file.stem not in TOP
        for line, name in source.imports
        if name.split(".")[0] in CONFIGURED
    )


def test_ilora_depends_on_nothing_of_ours():
    """No other subpackage, no Hydra, no files (DESIGN section 2), no word of recommendation."""
    foreign = {"hydra", "omegaconf", "accelerate", "pathlib", "datasets"}
    ilora = [source for source in sources() if source.package == "ilora"]
    assert ilora
    fail_if_any(
        source.at(line, name)
        for source in ilora
        for line, name in source.imports
        if name.split(".")[0] in foreign or (name.startswith("llm2rec.") and not name.startswith("llm2rec.ilora"))
    )
    fail_if_any(
        source.at(line, text)
        for source in ilora
        for line, text in enumerate(source.text.splitlines(), start=1)
        if re.search(r"recommend|movie|catalogue", text, re.IGNORECASE)
    )


def test_nothing_is_unpickled():
    def wrong():
        for source in sources():
            for line, name in source.imports:
                if name.split(".")[0] in PICKLING or name in LOADERS:
                    yield source.at(line, name)
            for node, called, keywords in source.calls():
                if (
                    called in UNSAFE
                    or (called == "torch.load" and keywords.get("weights_only") != "True")
                    or (called in {"np.load", "numpy.load"} and keywords.get("allow_pickle") != "False")
                    or keywords.get("allow_pickle", "False") != "False"
                ):
                    yield source.at(node.lineno, called)

    fail_if_any(wrong())


def test_archives_are_never_unpacked():
    """Members are read by name, so that none can be written outside of a folder."""

    def wrong():
        for source in sources():
            yield from (source.at(line, name) for line, name in source.imports if name.split(".")[0] == "tarfile")
            for node, called, _ in source.calls():
                if called.split(".")[-1] in {"extract", "extractall", "unpack_archive"} and "." in called:
                    yield source.at(node.lineno, called)

    fail_if_any(wrong())


def test_code_of_models_runs_only_on_request():
    """Whoever loads a language model passes ``llm.trust_remote_code`` on, and no configuration sets it."""

    def wrong():
        for source in sources():
            for node, called, keywords in source.calls():
                loads = re.fullmatch(r"(Auto\w+|kind)\.from_pretrained", called)
                if not trusted(keywords.get("trust_remote_code", "absent" if loads else "False")):
                    yield source.at(node.lineno, called)
            for node in source.nodes:
                if isinstance(node, ast.Dict):
                    for key, value in zip(node.keys, node.values, strict=True):
                        named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                        if named and not trusted(ast.unparse(value)):
                            yield source.at(node.lineno, ast.unparse(node))
        for file in (REPOSITORY / "conf").rglob("*.yaml"):
            if re.search(r"trust_remote_code: *true", file.read_text(encoding="utf-8"), re.IGNORECASE):
                yield str(file)

    def trusted(value):
        return value == "False" or value.endswith(".trust_remote_code")

    fail_if_any(wrong())


def test_heavy_optional_libraries_are_imported_where_they_are_used():
    top_level = (
        (source, node.lineno, name)
        for source in sources()
        for node in source.tree.body
        for _, name in imported([node], ("llm2rec",))
    )
    fail_if_any(source.at(line, name) for source, line, name in top_level if name.split(".")[0] in OPTIONAL)


def test_nothing_comes_from_local_clones():
    fail_if_any(source.at(1, "ref_repositories") for source in sources() if "ref_repositories" in source.text)


def test_every_package_has_its_rule_and_a_docstring():
    packages = [source for source in sources() if source.file.name == "__init__.py"]
    assert {source.package for source in packages} - {None} <= BELOW.keys()
    fail_if_any(source.at(1, "no docstring") for source in packages if not ast.get_docstring(source.tree))


def old_words():
    """Each old word in the package, the configuration, README and docs, as (folder, `file:line word`)."""
    roots = ("llm2rec", "conf", "docs", "cmd", "examples", "README.md", "README.ja.md", "CONTRIBUTING.md")
    for root in roots:
        path = REPOSITORY / root
        for file in sorted(path.rglob("*") if path.is_dir() else [path]):
            if file.suffix in SUFFIXES and file.is_file():
                parts = file.relative_to(REPOSITORY).parts
                folder = "/".join(parts[:2]) if parts[0] == "llm2rec" and len(parts) > 2 else parts[0]
                for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                    for word in WORDS.findall(text):
                        yield folder, f"{file.relative_to(REPOSITORY)}:{line} {word}"


def test_old_words_do_not_come_back():
    found = {}
    for folder, place in old_words():
        found.setdefault(folder, []).append(place)
    fail_if_any(
        place
        for folder, places in found.items()
        if len(places) > WORDS_LEFT.get(folder, 0)
        for place in [f"{folder}: {len(places)}, at most {WORDS_LEFT.get(folder, 0)} allowed", *places]
    )


def test_the_reader_of_imports_finds_every_way_to_write_one(tmp_path):
    file = tmp_path / "llm2rec" / "student" / "models.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a.b as c\nfrom llm2rec import teacher\nfrom ..distill.x import y\nfrom . import z\n"
        "def f():\n    import hydra\n    from pickle import loads\n"
    )
    assert {name for _, name in parse(file, tmp_path).imports} == {
        "a.b",
        "llm2rec.teacher",
        "llm2rec.distill.x.y",
        "llm2rec.student.z",
        "hydra",
        "pickle.loads",
    }


LOADED = "import sys, json; import {}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("llm2rec", {"torch", "numpy", "pandas", "datasets", "transformers", "peft", "accelerate", "hydra"}),
        ("llm2rec.core.errors", {"torch", "numpy", "datasets", "accelerate"}),
        ("llm2rec.student.settings", {"torch", "datasets", "accelerate"}),
        (
            ", ".join(
                f"llm2rec.{stage}.__main__" for stage in ("student", "ensemble", "distill", "evaluate", "recommend")
            ),
            {"transformers", "peft"},
        ),
    ],
)
def test_importing_brings_in_nothing_it_does_not_need(module, absent):
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(module)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not set(json.loads(done.stdout)) & (absent | {"deepspeed", "bitsandbytes"})
