"""Losses, gradients, metrics and exports do not depend on how a step's rows are split among processes and passes.

Every stage takes steps of 150 rows, then of 124 (title: 80 and 70): in one piece; in four micro-batches; and on two
processes in two each, by DDP and by DeepSpeed ZeRO-2. Rows of similar length share a step, so that shares hold uneven
numbers of tokens, and pieces of sequences are of uneven numbers of rows.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_helpers import OF_ILORA, TORCHRUN, TOY, accelerate_on_cpu, history, outputs_of, run_command

pytestmark = pytest.mark.slow
PROGRAM = str(Path(__file__).with_name("stages_in_turn.py"))
N_STEPS, N_STEPS_OF_TITLE = 6, 4
ROUNDED = 1e-2  # of a metric: a value that is rounded to 8 bits may, for its last bit, fall on the other side
IN_ONE_PIECE, IN_PARTS = 1, 4
CASES = {  # in an order in which what a case reads is there
    "windows": "student",
    "sequences": "student",
    "sampled softmax": "student",
    "gbce": "student",
    "item": "teacher",
    "item in 8 bits": "teacher",
    "item in 4 bits": "teacher",
    "title": "teacher",
    "dllm2rec": "distill",
    "confidence": "distill",
    "disagreement": "distill",
    "meta": "distill",
    "distilled sequences": "distill",
    "reading": "distill",
}
SEQUENCES = ["student.examples=sequences", "student.model.positions=oldest"]
OVERRIDES = {
    "windows": ["student.training.max_grad_norm=0.1"],
    "sequences": SEQUENCES,
    "sampled softmax": ["student.loss.name=sampled_softmax", "student.loss.n_negatives=16"],
    "gbce": ["student=gru4rec", "student.loss.name=gbce", "student.loss.n_negatives=8"],
    "item": ["teacher.training.max_grad_norm=0.1"],
    "item in 8 bits": ["teacher.precision=int8", "llm.width=64"],
    "item in 4 bits": ["teacher.precision=int4", "llm.width=64"],
    "title": [
        "teacher=ilora_paper",
        "teacher.training.learning_rate=3e-3",
        "teacher.train_rows=150",
        "teacher.validation_rows=20",
        "teacher.export.top_k=6",
        "active=random",  # a search over titles takes long
        "active.budget=0.1",
        "llm.prompt.wording=domain",
        "llm.prompt.max_tokens=512",
    ],
    "dllm2rec": ["distill.dros.in_ranking=per_row", "distill.embedding.alignment_weight=0.1"],
    "confidence": ["active=confidence", "active.budget=0.5", "distill.ranking.loss=ranknet"],
    "disagreement": ["active=disagreement", "active.budget=0.5"],
    "meta": ["active=meta"],
    "distilled sequences": SEQUENCES,
    "reading": ["distill=reading", "distill.embedding.id_dropout=0.5"],
}


def overrides(case, n_parts, one):
    """Overrides of the stage of a case; ``one`` is where the launch that others are compared with has run."""
    stage, batch_size = CASES[case], 80 if case == "title" else 150
    trained = "teacher" if stage == "teacher" else "student"
    overrides = [*TOY, *OVERRIDES[case], f"{trained}.training.epochs=2", f"{trained}.training.batch_size={batch_size}"]
    overrides.append(f"{trained}.training.micro_batch_size={-(-batch_size // n_parts)}")
    if stage == "teacher":
        overrides = [*OF_ILORA, "llm.width=32", "teacher.export.block_rows=50", *overrides]
    else:
        overrides.append("student.model.dropout=0")
    if stage == "distill":
        teacher = one / "item" / "data" / "teacher_outputs" / "toy" / "ilora-tiny_random"
        overrides += [f"distill.teacher_outputs={teacher}", "distill.dros.weight=0.1"]
        if case != "confidence":
            overrides.append("distill.ranking.negative=one_minus_probability")
    if case == "title":
        overrides.append(f"teacher.recommender_run={one / 'windows' / 'run'}")
    return overrides


def launch(folder, launcher, n_parts, one):
    """Run all cases in one launch; returns ``folder``, with a folder in it for each case."""
    jobs = [
        [str(folder / case), stage, [*overrides(case, n_parts, one), f"hydra.run.dir={folder / case / 'run'}"]]
        for case, stage in CASES.items()
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    run_command(folder, [*launcher, PROGRAM, str(file)])
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return launch(folder, [sys.executable], IN_ONE_PIECE, folder)


@pytest.fixture(scope="module", params=["micro-batches", "ddp", "zero2"])
def divided(request, one, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "zero2":
        pytest.importorskip("deepspeed")
        launcher = accelerate_on_cpu("multi_gpu_zero2", folder)
    else:
        launcher = {"micro-batches": [sys.executable], "ddp": TORCHRUN[:-1]}[request.param]
    return launch(folder, launcher, IN_PARTS, one)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_are_the_same_to_rounding_and_metrics_exactly(case, one, divided):
    norms = [json.loads((folder / case / "norms.json").read_text()) for folder in (one, divided)]
    assert len(norms[0]) == (N_STEPS_OF_TITLE if case == "title" else N_STEPS)
    assert min(norms[0]) > 0
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    first, second = (history(folder / case / "run") for folder in (one, divided))
    assert len(first) == len(second) == 2
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            # Not the bits: that one mean over all rows is summed in another order.
            tolerance = (ROUNDED if case.endswith("bits") else 0) if name.startswith("val/") else 1e-5
            np.testing.assert_allclose(theirs[name], ours[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("case", "teacher", "n_rows"), [("item", "ilora", 424), ("title", "ilora_paper", 42)])
def test_teachers_rank_the_same_items_for_every_row(case, teacher, n_rows, one, divided):
    (items, confidence), (items_two, confidence_two) = (outputs_of(each / case, teacher) for each in (one, divided))
    assert len(items) == n_rows
    assert np.array_equal(items, items_two)
    np.testing.assert_allclose(confidence_two, confidence, rtol=1e-5, atol=1e-4)
