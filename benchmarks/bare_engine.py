"""``python -m benchmarks.bare_engine REQUESTS OUT``: vLLM alone on the requests of a JSON file, in a process of its own.

The yardstick of ``benchmarks.generation``: the same model, settings, prompts and sampling as the generate stage, and nothing
around them: vLLM's own engine in its own process, all requests given at once, stepped until they are done.
"""

import json
import sys
import time


def main(source: str, out: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    with open(source, encoding="utf-8") as file:
        work = json.load(file)
    engine = LLM(model=work["model"], disable_log_stats=True, **work["engine_kwargs"]).llm_engine
    # As LLM.generate asks: no output before a request's last.
    params = SamplingParams(**work["sampling_params"], output_kind=RequestOutputKind.FINAL_ONLY)
    for i, prompt in enumerate(work["prompts"]):
        engine.add_request(str(i), prompt, params)
    finished = []
    begun = time.perf_counter()
    while engine.has_unfinished_requests():
        tokens = [len(o.outputs[0].token_ids) for o in engine.step() if o.finished]
        if tokens:
            finished.append((time.perf_counter() - begun, len(tokens), sum(tokens)))
    seconds = time.perf_counter() - begun
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"seconds": seconds, "finished": finished}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
