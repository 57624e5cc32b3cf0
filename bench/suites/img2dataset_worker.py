"""img2dataset's work on one shard without its downloads; run by the python that has it, without ours.

A line of JSON a shard on stdin ({"files", "labels", "out", "resize", "quality"}), an answer on stdout.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any


def write_shard(job: dict[str, Any]) -> None:
    """Read, resize (or only decode) and write every file as img2dataset does with what it downloaded."""
    import pyarrow as pa
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    resize = job["resize"]
    resizer = Resizer(
        image_size=resize or 256,
        resize_mode="keep_ratio" if resize else "no",
        resize_only_if_bigger=True,
        encode_quality=job["quality"],
        skip_reencode=not resize,
    )
    schema = pa.schema([("key", pa.string()), ("label", pa.int64())])
    writer = WebDatasetSampleWriter(0, job["out"], False, 5, schema, "jpg")
    for index, (path, label) in enumerate(zip(job["files"], job["labels"], strict=True)):
        jpeg, *_, error = resizer(io.BytesIO(Path(path).read_bytes()))
        if error is not None:
            raise ValueError(f"{path}: {error}")
        key = f"{index:09d}"
        writer.write(jpeg, key, None, {"key": key, "label": label})
    writer.close()


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            write_shard(json.loads(line))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = "done"
        answers.write(json.dumps(said) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
