"""``python -m llm2rec.plan``: what a job will take, before it is started."""

import logging
from pathlib import Path

from llm2rec.config import Config
from llm2rec.core.errors import ConfigError
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.run import Run
from llm2rec.data import RecData
from llm2rec.plan.cards import CARDS, CPU, usual_utilisation
from llm2rec.plan.models import TeacherShape
from llm2rec.plan.pace import processor
from llm2rec.plan.planner import Job, plan
from llm2rec.plan.report import format_plan
from llm2rec.plan.settings import PlanSettings, check_plan
from llm2rec.plan.shape import model_config
from llm2rec.plan.workload import EstimatedPrompts, Prompts, workload_of
from llm2rec.stage import build, open_data, stage
from llm2rec.student.settings import StudentSettings
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
    # A tiny model is made of a dataset's titles.
    data = None if settings.is_complete and not isinstance(llm, TinyRandomSettings) else open_data(cfg, run)
    llm_dir = from_launch_folder(cfg.paths.llm_dir, cfg.paths.root)
    with run.phase("plan"):
        config, source, shape_said = model_config(llm, Path(cfg.paths.root), llm_dir, data.titles if data else [])
        prompts, prompts_said = prompts_of(llm, source, data, cfg.seed, settings.characters_per_token)
        work = workload_of(settings, teacher, data, prompts, cfg.gpus, prompts_said)
        card = processor() if on_cpu else CARDS[settings.card]
        utilisation = settings.utilisation or usual_utilisation(settings.card, precision)
        width = student.model.width
        shape = TeacherShape(config, teacher, precision, llm.pooling, work.n_items, work.history_length, width, on_cpu)
        planned = plan(Job(shape, student, work, card, utilisation, cfg.gpus, launch))
    many = f"; {cfg.gpus} GPUs are taken to be {cfg.gpus} times as fast as one" if cfg.gpus > 1 else ""
    assumptions = [
        shape_said,
        f"training reaches {utilisation:.0%} of the card's rate, {'as given' if settings.utilisation else 'as usual'} "
        f"(plan.utilisation){many}",
        *(f"{name}: {source}" for name, source in work.sources.items()),
        "training runs all its epochs, and memory is that of the longest prompts, without gaps between blocks"
        + (" (glibc leaves as much again and more; MALLOC_MMAP_THRESHOLD_=65536 in the environment, none)" * on_cpu),
        *(["the student reads windows, which takes longer than sequences"] * (student.examples == "sequences")),
    ]
    run.write_metrics("plan", {**planned, "llm": llm.name, "assumptions": assumptions})
    run.note(label=f"plan {llm.name} {precision}", fits=planned["fits"])
    heading = f"{teacher.name} on {llm.name} in {precision}: {planned['sizes']['frozen_parameters']:,} frozen and "
    heading += f"{planned['sizes']['trained_parameters']:,} trained parameters"
    logger.info("\n%s", format_plan(planned, heading, assumptions))


def prompts_of(
    llm: LLMSettings, source: str | None, data: RecData | None, seed: int, characters_per_token: float
) -> tuple[Prompts | None, str]:
    """What counts tokens, and how: exactly where the tokenizer is at hand, by characters otherwise."""
    if data is None:
        return None, "given"
    if source is not None:
        try:
            with readable(ConfigError, f"the tokenizer of {llm.name} cannot be read", "It is done without."):
                tokenizer = load_tokenizer(source, llm)
        except ConfigError as error:
            logger.info("%s", error)
        else:
            return PromptBuilder(tokenizer, data.items, llm.prompt, data.domain, seed), "counted by its tokenizer"
    told = f"estimated, {characters_per_token:g} characters a token, since the tokenizer is not at hand"
    return EstimatedPrompts(data.titles, llm.prompt, data.domain, characters_per_token), told


if __name__ == "__main__":
    main()
