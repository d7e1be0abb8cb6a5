"""Format a plan for a terminal."""

from collections.abc import Mapping
from typing import Any

__all__ = ["format_bytes", "format_plan", "format_seconds"]

_LAUNCHES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero2_offload": "ZeRO-2, offloaded", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def format_bytes(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration with a unit."""
    day = 86400
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (2 * day, 3600, "h"), (730 * day, day, "days")):
        if seconds < limit:
            return f"{seconds / divisor:.1f} {unit}"
    return f"{seconds / 86400 / 365.25:,.1f} years"


def format_plan(plan: dict[str, Any], heading: str, assumptions: list[str]) -> str:
    """Format a plan as a table.

    Args:
        plan: Returned by `llm2rec.plan.planner.plan`.
        heading: First line.
        assumptions: A sentence each.
    """
    seconds, disk, student = plan["seconds"], plan["disk_bytes"], plan["student"]
    fits = "" if student["memory"]["fits"] else " (does NOT fit)"
    verdict = "Fits" if plan["fits"] else "Does NOT fit"
    needs = f"{format_seconds(sum(seconds.values()))} at most, {format_bytes(sum(disk.values()))} of disk"
    lines = [heading, f"{verdict}; {needs}", "", *_memory(plan), ""]
    lines.append(
        f"Time on {plan['gpus']} x {plan['card']['name']}, at most: {format_seconds(sum(seconds.values()))} "
        f"({plan['tokens_per_second']:,.0f} tokens/s in training)"
    )
    lines += _rows({name: format_seconds(value) for name, value in seconds.items() if value})
    lines += ["", f"Disk: {format_bytes(sum(disk.values()))}"]
    lines += _rows({name: format_bytes(size) for name, size in disk.items() if size})
    held = format_bytes(student["memory"]["total"])
    lines += ["", f"Student {student['name']} on one GPU, without activations: {held}{fits}"]
    lines += ["", "Assumptions:", *(f"  - {each}" for each in assumptions)]
    if plan["advice"]:
        lines += ["", "What to change:", *(f"  - {each}" for each in plan["advice"])]
    return "\n".join(lines)


def _memory(plan: dict[str, Any]) -> list[str]:
    kinds = ("without_checkpointing", "with_checkpointing")
    memory = [plan["memory"][kind] for kind in kinds]
    sharing = f", {_LAUNCHES[plan['launch']]}" if plan["gpus"] > 1 else ""
    on = "on" if plan["gradient_checkpointing"] else "off"
    lines = [
        f"Memory of each GPU ({plan['card']['name']}, {format_bytes(plan['card']['memory_bytes'])}{sharing}), "
        f"{plan['rows_per_micro_batch']} rows of up to {plan['work']['longest_tokens']} tokens; "
        f"teacher.gradient_checkpointing is {on}",
        f"  {'':<30}{'off':>14}{'on':>16}",
    ]
    for name in memory[0]["parts"]:
        sizes = [each["parts"][name] for each in memory]
        if any(sizes):
            lines.append(f"  {name:<30}{format_bytes(sizes[0]):>14}{format_bytes(sizes[1]):>16}")
    totals, rows = [_fits(each) for each in memory], [f"{each['largest']} rows" for each in memory]
    lines.append(f"  {'total':<30}{totals[0]:>14}{totals[1]:>16}")
    lines.append(f"  {'largest micro-batch':<30}{rows[0]:>14}{rows[1]:>16}")
    return [*lines, f"  {'total in the export':<30}{_fits(plan['export_memory']):>14}"]


def _fits(memory: dict[str, Any]) -> str:
    return format_bytes(memory["total"]) + (" fits" if memory["fits"] else " NO  ")


def _rows(values: Mapping[str, str]) -> list[str]:
    return [f"  {name.replace('_', ' '):<30}{value:>14}" for name, value in values.items()]
