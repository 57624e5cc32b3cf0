from typing import Any

import fake_store


class BinaryWriter:
    def __init__(self, folder: str, *, chunk_bytes: str) -> None:
        self.folder, self.samples = folder, {}

    def __setitem__(self, index: int, sample: dict[str, Any]) -> None:
        self.samples[index] = sample

    def done(self) -> None:
        fake_store.save([*self.samples.values()], self.folder)

    def merge(self, num_workers: int) -> None:
        assert num_workers == 1
