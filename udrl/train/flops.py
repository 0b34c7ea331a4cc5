"""Work and speed: the floating-point operations that training a token takes, and the most that this device does.

``MFU = tokens_per_second * train_flops_per_token(config, context) / (ceiling(device, dtype) * workers)``, model FLOPs
utilisation as in PaLM (arXiv 2204.02311, appendix B), but against what the device reaches in a matrix product here rather
than a data sheet's peak.
"""

import time
from statistics import median
from typing import Any

SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices: large enough to be bound by arithmetic


def train_flops_per_token(config: Any, context: float, target_share: float = 1.0) -> float:
    """Operations to learn from one token, forward and backward: ``6 N + 12 L d T``.

    N counts the weights that a token is multiplied with: L layers of ``4 d^2 + 2 d f`` and the output matrix ``V d``, tied to
    the embedding or not; looking up an embedding costs nothing. The second term is attention's two products (queries with
    keys, weights with values) over T tokens. Biases, norms and activations are left out, as in the paper.

    Args:
        config: a ``GPT2Config``.
        context: T, the tokens of a row. By convention every token is counted against all of them: neither causality nor
            packing's mask is deducted, since a kernel that takes a dense mask computes what it then hides. For one that skips
            it, give the mean length of a packed example (weighted by tokens).
        target_share: share of the tokens whose logits are made; ``packed_loss`` makes those of targets alone.
    """
    inner = config.n_inner or 4 * config.n_embd
    weights = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * inner)
    weights += target_share * config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * context


def ceiling(device: Any, dtype: Any, seconds: float = 0.3) -> float:
    """Operations a second of a square matrix product in ``dtype`` on ``device``: the median over about ``seconds``.

    A CPU is measured with the threads that torch is set to. Several workers on one machine share it: measure while all of
    them do, or divide.
    """
    import torch

    device = torch.device(device)
    n = SIZE.get(device.type, SIZE["cuda"])
    # Not from the global generator: measuring must not change what training draws.
    made = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=made).to(device, dtype)
    out = torch.empty_like(a)

    def once() -> float:
        begun = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    once()  # loads kernels and chooses among them
    once()
    took = [once()]
    while sum(took) < seconds or len(took) < 3:
        took.append(once())
    return 2.0 * n**3 / median(took)
