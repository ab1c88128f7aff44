"""The first minutes on a GPU: what works, what is wrong, and how fast it is.

    python -m benchmarks.device                              # on the GPU of this machine, within ten minutes
    python -m benchmarks.device --only training sampling     # some sections, or checks whose names hold these words
    python -m benchmarks.device --device cpu --small         # the same checks on tiny networks, as the tests run them

It needs PyTorch, torchvision, timm, NumPy, SciPy and safetensors: no Ray, no workspace, no weights. Everything of `beeline/`
that a run does on a GPU is done once, at full size with random weights, and compared with the CPU in float32 or with itself.
Each check prints a line: PASS, FAIL or SKIP, the figure, what it may be at most, and seconds. A check that fails, crashes the
process or hangs does not end the others. The JSON file has the machine, all figures, tracebacks and peak memory; beside it
stand results that `cluster/estimate.py` reads once they are in `benchmarks/results/`.
"""
