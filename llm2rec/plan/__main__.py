"""``python -m llm2rec.plan``: estimate memory, time and disk before you start."""

import logging
import os
import time
from pathlib import Path

import torch

from llm2rec.config import Config
from llm2rec.core.errors import ConfigError
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.run import Run
from llm2rec.data import RecData
from llm2rec.plan.models import TeacherShape, model_config
from llm2rec.plan.planner import Job, plan
from llm2rec.plan.settings import CARDS, CPU, Card, PlanSettings, check_plan, default_utilisation
from llm2rec.plan.table import format_plan
from llm2rec.plan.workload import EstimatedPrompts, workload_of
from llm2rec.stage import build, open_data, stage
from llm2rec.student.settings import StudentSettings
from llm2rec.teacher.factory import build_prompts
from llm2rec.teacher.llm import load_tokenizer, readable
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import LLMSettings, TeacherSettings, TinyRandomSettings

logger = logging.getLogger("llm2rec.plan")


@stage("plan")
def main(cfg: Config, run: Run) -> None:
    """Plan the teacher and the student of this configuration."""
    settings, llm = build(cfg.plan, PlanSettings), build(cfg.llm, LLMSettings)
    teacher, student = build(cfg.teacher, TeacherSettings), build(cfg.student, StudentSettings)
    on_cpu = settings.card == CPU
    precision = teacher.precision if teacher.precision != "auto" else "float32" if on_cpu else "bfloat16"
    launch = check_plan(settings, cfg.gpus, precision)
    # A tiny model's tokenizer is made from the dataset's titles.
    data = None if settings.is_complete and not isinstance(llm, TinyRandomSettings) else open_data(cfg, run)
    llm_dir = from_launch_folder(cfg.paths.llm_dir, cfg.paths.root)
    with run.phase("plan"):
        config, source, sizes_from = model_config(llm, Path(cfg.paths.root), llm_dir, data.titles if data else [])
        prompts, tokens_from = prompts_of(teacher.objective, llm, source, data, cfg.seed, settings.characters_per_token)
        work = workload_of(settings, teacher, data, prompts)
        card = this_cpu() if on_cpu else CARDS[settings.card]
        utilisation = settings.utilisation or default_utilisation(settings.card, precision)
        width = student.model.width
        shape = TeacherShape(config, teacher, precision, llm.pooling, work.n_items, work.history_length, width, on_cpu)
        planned = plan(Job(shape, student, work, card, utilisation, cfg.gpus, launch))
    heap = " (glibc fragments its heap to up to 5 times as much; MALLOC_MMAP_THRESHOLD_=65536 avoids that)"
    assumptions = [
        sizes_from,
        f"training reaches {utilisation:.0%} of the card's peak rate (plan.utilisation), and GPUs scale linearly",
        "prompts have plan.prompt_tokens tokens each" if settings.prompt_tokens else tokens_from,
        "training runs all its epochs; memory is that of a micro-batch of the longest prompts" + heap * on_cpu,
    ]
    run.write_metrics("plan", {**planned, "llm": llm.name, "assumptions": assumptions})
    run.note(label=f"plan {llm.name} {precision}", fits=planned["fits"])
    frozen, trained = planned["sizes"]["frozen_parameters"], planned["sizes"]["trained_parameters"]
    heading = f"{teacher.name} on {llm.name} in {precision}: {frozen:,} frozen and {trained:,} trained parameters"
    logger.info("\n%s", format_plan(planned, heading, assumptions))


def prompts_of(
    objective: str, llm: LLMSettings, source: str | None, data: RecData | None, seed: int, characters_per_token: float
) -> tuple[PromptBuilder | EstimatedPrompts | None, str]:
    """A token counter, exact if the tokenizer can be read, and a sentence that says how it counts."""
    if data is None:
        return None, ""
    if source is not None:
        try:
            with readable(ConfigError, f"the tokenizer of {llm.name} cannot be read", "Tokens are estimated."):
                tokenizer = load_tokenizer(source, llm)
        except ConfigError as error:
            logger.info("%s", error)
        else:
            return build_prompts(objective, tokenizer, data, llm.prompt, seed), "tokens: by its tokenizer"
    estimated = EstimatedPrompts(data.titles, llm.prompt, data.domain, characters_per_token)
    return estimated, f"tokens: {characters_per_token:g} characters each (plan.characters_per_token)"


def this_cpu() -> Card:
    """This machine's CPU: its memory, and the rate of a matrix product measured now."""
    left, right = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        left.matmul(right)
        seconds.append(time.perf_counter() - start)
    rate = 2.0 * 1024**3 / min(seconds) / 1e12
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card("this machine's CPU", memory, rate, rate)


if __name__ == "__main__":
    main()
