"""The README's programs run as they stand, on a tiny model in the place of the one that the first names.

Its Japanese twin says the same: the same commands, numbers, names and links.
"""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llm2rec.teacher.llm import make_tiny_random
from llm2rec.teacher.settings import TinyRandomSettings

README = Path(__file__).parents[1] / "README.md"
TWIN = README.with_name("README.ja.md")
BLOCK = re.compile(r"^```\w*\n(?:.*\n)*?```\n|^(?:    .*\n)+", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*|\.\d+")


def programs():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_of_ilora_runs(tmp_path, monkeypatch, capsys):
    [program] = [program for program in programs() if "ILoraConfig" in program]
    assert len(program.splitlines()) <= 45
    folder = make_tiny_random(TinyRandomSettings(name="tiny"), tmp_path, ["Good morning", "hey", "Dear Sir or Madam"])
    program, replaced = re.subn(r'^name = ".*"$', f"name = {str(folder)!r}", program, flags=re.MULTILINE)
    assert replaced == 1
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(program, str(README), "exec"), names)

    printed = capsys.readouterr().out
    assert "trainable params" in printed
    assert "gate_entropy" in printed
    batch, gates = names["batch"], names["gates"]
    with torch.no_grad(), names["model"].disable_adapter():
        untrained = names["model"](**batch, labels=names["labels"]).loss
    assert names["loss"] < untrained - 0.2
    # What it leaves behind is what it says.
    with torch.no_grad(), names["tuner"].hold(gates[:1].expand(4, -1)):
        expected = names["model"](**batch).logits
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.lm_head = names["base"].lm_head  # the tiny model is saved without one
    folded = PeftModel.from_pretrained(base, tmp_path / "speaker_0").eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_the_example_of_a_student_runs(tmp_path, monkeypatch, capsys):
    [program] = [program for program in programs() if "llm2rec.run" in program]
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(README), "exec"), names := {})
    assert names["run"].parent == tmp_path / "result"
    told = capsys.readouterr().out
    assert told.count("Recommendation(") == 5


def blocks_of(text):
    """Programs, commands and pictures, without their comments."""
    return [re.sub(r"(?:^|\s+)#.*$", "", block, flags=re.MULTILINE) for block in BLOCK.findall(text)]


def prose_of(text):
    return BLOCK.sub("", text)


def links_of(text):
    return Counter(re.findall(r"\]\(([^)]+)\)", prose_of(text)))


class TestTwin:
    """What both say is the same; only the words differ."""

    @pytest.fixture
    def both(self):
        return README.read_text(encoding="utf-8"), TWIN.read_text(encoding="utf-8")

    def test_commands_and_programs(self, both):
        english, japanese = map(blocks_of, both)
        assert len(english) > 5
        assert japanese == english

    def test_numbers(self, both):
        english, japanese = (Counter(NUMBER.findall(prose_of(text))) for text in both)
        assert (english - japanese, japanese - english) == (Counter(), Counter())

    def test_tables_row_by_row(self, both):
        english, japanese = (
            [(row.count("|"), NUMBER.findall(row)) for row in re.findall(r"^\|.*$", text, re.MULTILINE)]
            for text in both
        )
        assert japanese == english

    def test_sections_and_names_in_code(self, both):
        english, japanese = (re.findall(r"^(#+) ", prose_of(text), re.MULTILINE) for text in both)
        assert japanese == english
        english, japanese = (set(re.findall(r"`[^`\n]+`", prose_of(text))) for text in both)
        assert japanese == english

    def test_links_and_each_other(self, both):
        english, japanese = map(links_of, both)
        assert english - japanese == Counter([TWIN.name])
        assert japanese - english == Counter([README.name])
        assert all("README" in "".join(text.splitlines()[:5]) for text in both)

    def test_linked_files_are_there(self, both):
        targets = {target for text in both for target in links_of(text) if "://" not in target}
        assert [target for target in sorted(targets) if not (README.parent / target).is_file()] == []
