"""Plan a job: whether it fits, the largest micro-batch, hours, disk, and what to change if it does not fit."""

import functools
from dataclasses import asdict, dataclass
from typing import Any

from llm2rec.plan.memory import Memory, disk_bytes, largest_rows, memory_at_rest, quantisation_bytes, student_sizes
from llm2rec.plan.models import TeacherShape, measured_teacher
from llm2rec.plan.settings import SHARDED, Card
from llm2rec.plan.workload import Workload, rows_per_micro_batch
from llm2rec.student.settings import StudentSettings

__all__ = ["Job", "plan"]


@dataclass(frozen=True)
class Job:
    """A job to plan.

    Attributes:
        teacher: Shape and settings of the teacher.
        student: The student's settings.
        work: How much there is to read.
        card: The kind of GPU.
        utilisation: Share of its peak rate that the teacher reaches.
        gpus: Number of GPUs.
        launch: One of `llm2rec.plan.settings.LAUNCHES`.
    """

    teacher: TeacherShape
    student: StudentSettings
    work: Workload
    card: Card
    utilisation: float
    gpus: int
    launch: str

    @property
    def gate_width(self) -> int:
        """Width of the gate inputs that the language model computes and the run caches; 0 if there are none."""
        settings = self.teacher.settings
        return self.teacher.width if settings.tuning == "ilora" and settings.gate_input == "llm" else 0

    @property
    def top_k(self) -> int:
        """Items per exported row; 0 without export."""
        export = self.teacher.settings.export
        return export.top_k if export.enabled else 0


