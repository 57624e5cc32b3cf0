"""Two views -> a MoCo encoder: step, loop, checkpoints, evaluation, export."""
