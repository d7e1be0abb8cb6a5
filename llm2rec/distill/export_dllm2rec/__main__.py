"""``python -m llm2rec.distill.export_dllm2rec``: write the files of the released DLLM2Rec program.

The program trains on them with ``cd data/dllm2rec && python .../DLLM2Rec/main.py --data <dataset>`` and the weights
that this command prints (with ``distill=dllm2rec_code``, those of the program's README).
"""

import logging

from llm2rec.config import Config
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.processes import is_first_process
from llm2rec.core.run import Run
from llm2rec.distill.data_bridge import read_outputs
from llm2rec.distill.export_dllm2rec.layout import arguments_for, write_data, write_teacher
from llm2rec.distill.settings import DistillSettings
from llm2rec.stage import build, open_data, stage

logger = logging.getLogger(__name__)


@stage("distill.export_dllm2rec")
def main(cfg: Config, run: Run) -> None:
    """Write the dataset and the teacher's outputs in the program's layout, on the first process."""
    settings = build(cfg.distill, DistillSettings)
    data = open_data(cfg, run)
    n_rows = len(data.splits["train"])
    teacher = read_outputs(
        from_launch_folder(settings.teacher_outputs, cfg.paths.root),
        n_rows=n_rows,
        n_items=data.n_items,
        fingerprint=data.fingerprint,
        top_k=settings.ranking.top_k if settings.ranking.weight > 0 else 1,
    )
    folder = from_launch_folder(cfg.paths.dllm2rec_dir, cfg.paths.root)
    if is_first_process():
        with run.phase("export"):
            write_teacher(folder / "tocf" / data.name, teacher, n_rows)
            write_data(folder / "data" / data.name, data)
    arguments = arguments_for(data.name, n_rows, teacher.ranking.shape[1], settings)
    logger.info("files for DLLM2Rec in %s: run its main.py there with %s", folder, arguments)


if __name__ == "__main__":
    main()
