"""Write docs/api.md, the reference of `import llm2rec`, from its docstrings.

    .venv/bin/python cmd/build_api_page.py

Run it after changing a public docstring or signature; tests/test_api.py compares.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
TITLES = {"Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
LONGEST_SIGNATURE = 100


def page() -> str:
    """The whole page, in Markdown."""
    import llm2rec

    about, _, rest = inspect.cleandoc(llm2rec.__doc__ or "").partition("\n\n")
    parts = [
        "# Python API",
        "",
        "Generated from the docstrings by `cmd/build_api_page.py`: edit those, then run it again.",
        "",
        about,
        "",
        rest,
    ]
    for name in llm2rec.__all__:
        parts += ["", *described(f"llm2rec.{name}", getattr(llm2rec, name))]
    return "\n".join(parts) + "\n"


def described(name: str, thing: Any) -> Iterator[str]:
    """The section of a function or class; dataclasses show their fields, other classes their methods."""
    yield f"## `{name}`"
    yield from body(name, thing)
    if dataclasses.is_dataclass(thing):
        yield from bases_described(thing)
    elif inspect.isclass(thing):
        for method_name, method in public_methods(thing):
            yield from ["", f"### `{name.rpartition('.')[2]}.{method_name}`"]
            yield from body(method_name, method)


def public_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class and of its bases in this package, in the order of the source."""
    seen = set()
    for each in [kind, *(base for base in kind.__mro__[1:] if base.__module__.startswith("llm2rec."))]:
        for name, value in vars(each).items():
            is_shown = isinstance(value, classmethod | staticmethod | property) or inspect.isfunction(value)
            if is_shown and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, value if isinstance(value, property) else getattr(kind, name)


def body(name: str, thing: Any) -> Iterator[str]:
    """Signature and docstring."""
    if not isinstance(thing, property):
        yield from ["", "```python", signature(name, thing), "```"]
    yield ""
    yield from rendered(inspect.cleandoc(thing.__doc__ or ""))


def bases_described(kind: Any) -> Iterator[str]:
    """Attributes that a dataclass inherits from dataclasses of this package."""
    for base in kind.__mro__[1:]:
        if dataclasses.is_dataclass(base) and base.__module__.startswith("llm2rec."):
            for heading, text in sections(inspect.cleandoc(base.__doc__ or "")):
                if heading == "Attributes":
                    yield from ["", f"**Attributes of every `{base.__name__}`**", "", *entries(text)]


def signature(name: str, thing: Any) -> str:
    """The signature, on one line or with a line for each argument."""
    inspected = inspect.signature(thing)
    shown = [parameter_text(each) for each in inspected.parameters.values() if not each.name.startswith("_")]
    kinds = [each.kind for each in inspected.parameters.values() if not each.name.startswith("_")]
    first_keyword = next((i for i, kind in enumerate(kinds) if kind is inspect.Parameter.KEYWORD_ONLY), None)
    if first_keyword is not None and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(first_keyword, "*")
    has_result = inspected.return_annotation not in (inspect.Signature.empty, None) and not inspect.isclass(thing)
    result = f" -> {type_text(inspected.return_annotation)}" if has_result else ""
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) <= LONGEST_SIGNATURE:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){result}"


def parameter_text(parameter: inspect.Parameter) -> str:
    """A parameter with its type and default."""
    text = parameter.name
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        text = f"*{text}"
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {type_text(parameter.annotation)}"
    if parameter.default is not inspect.Parameter.empty:
        default = parameter.default
        text += f" = {'...' if repr(default).startswith('<') else repr(default)}"
    return text


def type_text(annotation: Any) -> str:
    """A type without the modules it comes from."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).replace("'", '"')


def sections(text: str) -> Iterator[tuple[str | None, str]]:
    """Parts of a docstring in Google's style, with their headings."""
    for part in re.split(rf"\n\n(?=(?:{'|'.join(TITLES)}):\n)", text.replace("``", "`")):
        heading = re.match(rf"({'|'.join(TITLES)}):\n", part)
        yield (None, part) if heading is None else (heading[1], part[heading.end() :].rstrip())


def rendered(text: str) -> Iterator[str]:
    """A docstring as Markdown."""
    for heading, part in sections(text):
        if heading is None:
            yield part
        elif heading in ("Returns", "Yields"):
            yield from ["", f"**{TITLES[heading]}** {' '.join(part.split())}"]
        else:
            yield from ["", f"**{TITLES[heading]}**", "", *entries(part)]


def entries(text: str) -> Iterator[str]:
    """A list of arguments, attributes or errors; one that goes over several lines is joined."""
    for entry in re.split(r"\n(?=    \S)", text):
        name, _, meaning = entry.strip().partition(": ")
        lines = [line.strip() for line in meaning.splitlines()]
        listed = [f"  {line}" if line.startswith("- ") else line for line in lines if line]
        yield f"- `{name}`: " + re.sub(r"\n(?!  - )", " ", "\n".join(listed))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
