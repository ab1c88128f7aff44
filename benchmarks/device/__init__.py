"""Checks for the first minutes on a GPU: what works, what is wrong, and how fast it is.

    python -m benchmarks.device                              # on the GPU of this machine, within ten minutes
    python -m benchmarks.device --only training sampling     # some sections, or checks whose names contain these words
    python -m benchmarks.device --device cpu --small         # the same checks on tiny networks, as in the tests

It needs PyTorch, torchvision, timm, NumPy, SciPy and safetensors, but no Ray, workspace or weights. Everything in `beeline/`
that a run does on a GPU is done once, at full size with random weights, and compared with the CPU in float32 or with itself.
Each check prints a line: PASS, FAIL or SKIP, the figure, its limit, and seconds. A check that fails, crashes the process or
hangs does not stop the others. The JSON file holds the machine, all figures, tracebacks and peak memory. The results in the
same folder are read by `cluster/estimate.py` once they are in `benchmarks/results/`.
"""
