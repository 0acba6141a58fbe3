"""Run real vLLM once in a process of its own: greedy tokens and logprobs for given token ids, as JSON.

usage: python vllm_generate.py REQUEST.json RESPONSE.json
REQUEST: {"model": DIR, "llm": {LLM keyword arguments}, "prompts": [[ids]], "max_tokens": n, "lora": DIR?,
"reload": DIR?}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    extra = {}
    if request.get("lora"):
        from vllm.lora.request import LoRARequest

        extra["lora_request"] = LoRARequest("test", 1, request["lora"])
    llm = LLM(
        request["model"],
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        **request["llm"],
    )
    if request.get("reload"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": request["reload"]})
    params = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, logprobs=1, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False, **extra)
    result = [
        {
            "tokens": list(o.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
            ],
        }
        for o in outputs
    ]
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
