"""What only a GPU can show; run with -m cuda."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalodon import MegalodonForCausalLM

from .models import CHUNK, config_of_the_comparison, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_logits_and_gradients_equal_those_of_the_cpu():
    on_cpu = tiny_model().double()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    ids = torch.randint(0, 256, (2, 5 * CHUNK + 3))
    results = []
    for model in (on_cpu, on_gpu):
        logits = model(ids.to(model.device)).logits
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-8, atol=1e-8)


def test_shipped_heads_run_in_the_flash_kernel():
    with torch.device("cuda"):
        model = MegalodonForCausalLM(config_of_the_comparison(num_layers=1))
    ids = torch.randint(0, 256, (2, 512), device="cuda")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.autocast("cuda", torch.bfloat16):
        model(ids, labels=ids, use_cache=False).loss.backward()


def test_training_forward_never_waits_for_the_device():
    with torch.device("cuda"):
        model = MegalodonForCausalLM(config_of_the_comparison(num_layers=1)).train()
    ids = torch.randint(0, 256, (2, 512), device="cuda")
    model(ids, use_cache=False).logits.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, use_cache=False).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