class _Planner:
    def __init__(self, job: Job) -> None:
        self.job, self.work, self.shape, self.settings = job, job.work, job.teacher, job.teacher.settings
        self.sizes, peak = measured_teacher(job.teacher)
        self._measured = functools.cache(peak)
        self.rows = rows_per_micro_batch(self.settings.training, job.gpus)
        wide, capacity = self.shape.precision == "float32", job.card.memory_bytes
        at_rest = functools.partial(memory_at_rest, self.sizes, job.launch, job.gpus, capacity)
        self.at_rest: Memory = at_rest(wide=wide, on_cpu=self.shape.on_cpu)

    def peak(self, rows: int, *, checkpointing: bool) -> int:
        """Activations and temporaries of a micro-batch of the longest prompts, bytes."""
        tokens, answer = self.work.longest_tokens, self.work.answer_tokens
        size = self._measured("training_peaks", rows, tokens, answer, checkpointing=checkpointing)
        packed = quantisation_bytes(self.sizes, self.shape.precision, rows * tokens, on_cpu=self.shape.on_cpu)
        return int(size) + packed

    def memory(self) -> dict[str, dict[str, Any]]:
        """Memory and largest micro-batch, without and with checkpointing."""
        room, most = self.at_rest.capacity - self.at_rest.total, self.settings.training.batch_size
        found = {}
        for on in (False, True):
            peak = functools.partial(self.peak, checkpointing=on)
            planned = _plain(self.at_rest.with_activations(peak(self.rows)))
            found[_label(on)] = planned | {"largest": largest_rows(peak, room, most)}
        return found

    def export_memory(self) -> Memory:
        """Memory of the export's widest batch, the one of the shortest prompts."""
        export, tokens = self.settings.export, self.work.shortest_tokens
        rows = max(1, min(export.block_rows, export.batch_tokens // tokens))
        peak = self._measured("ranking_peaks", rows, tokens, export.top_k)
        return self.at_rest.with_activations(peak)

    def seconds(self) -> tuple[dict[str, float], float]:
        """Seconds of each part of the job, and tokens a second in training.

        A token takes 2 operations per multiplied weight in the forward pass, twice that in training (frozen weights
        have no gradients), and three times that with checkpointing; attention scores are not counted. Communication
        between GPUs is not counted either.
        """
        job, work, settings = self.job, self.work, self.settings
        rate = (job.card.float32_tflops if self.shape.precision == "float32" else job.card.tflops) * 1e12
        rate *= job.utilisation
        token = 2 * self.sizes.multiplied_parameters / rate  # seconds on one GPU
        ranked = token * work.read_tokens
        if settings.objective == "title":  # each beam writes a title
            ranked += token * max(settings.title.search_beams, settings.export.top_k) * work.answer_tokens
        else:
            ranked += 2 * work.n_items * self.shape.width / rate
        trained_token = token * (3 if settings.gradient_checkpointing else 2)
        sharing = 1 if job.launch in SHARDED else job.gpus  # sharded: all GPUs read all rows outside of training
        gate_rows = work.n_train_rows + work.n_validation_rows
        gate_rows += work.n_rows if settings.export.enabled and work.n_train_rows < work.n_rows else 0
        epochs = settings.training.epochs
        return {
            "titles": work.n_items * work.title_tokens * token,  # every process reads all
            "gate_inputs": gate_rows * work.read_tokens * token / sharing if job.gate_width else 0.0,
            "training": epochs * work.n_train_rows * work.train_tokens * trained_token / job.gpus,
            "validation": epochs * work.n_validation_rows * ranked / sharing,
            "export": work.n_rows * ranked / sharing if settings.export.enabled else 0.0,
        }, job.gpus / trained_token

    def student(self) -> dict[str, Any]:
        """Memory of the student on one of these GPUs, activations excluded."""
        parameters, held = student_sizes(self.job.student, self.work.n_items)
        parts = {"weights_and_optimizer": held, "context": self.at_rest.parts["context"]}
        memory = Memory(parts, self.job.card.memory_bytes)
        return {"name": self.job.student.name, "parameters": parameters, "memory": _plain(memory)}

    def disk(self) -> dict[str, int]:
        """Disk space by part."""
        return disk_bytes(
            self.sizes,
            self.work,
            width=self.shape.width,
            gate_width=self.job.gate_width,
            top_k=self.job.top_k,
            zero=self.job.launch in ("zero2", "zero2_offload"),
        )


def plan(job: Job) -> dict[str, Any]:
    """Plan a job.

    Returns:
        Plain values: ``sizes``, ``memory`` without and with checkpointing, ``export_memory``, ``seconds``,
        ``tokens_per_second``, ``student``, ``disk_bytes``, ``work``, ``advice``, ``fits`` and the job.
    """
    planner = _Planner(job)
    memory, export, student = planner.memory(), planner.export_memory(), planner.student()
    seconds, tokens_per_second = planner.seconds()
    checkpointing = job.teacher.settings.gradient_checkpointing
    return {
        "card": asdict(job.card),
        "gpus": job.gpus,
        "launch": job.launch,
        "utilisation": job.utilisation,
        "precision": job.teacher.precision,
        "gradient_checkpointing": checkpointing,
        "rows_per_micro_batch": planner.rows,
        "work": asdict(job.work),
        "sizes": asdict(planner.sizes),
        "memory": memory,
        "export_memory": _plain(export),
        "fits": memory[_label(checkpointing)]["fits"] and export.fits,
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "student": student,
        "disk_bytes": planner.disk(),
        "advice": _advice(planner, memory, export, student),
    }


def _advice(planner: _Planner, memory: dict[str, Any], export: Memory, student: dict[str, Any]) -> list[str]:
    """What to change if something does not fit."""
    job, on, advice = planner.job, planner.settings.gradient_checkpointing, list[str]()
    if not memory[_label(on)]["fits"]:
        changes = []
        if memory[_label(True)]["fits"]:
            changes.append("teacher.gradient_checkpointing=true")
        for checkpointing in (on, True):
            if 1 <= (rows := memory[_label(checkpointing)]["largest"]) < planner.rows:
                also = " teacher.gradient_checkpointing=true" if checkpointing != on else ""
                changes.append(f"teacher.training.micro_batch_size={rows}{also}")
                break
        advice.append(
            f"Training fits with {' or with '.join(changes)}."
            if changes
            else "Not even one row fits: use a smaller llm, teacher.precision=int8 or int4, a larger card, or more "
            "GPUs with plan.launch=fsdp2."
        )
    if planner.sizes.item_bytes > job.card.memory_bytes / 2:
        advice.append(
            f"The vectors of {job.work.n_items:,} titles take {planner.sizes.item_bytes / 2**30:.0f} GiB on every GPU: "
            "use teacher.objective=title, or fewer items (dataset.k_core)."
        )
    if not export.fits and planner.at_rest.fits:
        advice.append("The export does not fit: lower teacher.export.batch_tokens.")
    if not student["memory"]["fits"]:
        advice.append(
            f"The student does not fit with a table of {job.work.n_items:,} items: use student.item_optimizer=rowwise "
            "with student.loss.name=sampled_softmax, or lower student.model.width."
        )
    return advice


def _label(checkpointing: bool) -> str:
    return "with_checkpointing" if checkpointing else "without_checkpointing"


def _plain(memory: Memory) -> dict[str, Any]:
    return {"parts": memory.parts, "total": memory.total, "fits": memory.fits}
