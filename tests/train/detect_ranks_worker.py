"""Run by torchrun: the toy transfer and a small detector, on as many ranks as there are.

python detect_ranks_worker.py TOY_FOLDER RUN VOC OUT
"""

import sys
from pathlib import Path

import torch
from tests.train.detect_toy import Points, toy_job, toy_options

from linerate.__main__ import main
from linerate.train.evaluate.detect.loop import open_ranks, run_job

torch.set_num_threads(1)
toy, run, voc, out = map(Path, sys.argv[1:])
run_job(toy_job(Points(), noise=0.0), toy_options(), folder=toy, accelerator=open_ranks())
words = ["eval", "detect", str(run), "--data", str(voc), "--format", "voc", "--out", str(out), "--batch", "2"]
words += ["--short-side", "64", "--rois", "8", "--proposals", "8", "--iterations", "2", "--precise-bn", "1"]
sys.exit(main(words))
