"""The programs of README.md and docs/ilora.md run as they stand, on a tiny model instead of the one they name.

README.ja.md shows the same commands, programs and pages; links of all pages lead somewhere.
"""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llm2rec.teacher.llm import make_tiny_random
from llm2rec.teacher.settings import TinyRandomSettings

ROOT = Path(__file__).parents[1]
README, JAPANESE, ILORA = ROOT / "README.md", ROOT / "README.ja.md", ROOT / "docs" / "ilora.md"
PAGES = [README, JAPANESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```\w*\n(?:.*\n)*?```\n|^(?:    .*\n)+", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def program_with(name, page):
    """The only Python program of a page that mentions a name."""
    programs = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    [program] = [program for program in programs if name in program]
    return program


@pytest.fixture
def run_with_tiny_model(tmp_path, monkeypatch):
    """Run a program that names a language model in its line ``name = ...``, and return its variables."""
    folder = make_tiny_random(TinyRandomSettings(name="tiny"), tmp_path, ["Good morning", "hey", "Dear Sir or Madam"])
    monkeypatch.chdir(tmp_path)

    def run(page):
        program, replaced = re.subn(
            r'^name = ".*"$', f"name = {str(folder)!r}", program_with("ILoraConfig", page), flags=re.MULTILINE
        )
        assert replaced == 1
        torch.manual_seed(0)
        names = {"folder": folder}
        exec(compile(program, str(page), "exec"), names)
        return names

    return run


def test_the_readme_is_short():
    assert all(len(page.read_text(encoding="utf-8").splitlines()) <= 150 for page in (README, JAPANESE))


def test_the_ilora_example_of_the_readme_runs(run_with_tiny_model):
    names = run_with_tiny_model(README)
    assert names["gates"].shape == (1, 4)
    trained = [weight for weight in names["model"].parameters() if weight.requires_grad]
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in trained)


def test_the_whole_ilora_example_runs(tmp_path, run_with_tiny_model, capsys):
    names = run_with_tiny_model(ILORA)

    printed = capsys.readouterr().out
    assert "trainable params" in printed
    assert "gate_entropy" in printed
    batch, gates = names["batch"], names["gates"]
    with torch.no_grad(), names["model"].disable_adapter():
        untrained = names["model"](**batch, labels=names["labels"]).loss
    assert names["loss"] < untrained - 0.2
    # The folded adapter predicts what the gates of its speaker predict.
    with torch.no_grad(), names["tuner"].hold(gates[:1].expand(4, -1)):
        expected = names["model"](**batch).logits
    base = AutoModelForCausalLM.from_pretrained(names["folder"])
    base.lm_head = names["base"].lm_head  # the tiny model is saved without one
    folded = PeftModel.from_pretrained(base, tmp_path / "speaker_0").eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_the_student_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(program_with("llm2rec.run", README), str(README), "exec"), names := {})
    assert names["run"].parent == tmp_path / "result"
    assert capsys.readouterr().out.count("Recommendation(") == 5


def blocks_of(page):
    """Programs, commands and diagrams, without their comments."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [re.sub(r"(?:^|\s+)#.*$", "", block, flags=re.MULTILINE) for block in blocks]


def links_of(page):
    return set(LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))))


def test_both_readmes_show_the_same_commands_and_link_the_same_pages():
    assert len(blocks_of(README)) > 5
    assert blocks_of(JAPANESE) == blocks_of(README)
    assert links_of(README) - links_of(JAPANESE) == {JAPANESE.name}
    assert links_of(JAPANESE) - links_of(README) == {README.name}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links_of(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_every_page_is_linked_from_the_readme():
    pages = {f"docs/{page.name}" for page in PAGES if page.parent == ROOT / "docs"}
    assert pages <= links_of(README)
