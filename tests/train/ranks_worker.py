"""A rank asserts that many ranks do what one device does, and writes one line if so; see rank_server.py."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linerate.train.collectives import gather_rows
from linerate.train.encoder import build_encoder
from linerate.train.in_batch import InBatch
from linerate.train.key_queue import KeyQueue
from linerate.train.memory_bank import MemoryBank
from linerate.train.negatives import KeyDictionary
from linerate.train.shuffle_bn import KeyShuffle, bn_modules, encode_by_group
from linerate.train.step import MoCo, train_step

GROUP, GROUPS_A_RANK, SIDE, KEYS, DIM = 4, 2, 8, 30, 8
# An odd number, so that the ranks hold different numbers of a bank's rows.
SAMPLES = 45
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Traffic:
    """What this rank receives from others, by collective, and how often each is called."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        for name in ("all_to_all_single", "all_gather_into_tensor", "broadcast", "all_reduce"):
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + output.numel() * output.element_size()
            return collective(output, *args, **kwargs)

        return call

    def reset(self) -> None:
        self.calls, self.bytes = {}, {}


def pixels(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (num, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return image.permute(0, 3, 1, 2)


def own(rows: Tensor, rank: int, world_size: int) -> Tensor:
    return rows.chunk(world_size)[rank]


def check_exchange(rank: int, world_size: int, traffic: Traffic) -> None:
    """The all-to-all gives every rank what the reference's all-gather and slice give."""
    num = GROUP * GROUPS_A_RANK * world_size
    images = pixels(num, seed=1)
    mine = own(images, rank, world_size)
    shuffle = KeyShuffle(seed=3, rank=rank, world_size=world_size)
    permutation = shuffle.permutation(5, global_batch=num)
    seen: list[Tensor] = []

    def encode(shuffled: Tensor) -> Tensor:
        seen.append(shuffled)
        return shuffled.flatten(1).double()

    traffic.reset()
    features = shuffle.encode(encode, mine, step=5)
    assert torch.equal(seen[0], own(gather_rows(mine, world_size=world_size)[permutation], rank, world_size))
    assert torch.equal(features, images.flatten(1).double())
    # uint8 instead of float32, and a rank's share instead of the whole batch.
    reference_bytes = num * 3 * SIDE * SIDE * 4
    assert traffic.bytes["all_to_all_single"] * 2 * world_size <= reference_bytes
    assert traffic.calls["all_to_all_single"] == 1


def check_within_rank(rank: int, world_size: int, traffic: Traffic) -> None:
    """A shuffle block that a rank holds whole costs no image traffic."""
    mine = own(pixels(GROUP * GROUPS_A_RANK * world_size, seed=2), rank, world_size)
    shuffle = KeyShuffle(block=GROUP * GROUPS_A_RANK, rank=rank, world_size=world_size)
    traffic.reset()
    shuffle.encode(lambda images: images.flatten(1).double(), mine, step=0)
    assert traffic.calls == {"all_gather_into_tensor": 1}


def build(
    rank: int,
    world_size: int,
    block: int | None,
    *,
    dictionary: KeyDictionary | None = None,
    symmetric: bool = False,
    sync_bn: bool = False,
) -> tuple[MoCo, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = build_encoder("tiny-resnet-w4", dim=DIM, stem="cifar").double()
    moco = MoCo(
        encoder,
        dictionary or KeyQueue(KEYS, DIM, dtype=torch.float64),
        temperature=0.2,
        symmetric=symmetric,
        ema_momentum=0.9,
        bn_group=None if sync_bn else GROUP,
        sync_bn=sync_bn,
        shuffle=KeyShuffle(seed=7, block=block, enabled=not sync_bn, rank=rank, world_size=world_size),
    )
    sgd = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, foreach=True)
    return moco, sgd


def wrap(moco: MoCo) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        moco.query_forward = DistributedDataParallel(moco.query_encoder, broadcast_buffers=False)


def check_training(
    rank: int, world_size: int, traffic: Traffic, *, block: int | None, micro_batch: int | None
) -> None:
    """The same losses, encoders and queue as one device with as many groups, to 1e-5."""
    num = GROUP * GROUPS_A_RANK * world_size
    (alone, alone_sgd), (moco, sgd) = build(0, 1, block), build(rank, world_size, block)
    wrap(moco)
    for step in range(4):
        views = pixels(num, seed=10 + step), pixels(num, seed=20 + step)
        mine = [own(view, rank, world_size) for view in views]
        traffic.reset()
        metrics = train_step(moco, *mine, sgd, step=step, micro_batch=micro_batch)
        # Gradients go through DDP's own reducer; besides them there are at most two collectives.
        assert sum(traffic.calls.values()) <= 2
        assert "broadcast" not in traffic.calls
        expected = train_step(alone, *views, alone_sgd, step=step)
        loss = metrics.loss.clone()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / world_size, expected.loss, rtol=0, atol=1e-5)
        require_same(moco.query_encoder, alone.query_encoder)
        require_same(moco.key_encoder, alone.key_encoder)
        torch.testing.assert_close(moco.dictionary.keys, alone.dictionary.keys, rtol=0, atol=1e-5)
        assert int(moco.dictionary.pointer) == int(alone.dictionary.pointer)
        # Not close: the very same bytes on every rank.
        every = gather_rows(moco.dictionary.keys, world_size=world_size).chunk(world_size)
        assert all(torch.equal(every[0], keys) for keys in every)


def check_sync_bn(rank: int, world_size: int, traffic: Traffic) -> None:
    """BN over all ranks is one rank's BN over the whole batch, to 1e-9; running statistics too."""
    num, built = (
        GROUP * world_size,
        [build(r, w, None, sync_bn=True) for r, w in ((0, 1), (rank, world_size))],
    )
    (alone, alone_sgd), (moco, sgd) = built
    wrap(moco)
    for step in range(3):
        views = pixels(num, seed=60 + step), pixels(num, seed=70 + step)
        traffic.reset()
        metrics = train_step(moco, *(own(view, rank, world_size) for view in views), sgd, step=step)
        num_layers = len(list(bn_modules(moco.query_encoder)))
        # Both encoders' statistics and the keys; the query's backward.
        assert traffic.calls == {"all_gather_into_tensor": 2 * num_layers + 1, "all_reduce": num_layers}
        expected = train_step(alone, *views, alone_sgd, step=step)
        torch.testing.assert_close(mean_loss(metrics.loss, world_size), expected.loss, **EXACT)
        torch.testing.assert_close(moco.state_dict(), alone.state_dict(), **EXACT)


def require_same(mine: nn.Module, other: nn.Module) -> None:
    for here, there in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def check_keys_by_group(rank: int, world_size: int) -> None:
    """Shuffled keys of all ranks equal the plain form: one forward per group of the permuted batch."""
    num = GROUP * GROUPS_A_RANK * world_size
    moco, _ = build(rank, world_size, None)
    truth = copy.deepcopy(moco.key_encoder)
    images = pixels(num, seed=4)
    permutation = moco.shuffle.permutation(1, global_batch=num)
    with torch.no_grad():
        keys = moco.shuffle.encode(moco.key_forward, own(images, rank, world_size), step=1)
        expected = torch.empty_like(keys)
        expected[permutation] = encode_by_group(truth, images[permutation], bn_group=GROUP)
    torch.testing.assert_close(keys, expected)


def load_plain() -> Any:
    path = Path(__file__).with_name("plain_dictionaries.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_plain(mine: nn.Module, other: nn.Module) -> None:
    for here, there in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(here, there, **EXACT)


def mean_loss(loss: Tensor, world_size: int) -> Tensor:
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / world_size


def check_encoding_dictionary(
    rank: int,
    world_size: int,
    traffic: Traffic,
    *,
    end_to_end: bool,
    symmetric: bool,
    micro_batch: int | None = None,
) -> None:
    """End-to-end and the symmetric queue on many ranks are their plain forms on one device, to 1e-9."""
    plain, num = load_plain(), GROUP * GROUPS_A_RANK * world_size
    torch.manual_seed(1)
    dictionary = InBatch() if end_to_end else KeyQueue(KEYS, DIM, dtype=torch.float64)
    moco, sgd = build(rank, world_size, None, dictionary=dictionary, symmetric=symmetric)
    about = {"t": 0.2, "lr": 0.03, "group": GROUP}
    if isinstance(dictionary, KeyQueue):
        truth = plain.SymmetricQueue(moco.query_encoder, dictionary.keys, m=0.9, **about)
    else:
        truth = plain.EndToEnd(moco.query_encoder, **about)
    wrap(moco)
    for step in range(3):
        one, two = pixels(num, seed=30 + step), pixels(num, seed=40 + step)
        turns = range(2 * step, 2 * step + 2) if symmetric else [step]
        shuffles = [moco.shuffle.permutation(turn, global_batch=num) for turn in turns]
        traffic.reset()
        mine = own(one, rank, world_size), own(two, rank, world_size)
        metrics = train_step(moco, *mine, sgd, step=step, micro_batch=micro_batch)
        directions = 2 if symmetric else 1
        # Each key forward: one exchange, one gather; end-to-end one sum of the keys' gradient besides.
        assert sum(traffic.calls.values()) <= directions * (3 if end_to_end else 2)
        if isinstance(dictionary, KeyQueue):
            expected = truth.iterate(one, two, *shuffles)
            torch.testing.assert_close(dictionary.keys, torch.stack(truth.queue), **EXACT)
            require_plain(moco.key_encoder, truth.f_k)
        else:
            views = [(two, one), (one, two)] if symmetric else [(one, two)]
            expected = truth.iterate(views, shuffles)
        torch.testing.assert_close(mean_loss(metrics.loss, world_size), expected, **EXACT)
        require_plain(moco.query_encoder, truth.f_q)


def check_memory_bank(rank: int, world_size: int, traffic: Traffic, *, loss: Any) -> None:
    """Rows over all ranks are the plain bank; what is saved moves to another number of ranks."""
    plain, num = load_plain(), GROUP * GROUPS_A_RANK * world_size
    options: Any = {"loss": loss, "seed": 3, "dtype": torch.float64}
    bank = MemoryBank(SAMPLES, KEYS, DIM, rank=rank, world_size=world_size, **options)
    alone = MemoryBank(SAMPLES, KEYS, DIM, **options)
    moco, sgd = build(rank, world_size, None, dictionary=bank)
    about = {"t": 0.2, "lr": 0.03, "group": GROUP, "momentum": 0.5, "nce": loss == "nce"}
    truth = plain.Bank(moco.query_encoder, alone.bank[:-1], **about)
    wrap(moco)
    for step in range(3):
        images, position = pixels(num, seed=50 + step), torch.arange(num) * 2 % SAMPLES
        mine = own(images, rank, world_size)
        traffic.reset()
        metrics = train_step(moco, mine, mine, sgd, step=step, position=own(position, rank, world_size))
        # Positions, rows, queries; NCE sums Z once.
        assert sum(traffic.calls.values()) == 3 + (loss == "nce" and step == 0)
        expected = truth.iterate(images, position, bank.draws(step))
        torch.testing.assert_close(mean_loss(metrics.loss, world_size), expected, **EXACT)
        require_plain(moco.query_encoder, truth.f_q)
        torch.testing.assert_close(bank.bank[:-1], truth.bank[bank.first :][: bank.num_rows], **EXACT)
        assert not bank.bank[-1].any()
    state = moco.state_dict()
    if rank == 0:
        torch.testing.assert_close(state["dictionary.bank"], truth.bank, **EXACT)
        one, _ = build(0, 1, None, dictionary=alone)
        one.load_state_dict(state)
        assert torch.equal(alone.bank[:-1], state["dictionary.bank"])
        assert torch.equal(alone.log_z, bank.log_z)
    # A checkpoint is read by every rank; here rank 0 hands it over.
    whole = truth.bank.clone()
    bank.bank.zero_()
    moco.load_state_dict(state | {"dictionary.bank": whole})
    assert torch.equal(bank.bank[:-1], whole[bank.first :][: bank.num_rows])


def main(number: str, out: str) -> None:
    world_size = int(number)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == world_size
    traffic = Traffic()
    check_exchange(rank, world_size, traffic)
    check_within_rank(rank, world_size, traffic)
    check_keys_by_group(rank, world_size)
    check_sync_bn(rank, world_size, traffic)
    check_training(rank, world_size, traffic, block=None, micro_batch=None)
    check_training(rank, world_size, traffic, block=GROUP * GROUPS_A_RANK, micro_batch=GROUP)
    check_encoding_dictionary(rank, world_size, traffic, end_to_end=True, symmetric=False)
    check_encoding_dictionary(rank, world_size, traffic, end_to_end=True, symmetric=True)
    check_encoding_dictionary(rank, world_size, traffic, end_to_end=False, symmetric=True)
    check_encoding_dictionary(rank, world_size, traffic, end_to_end=False, symmetric=True, micro_batch=GROUP)
    check_memory_bank(rank, world_size, traffic, loss="infonce")
    check_memory_bank(rank, world_size, traffic, loss="nce")
    dist.barrier()
    dist.destroy_process_group()
    (Path(out) / f"rank-{rank}.txt").write_text(f"rank {rank} of {world_size} agrees")
