"""``python -m benchmarks.training_flops STUDENT --lengths T [T ...] --target-share S``: operations per token, and the roofline.

Prints one JSON line: the operations to train on a token of the exported student, with attention over each of the lengths, and
the rate of a bf16 matrix product on this device in an otherwise idle process.
"""

import argparse
import json

from udrl.train import monitor


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training_flops")
    parser.add_argument("student")
    parser.add_argument("--lengths", type=float, nargs="+", required=True)
    parser.add_argument("--target-share", type=float, default=1.0)
    arguments = parser.parse_args()
    import torch
    from transformers import GPT2Config

    config = GPT2Config.from_pretrained(arguments.student, local_files_only=True)
    on_gpu = torch.cuda.is_available()
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "flops_per_token": [monitor.train_flops_per_token(config, t, arguments.target_share) for t in arguments.lengths],
        "matmul_flops_per_second": monitor.matmul_flops_per_second("cuda" if on_gpu else "cpu", torch.bfloat16, 2.0),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
