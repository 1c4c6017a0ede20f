"""What the server of forked workers has imported: a fresh interpreter would pay ten seconds for it, a fork pays none.

It runs no backward pass and no second thread: torch refuses the first, and hangs on the second, in a process forked
after it.
"""

import importlib

import torch

for name in ("pytest", "aigc_course.generate", "aigc_course.recipes", "aigc_course.training"):
    importlib.import_module(name)
torch.set_num_threads(1)
torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # it imports torch._dynamo
