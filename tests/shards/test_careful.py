"""An image that kills its decoder costs itself, not its shard."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from linerate.shards.careful import CarefulProcess
from linerate.shards.image_policy import Taken, make_judge
from linerate.shards.inspect_image import RejectedError
from linerate.shards.options import ImagePolicy, PackOptions
from linerate.shards.pack import pack

MakeJpeg = Callable[..., bytes]
POLICY = ImagePolicy(check="decode")
# A module that Python runs whenever it starts: for every worker, an image with such a comment is poison.
PLUGIN = """
import os, signal, time
from linerate.shards import image_policy
real = image_policy.check_decode
def check_decode(data, header):
    word = bytes(data).partition(b"poison ")[2]
    if word.startswith(b"SIG"):
        os.kill(os.getpid(), getattr(signal, word[:7].decode()))
    if word.startswith(b"exit"):
        os._exit(3)
    if word.startswith(b"sleep"):
        time.sleep(60)
    if word.startswith(b"error"):
        raise MemoryError("too large")
    real(data, header)
image_policy.check_decode = check_decode
"""


@pytest.fixture(autouse=True)
def _poisonable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture
def judge() -> Iterator[CarefulProcess[Taken]]:
    judge = CarefulProcess(functools.partial(make_judge, POLICY), limit_s=60.0)
    yield judge
    judge.close()


def poisoned(jpeg: bytes, word: str) -> bytes:
    comment = b"poison " + word.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def test_it_answers_as_the_policy_does(judge: CarefulProcess[Taken], make_jpeg: MakeJpeg) -> None:
    sound = make_jpeg(0)
    assert judge(memoryview(sound)) == make_judge(POLICY)(sound)
    with pytest.raises(RejectedError) as theirs:
        judge(b"")
    with pytest.raises(RejectedError) as ours:
        make_judge(POLICY)(b"")
    assert (theirs.value.reason, theirs.value.detail) == (ours.value.reason, ours.value.detail)
    with pytest.raises(MemoryError, match="too large"):
        judge(poisoned(sound, "error"))


@pytest.mark.parametrize(
    ("word", "how"),
    [
        ("SIGSEGV", "SIGSEGV"),
        ("SIGKILL", "SIGKILL"),
        ("exit", "its process ended with code 3"),
        ("sleep", "not done"),
    ],
)
def test_what_kills_the_process_is_rejected_and_the_next_image_is_judged(
    judge: CarefulProcess[Taken], make_jpeg: MakeJpeg, word: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = make_jpeg(0)
    if word == "sleep":
        judge(sound)
        monkeypatch.setattr(judge, "_limit_s", 0.2)
    with pytest.raises(RejectedError, match=f"kills the decoder: {how}"):
        judge(poisoned(sound, word))
    monkeypatch.setattr(judge, "_limit_s", 60.0)
    assert judge(sound).header[:2] == (20, 30)


def test_a_run_survives_an_image_that_kills_its_workers(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(make_jpeg(number))
    (tmp_path / "in" / "bad.jpg").write_bytes(poisoned(make_jpeg(9), "SIGSEGV"))
    catalog = pack(tmp_path / "in", tmp_path / "out", options=PackOptions(check="decode"), num_workers=1)
    assert catalog.num_samples == 6
    (row,) = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert (row["key"], row["reason"], row["detail"]) == ("bad.jpg", "kills the decoder", "SIGSEGV")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"")
    clean = pack(tmp_path / "in", tmp_path / "clean", options=PackOptions(check="decode"), num_workers=0)
    assert [clean.shard_path(s).read_bytes() for s in range(clean.num_shards)] == [
        catalog.shard_path(s).read_bytes() for s in range(catalog.num_shards)
    ]
