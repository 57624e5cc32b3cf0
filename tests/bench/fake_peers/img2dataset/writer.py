import io
import tarfile
from pathlib import Path


class WebDatasetSampleWriter:
    def __init__(self, shard: int, out: str, *_: object) -> None:
        self.tar = tarfile.open(Path(out) / f"{shard:05d}.tar", "w")  # noqa: SIM115

    def write(self, jpeg: bytes, key: str, caption: None, meta: dict[str, object]) -> None:
        member = tarfile.TarInfo(f"{key}.jpg")
        member.size = len(jpeg)
        self.tar.addfile(member, io.BytesIO(jpeg))

    def close(self) -> None:
        self.tar.close()
