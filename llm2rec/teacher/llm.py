"""Load language models and tokenizers, from a folder or the Hub, or create a tiny random one."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm2rec.core.errors import ConfigError, Llm2RecError
from llm2rec.core.files import replaced_folder
from llm2rec.core.host_memory import check_host_memory
from llm2rec.core.processes import is_first_process, uses_fsdp, uses_gpu, uses_zero3
from llm2rec.core.seed import derived_seed
from llm2rec.core.train.sharding import gather_with_deepspeed, shard, shards_frozen_weights, zero3_config
from llm2rec.teacher.settings import LLMSettings, TinyRandomSettings

__all__ = [
    "check_launch",
    "load_model",
    "load_tokenizer",
    "locate",
    "make_tiny_random",
    "mixed_precision",
    "model_identity",
    "readable",
    "resolve_precision",
    "weights_changed",
    "weights_hash",
    "without_head",
]

logger = logging.getLogger(__name__)


def locate(settings: LLMSettings, root: Path, llm_dir: Path, titles: list[str]) -> str:
    """Find the model before anything expensive starts, or create the tiny one.

    Args:
        settings: The model's settings.
        root: Base folder of relative paths.
        llm_dir: Folder for tiny models, and for models converted from GGUF.
        titles: Item titles, for the tiny model's tokenizer.

    Returns:
        A folder, or an id on the Hub whose configuration can be read.

    Raises:
        ConfigError: If there is no such model, or it is in GGUF and cannot be converted.
    """
    if isinstance(settings, TinyRandomSettings):
        return str(make_tiny_random(settings, llm_dir, titles))
    local = root / Path(settings.path).expanduser()
    if (gguf := _gguf_file(local, settings.path)) is not None:
        return str(_converted(gguf, settings, llm_dir).resolve())
    source = str(local.resolve()) if local.is_dir() else settings.path
    with readable(
        ConfigError,
        f"llm.path is {settings.path!r}, which is neither a folder with a model in Hugging Face's layout nor a model "
        "that can be downloaded from the Hub now",
        "Set `llm.path=FOLDER`, or connect to the network (and log in, for gated models). A model's own code runs only "
        "with `llm.trust_remote_code=true`.",
    ):
        AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    return source


def _gguf_file(local: Path, path: str) -> Path | None:
    """The GGUF file that ``local`` is, or that a folder holds in place of other weights."""
    files = sorted(local.glob("*")) if local.is_dir() else [local] if local.is_file() else []
    found = [file for file in files if file.suffix.lower() == ".gguf"]
    if not found or any(file.suffix in (".safetensors", ".bin") for file in files):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigError(f"llm.path is {path!r}, which holds several GGUF files ({names}); give one of them.")
    return found[0]


def _converted(file: Path, settings: LLMSettings, llm_dir: Path) -> Path:
    """A GGUF model in Hugging Face's layout, de-quantised to float16; converted once into a folder of ``llm_dir``."""
    folder = llm_dir / f"{file.stem}-{_hash_of([file])[:16]}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"llm.path is {settings.path!r}, a model in GGUF, which the package `gguf` converts to Hugging Face's "
            "layout; install it (`pip install gguf`), or give a folder in that layout."
        )
    problem = f"llm.path is {settings.path!r}, a model in GGUF that cannot be converted to Hugging Face's layout"
    logger.info("converting %s to %s", settings.path, folder)
    with readable(ConfigError, problem, "Give a folder in that layout."), replaced_folder(folder) as aside:
        place, plain = str(file.parent), GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=file.name,
            quantization_config=plain,
            dtype=torch.float16,
            trust_remote_code=settings.trust_remote_code,
        )
        model.save_pretrained(aside)
        tokenizer = AutoTokenizer.from_pretrained(
            place, gguf_file=file.name, trust_remote_code=settings.trust_remote_code
        )
        tokenizer.save_pretrained(aside)
    return folder


