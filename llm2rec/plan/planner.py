"""From what is asked for to what it takes: memory, time and disk of a whole job, and what to change where it fails."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from llm2rec.core.train.batching import micro_batch_count
from llm2rec.plan.cards import CPU, Card, usual_utilisation
from llm2rec.plan.disk import disk_bytes
from llm2rec.plan.memory import Memory, host_bytes, largest_rows, memory_at_rest, quantisation_bytes
from llm2rec.plan.models import Sizes, TeacherShape, teacher_costs
from llm2rec.plan.pace import Throughput
from llm2rec.plan.settings import DIVIDED, LAUNCHES
from llm2rec.plan.students import plan_student
from llm2rec.plan.workload import Workload, rows_per_micro_batch
from llm2rec.student.settings import StudentSettings

__all__ = ["Job", "plan"]

_QUANTISED = ("int8", "int4")


@dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
        teacher: Shape and settings of the teacher.
        student: The student's settings.
        work: What there is to read.
        card: On which kind of GPU.
        utilisation: Share of its rate that the teacher reaches.
        gpus: On how many.
        launch: One of `LAUNCHES`.
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
        """Width of the gate inputs that are computed by the language model and cached; 0 where none are."""
        settings = self.teacher.settings
        return self.teacher.width if settings.tuning == "ilora" and settings.gate_input == "llm" else 0

    @property
    def pace(self) -> Throughput:
        """How fast the teacher is."""
        rate = self.card.float32_tflops if self.teacher.precision == "float32" else self.card.tflops
        return Throughput(self.utilisation * rate * 1e12, self.card.bandwidth)


class _Planner:
    """Finds each number once."""

    def __init__(self, job: Job) -> None:
        self.job, self.work, self.shape = job, job.work, job.teacher
        self.settings, self.on_cpu = job.teacher.settings, job.teacher.on_cpu
        self.sizes: Sizes
        self.sizes, cost = teacher_costs(job.teacher)
        self.cost = functools.cache(cost)  # launches differ in what lies beside a step, not in the step
        self.rows = rows_per_micro_batch(self.settings.training, job.gpus)
        export = self.settings.export
        self.read_rows = max(1, min(export.block_rows, int(export.batch_tokens // self.work.read_tokens)))

    def at_rest(self, launch: str) -> Memory:
        """Memory between two steps."""
        wide = self.shape.precision == "float32"
        return memory_at_rest(
            self.sizes, launch, self.job.gpus, self.job.card.memory_bytes, wide=wide, on_cpu=self.on_cpu
        )

    def peak(self, rows: int, checkpointing: bool) -> int:
        """Activations and temporaries of a micro-batch of the longest prompts."""
        tokens = self.work.longest_tokens
        cost = self.cost("training", rows, tokens, self.work.answer_tokens, checkpointing=checkpointing)
        packed = quantisation_bytes(self.sizes, self.shape.precision, rows * tokens, on_cpu=self.on_cpu)
        return int(cost.peak_bytes) + packed

    def memory(self) -> dict[str, Any]:
        """Memory of each way to launch, without and with checkpointing."""
        launches = [launch for launch in LAUNCHES if self._is_open(launch)]
        peaks = {on: self.peak(self.rows, on) for on in (False, True)}
        return {
            launch: {
                _label(on): _shown(self.at_rest(launch).with_activations(peak)) | {"largest": self.largest(launch, on)}
                for on, peak in peaks.items()
            }
            for launch in launches
        }

    def largest(self, launch: str, checkpointing: bool) -> int:
        """Rows of the largest micro-batch that fits."""
        resting, peak = self.at_rest(launch), self._peak_with(checkpointing)
        return largest_rows(peak, resting.capacity - resting.total, self.settings.training.batch_size)

    def export_memory(self) -> Memory:
        """Memory of the widest batch that is only read and ranked: the one of the shortest prompts."""
        export, tokens = self.settings.export, self.work.shortest_tokens
        rows = max(1, min(export.block_rows, export.batch_tokens // tokens))
        resting = self.at_rest(self.job.launch)
        return resting.with_activations(self.cost("ranking", rows, tokens, export.top_k).peak_bytes)

    def _is_open(self, launch: str) -> bool:
        """Whether a launch is worth a look: the chosen one, and with several GPUs all that are possible."""
        others = self.job.gpus > 1 and not (launch in DIVIDED and self.shape.precision in _QUANTISED)
        return launch == self.job.launch or others

    def _peak_with(self, checkpointing: bool) -> Callable[[int], int]:
        return lambda rows: self.peak(rows, checkpointing)

    def seconds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of each part of the job, and what speed they come from."""
        job, work, settings, pace = self.job, self.work, self.settings, self.job.pace
        training, tokens = settings.training, round(work.train_tokens)
        recomputes = settings.gradient_checkpointing
        cost = self.cost("training", self.rows, tokens, work.answer_tokens, checkpointing=recomputes)
        micro, n_micro = pace.seconds(cost), micro_batch_count(training.batch_size, training.micro_batch_size, job.gpus)
        steps = training.epochs * training.steps_per_epoch(work.n_train_rows)
        read = round(work.read_tokens)
        ranked = pace.seconds(self.cost("ranking", self.read_rows, read, settings.export.top_k)) / self.read_rows
        reading = pace.seconds(self.cost("reading", self.read_rows, read)) / self.read_rows
        if settings.objective == "title":  # each beam writes a token at a time, at the rate of reading
            beams = max(settings.title.search_beams, settings.export.top_k)
            ranked += reading / read * beams * work.answer_tokens
        sharing = 1 if job.launch in DIVIDED else job.gpus  # but for training, those go through all rows together
        gate_rows = work.n_train_rows + work.n_validation_rows
        gate_rows += work.n_rows if settings.export.enabled and work.n_train_rows < work.n_rows else 0
        parts = {
            "titles": work.n_items * reading * work.title_tokens / read,
            "gate_inputs": gate_rows * reading / sharing if job.gate_width else 0.0,
            "training": steps * (n_micro * micro + pace.update_seconds(self.sizes.trained_parameters)),
            "validation": training.epochs * work.n_validation_rows * ranked / sharing,
            "export": work.n_rows * ranked / sharing if settings.export.enabled else 0.0,
        }
        per_token = self.rows * tokens
        return parts, {
            "flops_per_token": cost.flops / per_token,
            "forward_flops_per_token": cost.forward_flops / per_token,
            "tokens_per_second": job.gpus * per_token / micro,
            "rows_per_second": job.gpus * self.rows / micro,
        }

    def student(self) -> dict[str, Any]:
        """Memory and time of the student, in float32 on one GPU of these."""
        job, training = self.job, self.job.student.training
        rows = rows_per_micro_batch(training, 1)
        planned = plan_student(job.student, self.work.n_items, rows)
        share = usual_utilisation(CPU if self.on_cpu else "", "float32")
        pace = Throughput(share * job.card.float32_tflops * 1e12, job.card.bandwidth)
        n_micro = micro_batch_count(training.batch_size, training.micro_batch_size, 1)
        step = n_micro * pace.seconds(planned.cost) + planned.update_bytes / pace.bandwidth
        context = self.at_rest("ddp").parts["context"]
        resting = {"weights_and_optimizer": planned.held_bytes, "context": context}
        memory = Memory(resting, job.card.memory_bytes).with_activations(planned.cost.peak_bytes)
        epoch = training.steps_per_epoch(self.work.n_rows) * step
        return {
            "name": job.student.name,
            "parameters": planned.parameters,
            "memory": _shown(memory),
            "seconds_per_epoch": epoch,
            "seconds": training.epochs * epoch,
        }

    def disk(self, student: int) -> dict[str, int]:
        """Bytes on disk."""
        return disk_bytes(
            self.sizes,
            self.work,
            width=self.shape.width,
            gate_width=self.job.gate_width,
            top_k=self.settings.export.top_k if self.settings.export.enabled else 0,
            zero=self.job.launch in ("zero2", "zero2_offload"),
            student=student,
        )

    def host(self) -> dict[str, int]:
        """Bytes of the machine's own memory, for each process."""
        return host_bytes(
            self.sizes.trained_parameters,
            self.work.n_rows,
            self.work.history_length,
            self.job.gate_width,
            self.settings.export.top_k if self.settings.export.enabled else 0,
            self.job.gpus,
            self.job.launch,
            sum(self.sizes.frozen_bytes.values()),
        ) | ({"title_vectors": 4 * self.shape.width * self.work.n_items} if self.settings.objective == "title" else {})


