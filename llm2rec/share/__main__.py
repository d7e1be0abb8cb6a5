"""``python -m llm2rec.share``: upload a finished student or teacher to the Hugging Face Hub."""

import sys
from typing import Any

from llm2rec.command import question
from llm2rec.config import build
from llm2rec.share.pushing import ShareSettings, push


@question("share")
def main(cfg: Any) -> None:
    """Upload a model and print the URL of the commit."""
    settings = build(cfg, ShareSettings)
    options: dict[str, Any] = {"private": settings.private, "base_model": settings.base_model}
    url = push(settings.run, settings.repo, message=settings.message, **options)
    sys.stdout.write(url + "\n")


if __name__ == "__main__":
    main()
