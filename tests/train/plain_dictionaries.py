"""The paper's other two mechanisms and the symmetric queue, as a textbook writes them: the tests' truth.

One device, g images a BN group, the logits in memory; plain torch, nothing shared with the step.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize


class Plain:
    """f_q, SGD, and forwards group by group."""

    def __init__(self, f_q: nn.Module, *, t: float, lr: float, group: int) -> None:
        self.f_q, self.t, self.group = copy.deepcopy(f_q), t, group
        self.sgd = torch.optim.SGD(
            self.f_q.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, foreach=False
        )

    def forward(self, f: nn.Module, x: Tensor) -> Tensor:
        return normalize(torch.cat([f(group) for group in x.split(self.group)]), dim=1)

    def keys(self, f: nn.Module, x: Tensor, shuffle: Tensor) -> Tensor:
        """Encoded in the shuffled order; row i is the key of image i again."""
        return self.forward(f, x[shuffle])[shuffle.argsort()]

    def learn(self, loss: Tensor) -> Tensor:
        self.sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.sgd.step()
        return loss.detach()


class EndToEnd(Plain):
    """Keys by the same network, with their gradient; the other images' keys are the negatives."""

    def iterate(self, views: list[tuple[Tensor, Tensor]], shuffles: list[Tensor]) -> Tensor:
        losses = []
        for (x_q, x_k), shuffle in zip(views, shuffles, strict=True):
            k, q = self.keys(self.f_q, x_k, shuffle), self.forward(self.f_q, x_q)
            losses.append(cross_entropy(q @ k.T / self.t, torch.arange(len(q))))
        return self.learn(torch.stack(losses).mean())


class SymmetricQueue(Plain):
    """MoCo whose views are queries and keys of each other; the keys of both are enqueued, view 1 first."""

    def __init__(self, f_q: nn.Module, queue: Tensor, *, t: float, m: float, lr: float, group: int) -> None:
        super().__init__(f_q, t=t, lr=lr, group=group)
        self.f_k, self.queue, self.m = copy.deepcopy(f_q), list(queue.clone()), m
        self.pointer = 0

    def iterate(self, x_1: Tensor, x_2: Tensor, shuffle_1: Tensor, shuffle_2: Tensor) -> Tensor:
        with torch.no_grad():
            k_1, k_2 = self.keys(self.f_k, x_1, shuffle_1), self.keys(self.f_k, x_2, shuffle_2)
        l_12 = self.contrast(self.forward(self.f_q, x_2), k_1)
        l_21 = self.contrast(self.forward(self.f_q, x_1), k_2)
        loss = self.learn((l_12 + l_21) / 2)
        with torch.no_grad():
            for p_k, p_q in zip(self.f_k.parameters(), self.f_q.parameters(), strict=True):
                p_k.copy_(self.m * p_k + (1 - self.m) * p_q)
        for key in [*k_1, *k_2]:
            self.queue[self.pointer] = key
            self.pointer = (self.pointer + 1) % len(self.queue)
        return loss

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.stack(self.queue).T], dim=1)
        return cross_entropy(logits / self.t, torch.zeros(len(q), dtype=torch.int64))


class Bank(Plain):
    """InstDisc's memory: the own row is the positive, the drawn rows are the rest of the dictionary."""

    def __init__(
        self, f_q: nn.Module, bank: Tensor, *, t: float, momentum: float, lr: float, group: int, nce: bool
    ) -> None:
        super().__init__(f_q, t=t, lr=lr, group=group)
        self.bank, self.momentum, self.nce = bank.clone(), momentum, nce
        self.z: Tensor | None = None

    def iterate(self, x: Tensor, position: Tensor, draws: Tensor) -> Tensor:
        v = self.forward(self.f_q, x)
        similar = torch.cat([(v * self.bank[position]).sum(1, keepdim=True), v @ self.bank[draws].T], dim=1)
        exponentials = (similar / self.t).exp()
        if self.z is None:
            self.z = exponentials.detach().mean() * len(self.bank)
        if self.nce:
            p, noise = exponentials / self.z, len(draws) / len(self.bank)
            h = p / (p + noise)
            each = -h[:, :1].log() - (1 - h[:, 1:]).log().sum(1, keepdim=True)
            loss = self.learn(each.mean())
        else:
            loss = self.learn(cross_entropy(similar / self.t, torch.zeros(len(v), dtype=torch.int64)))
        for row, new in zip(position.tolist(), v.detach(), strict=True):
            self.bank[row] = normalize(self.momentum * self.bank[row] + (1 - self.momentum) * new, dim=0)
        return loss
