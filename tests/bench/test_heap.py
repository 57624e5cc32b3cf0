import torch

from linerate.bench.heap import heap_without_holes, page_faults

NUM_BYTES = 40 * 2**20


def faults_of_a_block() -> int:
    before = page_faults()
    torch.ones(NUM_BYTES, dtype=torch.uint8)
    return page_faults() - before


def test_a_large_block_faults_in_all_of_its_pages_whatever_ran_before() -> None:
    # Blocks below 32 MiB lie in the heap and leave a hole below the one that stays.
    torch.ones(31 * 2**20, dtype=torch.uint8)
    blocks = [torch.ones(24 * 2**20, dtype=torch.uint8) for _ in range(5)]
    del blocks[:-1]
    with heap_without_holes(NUM_BYTES):
        assert min(faults_of_a_block() for _ in range(3)) >= NUM_BYTES // 65_536
    assert len(blocks) == 1
