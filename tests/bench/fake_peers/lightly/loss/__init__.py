"""A stand-in for lightly's loss with a memory bank, written as the paper's Algorithm 1 has it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize


class MemoryBank(nn.Module):
    def __init__(self, num_keys: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(num_keys, dim))
        self.next = 0


class NTXentLoss(nn.Module):
    def __init__(self, *, temperature: float, memory_bank_size: tuple[int, int]) -> None:
        super().__init__()
        self.temperature, self.memory_bank = temperature, MemoryBank(*memory_bank_size)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = normalize(query, dim=1), normalize(key, dim=1)
        memory = self.memory_bank
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ memory.bank.clone().T], dim=1)
        memory.bank[memory.next : memory.next + len(key)] = key
        memory.next = (memory.next + len(key)) % len(memory.bank)
        return cross_entropy(logits / self.temperature, torch.zeros(len(logits), dtype=torch.long))
