from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from linerate.bench.demo_source import SourcePart, is_test
from linerate.shards.sources import SourceReject, SourceRow


class Listed:
    """A source of some images a class."""

    def __init__(self, num_of_class):
        self.num_of_class = num_of_class
        self.containers = []

    def rows(self):
        for name, num in self.num_of_class.items():
            for i in range(num):
                yield SourceRow(f"{name}/{i}", b"", 0, 0, 1, name)
        yield SourceReject("broken", 0, "no image")


def listed(part):
    rows = list(part.rows())
    return [r for r in rows if isinstance(r, SourceRow)], [r for r in rows if isinstance(r, SourceReject)]


def test_a_sixth_of_a_class_is_for_testing_and_nothing_is_in_both():
    source = Listed({"cat": 60, "dog": 12})
    train, train_rejects = listed(SourcePart(source, "train"))
    test, test_rejects = listed(SourcePart(source, "test"))
    assert Counter(r.label_name for r in test) == {"cat": 10, "dog": 2}
    assert {r.key for r in train}.isdisjoint(r.key for r in test)
    assert len(train) + len(test) == 72
    assert (len(train_rejects), len(test_rejects)) == (1, 0)


def test_both_parts_have_the_same_classes_and_a_lone_image_loses_its_label():
    source = Listed({"cat": 2, "dog": 1, None: 3})
    train, _ = listed(SourcePart(source, "train"))
    test, _ = listed(SourcePart(source, "test"))
    assert {r.label_name for r in test} == {"cat"}
    assert {r.key: r.label_name for r in train} == {
        "cat/0": "cat", "dog/0": None, "None/0": None, "None/1": None, "None/2": None
    }  # fmt: skip


def test_per_class_takes_the_first():
    train, _ = listed(SourcePart(Listed({"cat": 60}), "train", 12))
    test, _ = listed(SourcePart(Listed({"cat": 60}), "test", 12))
    assert sorted(int(r.key.split("/")[1]) for r in train + test) == list(range(12))
    assert len(test) == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 500))
def test_a_class_of_two_or_more_has_images_in_both_parts(num):
    num_test = sum(is_test(place, num=num) for place in range(num))
    assert num_test == max(1, num // 6)
    assert num_test < num
