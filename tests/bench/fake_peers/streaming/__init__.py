"""A stand-in for mosaicml-streaming: what linerate calls of it."""

from typing import Any

import fake_store


class MDSWriter:
    def __init__(self, *, out: str, columns: dict[str, str]) -> None:
        assert columns == {"jpg": "bytes", "cls": "int"}
        self.out, self.samples = out, []

    def __enter__(self) -> "MDSWriter":
        return self

    def write(self, sample: dict[str, Any]) -> None:
        self.samples.append(sample)

    def __exit__(self, *_: object) -> None:
        fake_store.save(self.samples, self.out)


class StreamingDataset(fake_store.Shuffled):
    def __init__(self, *, local: str, batch_size: int, shuffle: bool) -> None:
        assert shuffle
        super().__init__(local)
