"""The model card that an exported directory carries as README.md: where the weights come from, and how to
load them.
"""

from pathlib import Path

from model.config import ModelConfig
from model.tokenizer import render
from spin.config import Config, to_toml
from spin.engine.metrics import read_log
from spin.report.markdown import escaped, markdown


def model_card(
    config: Config, iteration: int, model: ModelConfig, directory: Path, inputs: dict, examples: str
) -> str:
    """The card, in Markdown, of what `directory` trained: an iteration of SPIN or its control, or for -1 the
    SFT model.

    Args:
        inputs: what is in inputs.json, fingerprints of opponent (or init) and data
        examples: how many were trained on, in words
    """
    metrics = (read_log(directory / "metrics.jsonl") or [{}])[-1]
    part = config.sft if iteration < 0 else config.train
    if iteration < 0:
        title = "SFT model"
        origin = [("Base model", config.sft.init or f"random weights, seed {config.sft.seed}")]
    else:
        spin = config.train.objective == "spin"
        title = f"{'SPIN' if spin else 'Continued SFT (the control of SPIN)'}, iteration {iteration}"
        opponent = ("Opponent" if spin else "Starts from", str(config.model_dir(iteration - 1)))
        origin = [("Base model", str(config.base)), opponent]
    facts = origin + [
        ("Recipe", f"{config.run.dir}; every setting is at the end"),
        ("Iteration", "the base of iteration 0" if iteration < 0 else str(iteration)),
        (
            "Data",
            f"{config.data.pairs if iteration >= 0 and config.data.pairs else config.data.path}: {examples}",
        ),
        *((f"Fingerprint: {name}", value) for name, value in inputs.items() if isinstance(value, str)),
        (
            "Architecture",
            f"{model.model_type}, {model.num_hidden_layers} layers of width {model.hidden_size}",
        ),
        ("Weights", config.model.save_dtype),
    ]
    shown = [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in metrics.items()]
    parts = render([{"role": "user", "content": "Why is the sky blue?"}], part.template)
    # as sentencepiece models of this kind have it
    prompt = "".join("</s>" if part is None else part for part in parts)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{"sft" if iteration < 0 else "spin, self-play"}]
---

# {escaped(Path(config.run.dir).name)}: {title}

{markdown([["", ""], *([name, escaped(value)] for name, value in facts)], longest=1000)}

Self-play fine-tuning: [arXiv 2401.01335](https://arxiv.org/abs/2401.01335). The last training step:

{markdown([["metric", "value"], *shown])}

## Load

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("<this directory>", dtype="auto")
```

or `model.weights.load_model("<this directory>")` in the code that made it, where `Tokenizer.encode_prompt`
gives a prompt's ids. `AutoTokenizer`, and `vllm serve`, which uses it, need a tokenizer.json; where the base
model had none, there is none here. It was trained on prompts of this form, without a beginning-of-sequence
token (`</s>` is the one token that ends a turn, not its characters):

```
{prompt}
```

## Settings

```toml
{to_toml(config).rstrip()}
```
"""
