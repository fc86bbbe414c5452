"""Trains several times with the processes that torchrun started: `worker.py CONFIG name:key=value
name:key=value,key=value ...` writes to run_dir=name."""

import sys

import torch.distributed as dist

from megalodon_enwik8.config import load_config
from megalodon_enwik8.training import train

dist.init_process_group("gloo")
for job in sys.argv[2:]:
    name, _, overrides = job.partition(":")
    resume = "newest" if name.endswith("/resumed") else None
    run_dir = f"run_dir={name.removesuffix('/resumed')}"
    config = load_config(sys.argv[1], [run_dir, *filter(None, overrides.split(","))])
    assert train(config, resume=resume) == 0
dist.destroy_process_group()
