"""A stand-in for litdata: what linerate calls of it."""

import fake_store


class StreamingDataset(fake_store.Shuffled):
    def __init__(self, folder: str, *, shuffle: bool) -> None:
        assert shuffle
        super().__init__(folder)
