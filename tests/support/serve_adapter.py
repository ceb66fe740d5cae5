"""What vLLM says with an adapter on a model, in a process of its own, because a process has one engine at a time.

    python -m support.serve_adapter <model> <adapter> <file>

The file holds token ids of prompts as JSON; the ids of the replies take their place.
"""

import json
import sys
from pathlib import Path

from cgd_stages.contract import Engine
from cgd_stages.engines.vllm_settings import vllm_arguments


def main(model: str, adapter: str, file: str) -> None:
    arguments = vllm_arguments(Path(model), Engine(dtype="float32"))
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**arguments, enable_lora=True, max_lora_rank=8)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(file).read_text())]
    greedy = SamplingParams(temperature=0, max_tokens=24)
    replies = engine.generate(prompts, greedy, lora_request=LoRARequest("one", 1, adapter), use_tqdm=False)
    Path(file).write_text(json.dumps([list(reply.outputs[0].token_ids) for reply in replies]))


if __name__ == "__main__":
    main(*sys.argv[1:])
