"""Shards and epochs of mosaicml-streaming and litdata, each in its own format and in a process of its own."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from linerate.bench.contest import Contest, Disagreement
from linerate.bench.images import ImageFolder
from linerate.bench.peers import missing_peer, open_peer
from linerate.bench.suites.shard_peers import require_same_samples
from linerate.bench.timing import Side

# Module -> how its writer and its reader are called in a record.
WRITERS = {"streaming": "mosaicml-streaming MDSWriter", "litdata": "litdata BinaryWriter, 64 MB chunks"}
READERS = {
    "streaming": "mosaicml-streaming StreamingDataset, shuffle=True",
    "litdata": "litdata StreamingDataset, shuffle=True",
}

Samples = list[tuple[bytes, int]]


def against_writers(
    images: ImageFolder,
    folder: Path,
    *,
    ours: Side,
    our_samples: Callable[[], Samples],
    **about: Any,
) -> Iterator[Contest]:
    """A contest with each writer, which is fed the same files. our_samples: packs, and reads them back."""
    for module, peer in WRITERS.items():
        missing = missing_peer(module)
        if missing:
            yield Contest(peer=peer, ours=ours, missing=missing, **about)
            continue
        out = folder / module
        with open_peer(module) as ask:
            write = partial(ask, f"write_{module}", **_files(images), out=os.fspath(out))

            def agree(
                out: Path = out,
                module: str = module,
                write: Callable[[], None] = write,
                ask: Callable[..., Any] = ask,
            ) -> str:
                remove(out)
                write()
                theirs = ask("digest_epoch", reader=module, folder=os.fspath(out), batch=1)
                ask("forget", folder=os.fspath(out))
                return require_same_samples(_digests(our_samples()), _undone(theirs))

            yield Contest(
                peer=peer,
                ours=ours,
                theirs=Side(run=write, prepare=partial(remove, out)),
                agree=agree,
                note="its own format without hashes, in a process of its own; fed the list of files",
                **about,
            )


def against_readers(
    images: ImageFolder,
    folder: Path,
    *,
    batch: int,
    ours: Side,
    our_samples: Callable[[], Samples],
    may_leave_out: int,
    **about: Any,
) -> Iterator[Contest]:
    """A contest with each reader over the same images, which its own writer wrote before.

    may_leave_out: as many samples may be absent from our epoch, whose last batch is not full.
    """
    for module, peer in READERS.items():
        missing = missing_peer(module)
        if missing:
            yield Contest(peer=peer, ours=ours, missing=missing, **about)
            continue
        out = folder / module
        remove(out)
        with open_peer(module) as ask:
            ask(f"write_{module}", **_files(images), out=os.fspath(out))
            epoch = {"reader": module, "folder": os.fspath(out), "batch": batch}

            def agree(ask: Callable[..., Any] = ask, epoch: dict[str, Any] = epoch) -> str:
                theirs = _undone(ask("digest_epoch", **epoch))
                if [label for _, label in theirs] == list(images.labels):
                    raise Disagreement("the peer's epoch comes in the order of the files: it is not shuffled")
                return require_same_samples(_digests(our_samples()), theirs, may_leave_out=may_leave_out)

            yield Contest(
                peer=peer,
                ours=ours,
                theirs=Side(run=partial(ask, "read_epoch", **epoch)),
                agree=agree,
                note="its own format, in a process of its own whose dataset stays open",
                **about,
            )


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _files(images: ImageFolder) -> dict[str, Any]:
    return {"files": [os.fspath(path) for path in images.files], "labels": list(images.labels)}


def _digests(samples: Sequence[tuple[bytes, int]]) -> Samples:
    return [(hashlib.sha256(jpeg).digest(), label) for jpeg, label in samples]


def _undone(samples: Sequence[tuple[str, int]]) -> Samples:
    """What comes out of JSON, as bytes again."""
    return [(bytes.fromhex(digest), label) for digest, label in samples]