def plan(job: Job) -> dict[str, Any]:
    """Plan a job.

    Returns:
        Plain values: ``sizes``, ``memory`` by launch and checkpointing, ``export_memory``, ``seconds``, ``speed``,
        ``student``, ``disk_bytes``, ``host_bytes``, ``work``, ``advice`` and what was asked for.
    """
    planner = _Planner(job)
    memory, student = planner.memory(), planner.student()
    seconds, speed = planner.seconds()
    chosen = memory[job.launch][_label(job.teacher.settings.gradient_checkpointing)]
    export = planner.export_memory()
    return {
        "card": asdict(job.card),
        "gpus": job.gpus,
        "launch": job.launch,
        "utilisation": job.utilisation,
        "precision": job.teacher.precision,
        "gradient_checkpointing": job.teacher.settings.gradient_checkpointing,
        "rows_per_micro_batch": planner.rows,
        "work": asdict(job.work),
        "sizes": asdict(planner.sizes),
        "memory": memory,
        "export_memory": _shown(export),
        "fits": chosen["fits"] and export.fits,
        "seconds": seconds,
        "speed": speed,
        "student": student,
        "disk_bytes": planner.disk(student["parameters"]),
        "host_bytes": planner.host(),
        "advice": _advice(job, planner, memory, export, student),
    }


