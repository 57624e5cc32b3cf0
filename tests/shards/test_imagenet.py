"""ImageNet's archives: the classes of its validation set, from every file that states them."""

import base64
import contextlib
import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linerate.shards import imagenet, matlab_file
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError
from linerate.shards.imagenet import LabelledSource, load_ground_truth
from linerate.shards.matlab_file import read_struct_array
from linerate.shards.options import PackOptions
from linerate.shards.pack import pack
from linerate.shards.sources import SourceReject, SourceRow, open_source

MakeJpeg = Callable[..., bytes]
# Three synsets in the fields of ImageNet's meta.mat, as scipy.io.savemat writes them, packed:
# 1 n02119789, 2 n02100735, 1001 n02083346.
META = base64.b85decode(
    "O+i#lK|&xkE-)ZXK~ybfX>4U6P;6mzW^ZzBIv{Xwb7^=iAVYFxVRU6=Aa8CuAXjB%AWm;~ATl)|Ff=+cH99dlATlsAHUIzs0"
    "0000000000000000000000000000000000000000000000000000000000000Bu&4*&oFcL4wZc%1E%K~KUk6vqo9!UgBeV?"
    "O|g4OHL+iJCxSjL`&-OJ!wi+&a@1m2cq9i(kUe;TPf~*t!nOAVRjQFL`O++kXG{^}RL#0M-EjRk_xrmqB9tI^L6B(k_1kd`>"
    "wQTz;>BBb|SfKDxRa-=4Q@r{#_=l)(LUvM%i<W*#>aei-wW1f50hBp{*3F#Soa1gQqa!VNI-1ECSY5TP!KkdHZN$YdA%)>F;"
    "YQ!-pxUFQ>9^c6oa_{s*pZt#|lsoip%UZ>mBd8ISlqH~<lQSl=Ya2mfh;dmB4VGbiSVX+{5mvc2TdMf4-3Pb2KJXf-y;Qb`L"
    "{Rf|#$){Y=eRK0SAA^GX4~oo%ZFkzIMjhL9Hudq6`XS)~l#fqfwwsQX(NT^lOr;(e#@_!t<lu+zMdrcow%aFXMjhL94#9dKC"
    "x{Y?n^3JD{QAs0SBTDGJcZAQk$A=n_hs!~Hu2>QZ!Pgf-_*%}j#|<84!!{#P++z"
)


def make_devkit(path: Path, files: dict[str, bytes]) -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(packed.getvalue()))
    return path


IDS = "ILSVRC2012_validation_ground_truth.txt"
KIT = {"readme.txt": b"hello", IDS: b"2\n1\n2\n", "meta.mat": META}
WNIDS = ["n02100735", "n02119789", "n02100735"]


