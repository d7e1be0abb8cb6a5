"""Compare the library with reference numbers: ``python tests/golden/check.py [DIR]``.

Runs every reference file in DIR that the project covers, with the library's own code, and prints the file, the case
and the largest relative error of its tensors: ``max|ours - reference| / max|reference|``. Sizes, scales and the number
of cases are read from the files, so other files of the same format work too. DIR is ../shared/golden by default, and
the copies beside this program where there is no such folder.

Exit status: 0 if all errors are at most 1e-5, 1 if one is larger or a file is broken, 2 if DIR holds nothing to check.
To cover another file, write its checker and enter it in CHECKERS.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY) not in sys.path:  # run as a script, Python puts this file's own folder there instead
    sys.path.insert(0, str(REPOSITORY))

from peft import get_peft_model  # noqa: E402

from llm2rec.core.metrics import ranking_metrics, target_ranks  # noqa: E402
from llm2rec.core.train.optimizer import warmup_cosine  # noqa: E402
from llm2rec.distill import kd_losses  # noqa: E402
from llm2rec.distill.data_bridge import TeacherBatch  # noqa: E402
from llm2rec.distill.objective import candidate_weights, objective  # noqa: E402
from llm2rec.distill.settings import DLLM2RecCodeSettings  # noqa: E402
from llm2rec.ilora import ILoraConfig, ILoraLinear  # noqa: E402
from llm2rec.ilora.gate import build_gate  # noqa: E402
from llm2rec.teacher.title.matching import ground, judge  # noqa: E402

TOLERANCE = 1e-5
Result = tuple[str, float | None]  # name of the case, largest relative error (None: not covered)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value; infinite where the shapes differ."""
    if ours.shape != reference.shape:
        return math.inf
    ours, reference = ours.detach().double(), reference.double()
    largest = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours - reference).abs().max() / largest)