def _advice(job: Job, planner: _Planner, memory: dict[str, Any], export: Memory, student: dict[str, Any]) -> list[str]:
    """What to change where something does not fit, the cheapest change first."""
    settings, capacity, advice = job.teacher.settings, job.card.memory_bytes, list[str]()
    on = settings.gradient_checkpointing
    if planner.sizes.item_bytes > capacity / 2:
        advice.append(
            f"The vectors of {job.work.n_items:,} titles, of which every GPU holds all, take "
            f"{planner.sizes.item_bytes / 2**30:.0f} GiB: a language model of smaller width, or fewer items "
            "(dataset.k_core)."
        )
    elif not memory[job.launch][_label(on)]["fits"]:
        advice += _remedies(job, planner, memory)
    if not export.fits and planner.at_rest(job.launch).fits:
        advice.append("The export does not fit: lower teacher.export.batch_tokens.")
    if not student["memory"]["fits"]:
        advice.append(
            f"The student does not fit: the table of {job.work.n_items:,} items with its gradient and AdamW's averages "
            "is too large; take student.item_optimizer=rowwise with student.loss.name=sampled_softmax, or lower "
            "student.model.width."
        )
    if planner.rows < settings.training.micro_batch_size and job.gpus > 1:
        advice.append(
            f"{settings.training.batch_size} rows a step leave {planner.rows} to each of {job.gpus} GPUs at a time; a "
            "larger teacher.training.batch_size uses them better."
        )
    return advice


def _remedies(job: Job, planner: _Planner, memory: dict[str, Any]) -> list[str]:
    """Single changes after which training fits."""
    on = job.teacher.settings.gradient_checkpointing
    chosen, found = memory[job.launch], list[str]()
    if not on and chosen[_label(True)]["fits"]:
        found.append("teacher.gradient_checkpointing=true")
    for checkpointing in (on, True):
        rows = chosen[_label(checkpointing)]["largest"]
        if rows >= 1 and rows < planner.rows:
            also = " teacher.gradient_checkpointing=true" if checkpointing != on else ""
            found.append(f"teacher.training.micro_batch_size={rows}{also}")
            break
    for launch, by_checkpointing in memory.items():
        if launch != job.launch and by_checkpointing[_label(True)]["fits"]:
            found.append(f"plan.launch={launch} with teacher.gradient_checkpointing=true")
            break
    for precision in ("int8", "int4"):
        if job.teacher.precision in ("float32", "bfloat16") and job.launch not in DIVIDED:
            other = _Planner(replace(job, teacher=replace(job.teacher, precision=precision)))
            peak = other.at_rest(job.launch).with_activations(other.peak(other.rows, True))
            if peak.fits:
                found.append(f"teacher.precision={precision} with teacher.gradient_checkpointing=true")
                break
    if not found:
        return [
            "No single change makes it fit: take a larger card, more GPUs with plan.launch=fsdp2, or a smaller llm."
        ]
    return [f"Training does not fit. Any of these makes it fit: {'; or '.join(found)}."]


def _label(checkpointing: bool) -> str:
    return "with_checkpointing" if checkpointing else "without_checkpointing"


def _shown(memory: Memory) -> dict[str, Any]:
    return {"parts": memory.parts, "total": memory.total, "fits": memory.fits}