def weights_hash(source: str) -> str:
    """Hash of a language model's weights, independent of their path and without reading gigabytes.

    Returns:
        SHA-256 of names, sizes, and first and last MiB of the weight files in a folder; empty if there are none, as for
        an id on the Hub.
    """
    found = sorted(file for file in Path(source).glob("*") if file.suffix in (".safetensors", ".bin"))
    return _hash_of(found) if found else ""


def _hash_of(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes, and first and last MiB of files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, size - 2**20))
            digest.update(opened.read())
    return digest.hexdigest()


def weights_changed(source: str, known: str) -> bool:
    """Whether the weights at ``source`` are known to differ from those with the hash ``known``."""
    return bool(known) and weights_hash(source) not in ("", known)


def model_identity(source: str) -> str:
    """Identity of a language model on this machine without reading gigabytes: names, sizes and times of its files."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json", ".bin", ".txt"))
    return json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


@contextmanager
def readable(kind: type[Llm2RecError], problem: str, remedy: str) -> Iterator[None]:
    """Convert errors of third-party code that reads model files into our own.

    Damaged files make transformers, tokenizers and safetensors raise about ten different classes, one of which is
    ``Exception`` itself.

    Args:
        kind: Class of the error to raise.
        problem: Its message; the original error is added in brackets.
        remedy: What to do.
    """
    try:
        yield
    except (Llm2RecError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise kind(f"{problem} ({why}). {remedy}") from error


def load_tokenizer(source: str, settings: LLMSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer; without a padding token it pads with the end-of-text token (padding is masked anyway).

    Raises:
        ConfigError: If it has neither.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer of {source!r} has neither a padding nor an end-of-text token; set `pad_token` in its "
            "tokenizer_config.json to any of its tokens (padding is masked)."
        )
    return tokenizer


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bfloat16 on a GPU, float32 on a CPU, where bfloat16 can be hundreds of times slower."""
    if precision != "auto":
        return precision
    return "float32" if device.type == "cpu" else "bfloat16"


def mixed_precision(precision: str) -> str:
    """Mixed precision of the engine: ``bf16`` on a GPU unless ``precision`` is float32, else ``no``."""
    return "bf16" if uses_gpu() and precision != "float32" else "no"


def load_model(
    source: str, settings: LLMSettings, precision: str, device: torch.device, *, writes: bool = False
) -> PreTrainedModel:
    """Load the model, frozen, in evaluation mode.

    Args:
        source: Return value of `locate`.
        settings: The model's settings.
        precision: ``float32``, ``bfloat16``, ``int8`` or ``int4`` (base weights quantised by bitsandbytes).
        device: Device of the model.
        writes: Whether to load the language-model head; without it the model returns hidden states.

    Raises:
        ConfigError: If the model has no causal head, or this launch cannot shard it.
    """
    check_launch(precision)
    kind: Any = AutoModelForCausalLM if writes else AutoModel
    try:
        model = _loaded(kind, source, settings, precision, device)
    except ValueError as error:
        if not writes or "AutoModelForCausalLM" not in str(error):
            raise
        raise _cannot_write(settings) from error
    model.requires_grad_(False)
    model.eval()
    if shards_frozen_weights() and uses_fsdp():
        shard(model, model.base_model, model._no_split_modules or (), device)
        model.tie_weights()
    if writes:
        if not _reads_forwards(model):
            raise _cannot_write(settings)
        # Otherwise sampling (Llama 2) or a repetition penalty (Qwen) is loaded with the weights.
        model.generation_config = GenerationConfig()
    return cast(PreTrainedModel, model)