def cases(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split ``case0.x, case0.y, case1.x`` into one dictionary per case."""
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.partition(".")
        split.setdefault(name, {})[field] = tensor
    return dict(sorted(split.items(), key=lambda item: (len(item[0]), item[0])))


def check_ilora_linear(path: Path) -> Iterator[Result]:
    """The adapted linear layer: output and gradients of ``(y * cotangent).sum()``."""
    settings = {f"case{entry['case']}": entry for entry in read_json(path.with_suffix(".json"))}
    for name, case in cases(load_file(path)).items():
        model, layer = adapted_layer(case, settings[name])
        down, up = layer.ilora_A["default"].weight, layer.ilora_B["default"].weight
        x, gates = case["x"].requires_grad_(), case["gates"].requires_grad_()
        with model.base_model.hold(gates):
            y = model(x)
            (y * case["cotangent"]).sum().backward()
        ours = {"y": y, "grad_x": x.grad, "grad_lora_A": down.grad, "grad_lora_B": up.grad, "grad_gates": gates.grad}
        errors = {field: relative_error(tensor, case[field]) for field, tensor in ours.items()}
        errors["scaling"] = relative_error(
            torch.tensor(layer.layouts["default"].scale), torch.tensor(settings[name]["scaling"])
        )
        yield name, largest(errors.values())


def adapted_layer(case: dict[str, Tensor], settings: dict[str, Any]) -> tuple[Any, ILoraLinear]:
    """Put the case's weights into a one-layer model adapted the way a user adapts any model."""
    (out_features, in_features), rank = case["weight"].shape, case["lora_A"].shape[0]
    experts, scaling = case["gates"].shape[1], settings["scaling"]
    alpha = settings.get("lora_alpha", scaling * rank / experts)
    rule = "total" if math.isclose(alpha / rank, scaling) and experts > 1 else "per_expert"
    model = nn.Sequential(nn.Linear(in_features, out_features, bias="bias" in case))
    model.load_state_dict({f"0.{field}": case[field] for field in ("weight", "bias") if field in case})
    config = ILoraConfig(
        r=rank, num_experts=experts, alpha=alpha, scaling=rule, target_modules=["0"], gate_input_size=1
    )
    adapted = get_peft_model(model, config)
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        layer.ilora_A["default"].weight.copy_(case["lora_A"])
        layer.ilora_B["default"].weight.copy_(case["lora_B"])
    return adapted, layer


def check_gates(path: Path) -> Iterator[Result]:
    """The gate networks in evaluation mode, each on the same user vectors."""
    kinds = cases(load_file(path))
    users = kinds.pop("user_embeds")[""]
    for kind, fields in kinds.items():
        if kind not in GATES:
            yield kind, None
            continue
        name, renamed = GATES[kind]
        reference = fields.pop("out")
        weights = {rename(key, renamed): tensor for key, tensor in fields.items()}
        config = ILoraConfig(
            r=reference.shape[1], num_experts=reference.shape[1], gate=name, gate_input_size=users.shape[1]
        )
        gate = build_gate(config).eval()
        gate.load_state_dict(weights)
        yield kind, relative_error(gate(users), reference)


# The released program's name of a gate -> ours, and how the names of its weights become ours.
GATES: dict[str, tuple[Any, dict[str, str]]] = {
    "Dense": ("linear", {r"linear_layer\.": ""}),
    "topK": ("topk_released", {r"linear_layer\.": ""}),
    "Drop": ("dropout", {r"linear_layer\.": ""}),
    "MLP": ("mlp", {r"linear_layer1\.": "down.", r"linear_layer2\.": "up."}),
    "conv": (
        "conv",
        {
            r"^conv1\.": "stem.",
            r"^bn1\.": "stem_norm.",
            r"\.bn([12])\.": r".norm\1.",
            r"^layer(\d)\.(\d)\.": lambda match: f"blocks.{3 * (int(match[1]) - 1) + int(match[2])}.",
            r"^gate\.fc\.": "head.",
        },
    ),
}


def rename(key: str, renamed: dict[str, Any]) -> str:
    for pattern, replacement in renamed.items():
        key = re.sub(pattern, replacement, key)
    return key


def check_dllm2rec_loss(path: Path) -> Iterator[Result]:
    """The objective of ``distill=dllm2rec_code``: candidate weights, each loss, their total, and its gradient."""
    given = {f"case{entry['case']}": entry for entry in read_json(path.with_suffix(".json"))}
    for name, case in cases(load_file(path)).items():
        settings = dllm2rec_code(given[name])
        logits, top_k = case["logits"].requires_grad_(), settings.ranking.top_k
        teacher = TeacherBatch(case["teacher_ranking"][:, :top_k], case["teacher_distance"][:, :top_k])
        losses = objective(
            logits,
            case["target"],
            teacher,
            torch.ones(len(logits)),
            settings,
            negatives=case["negative"],
            propensity=case["propensity"],
        )
        losses["loss"].mean().backward()
        ours = {
            "weight_position": kd_losses.position_weights(top_k, settings.ranking.beta).expand(len(logits), -1),
            "weight_confidence": kd_losses.confidence_weights(teacher.distance, settings.ranking.weight_floor),
            "weight_consistency": kd_losses.consistency_weights(
                logits, teacher.ranking, top_k, floor=settings.ranking.weight_floor
            ),
            "weight": candidate_weights(logits, teacher, settings.ranking),
            "grad_logits": logits.grad,
            **{DLLM2REC_LOSSES[loss]: values.mean() for loss, values in losses.items()},
        }
        # A part that a case leaves out (alpha or lam 0) is not in the file.
        fields = [field for field in case if field.startswith(("weight", "loss", "grad"))]
        missing = {"loss_bce", "loss_total", "grad_logits"} - set(fields)
        if missing:
            raise KeyError(f"{name}.{min(missing)}")
        yield name, largest(relative_error(ours[field], case[field]) for field in fields)


def dllm2rec_code(case: dict[str, Any]) -> DLLM2RecCodeSettings:
    """The settings of ``distill=dllm2rec_code`` with a case's weights in place of the program's defaults."""
    settings = DLLM2RecCodeSettings()
    gammas = {key: value for key, value in case.items() if key.startswith("gamma_")}
    # The program's beta is the robust radius; that of the position weights is fixed.
    return replace(
        settings,
        dros=replace(settings.dros, weight=case["alpha"], beta=case["beta"]),
        ranking=replace(settings.ranking, weight=case["lam"], top_k=case["candidate_topk"], **gammas),
    )


DLLM2REC_LOSSES = {
    "loss_student": "loss_bce",
    "loss_dros": "loss_dros",
    "loss_ranking": "loss_ranking",
    "loss": "loss_total",
}


def check_metrics(path: Path) -> Iterator[Result]:
    """Hit rate and NDCG of scores, all rows counted."""
    tensors, reference = load_file(path), read_json(path.with_suffix(".json"))
    metrics = ranking_metrics(target_ranks(tensors["scores"], tensors["target"]), reference["topk"])
    for name in ("hr", "ndcg", "mrr"):
        if name in reference:
            ours = torch.tensor([metrics[f"{name}@{k}"] for k in reference["topk"]], dtype=torch.float64)
            yield name, relative_error(ours, torch.tensor(reference[name], dtype=torch.float64))


def check_lr_schedule(path: Path) -> Iterator[Result]:
    """Warm-up and cosine."""
    settings = read_json(path)
    reference = torch.tensor(settings.pop("values"), dtype=torch.float64)
    ours = [warmup_cosine(step, **settings) for step in range(len(reference))]
    yield "values", relative_error(torch.tensor(ours, dtype=torch.float64), reference)


def check_hit_ratio(path: Path) -> Iterator[Result]:
    """Which generated texts name one candidate, and the right one, by the released program's rule."""
    reference = read_json(path)
    hits = judge(reference["generate"], reference["cans"], reference["real"], rule="released")
    for metric, name in (("valid_ratio", "valid_ratio"), ("hr@1_valid", "hit_ratio_at_1")):
        ours = torch.tensor(hits.metrics[metric], dtype=torch.float64)
        yield metric, relative_error(ours, torch.tensor(reference[name], dtype=torch.float64))


def check_grounding(path: Path) -> Iterator[Result]:
    """Distances of all items from the predicted vectors, and the items' ranks."""
    tensors = load_file(path)
    predictions, item_vectors = tensors["prediction"], tensors["item_embeddings"]
    items, distances = ground(predictions, item_vectors, len(item_vectors))
    ranks = torch.arange(items.shape[1]).expand_as(items)
    for name, found in (("distance", distances), ("rank", ranks)):  # in the order of the items
        yield name, relative_error(torch.empty_like(found).scatter_(1, items, found), tensors[name])


CHECKERS: dict[str, Callable[[Path], Iterator[Result]]] = {
    "dllm2rec_loss.safetensors": check_dllm2rec_loss,
    "gates.safetensors": check_gates,
    "grounding.safetensors": check_grounding,
    "hit_ratio.json": check_hit_ratio,
    "ilora_linear.safetensors": check_ilora_linear,
    "lr_schedule.json": check_lr_schedule,
    "metrics.safetensors": check_metrics,
}


def largest(errors: Any) -> float:
    """The largest error; a NaN anywhere is the largest."""
    errors = list(errors)
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def report(path: Path) -> int:
    """Check one file and print a line per case.

    Returns:
        The number of errors that are too large; a file that cannot be read as its name says counts as one.
    """
    failed = 0
    try:
        for case, error in CHECKERS[path.name](path):
            if error is None:
                print(f"{path.name:28} {case:12} not covered")
                continue
            passed = error <= TOLERANCE  # false for NaN
            failed += not passed
            print(f"{path.name:28} {case:12} {error:.2e}{'' if passed else f'  LARGER THAN {TOLERANCE}'}")
    except (KeyError, OSError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        print(f"{path.name:28} BROKEN: {type(error).__name__}: {error}")
        return failed + 1
    return failed


def run(folder: Path) -> int:
    """Check a folder and print what was found.

    Returns:
        The exit status.
    """
    files = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".json"))
    covered = [name for name in files if name in CHECKERS]
    if not covered:
        print(f"{folder}: nothing to check; expected one of {', '.join(sorted(CHECKERS))}.", file=sys.stderr)
        return 2
    failed = sum(report(folder / name) for name in covered)
    # A .json beside a .safetensors of the same name belongs to it.
    stems = {Path(name).stem for name in files if name.endswith(".safetensors")}
    for name in files:
        if name not in CHECKERS and not (name.endswith(".json") and Path(name).stem in stems):
            print(f"{name:28} not covered")
    print(f"{len(covered)} files checked, {failed} failures (tolerance {TOLERANCE})")
    return 1 if failed else 0


def default_folder() -> Path:
    shared = REPOSITORY.parent / "shared" / "golden"
    return shared if shared.is_dir() else Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=default_folder())
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        print(f"{folder}: no such folder; give the folder of the reference files.", file=sys.stderr)
        return 2
    return run(folder)


if __name__ == "__main__":
    sys.exit(main())
