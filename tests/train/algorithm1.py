"""The paper's Algorithm 1, transcribed line by line on one device with g images a group: the tests' truth."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize


class Algorithm1:
    """f_q, f_k, queue and pointer of MoCo, Algorithm 1; plain torch, nothing shared with the step."""

    def __init__(
        self, f_q: nn.Module, queue: Tensor, *, t: float, m: float, lr: float, group: int | None
    ) -> None:
        self.f_q, self.f_k = copy.deepcopy(f_q), copy.deepcopy(f_q)  # f_k.params = f_q.params
        self.queue, self.pointer = queue.T.clone(), 0  # dictionary as a queue of K keys (C x K)
        self.t, self.m, self.group = t, m, group
        self.sgd = torch.optim.SGD(
            self.f_q.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, foreach=False
        )

    def forward(self, f: nn.Module, x: Tensor) -> Tensor:
        groups = x.split(self.group or len(x))
        return normalize(torch.cat([f(group) for group in groups]), dim=1)

    def iterate(self, x_q: Tensor, x_k: Tensor, shuffle: Tensor) -> Tensor:
        """The loss of one iteration; shuffle[i] is the image that takes place i among the keys."""
        q = self.forward(self.f_q, x_q)  # queries: N x C
        with torch.no_grad():  # k = k.detach()
            k = torch.empty_like(q)
            k[shuffle] = self.forward(self.f_k, x_k[shuffle])  # keys: N x C
        l_pos = torch.bmm(q[:, None, :], k[:, :, None])[:, :, 0]  # positive logits: N x 1
        l_neg = torch.mm(q, self.queue)  # negative logits: N x K
        logits = torch.cat([l_pos, l_neg], dim=1)
        labels = torch.zeros(len(q), dtype=torch.int64)
        loss = cross_entropy(logits / self.t, labels)
        self.sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.sgd.step()
        with torch.no_grad():  # momentum update: key network
            for p_k, p_q in zip(self.f_k.parameters(), self.f_q.parameters(), strict=True):
                p_k.copy_(self.m * p_k + (1 - self.m) * p_q)
        for key in k:  # enqueue and dequeue the earliest
            self.queue[:, self.pointer] = key
            self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return loss.detach()