def make_val_tar(path: Path, make_jpeg: MakeJpeg, names: list[str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for seed, name in enumerate(names):
            info, jpeg = tarfile.TarInfo(name), make_jpeg(seed)
            info.size = len(jpeg)
            archive.addfile(info, io.BytesIO(jpeg))
    return path


VAL = [f"ILSVRC2012_val_0000000{number}.JPEG" for number in (2, 1, 3)]


@pytest.fixture
def val(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """Three images of the validation set, not in order."""
    return make_val_tar(tmp_path / "ILSVRC2012_img_val.tar", make_jpeg, VAL)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def classes(tar: Path, truth: Path) -> dict[str, str | None]:
    rows = LabelledSource(open_source([tar]), load_ground_truth(truth)).rows()
    return {row.key: row.label_name for row in rows if isinstance(row, SourceRow)}


def test_every_form_of_the_ground_truth_gives_the_same_classes(val: Path, tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "meta.mat").write_bytes(META)
    stems = [name[:-5] for name in sorted(VAL)]
    boxes = "ImageId,PredictionString\n" + "".join(
        f"{s},{w} 1 2 3 4 {w} 5 6 7 8 \n" for s, w in zip(stems, WNIDS, strict=True)
    )
    pairs = "".join(f"{s}.JPEG {w}\n" for s, w in zip(stems, WNIDS, strict=True))
    forms = [
        make_devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", KIT),
        write(tmp_path / "kit" / IDS, "2\n1\n2\n"),
        write(tmp_path / "LOC_val_solution.csv", boxes),
        write(tmp_path / "wnids.txt", "\n".join(WNIDS)),
        write(tmp_path / "pairs.txt", pairs),
        write(tmp_path / "pairs.csv", "\ufeff" + pairs.replace(" ", ",")),
    ]
    expected = dict(zip(sorted(VAL), WNIDS, strict=True))
    for truth in forms:
        assert classes(val, truth) == expected


def test_the_validation_set_is_packed_with_its_classes(val: Path, tmp_path: Path) -> None:
    truth = make_devkit(tmp_path / "kit.tar.gz", KIT)
    catalog = pack(val, tmp_path / "out", ground_truth=truth, num_workers=0)
    assert catalog.class_names == ("n02100735", "n02119789")
    index = pq.read_table(tmp_path / "out" / "shard-000000.parquet")
    labels = dict(zip(index["key"].to_pylist(), index["label"].to_pylist(), strict=True))
    assert labels == {VAL[1]: 0, VAL[0]: 1, VAL[2]: 0}


def test_the_train_archive_is_packed_as_its_class_folders_would_be(
    packed: Catalog, photo_folder: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted(photo_folder.iterdir()):
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as inner:
                for photo in sorted(folder.iterdir()):
                    inner.add(photo, arcname=photo.name)
            outer.add(tmp_path / f"{folder.name}.tar", arcname=f"{folder.name}.tar")
    options = PackOptions(seed=7, shard_samples=8)
    catalog = pack(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "out", options=options, num_workers=0)
    assert catalog.class_names == packed.class_names
    for shard in range(packed.num_shards):
        assert catalog.shard_path(shard).read_bytes() == packed.shard_path(shard).read_bytes()


def test_an_image_that_a_list_does_not_name_is_a_reject(val: Path, tmp_path: Path) -> None:
    truth = write(tmp_path / "list.txt", f"{VAL[0]} n02119789\n")
    source = LabelledSource(open_source([val]), load_ground_truth(truth))
    assert source.containers == [val]
    rejects = [row for row in source.rows() if isinstance(row, SourceReject)]
    assert [(row.key, row.reason, row.detail) for row in rejects] == [
        (VAL[1], "no label", "list.txt does not name it"),
        (VAL[2], "no label", "list.txt does not name it"),
    ]


def test_what_the_source_rejects_stays_rejected(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    tar = make_val_tar(tmp_path / "x.tar", make_jpeg, ["a.JPEG", "notes.txt"])
    truth = write(tmp_path / "list.txt", "n02119789\n")
    rows = list(LabelledSource(open_source([tar]), load_ground_truth(truth)).rows())
    assert [type(row) for row in rows] == [SourceRow, SourceReject]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n02119789\n" * 4, r"has 4 lines, one per image .* the source has 3 images"),
        ("other.JPEG n02119789\n", r"names no image of the source: it has other, the source ILSVRC2012_val"),
    ],
)
def test_a_list_of_another_set_is_refused(val: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        classes(val, write(tmp_path / "list.txt", text))


def test_a_source_with_doubles_is_refused(tmp_path: Path, make_jpeg: MakeJpeg) -> None:
    tar = make_val_tar(tmp_path / "x.tar", make_jpeg, ["a/1.JPEG", "b/1.JPEG"])
    with pytest.raises(UserError, match="the source has 1 more than once"):
        classes(tar, write(tmp_path / "list.txt", "1 n02119789\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("2\n1\n2\n", r"by the devkit's own numbers, which its meta\.mat explains: put that beside it"),
        ("a.JPEG tabby\n", r"entry 1, 'a\.JPEG tabby', is no name with a wnid"),
        ("ImageId,PredictionString\nval_1\n", r"entry 1, 'val_1', is no name with a wnid"),
        ("ImageId,PredictionString\nval_1, \n", "entry 1, 'val_1 ', is no name with a wnid"),
        ("a b c\n", "entry 1, 'a b c', is no name"),
    ],
)
def test_lists_that_say_no_classes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_ground_truth(write(tmp_path / "list.txt", text))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({IDS: b"1"}, r"holds no meta\.mat; give"),
        ({"readme.txt": b"1"}, r"holds no ILSVRC2012_validation_ground_truth\.txt and no meta\.mat"),
        (KIT | {"meta.mat": b"nonsense"}, "cannot be read: not a MATLAB 5 file"),
        (KIT | {IDS: b"1\n77\n"}, r"has the class 77, its meta\.mat does not"),
        (KIT | {IDS: b"1\nx\n"}, r"has the class .*'x'"),
    ],
)
def test_devkits_that_lack_something_are_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_ground_truth(make_devkit(tmp_path / "kit.tar.gz", files))


def test_a_damaged_devkit_is_refused(tmp_path: Path) -> None:
    whole = make_devkit(tmp_path / "kit.tar.gz", KIT).read_bytes()
    for number, stored in enumerate((whole[:200], gzip.compress(b"no tar" * 200), whole[:-9] + bytes(9))):
        path = tmp_path / f"{number}.tar.gz"
        path.write_bytes(stored)
        with pytest.raises(UserError, match=r"is no sound \.tar\.gz: .*; fetch it again"):
            load_ground_truth(path)


def test_a_sparse_file_in_a_devkit_is_not_unpacked(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo(f"data/{IDS}")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": f"{1 << 50}"}
    sparse.pax_headers |= {"GNU.sparse.map": "0,0"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse)
    (tmp_path / "kit.tar.gz").write_bytes(gzip.compress(packed.getvalue()))
    with pytest.raises(UserError, match="holds no"):
        load_ground_truth(tmp_path / "kit.tar.gz")


def test_what_is_no_ground_truth_at_all_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"missing is no file; give ILSVRC2012_devkit_t12"):
        load_ground_truth(tmp_path / "missing")
    (tmp_path / "x.bin").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="is neither a devkit nor a text"):
        load_ground_truth(tmp_path / "x.bin")
    bomb = make_devkit(tmp_path / "kit.tar.gz", KIT | {"zeros": bytes(20_000)})
    monkeypatch.setattr(imagenet, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="unpacks to more than 10000 bytes"):
        load_ground_truth(bomb)
    with pytest.raises(UserError, match="has more than 10000 bytes, which no ground truth has"):
        load_ground_truth(write(tmp_path / "long.txt", "n02119789\n" * 2000))


# --- MATLAB's file


def element(kind: int, data: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(kind: int, *parts: bytes, name: bytes = b"", order: str = "<") -> bytes:
    head = element(6, struct.pack(order + "II", kind, 0), order)
    head += element(5, struct.pack(order + "ii", 1, 1), order) + element(1, name, order)
    return element(14, head + b"".join(parts), order)


def mat_file(*variables: bytes, order: str = "<") -> bytes:
    mark = {"<": b"\x00\x01IM", ">": b"\x01\x00MI"}[order]
    return b"MATLAB 5.0".ljust(124) + mark + b"".join(variables)


def struct_matrix(names: bytes, *values: bytes, length: int = 4, order: str = "<") -> bytes:
    fields = element(5, struct.pack(order + "i", length), order) + element(1, names, order)
    return matrix(2, fields, *values, name=b"s", order=order)


def test_numbers_and_texts_of_either_byte_order_are_read() -> None:
    for order, coded in (("<", "utf-16-le"), (">", "utf-16-be")):
        values = [
            matrix(6, element(9, struct.pack(order + "d", 2.5), order), order=order),
            matrix(4, element(4, "n\u00e9".encode(coded), order), order=order),
            matrix(6, element(9, b"", order), order=order),
            matrix(4, element(16, "n\u00e9".encode(), order), order=order),
        ]
        stored = mat_file(
            matrix(6, element(9, b"", order), name=b"other", order=order),
            struct_matrix(b"a\0\0\0b\0\0\0", *values, order=order),
            order=order,
        )
        assert read_struct_array(stored, "s", ("b", "a")) == [("n\u00e9", 2.5), ("n\u00e9", None)]


def test_the_fields_that_scipy_wrote_are_read() -> None:
    assert read_struct_array(META, "synsets", ("ILSVRC2012_ID", "WNID", "words")) == [
        (1.0, "n02119789", "kit fox, Vulpes macrotis"),
        (2.0, "n02100735", "English setter"),
        (1001.0, "n02083346", "canine, canid \u00e9"),
    ]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "not a MATLAB 5 file"),
        (mat_file(), "it holds no s"),
        (mat_file(element(1, b"x")), "it holds no s"),
        (mat_file(matrix(6, name=b"s")), "s is no struct array"),
        (mat_file(struct_matrix(b"b\0\0\0")), "it has no field a"),
        (mat_file(struct_matrix(b"a\0\0\0", length=0)), "field names of 0 bytes"),
        (mat_file(struct_matrix(b"a\0\0\0b\0\0\0", matrix(4, element(16, b"x")))), "it is cut short"),
        (mat_file(struct_matrix(b"a\0\0\0", matrix(4, element(16, b"\xff")))), "can be read: 'utf-8'"),
        (mat_file(struct_matrix(b"a\0\0\0"))[:-20], "an element of .* bytes where .* are left"),
        (mat_file(element(15, b"no zlib")), "can be read: Error -3"),
        (META[:-60], "an element of"),
    ],
)
def test_matlab_files_that_cannot_be_read_say_why(stored: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_struct_array(stored, "s", ("a",))


def test_a_packed_variable_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab_file, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read_struct_array(META, "synsets", ("WNID",))


@given(at=st.integers(0, len(META) - 1), value=st.integers(0, 255), end=st.integers(0, len(META)))
def test_any_damage_to_a_matlab_file_is_a_value_error_or_rows(at: int, value: int, end: int) -> None:
    stored = (META[:at] + bytes([value]) + META[at + 1 :])[:end]
    with contextlib.suppress(ValueError):
        assert isinstance(read_struct_array(stored, "synsets", ("ILSVRC2012_ID", "WNID")), list)