def _loaded(kind: Any, source: str, settings: LLMSettings, precision: str, device: torch.device) -> Any:
    """The weights on the device; if they will be sharded, only on the first process, in host memory."""
    if precision in ("int8", "int4"):
        from transformers import BitsAndBytesConfig  # needs bitsandbytes, which other precisions do without

        compute = torch.float32 if device.type == "cpu" else torch.bfloat16
        quantized = (
            BitsAndBytesConfig(load_in_8bit=True)
            if precision == "int8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        )
        # Quantised weights are placed on the device while they load.
        arguments = {"dtype": compute, "device_map": {"": device}, "quantization_config": quantized}
        return kind.from_pretrained(source, **arguments, trust_remote_code=settings.trust_remote_code)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if not shards_frozen_weights():
        return kind.from_pretrained(source, dtype=dtype, trust_remote_code=settings.trust_remote_code).to(device)
    if uses_zero3():
        from transformers.integrations import HfDeepSpeedConfig

        asked = zero3_config(dtype)
        if asked["zero_optimization"]["offload_param"]["device"] == "cpu":
            files = Path(source).glob("*.safetensors")  # empty for a Hub id, whose size is unknown yet
            check_host_memory(
                sum(file.stat().st_size for file in files),
                "the language model",
                "set offload_param_device to none in the launch configuration, or use a smaller `llm`",
            )
        _seen = HfDeepSpeedConfig(asked)  # transformers shards the weights while it exists
        model = kind.from_pretrained(source, dtype=dtype, trust_remote_code=settings.trust_remote_code)
        gather_with_deepspeed(model, asked)
        return model
    if is_first_process():
        return kind.from_pretrained(source, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    # Keep the random state, so that adapters are initialised alike on all processes.
    with torch.random.fork_rng(), torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)


def without_head(model: PreTrainedModel) -> nn.Module:
    """The part of a language model that returns hidden states.

    `PreTrainedModel.base_model` is the model itself, head included, where its prefix names no module (Llama 4).
    """
    body: nn.Module = model.base_model
    return cast(nn.Module, model.model) if body is model and hasattr(model, "lm_head") else body


def check_launch(precision: str) -> None:
    """Raise for precisions that this launch cannot shard, before anything is loaded.

    Raises:
        ConfigError: If quantised weights would be sharded.
    """
    if precision in ("int8", "int4") and shards_frozen_weights():
        raise ConfigError(
            f"teacher.precision is {precision!r}, and the launch shards the language model's weights, which would "
            "separate them from their scales; use teacher.precision=bfloat16, or keep a full copy on every GPU with "
            "accelerate_configs/multi_gpu_ddp.yaml."
        )


def _cannot_write(settings: LLMSettings) -> ConfigError:
    return ConfigError(
        f"`teacher.objective=title` needs a model that writes text, and `llm` is {settings.name!r}, a model without a "
        "causal language-model head; use a decoder such as `llm=llama2_7b`, or `teacher.objective=item`."
    )


@torch.no_grad()
def _reads_forwards(model: PreTrainedModel) -> bool:
    """Whether a token's logits are independent of later tokens.

    transformers also gives BERT and similar models a language-model head, newly initialised and, unless the
    configuration has ``is_decoder``, on states that attend to the whole text: such a model would learn to copy the
    answer. No attribute distinguishes them, since decoders have ``is_decoder=False`` too.
    """
    table = model.get_input_embeddings()
    ids = torch.arange(1, 7, device=table.weight.device)  # type: ignore[arg-type]
    logits = model(input_ids=torch.stack([ids, torch.cat([ids[:3], ids[3:] + 3])])).logits[:, :3].float()
    # Masked positions add exact zeros in any dtype; the tolerance is for kernels that sum in another order.
    return bool((logits[0] - logits[1]).abs().max() <= 1e-3 * logits.std())


def make_tiny_random(settings: TinyRandomSettings, llm_dir: Path, titles: list[str]) -> Path:
    """Create a small random Llama and a tokenizer trained on the titles, in Hugging Face's layout, once.

    Args:
        settings: Sizes and seed.
        llm_dir: Parent folder; the model's folder name is a hash of sizes, seed and titles.
        titles: Item titles.

    Returns:
        The model's folder.
    """
    sizes = ("with head", settings.width, settings.n_layers, settings.n_heads, settings.vocabulary, settings.seed)
    folder = llm_dir / f"{settings.name}-{derived_seed(*sizes, *titles):016x}"
    if folder.is_dir():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {title};" for title in titles], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_heads,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config)
    with replaced_folder(folder) as aside:
        model.save_pretrained(aside)
        fast.save_pretrained(aside)
    logger.info("made a tiny random Llama in %s", folder)
    return folder
