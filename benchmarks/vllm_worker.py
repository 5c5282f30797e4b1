"""vLLM's side of benchmarks/generate.py, run by the interpreter of vLLM's own environment.

Reads JSON lines and answers each with one: first the settings of vllm.LLM, then calls of generate. Imports
nothing of this project.
"""

import json
import os
import sys


def memory_status(field: str) -> float:
    """VmRSS or VmHWM of this process, in GB."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(field))


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to stdout
    import torch
    import vllm
    from vllm.platforms import current_platform

    before, cuda = memory_status("VmRSS"), current_platform.device_type == "cuda"
    llm = vllm.LLM(**json.loads(sys.stdin.readline()))
    versions = {"vllm": vllm.__version__, "vllm's torch": torch.__version__}
    print(json.dumps({"device": current_platform.device_type, "versions": versions}), file=replies)
    for line in sys.stdin:
        call = json.loads(line)
        sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **call["sampling"])
        prompts = [{"prompt_token_ids": ids} for ids in call["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else memory_status("VmHWM") - before
        responses = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"responses": responses, "peak_memory_gb": peak}), file=replies)


if __name__ == "__main__":
    main()
