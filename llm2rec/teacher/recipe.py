"""What a finished teacher needs to be put together again, besides its weights."""

import json
from dataclasses import dataclass
from typing import Any

from llm2rec.teacher.gate_cache import model_identity
from llm2rec.teacher.gate_source import StudentVectors
from llm2rec.teacher.settings import LLMSettings, PromptSettings

__all__ = ["TeacherRecipe"]


@dataclass(frozen=True)
class TeacherRecipe:
    """What a finished teacher needs to be put together again, besides its weights; plain values.

    Attributes:
        source: Folder or Hub id of the language model.
        precision: Number format of its weights.
        pooling: How texts are represented.
        prompt: Arguments of `PromptSettings`.
        trust_remote_code: Whether the model's own code may run.
        seed: Seed of the choice among wordings.
        objective: ``item`` or ``title``.
        tuning: ``ilora``, ``lora`` or ``none``.
        logit_scale: Factor on the cosine.
        exclude_history: Whether items of a history are out of the running.
        head: Kind of `ItemHead`.
        gate_input: Name of the `GateSource`.
        hybrid: Whether prompts carry injected vectors.
        title: Arguments of `TitleSettings`.
        fingerprint: Of the dataset whose items it ranks; empty where that is not known.
        llm_weights: `weights_hash` of the language model; empty where that is not known.
    """

    source: str
    precision: str
    pooling: str
    prompt: dict[str, Any]
    trust_remote_code: bool
    seed: int
    objective: str
    tuning: str
    logit_scale: float
    exclude_history: bool
    head: str
    gate_input: str
    hybrid: bool
    title: dict[str, Any]
    fingerprint: str = ""
    llm_weights: str = ""

    @property
    def identity(self) -> str:
        """All about the language model that decides gate inputs."""
        return json.dumps([model_identity(self.source), self.precision, self.pooling, self.prompt], sort_keys=True)

    @property
    def llm_settings(self) -> LLMSettings:
        """The language model's settings."""
        return LLMSettings("", self.source, self.pooling, PromptSettings(**self.prompt), self.trust_remote_code)

    @property
    def reads_recommender(self) -> bool:
        """Whether a trained recommender belongs to the teacher."""
        return self.hybrid or self.gate_input == StudentVectors.name or self.head in ("joined", "residual")
