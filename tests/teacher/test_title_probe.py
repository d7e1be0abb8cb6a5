"""The numeric probe decides which language models can score titles side by side."""

import pytest
import torch
from architecture_helpers import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.title.probe import check_side_by_side

TOKENS = range(3, 60)


def model_of(case, **options):
    kind, sizes = ARCHITECTURES[case]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=80, **{**sizes, **options})).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "falcon"])
def test_models_that_go_by_positions_and_mask_pass(case, dtype):
    check_side_by_side(model_of(case).to(dtype), TOKENS, max_tokens=300, longest_row=5000)


def test_a_window_by_row_index_passes_only_where_no_row_reaches_beyond_it():
    """GPT-Neo's local layers mask by row index, whatever the mask and the positions say."""
    model = model_of("gpt_neo, short window")
    check_side_by_side(model, TOKENS, max_tokens=8, longest_row=15)
    with pytest.raises(ConfigError, match=r"'gpt_neo' cannot do here .*side by side differ .*llm=llama2_7b"):
        check_side_by_side(model, TOKENS, max_tokens=8, longest_row=200)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("falcon, alibi", "ValueError"),
        ("lfm2", "LinearAttentionLayer"),
        ("mpt", "differ|position_ids"),
        ("mamba", "takes no `position_ids`"),
    ],
)
def test_other_models_are_refused_with_their_type_and_a_remedy(case, reason):
    kind = ARCHITECTURES[case][0]
    with pytest.raises(ConfigError, match=rf"'{kind}' cannot do here \(.*({reason}).*\); use another decoder"):
        check_side_by_side(model_of(case), TOKENS, max_tokens=8, longest_row=200)


def test_a_model_that_ignores_positions_is_refused_in_any_number_format():
    class Deaf(torch.nn.Module):
        """Hands on everything but the positions: continuations then count on from each other."""

        def __init__(self, llm):
            super().__init__()
            self.llm, self.config = llm, llm.config

        def get_input_embeddings(self):
            return self.llm.get_input_embeddings()

        def forward(self, position_ids=None, **inputs):
            return self.llm(**inputs)

    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ConfigError, match="differ from those alone by"):
            check_side_by_side(Deaf(model_of("gpt2")).to(dtype), TOKENS, max_tokens=8, longest_row=200)
