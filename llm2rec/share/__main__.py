"""``python -m llm2rec.share``: put a finished student or teacher on the Hugging Face Hub."""

import sys
from typing import Any

from llm2rec.share.pushing import push
from llm2rec.share.settings import ShareSettings
from llm2rec.stage import build, question


@question("share")
def main(cfg: Any) -> None:
    """Put it there and tell where."""
    asked = build(cfg, ShareSettings)
    address = push(asked.run, asked.repo, private=asked.private, base_model=asked.base_model, message=asked.message)
    sys.stdout.write(address + "\n")


if __name__ == "__main__":
    main()
