"""DALI as judge, and what happens when its process dies, hangs or does not start."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from linerate.shards import dali_check
from linerate.shards.dali_check import DaliJudge
from linerate.shards.errors import UserError
from linerate.shards.inspect_image import RejectedError
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack

MakeJpeg = Callable[..., bytes]


@pytest.fixture
def judge() -> Iterator[DaliJudge]:
    judge = DaliJudge()
    yield judge
    judge.close()


def test_dali_goes_on_after_an_image_that_it_refuses(judge: DaliJudge, make_jpeg: MakeJpeg) -> None:
    sound = make_jpeg(0)
    judge.check(sound)
    with pytest.raises(RejectedError, match="does not decode in DALI: "):
        judge.check(sound[: len(sound) // 3])
    judge.check(memoryview(sound))


def test_packing_with_dali_as_judge(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(make_jpeg(0))
    # Two bytes in front of a table: Pillow and libjpeg skip them, DALI's parser does not.
    bad = make_jpeg(1)
    at = bad.index(b"\xff\xdb")
    (tmp_path / "in" / "bad.jpg").write_bytes(bad[:at] + b"\0\0" + bad[at:])
    catalog = pack(tmp_path / "in", tmp_path / "out", options=PackOptions(check="dali"), num_workers=1)
    assert catalog.num_samples == 1
    (row,) = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert (row["key"], row["reason"]) == ("bad.jpg", "does not decode in DALI")


def _judge_of(script: str, monkeypatch: pytest.MonkeyPatch) -> DaliJudge:
    popen = dali_check.subprocess.Popen

    def start(argv: list[str], **options: object) -> object:
        return popen([argv[0], "-c", script], **options)

    monkeypatch.setattr(dali_check.subprocess, "Popen", start)
    return DaliJudge()


READY = "import os, sys, struct, time, signal; os.write(1, struct.pack('<I', 5) + b'ready')\n"


def test_an_image_that_kills_the_decoder_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = _judge_of(READY + "os.read(0, 9); os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    for _ in range(2):  # a new process for the next image
        with pytest.raises(RejectedError, match="its process ended with SIGSEGV"):
            judge.check(b"a jpeg")
    judge.close()


def test_a_decoder_that_leaves_is_named_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = _judge_of(READY + "os.read(0, 9); os._exit(3)", monkeypatch)
    with pytest.raises(RejectedError, match="its process ended with code 3"):
        judge.check(b"a jpeg")


def test_an_image_that_takes_for_ever_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_check, "IMAGE_LIMIT_S", 0.1)
    judge = _judge_of(READY + "time.sleep(60)", monkeypatch)
    with pytest.raises(RejectedError, match="not done after 0 s"):
        judge.check(b"a jpeg")


def test_without_dali_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = _judge_of("raise SystemExit(1)", monkeypatch)
    with pytest.raises(UserError, match=r"--check dali needs DALI.*ended while starting.*use --check decode"):
        judge.check(b"a jpeg")
    why = "import os, struct; os.write(1, struct.pack('<I', 7) + b'no DALI')"
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"does not start here \(no DALI\)"):
        _judge_of(why, monkeypatch).check(b"a jpeg")
