"""Trains a tiny Llama with PEFT and Accelerate, as any PEFT user would; in as many processes as it is launched in.

``train_ilora.py FOLDER CASES``: CASES is a JSON object of cases by name, each with keywords of `train`. A case leaves
the gradients of its first step and the trained adapter in FOLDER/name.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from peft import get_peft_model
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from llm2rec.ilora import ILoraConfig

ROWS, LENGTH, WIDTH, STEPS = 8, 6, 16, 3


def train(
    folder: Path,
    adapter: dict[str, Any],
    zero2: bool = False,
    micro_batches: int = 1,
    checkpointing: bool = False,
    find_unused: bool = False,
) -> None:
    """Train for three steps of eight rows."""
    in_processes = int(os.environ.get("WORLD_SIZE", "1"))
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=find_unused)]
    if in_processes > 1:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        cpu=not zero2,  # with it, Accelerate would not look at DeepSpeed
        gradient_accumulation_steps=micro_batches,
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=2) if zero2 and in_processes > 1 else None,
        kwargs_handlers=handlers,
    )
    assert accelerator.num_processes == in_processes

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )
    model = get_peft_model(base, ILoraConfig(task_type="CAUSAL_LM", r=8, num_experts=4, **adapter))
    for name, parameter in model.named_parameters():
        if "ilora_B" in name:  # zero in a fresh adapter, so that A and gate would have no gradient in the first step
            torch.nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    data = TensorDataset(torch.randint(3, 40, (STEPS * ROWS, LENGTH)), torch.randn(STEPS * ROWS, WIDTH))
    loader = DataLoader(data, batch_size=ROWS // (accelerator.num_processes * micro_batches))
    # An eps far above the rounding of gradients: Adam would else make full steps of it where the true gradient is 0.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-5)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    peft_model = accelerator.unwrap_model(model)
    assert not zero2 or in_processes == 1 or model.zero_optimization_stage() == 2
    folder.mkdir(parents=True, exist_ok=True)
    model.train()
    n_steps = 0
    for ids, gate_input in loader:
        with accelerator.accumulate(model):
            with peft_model.base_model.use_gates(gate_input):
                loss = model(input_ids=ids, labels=ids).loss  # the mean of rows of equal length
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradients = {name: p.grad for name, p in peft_model.named_parameters() if p.grad is not None}
                if n_steps == 0 and accelerator.is_main_process:
                    save_file(gradients, folder / "gradients.safetensors")
                n_steps += 1
            optimizer.step()
            optimizer.zero_grad()
    assert n_steps == STEPS
    if accelerator.is_main_process:
        peft_model.save_pretrained(folder)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


if __name__ == "__main__":
    for name, options in json.loads(sys.argv[2]).items():
        train(Path(sys.argv[1]) / name, **options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
