"""The three dictionaries against the plain references, on one device; ranks_worker.py has them on two."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linerate.shards.errors import UserError
from linerate.train import memory_bank as memory_bank_module
from linerate.train.encoder import build_encoder
from linerate.train.in_batch import InBatch, in_batch_infonce
from linerate.train.infonce import infonce_plain
from linerate.train.key_queue import KeyQueue
from linerate.train.memory_bank import MemoryBank, free_bytes
from linerate.train.nce import nce
from linerate.train.negatives import KeyDictionary, Lookup
from linerate.train.shuffle_bn import KeyShuffle, bn_modules
from linerate.train.step import MoCo, train_step

NUM, SIDE, DIM, GROUP, STEPS, SAMPLES = 8, 8, 8, 4, 4, 37
BOUNDS = {"rtol": 1e-9, "atol": 1e-9}


def load_neighbour(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = load_neighbour("plain_dictionaries")


def pixels(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (NUM, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return image.permute(0, 3, 1, 2)


def views(step: int) -> tuple[Tensor, Tensor]:
    return pixels(2 * step), pixels(2 * step + 1)


def places(step: int) -> Tensor:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:NUM]


def new_encoder() -> nn.Module:
    torch.manual_seed(0)
    return build_encoder("tiny-resnet-w4", dim=DIM, stem="cifar").double()


def build(dictionary: KeyDictionary, *, symmetric: bool = False) -> tuple[MoCo, torch.optim.Optimizer]:
    encoder = new_encoder()
    shuffle = KeyShuffle(seed=5)
    moco = MoCo(
        encoder,
        dictionary,
        temperature=0.2,
        symmetric=symmetric,
        ema_momentum=0.9,
        bn_group=GROUP,
        shuffle=shuffle,
    )
    sgd = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, foreach=True)
    return moco, sgd


def bank(**options: object) -> MemoryBank:
    return MemoryBank(SAMPLES, 50, DIM, dtype=torch.float64, **options)  # type: ignore[arg-type]


def require_same(mine: nn.Module, other: nn.Module) -> None:
    for here, there in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(here, there, **BOUNDS)


def buffers(encoder: nn.Module) -> list[Tensor]:
    return [b for m in bn_modules(encoder) for b in (m.running_mean, m.running_var) if b is not None]


@pytest.mark.parametrize("symmetric", [False, True])
def test_end_to_end_is_the_plain_form_with_its_gradient_through_the_keys(symmetric: bool) -> None:
    moco, sgd = build(InBatch(), symmetric=symmetric)
    truth = plain.EndToEnd(new_encoder(), t=0.2, lr=0.03, group=GROUP)
    for step in range(STEPS):
        one, two = views(step)
        directions = [(two, one), (one, two)] if symmetric else [(one, two)]
        turns = range(step * len(directions), (step + 1) * len(directions))
        shuffles = [moco.shuffle.permutation(turn, global_batch=NUM) for turn in turns]
        metrics = train_step(moco, one, two, sgd, step=step)
        torch.testing.assert_close(metrics.loss, truth.iterate(directions, shuffles), **BOUNDS)
        require_same(moco.query_encoder, truth.f_q)


# Micro-batches of nce are refused, see test_config.py.
@pytest.mark.parametrize(("loss", "micro_batch"), [("infonce", None), ("infonce", GROUP), ("nce", None)])
def test_the_memory_bank_is_the_plain_form(loss: str, micro_batch: int | None) -> None:
    dictionary = bank(loss=loss, seed=3)
    moco, sgd = build(dictionary)
    truth = plain.Bank(
        new_encoder(),
        dictionary.bank[:-1],
        t=0.2,
        momentum=0.5,
        lr=0.03,
        group=GROUP,
        nce=loss == "nce",
    )
    for step in range(STEPS):
        where = places(step)
        metrics = train_step(moco, *views(step), sgd, step=step, position=where, micro_batch=micro_batch)
        expected = truth.iterate(views(step)[0], where, dictionary.draws(step))
        torch.testing.assert_close(metrics.loss, expected, **BOUNDS)
        require_same(moco.query_encoder, truth.f_q)
        torch.testing.assert_close(dictionary.bank[:-1], truth.bank, **BOUNDS)


@pytest.mark.parametrize("micro_batch", [None, GROUP])
@pytest.mark.parametrize("num_keys", [50, 12])
def test_the_symmetric_queue_is_the_plain_form(num_keys: int, micro_batch: int | None) -> None:
    """K is no multiple of the 16 keys of a step, and once it is smaller than they are."""
    torch.manual_seed(1)
    queue = KeyQueue(num_keys, DIM, dtype=torch.float64)
    moco, sgd = build(queue, symmetric=True)
    truth = plain.SymmetricQueue(new_encoder(), queue.keys, t=0.2, m=0.9, lr=0.03, group=GROUP)
    for step in range(STEPS):
        shuffles = [moco.shuffle.permutation(2 * step + turn, global_batch=NUM) for turn in (0, 1)]
        metrics = train_step(moco, *views(step), sgd, step=step, micro_batch=micro_batch)
        torch.testing.assert_close(metrics.loss, truth.iterate(*views(step), *shuffles), **BOUNDS)
        require_same(moco.query_encoder, truth.f_q)
        require_same(moco.key_encoder, truth.f_k)
        torch.testing.assert_close(queue.keys, torch.stack(truth.queue), **BOUNDS)


@pytest.mark.parametrize("symmetric", [False, True])
def test_micro_batches_leave_the_running_statistics_of_one_batch(symmetric: bool) -> None:
    found = []
    for micro_batch in (None, GROUP):
        torch.manual_seed(1)
        moco, sgd = build(KeyQueue(20, DIM, dtype=torch.float64), symmetric=symmetric)
        metrics = [train_step(moco, *views(s), sgd, step=s, micro_batch=micro_batch) for s in range(2)]
        state = [*buffers(moco.query_encoder), *buffers(moco.key_encoder)]
        found.append([*state, *(value for m in metrics for value in (m.loss, m.top1, m.top5))])
    torch.testing.assert_close(*found, **BOUNDS)


@pytest.mark.parametrize("kind", ["end-to-end", "infonce", "nce"])
def test_a_step_of_each_reads_the_device_at_no_time(kind: str) -> None:
    """Fake tensors hold no values: whatever asked for one, as .item() or a branch, would raise."""
    num_keys = 4000
    dictionary = (
        InBatch()
        if kind == "end-to-end"
        else MemoryBank(SAMPLES, num_keys, DIM, loss=kind, dtype=torch.float64)  # type: ignore[arg-type]
    )
    moco, sgd = build(dictionary)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(func.name())
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    names: list[str] = []
    sizes: list[int] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Watch():
        one, two = (mode.from_tensor(view) for view in views(0))
        where = mode.from_tensor(places(0))
        for step in (0, 1):
            train_step(moco, one, two, sgd, step=step, position=where)
    assert not [name for name in names if "_local_scalar_dense" in name or "nonzero" in name]
    # The rows that are drawn are K x C; no n x K logits.
    assert max(sizes) < (num_keys + NUM) * max(NUM, DIM + 1)


def test_only_the_queue_has_a_second_encoder() -> None:
    for dictionary, own in ((KeyQueue(20, DIM), True), (InBatch(), False), (bank(), False)):
        moco, _ = build(dictionary)
        assert (moco.key_encoder is not moco.query_encoder) == own
        assert any(name.startswith("key_encoder.") for name in moco.state_dict()) == own
        before = [p.clone() for p in moco.query_encoder.parameters()]
        moco.update_key_encoder()
        assert all(torch.equal(a, b) for a, b in zip(before, moco.query_encoder.parameters(), strict=True))


def test_in_batch_top1_and_top5_count_the_other_keys_above_the_own() -> None:
    # The own key of query i is key i + 2, and exactly i of the others are above it.
    keys = torch.eye(8, dtype=torch.float64)
    query = torch.zeros(6, 8, dtype=torch.float64)
    for place in range(6):
        query[place, place + 2] = 1.0
        others = [key for key in range(8) if key != place + 2]
        query[place, others[:place]] = 2.0
    found = in_batch_infonce(query, keys, first=2, temperature=1.0)
    assert (found.top1, found.top5) == (1 / 6, 5 / 6)


def test_in_batch_loss_is_infonce_with_the_other_keys_as_negatives() -> None:
    torch.manual_seed(0)
    query, keys = (nn.functional.normalize(torch.randn(5, 4, dtype=torch.float64)) for _ in "qk")
    each = [
        infonce_plain(query[[i]], keys[[i]], keys[[j for j in range(5) if j != i]], temperature=0.3).loss
        for i in range(5)
    ]
    found = in_batch_infonce(query, keys, first=0, temperature=0.3)
    torch.testing.assert_close(found.loss, torch.stack(each).mean())


def test_nce_has_the_gradient_of_its_loss() -> None:
    torch.manual_seed(0)
    query, key, noise = (nn.functional.normalize(torch.randn(n, 5, dtype=torch.float64)) for n in (3, 3, 700))
    about = {"temperature": 0.3, "log_z": torch.tensor(7.0, dtype=torch.float64), "num_samples": 900}
    assert torch.autograd.gradcheck(lambda q: nce(q, key, noise, **about).loss, (query.requires_grad_(),))


def test_nce_at_chance_is_what_the_config_says() -> None:
    from linerate.train.config import Dictionary, TrainConfig

    key = torch.zeros(2, 4)
    found = nce(key, key, torch.zeros(30, 4), temperature=0.1, log_z=torch.tensor(90.0).log(), num_samples=90)
    about = Dictionary(dictionary="memory-bank", bank_loss="nce", num_keys=30)
    config = TrainConfig(recipe="x", dictionary=about)
    assert float(found.loss) == pytest.approx(config.chance_loss, rel=1e-6)
    assert config.chance_loss == pytest.approx(math.log(31) + 1, abs=0.02)


def test_the_bank_starts_as_instdisc_s_whatever_the_ranks() -> None:
    whole = MemoryBank(5000, 4, 3, seed=1).bank[:-1]
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(5000))
    assert whole.mean(0).abs().max() < 0.03
    parts = [MemoryBank(5000, 4, 3, seed=1, rank=rank, world_size=3).bank[:-1] for rank in range(3)]
    assert [len(part) for part in parts] == [1667, 1667, 1666]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(MemoryBank(5000, 4, 3, seed=2).bank[:-1], whole)


def test_more_ranks_than_samples_leave_some_without_rows() -> None:
    assert [len(MemoryBank(5, 4, 3, rank=rank, world_size=4).bank) - 1 for rank in range(4)] == [2, 2, 1, 0]


def test_draws_are_uniform_and_a_function_of_seed_and_step() -> None:
    one, other = MemoryBank(10, 5000, 2, seed=1), MemoryBank(10, 5000, 2, seed=2)
    assert torch.equal(one.draws(3), one.draws(3))
    assert not torch.equal(one.draws(3), one.draws(4))
    assert not torch.equal(one.draws(3), other.draws(3))
    counts = torch.bincount(one.draws(3), minlength=10)
    assert counts.min() > 400
    assert counts.max() < 600


def test_a_bank_that_does_not_fit_is_refused_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"940,000,000 samples x 128 dimensions takes 481 GB.*--dictionary q"):
        MemoryBank(940_000_000, 65536, 128, device="cpu")
    monkeypatch.setattr(memory_bank_module, "free_bytes", lambda device: 1000)
    with pytest.raises(
        UserError, match=r"takes 1\.2 kB, 1\.2\d? kB on each of 1 rank\(s\), and cpu has 1 kB"
    ):
        MemoryBank(100, 4, 3)
    assert len(MemoryBank(100, 4, 3, world_size=2).bank) == 51


def test_free_memory_is_what_the_control_group_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert free_bytes(torch.device("cpu")) > 2**20
    (tmp_path / "memory.max").write_text("12345\n")
    monkeypatch.setattr(memory_bank_module, "CONTROL_GROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 12345


def test_a_bank_without_positions_and_a_symmetric_one_are_refused() -> None:
    moco, sgd = build(bank())
    with pytest.raises(ValueError, match="a MemoryBank needs the position of every image"):
        train_step(moco, *views(0), sgd, step=0)
    with pytest.raises(UserError, match="a MemoryBank encodes none"):
        build(bank(), symmetric=True)


def test_end_to_end_refuses_micro_batches() -> None:
    moco, sgd = build(InBatch())
    with pytest.raises(UserError, match="micro_batch=4: end-to-end needs the gradient through all keys"):
        train_step(moco, *views(0), sgd, step=0, micro_batch=4)


def test_a_protocol_is_no_dictionary() -> None:
    lookup = Lookup(step=0, first=0, num=1, temperature=1.0, keys=None, position=None)
    with pytest.raises(NotImplementedError):
        KeyDictionary().open(lookup)


def test_the_state_of_a_bank_is_its_rows_and_z_and_moves_to_other_ranks() -> None:
    (moco, sgd), (other, other_sgd) = build(bank(loss="nce")), build(bank(loss="nce", seed=9))
    train_step(moco, *views(0), sgd, step=0, position=places(0))
    state = {name: value.clone() for name, value in moco.state_dict().items()}
    assert state["dictionary.bank"].shape == (SAMPLES, DIM)
    other.load_state_dict(state)
    other_sgd.load_state_dict(sgd.state_dict())
    assert torch.equal(moco.dictionary.bank, other.dictionary.bank)  # type: ignore[arg-type]
    assert float(other.dictionary.log_z) == float(moco.dictionary.log_z) != 0  # type: ignore[arg-type]
    part = bank(rank=1, world_size=3)
    own = part.own_state({"bank": state["dictionary.bank"], "log_z": state["dictionary.log_z"]})
    assert torch.equal(own["bank"][:-1], state["dictionary.bank"][13:26])
    assert not own["bank"][-1].any()


def test_a_checkpoint_of_another_bank_is_refused() -> None:
    moco, _ = build(bank())
    other = MemoryBank(SAMPLES + 1, 50, DIM, dtype=torch.float64)
    with pytest.raises(UserError, match=r"another memory bank: \(38, 8\) there and \(37, 8\) here"):
        moco.load_state_dict(build(other)[0].state_dict())
    with pytest.raises(UserError, match=r"another memory bank: none there"):
        moco.load_state_dict(build(InBatch())[0].state_dict())
    with pytest.raises(UserError, match=r"dictionary.bank is \(37, 8\) there and absent here"):
        build(InBatch())[0].load_state_dict(moco.state_dict())
