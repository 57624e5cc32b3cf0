"""What other projects do, one task a line; run by the python that has them.

stdin: {"task": NAME, "what": {...}}. stdout: {"value": ...} or {"error": TEXT}. Only lightly's need our code.
Legend: N samples of a batch. A sample is a JPEG with its label.
"""

import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# What stays open from task to task: folder -> dataset, and the step.
_open: dict[str, Any] = {}


def write_img2dataset(
    files: Sequence[str], labels: Sequence[int], *, out: str, resize: int | None, quality: int
) -> None:
    """Read, resize (or only decode) and write every file as img2dataset does with what it downloaded."""
    import pyarrow as pa
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    resizer = Resizer(
        image_size=resize or 256,
        resize_mode="keep_ratio" if resize else "no",
        resize_only_if_bigger=True,
        encode_quality=quality,
        skip_reencode=not resize,
    )
    schema = pa.schema([("key", pa.string()), ("label", pa.int64())])
    writer = WebDatasetSampleWriter(0, out, False, 5, schema, "jpg")
    for index, (path, label) in enumerate(zip(files, labels, strict=True)):
        jpeg, *_, error = resizer(io.BytesIO(Path(path).read_bytes()))
        if error is not None:
            raise ValueError(f"{path}: {error}")
        key = f"{index:09d}"
        writer.write(jpeg, key, None, {"key": key, "label": label})
    writer.close()


def write_streaming(files: Sequence[str], labels: Sequence[int], *, out: str) -> None:
    """MDS shards of the size that it takes by itself, without hashes."""
    from streaming import MDSWriter

    with MDSWriter(out=out, columns={"jpg": "bytes", "cls": "int"}) as writer:
        for path, label in zip(files, labels, strict=True):
            writer.write({"jpg": Path(path).read_bytes(), "cls": label})


def write_litdata(files: Sequence[str], labels: Sequence[int], *, out: str) -> None:
    """Chunks of 64 MB by the writer that `litdata.optimize` runs in its processes."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(out, chunk_bytes="64MB")
    for index, (path, label) in enumerate(zip(files, labels, strict=True)):
        writer[index] = {"jpg": Path(path).read_bytes(), "cls": label}
    writer.done()
    writer.merge(1)


def _open_streaming(folder: str, batch: int) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=folder, batch_size=batch, shuffle=True)


def _open_litdata(folder: str, batch: int) -> Any:
    from litdata import StreamingDataset

    return StreamingDataset(folder, shuffle=True)


def read_epoch(reader: str, *, folder: str, batch: int) -> int:
    """Samples of the next epoch, shuffled; the JPEGs of a batch are copied into one run of bytes."""
    num_samples = 0
    samples = _epoch(reader, folder, batch)
    while some := list(itertools.islice(samples, batch)):
        bytearray(b"".join(jpeg for jpeg, _ in some))
        num_samples += len(some)
    return num_samples


def digest_epoch(reader: str, *, folder: str, batch: int) -> list[tuple[str, int]]:
    """(SHA-256 of the JPEG, label) of every sample of the next epoch, as read_epoch reads them."""
    return [(hashlib.sha256(jpeg).hexdigest(), label) for jpeg, label in _epoch(reader, folder, batch)]


def _epoch(reader: str, folder: str, batch: int) -> Iterator[tuple[bytes, int]]:
    if folder not in _open:
        _open[folder] = {"streaming": _open_streaming, "litdata": _open_litdata}[reader](folder, batch)
    for sample in _open[folder]:
        yield sample["jpg"], sample["cls"]


def forget(folder: str) -> None:
    """The folder's dataset is closed: what is written there anew is read anew."""
    _open.pop(folder, None)


def lightly_losses(*, steps: int, **shape: Any) -> list[float]:
    """The losses of the first steps from the start that ours has too, in float64."""
    import torch

    from linerate.bench.suites.step_start import curve_views

    run = _lightly_step(dtype=torch.float64, **shape)
    size, device = shape["size"], shape["device"]
    return [float(run(*views)) for views in curve_views(steps, shape["batch"], size, device=device)]


def lightly_step(**shape: Any) -> None:
    """One step on views that stay the same; done when the device has done it."""
    import torch

    name = json.dumps(shape)
    if name not in _open:
        from linerate.bench.suites.step_start import random_views

        size, device = shape["size"], shape["device"]
        views = [random_views(shape["batch"], size, seed=view, device=device) for view in (0, 1)]
        _open[name] = (_lightly_step(dtype=torch.float32, **shape), views)
    run, views = _open[name]
    run(*views)
    if shape["device"] == "cuda":
        torch.cuda.synchronize()


def lightly_train(
    folder: str, *, num_batches: int, augmentation: str, num_workers: int, **shape: Any
) -> list[list[int]]:
    """So many steps on views that lightly's loader makes of a folder's images; the shapes of the last ones.

    Dataset, transform and DataLoader are lightly's and torch's own; the epochs go on from task to task.
    """
    import torch
    from lightly import transforms
    from lightly.data import LightlyDataset

    name = json.dumps([folder, augmentation, num_workers, shape])
    if name not in _open:
        transform = {"v1": transforms.MoCoV1Transform, "v2": transforms.MoCoV2Transform}[augmentation]
        loader = torch.utils.data.DataLoader(
            LightlyDataset(folder, transform=transform(input_size=shape["size"])),
            batch_size=shape["batch"],
            shuffle=True,
            drop_last=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=shape["device"] == "cuda",
        )
        batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
        _open[name] = (_lightly_moco(dtype=torch.float32, **shape), batches)
    moco, batches = _open[name]
    views: list[Any] = []
    for (query, key), *_ in itertools.islice(batches, num_batches):
        views = [view.to(shape["device"], non_blocking=True) for view in (query, key)]
        moco.step_on_floats(*views)
    if shape["device"] == "cuda":
        torch.cuda.synchronize()
    return [list(view.shape) for view in views]


def _lightly_step(**shape: Any) -> Callable[[Any, Any], Any]:
    step: Callable[[Any, Any], Any] = _lightly_moco(**shape).step
    return step


def _lightly_moco(
    *, encoder: str, num_keys: int, device: str, autocast: bool, num_threads: int, dtype: Any, **_: int
) -> Any:
    import torch

    from linerate.bench.suites import step_start
    from linerate.bench.suites.train_peers import LightlyMoCo

    torch.set_num_threads(num_threads)
    built, queue = step_start.start(encoder, num_keys=num_keys, device=device, dtype=dtype)
    return LightlyMoCo(
        built,
        queue.keys,
        temperature=step_start.TEMPERATURE,
        ema_momentum=step_start.EMA_MOMENTUM,
        lr=step_start.LR,
        autocast=autocast,
    )


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task
    for task in (
        write_img2dataset,
        write_streaming,
        write_litdata,
        read_epoch,
        digest_epoch,
        forget,
        lightly_losses,
        lightly_step,
        lightly_train,
    )
}


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"value": TASKS[asked["task"]](**asked["what"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    _open.clear()


if __name__ == "__main__":
    main()
