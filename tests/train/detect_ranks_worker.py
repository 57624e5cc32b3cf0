"""The toy transfer and a small detector, on as many ranks as there are; see rank_server.py."""

from pathlib import Path

import torch
from tests.train.detect_toy import Points, toy_job, toy_options

from linerate.__main__ import main as command
from linerate.train.evaluate.detect.loop import open_ranks, run_job


def main(toy: str, run: str, voc: str, out: str) -> int:
    """The exit code of the rank's `linerate eval detect`."""
    torch.set_num_threads(1)
    job, options = toy_job(Points(), noise=0.0), toy_options()
    run_job(job, options, folder=Path(toy), accelerator=open_ranks())
    words = ["eval", "detect", run, "--data", voc, "--format", "voc", "--out", out, "--batch", "2"]
    words += ["--short-side", "64", "--rois", "8", "--proposals", "8", "--iterations", "2"]
    return command([*words, "--precise-bn", "1"])
