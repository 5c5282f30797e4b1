"""The model card of an exported model, its README.md: where the weights come from, and how to load them."""

from pathlib import Path

from model.config import ModelConfig
from model.tokenizer import render
from spin.config import Config
from spin.engine.metrics import read_log
from spin.engine.recipe import to_toml
from spin.report.markdown import escaped, markdown

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {run}: {title}

{facts}

Self-play fine-tuning: [arXiv 2401.01335](https://arxiv.org/abs/2401.01335). The last training step:

{metrics}

## Load

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("<this directory>", dtype="auto")
```

or `model.weights.load_model("<this directory>")` in the code that made it, where `Tokenizer.encode_prompt`
gives a prompt's ids. `AutoTokenizer` and `vllm serve` need a tokenizer.json, which is here if the base model
had one. {template}

## Settings

```toml
{settings}
```
"""

TEMPLATE = """Training used prompts of this form, without a beginning-of-sequence token (`<eos>` is the
end-of-sequence token, not its characters):

```
{prompt}
```"""


def model_card(
    config: Config, iteration: int, model: ModelConfig, directory: Path, inputs: dict, examples: str
) -> str:
    """The card of what `directory` trained: an iteration of SPIN or its control, or the SFT model (-1).

    `inputs`: the content of inputs.json, the fingerprints. `examples`: how many were trained on, in words.
    """
    sft, method = iteration < 0, "Training on given pairs" if config.data.pairs else "SPIN"
    if config.train.objective == "sft":
        method = "Continued SFT (the control of SPIN)"
    origin = {"Base model": config.sft.init or f"random weights, seed {config.sft.seed}"}
    if not sft:
        opponent = str(config.model_dir(iteration - 1))
        origin = {"Base model": str(config.base), "Opponent" if method == "SPIN" else "Starts from": opponent}
    data = config.data.path if sft else config.data.pairs or config.data.path
    facts = origin | {
        "Recipe": f"{config.run.dir}; every setting is at the end",
        "Iteration": "the base of iteration 0" if sft else str(iteration),
        "Data": f"{data}: {examples}",
        **{f"Fingerprint: {name}": value for name, value in inputs.items() if isinstance(value, str)},
        "Architecture": f"{model.model_type}, {model.num_hidden_layers} layers of width {model.hidden_size}",
        "Weights": config.model.save_dtype,
    }
    last = (read_log(directory / "metrics.jsonl") or [{}])[-1]
    metrics = [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in last.items()]
    template = (config.sft if sft else config.train).template
    if template == "model":
        form = "Training used the model's own chat template."
    else:
        parts = render([{"role": "user", "content": "Why is the sky blue?"}], template)
        form = TEMPLATE.format(prompt="".join("<eos>" if part is None else part for part in parts))
    return CARD.format(
        tags="sft" if sft else "spin, self-play",
        run=escaped(Path(config.run.dir).name),
        title="SFT model" if sft else f"{method}, iteration {iteration}",
        facts=markdown([["", ""], *((name, escaped(value)) for name, value in facts.items())], longest=1000),
        metrics=markdown([["metric", "value"], *metrics]),
        template=form,
        settings=to_toml(config).rstrip(),
    )
