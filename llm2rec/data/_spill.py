"""Tables that are written once and read part by part, so that they need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from llm2rec.core.logging import Progress

__all__ = ["Spill", "read_batches"]


class Spill:
    """A table in parts, in a file or in memory.

    Args:
        file: The file; None keeps the table in memory.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._kept: list[pa.Table] = []
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._sink: pa.NativeFile | None = None

    def append(self, part: pa.Table) -> None:
        """Add a part; all have the same columns."""
        if self._file is None:
            self._kept.append(part)
            return
        if self._writer is None:
            self._sink = pa.OSFile(str(self._file), "wb")
            self._writer = pa.ipc.new_stream(self._sink, part.schema)
        self._writer.write_table(part)

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None and self._sink is not None:
            self._writer.close()
            self._sink.close()

    def parts(self) -> Iterator[pa.Table]:
        """Yield the parts in order; may be called again."""
        if self._writer is None or self._file is None:
            yield from self._kept
            return
        for batch in read_batches(self._file):
            yield pa.Table.from_batches([batch])


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a stream file, with progress; read, not mapped, so that their memory is freed."""
    bar = Progress(f"read {file.parent.name}/{file.name}", file.stat().st_size, "byte")
    with pa.OSFile(str(file), "rb") as source, pa.ipc.open_stream(source) as reader, bar:
        for batch in reader:
            yield batch
            bar.advance(batch.nbytes)
