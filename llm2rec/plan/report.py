"""A plan as a table for people."""

from typing import Any

__all__ = ["format_plan", "told_bytes", "told_seconds"]

_LAUNCHES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero2_offload": "ZeRO-2, offloaded", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
_DISK = {
    "prepared_data": "prepared data",
    "llm": "language model, 16 bits",
    "gate_inputs": "cached gate inputs",
    "checkpoints": "checkpoints, best weights",
    "adapter": "adapter and head",
    "title_vectors": "title vectors",
    "outputs_embeddings": "outputs: all_embeddings.pt",
    "outputs_text": "outputs: text files",
    "outputs_mapped": "outputs: mapped twins",
    "outputs_blocks": "outputs: blocks, until done",
    "student": "student",
}


def told_bytes(size: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def told_seconds(seconds: float) -> str:
    """Seconds as a person says them."""
    day = 86400
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (2 * day, 3600, "h"), (730 * day, day, "days")):
        if seconds < limit:
            return f"{seconds / divisor:.1f} {unit}"
    return f"{seconds / 86400 / 365.25:,.1f} years"


def format_plan(plan: dict[str, Any], heading: str, assumptions: list[str]) -> str:
    """Lay a plan out for a terminal.

    Args:
        plan: What `llm2rec.plan.planner.plan` returned.
        heading: What is planned.
        assumptions: What was taken for granted, a sentence each.
    """
    lines = [heading, "", *_memory(plan), "", *_time(plan), "", *_disk(plan), "", "Taken for granted:"]
    lines += [f"  - {each}" for each in assumptions]
    if plan["advice"]:
        lines += ["", "What to change:", *(f"  - {each}" for each in plan["advice"])]
    return "\n".join(lines)


def _memory(plan: dict[str, Any]) -> list[str]:
    on = "with_checkpointing" if plan["gradient_checkpointing"] else "without_checkpointing"
    chosen = plan["memory"][plan["launch"]]
    parts = {kind: chosen[kind]["parts"] for kind in ("without_checkpointing", "with_checkpointing")}
    rows, sharing = plan["rows_per_micro_batch"], f"; {_LAUNCHES[plan['launch']]}" if plan["gpus"] > 1 else ""
    capacity = plan["card"]["memory_bytes"]
    lines = [
        f"Memory of each GPU ({plan['card']['name']}, {told_bytes(capacity)}{sharing}), "
        f"{rows} rows of up to {plan['work']['longest_tokens']} tokens",
        f"  {'':<30}{'as it is':>14}{'checkpointing':>16}",
    ]
    for name in parts["without_checkpointing"]:
        values = [told_bytes(parts[kind][name]) for kind in parts]
        if parts["without_checkpointing"][name] > 0:
            lines.append(f"  {name:<30}{values[0]:>14}{values[1]:>16}")
    for launch, kinds in plan["memory"].items():
        told = [kinds[kind] for kind in parts]
        marks = [told_bytes(each["total"]) + (" fits" if each["fits"] else " NO  ") for each in told]
        here = "total" if launch == plan["launch"] else f"total with {_LAUNCHES[launch]}"
        lines.append(f"  {here:<30}{marks[0]:>14}{marks[1]:>16}")
        largest = [f"{each['largest']} rows" for each in told]
        lines.append(f"  {'  micro-batch at most':<30}{largest[0]:>14}{largest[1]:>16}")
    export = plan["export_memory"]
    read = told_bytes(export["total"]) + (" fits" if export["fits"] else " NO  ")
    lines.append(f"  {'total in the export':<30}{read:>14}")
    lines.append(f"  The settings say {'checkpointing' if on == 'with_checkpointing' else 'as it is'}.")
    return lines


def _time(plan: dict[str, Any]) -> list[str]:
    speed, work = plan["speed"], plan["work"]
    lines = [
        f"Time on {plan['gpus']} x {plan['card']['name']}: {speed['tokens_per_second']:,.0f} tokens a second in "
        f"training ({speed['flops_per_token'] / 1e9:.3g} GFLOP a token), {work['train_tokens']:.0f} tokens a row",
    ]
    names = {
        "titles": f"reading {work['n_items']:,} titles",
        "gate_inputs": "gate inputs",
        "training": f"training, {work['n_train_rows']:,} rows",
        "validation": f"validation, {work['n_validation_rows']:,} rows",
        "export": f"export, {work['n_rows']:,} rows",
    }
    lines += [f"  {names[name]:<40}{told_seconds(value):>14}" for name, value in plan["seconds"].items()]
    lines.append(f"  {'teacher, in all, at most':<40}{told_seconds(sum(plan['seconds'].values())):>14}")
    student = plan["student"]
    fits = "" if student["memory"]["fits"] else ", does NOT fit"
    lines.append(
        f"  {student['name'] + ' on one GPU, an epoch':<40}{told_seconds(student['seconds_per_epoch']):>14}"
        f"  ({told_bytes(student['memory']['total'])}{fits})"
    )
    lines.append(f"  {student['name'] + ', all epochs at most':<40}{told_seconds(student['seconds']):>14}")
    return lines


def _disk(plan: dict[str, Any]) -> list[str]:
    lines = [f"Disk: {told_bytes(sum(plan['disk_bytes'].values()))}"]
    lines += [f"  {_DISK[name]:<40}{told_bytes(size):>14}" for name, size in plan["disk_bytes"].items()]
    host = plan["host_bytes"]
    lines.append(f"Memory of the machine, for each process: {told_bytes(sum(host.values()))}")
    lines += [f"  {name.replace('_', ' '):<40}{told_bytes(size):>14}" for name, size in host.items()]
    return lines
