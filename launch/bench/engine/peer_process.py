"""Somebody else's engine as a process, run with its own environment's Python; nothing of Stepladder is needed there.

    PYTHON -I peer_process.py vllm|transformers MODEL DTYPE THREADS

A line of JSON on stdin is work, {"prompts": token ids, "lengths": tokens to generate}; the line on stdout that answers
it says how long it took, {"seconds": ...}. The first line on stdout, {}, says that the engine is ready.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], list[int]], None]


def serve(start: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer lines until stdin ends. start: loads the engine, and returns what answers a message."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answer = start()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def timed(generate: Generate) -> Callable[[Any], Any]:
    def answer(work: Any) -> dict[str, float]:
        began = time.perf_counter()
        generate(work["prompts"], work["lengths"])
        return {"seconds": time.perf_counter() - began}

    return answer


def transformers(model: str, dtype: str, threads: int) -> Generate:
    """Eager, a batch padded on the left, until the longest output is done."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), trust_remote_code=True).eval()
    loaded.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: list[list[int]], lengths: list[int]) -> None:
        width, new = max(map(len, prompts)), max(lengths)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = loaded.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        assert out.shape == (len(prompts), width + new)

    return generate


def vllm(model: str, dtype: str, threads: int) -> Generate:
    """With the defaults of its CPU build, besides its threads: of two cores it would leave one alone."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype=dtype, max_num_seqs=64)

    def generate(prompts: list[list[int]], lengths: list[int]) -> None:
        sampling = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == lengths

    return generate


ENGINES = {"transformers": transformers, "vllm": vllm}

if __name__ == "__main__":
    engine, path, kind, count = sys.argv[1:]
    serve(lambda: timed(ENGINES[engine](path, kind, int(count))))
