"""``python -m benchmarks.bare_engine REQUESTS OUT``: vLLM only, on the requests of a JSON file, in a process of its own.

The baseline of ``benchmarks.generation``: the same model, settings, prompts and sampling as in the generate stage, but nothing
around them. vLLM's engine in its own process gets all requests at once and is stepped until they are complete.
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
    # As LLM.generate does: no output of a request before its last.
    params = SamplingParams(**work["sampling_params"], output_kind=RequestOutputKind.FINAL_ONLY)
    for i, prompt in enumerate(work["prompts"]):
        engine.add_request(str(i), prompt, params)
    finished = []
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        tokens = [len(output.outputs[0].token_ids) for output in engine.step() if output.finished]
        if tokens:
            finished.append((time.perf_counter() - start, len(tokens), sum(tokens)))
    seconds = time.perf_counter() - start
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"seconds": seconds, "finished": finished}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
