"""What the fakes of other projects' formats share: a pickle a folder, read back in another order each time.

FAKE_PEERS_FLAW: `loses` a sample, `mixes` labels up, or keeps what it reads `sorted`.
"""

import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def save(samples: list[dict[str, Any]], folder: str) -> None:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "samples").write_bytes(pickle.dumps(samples))


class Shuffled:
    """The samples of a folder, shuffled anew by each iteration."""

    def __init__(self, folder: str) -> None:
        self.samples = pickle.loads((Path(folder) / "samples").read_bytes())
        self.epoch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        flaw = os.environ.get("FAKE_PEERS_FLAW")
        samples = [dict(sample) for sample in self.samples]
        if flaw == "mixes":
            samples[0]["cls"] += 1
        if flaw != "sorted":
            random.Random(self.epoch).shuffle(samples)
        self.epoch += 1
        return iter(samples[1:] if flaw == "loses" else samples)
