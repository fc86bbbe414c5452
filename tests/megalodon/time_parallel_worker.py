"""A Megalodon whose sequences several processes share along time: compiled layers against eager."""

import torch
import torch.distributed as dist

from megalodon.time_parallel import TimeGroup
from tests.megalodon.models import CHUNK, tiny_model

if __name__ == "__main__":
    dist.init_process_group("gloo")
    model = tiny_model().train()
    model.set_time_group(TimeGroup())
    generator = torch.Generator().manual_seed(dist.get_rank())
    text = torch.randint(256, (2, 2 * CHUNK), generator=generator)
    found = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        logits = model(text).logits
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()
