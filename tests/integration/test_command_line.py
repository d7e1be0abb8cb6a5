"""The chain by its commands, what lies in a run folder, and what bad input gets."""

import json
import re

import pytest
from command_helpers import PLAIN, ROOT, STUDENT, TEACHER, TOY, run, run_command, runs
from engine_helpers import events_of, texts_of
from huggingface_hub import ModelCard


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Data, student, teacher, distilled student, in one folder."""
    folder = tmp_path_factory.mktemp("chain")
    done = {}
    for stage, overrides in (("data", TOY), ("student", STUDENT), ("teacher", TEACHER), ("distill", STUDENT)):
        # The distilled student's outputs are those of the teacher above.
        done[stage] = run(folder, stage, *overrides)
    found = {json.loads((each / "run.json").read_text())["stage"]: each for each in runs(folder)}
    assert list(found) == ["data", "student", "teacher", "distill"]
    return folder, found, done


@pytest.mark.slow
def test_every_stage_leaves_a_finished_run(chain):
    _, found, _ = chain
    for stage, folder in found.items():
        record = json.loads((folder / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["seed"] == 42
        assert len(record["git"]["commit"]) == 40
        assert isinstance(record["git"]["dirty"], bool)
        assert {"torch", "transformers", "peft", "accelerate"} <= record["versions"].keys()
        assert record["dataset"]["name"] == "toy"
        config = json.loads((folder / "config.json").read_text())
        assert config["dataset"]["n_users"] == 60
        seconds = json.loads((folder / "metrics" / "time.json").read_text())
        assert seconds["data"] >= 0
        if stage != "data":
            assert seconds["train"] > 0
            assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
            validation = json.loads((folder / "metrics" / "validation.json").read_text())
            assert validation["select_on"] == "ndcg@10"
            assert "train/loss" in validation["history"][0]
        assert not (folder / "checkpoints").exists()
        assert not [name for name in files_of(folder) if ".partial" in name or name.endswith((".pkl", ".pt", ".bin"))]
    fingerprints = {
        json.loads((folder / "run.json").read_text())["dataset"]["fingerprint"] for folder in found.values()
    }
    assert len(fingerprints) == 1


@pytest.mark.slow
def test_weights_lie_where_the_design_says(chain):
    folder, found, _ = chain
    for stage in ("student", "distill"):
        assert {"student/config.json", "student/model.safetensors"} <= files_of(found[stage])
    teacher = files_of(found["teacher"])
    assert {"teacher/adapter/adapter_config.json", "teacher/adapter/adapter_model.safetensors"} <= teacher
    assert not [name for name in teacher if name.startswith("export/")]
    outputs = files_of(folder / "data" / "teacher_outputs" / "toy" / "ilora-tiny_random")
    assert {"all_embeddings.pt", "myrank_train.txt", "confidence_train.txt", "manifest.json"} <= outputs


@pytest.mark.slow
def test_every_loss_of_distillation_is_logged(chain):
    _, found, _ = chain
    history = json.loads((found["distill"] / "metrics" / "validation.json").read_text())["history"]
    assert {"train/loss", "train/loss_student", "train/loss_ranking"} <= history[0].keys()


@pytest.mark.slow
def test_tensorboard_shows_speed_memory_rates_and_samples_of_text(chain):
    _, found, _ = chain
    for stage, texts in (
        ("student", {"recommendations"}),
        ("distill", {"recommendations"}),
        ("teacher", {"prompts", "recommendations"}),
    ):
        assert {"learning_rate/rest", "speed/rows_per_second", "memory/process_gib"} <= events_of(found[stage]).keys()
        shown = texts_of(found[stage])
        assert shown.keys() == texts
        assert len(shown["recommendations"].splitlines()) == 2 + 5


@pytest.mark.slow
def test_a_stage_logs_its_folder_first_and_last_and_little_between(chain):
    _, found, done = chain
    for stage, folder in found.items():
        lines = [line.partition(" ")[2] for line in done[stage].stderr.splitlines()]  # the time is ahead
        shown = f"result/{folder.name}"
        assert lines[0] == f"{stage}: {shown}"
        assert re.fullmatch(rf"{stage}: done in [\d:]+ (s|min), see {shown}", lines[-2])
        assert lines[-1].startswith(f"{stage}: next: python -m llm2rec.")
        chatter = [line for line in done[stage].stderr.splitlines() if re.search("[Ww]arning|Traceback", line)]
        assert chatter == []


@pytest.mark.slow
def test_the_released_programs_objective_is_trained_by_name(chain):
    folder, _, _ = chain
    done = run(folder, "distill", *STUDENT, "distill=dllm2rec_code")
    assert "separate input and output item tables: fusion_sides=input" in done.stderr
    last = runs(folder)[-1]
    assert json.loads((last / "run.json").read_text())["label"].startswith("sasrec + dllm2rec_code (")
    assert json.loads((last / "student" / "config.json").read_text())["arguments"]["tie_items"] is False
    for entry in json.loads((last / "metrics" / "validation.json").read_text())["history"]:
        student, dros, ranking = (entry[f"train/loss_{name}"] for name in ("student", "dros", "ranking"))
        assert entry["train/loss"] == pytest.approx(student + 0.5 * dros + 0.7 * ranking, rel=1e-5)
    split = run(
        folder, "distill", *STUDENT, "distill=dllm2rec_code", "student.training.micro_batch_size=9", check=False
    )
    check_one_clear_error(split, "distill.dros.in_ranking is 'broadcast'")


@pytest.mark.slow
def test_stages_say_little_and_say_it_once(chain):
    _, _, done = chain
    for stage, process in done.items():
        assert process.stdout == ""
        lines = process.stderr.splitlines()
        assert len(lines) == len(set(lines))
        # "17:31:24 teacher: ..." and the statistics of the data stage; no library speaks.
        foreign = [line for line in lines if not line[:8].replace(":", "").isdigit()]
        assert stage == "data" or not foreign, foreign


@pytest.mark.slow
def test_resuming_a_finished_run_does_nothing(chain):
    folder, found, _ = chain
    before = (found["teacher"] / "metrics" / "time.json").read_bytes()
    done = run(folder, "teacher", *TEACHER, f"resume={found['teacher'].relative_to(folder)}")
    assert "finished already" in done.stderr
    assert (found["teacher"] / "metrics" / "time.json").read_bytes() == before


@pytest.mark.slow
def test_every_model_has_a_card_with_its_validation_numbers_and_no_place_of_this_machine(chain):
    folder, found, _ = chain
    for stage, part in (("student", "student"), ("teacher", "teacher"), ("distill", "student")):
        card = (found[stage] / part / "README.md").read_text()
        validation = json.loads((found[stage] / "metrics" / "validation.json").read_text())
        (best,) = (entry for entry in validation["history"] if entry["step"] == validation["best_step"])
        results = {each.metric_type: each.metric_value for each in ModelCard(card).data.eval_results}
        assert results == {name[4:]: round(value, 6) for name, value in best.items() if name.startswith("val/")}
        assert results[validation["select_on"]] == round(validation["best"], 6)
        assert not [path for path in (str(folder), str(ROOT), "teacher_outputs") if path in card]
    assert "distilled from the teacher `ilora-tiny_random`" in card


# ---- bad input -------------------------------------------------------------------------------------------------------

# Many more in test_bad_inputs.py; these go through the interpreter as users start it.
BAD = {
    "bad value": ("student", [*TOY, "student.training.batch_size=0"], "`batch_size` is 0, expected at least 1"),
    "nothing to resume": ("student", [*TOY, "resume=result/never"], "`resume` is 'result/never'"),
}


def check_one_clear_error(done, cause):
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if cause in line]) == 1, done.stderr
    assert len(done.stderr.splitlines()) <= 16


@pytest.mark.parametrize(("stage", "overrides", "cause"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_clear_line(stage, overrides, cause, tmp_path):
    command = [*PLAIN, f"llm2rec.{stage}", *overrides]
    check_one_clear_error(run_command(tmp_path, command, check=False), cause)


@pytest.mark.slow
def test_a_multirun_trains_each_seed_in_a_folder_of_its_own(tmp_path):
    run(tmp_path, "student", "-m", "seed=1,2", *STUDENT, "student.training.epochs=1")
    (sweep,) = (tmp_path / "result").iterdir()
    records = [json.loads((sweep / job / "run.json").read_text()) for job in ("0", "1")]
    assert [(record["seed"], record["status"]) for record in records] == [(1, "finished"), (2, "finished")]
    evaluated = run(tmp_path, "evaluate", *TOY)
    assert "sasrec [1]" in evaluated.stderr
    assert "sasrec [2]" in evaluated.stderr


@pytest.mark.slow
def test_the_report_finds_all_that_the_chain_leaves(chain):
    folder, found, _ = chain
    run(folder, "evaluate", *TOY)
    report = json.loads((runs(folder)[-1] / "report.json").read_text())
    assert report["notes"] == {"curves": [], "overlap": [], "gates": [], "samples": []}
    assert [(each["teacher"], each["run"]) for each in report["overlaps"]] == [
        ("ilora-tiny_random", found["teacher"].name)
    ]
    assert [each["name"] for each in report["gates"]] == ["ilora tiny_random"]
    assert {each["kind"] for each in report["curves"]} == {"students", "teachers"}
    assert f"python -m llm2rec.teacher {' '.join(TEACHER)}" in [each["command"] for each in report["runs"]]
    assert (runs(folder)[-1] / "report.html").stat().st_size > 20_000


@pytest.mark.slow
def test_the_released_programs_files_are_written_by_a_command(chain):
    folder, _, _ = chain
    done = run(folder, "distill.export_dllm2rec", *TOY)
    written = files_of(folder / "data" / "dllm2rec")
    assert written == {
        *(f"data/toy/{name}" for name in ("data_statis.df", "train_data.df", "val_data.csv", "test_data.csv")),
        *(f"tocf/toy/{name}" for name in ("all_embeddings.pt", "myrank_train.txt", "confidence_train.txt")),
    }
    assert "run its main.py there with --data toy" in done.stderr
    record = json.loads((runs(folder)[-1] / "run.json").read_text())
    assert (record["stage"], record["status"]) == ("distill.export_dllm2rec", "finished")
