"""Model FLOPs utilization (MFU): floating-point operations per trained token, and the device's matrix-product rate.

``MFU = tokens_per_second * train_flops_per_token(config, context) / (matmul_flops_per_second(device, dtype) * workers)``, as in
PaLM (arXiv 2204.02311, appendix B). The denominator is measured on the device rather than read from a data sheet.
"""

import time
from statistics import median
from typing import Any

MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices: large enough to be bound by arithmetic


def train_flops_per_token(config: Any, context: float, target_share: float = 1.0) -> float:
    """Return the floating-point operations to train on one token, forward and backward: ``6 N + 12 L d T``.

    N counts the weights that a token is multiplied with: L layers of ``4 d^2 + 2 d f``, and the output matrix ``V d``; the
    embedding lookup is free. The second term is attention's two products (queries with keys, weights with values) over T
    tokens. Biases, norms and activations are left out, as in PaLM's appendix B.

    Args:
        config: a ``GPT2Config``.
        context: T, the tokens of a row. By convention neither causality nor the mask of packing is deducted, because a kernel
            with a dense mask computes the hidden part as well. For a kernel that skips it, give the mean length of a packed
            example, weighted by tokens.
        target_share: share of the tokens whose logits are computed; ``packed_loss`` computes only those of targets.
    """
    inner = config.n_inner or 4 * config.n_embd
    weights = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * inner)
    weights += target_share * config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * context


def matmul_flops_per_second(device: Any, dtype: Any, seconds: float = 0.3) -> float:
    """Return the operations per second of a square matrix product, the median over about ``seconds``.

    On a CPU it uses torch's current number of threads. Workers that share a machine share this rate: measure in all of them at
    the same time, or divide.
    """
    import torch

    device = torch.device(device)
    n = MATRIX_SIZES.get(device.type, MATRIX_SIZES["cuda"])
    # A generator of its own: the measurement must not change the random state of the training.
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device, dtype)
    out = torch.empty_like(a)

    def time_product() -> float:
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):  # warm-up: loads and selects kernels
        time_product()
    times = [time_product()]
    while sum(times) < seconds or len(times) < 3:
        times.append(time_product())
    return 2.0 * n**3 / median(times)
