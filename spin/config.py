"""Every setting, its default and its unit.

A recipe is a TOML file that states only what differs from the defaults. `[[iteration]]` tables hold what
changes from one iteration to the next, by the settings' full names; the last one also serves the iterations
after it:

    [[iteration]]                       # iteration 0
    train.lr = 5e-7
    [[iteration]]                       # iteration 1
    train.lr = 1e-7

Later wins: default, recipe, iteration, command line (`--train.lr=1e-7`). spin/engine/recipe.py reads them.
"""

from dataclasses import dataclass, field
from pathlib import Path


def _free(default):
    """May change on resume: doesn't affect results, or names a file whose digest is recorded."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class Run:
    dir: str = "runs/tiny"  # everything of this run is written here
    paper: bool = _free(False)  # the report has the paper's numbers: this run has its model, data and method
    fork: str = _free("")  # a run to start from (train.py --from): what it has with equal settings is reused
    shard_size: int = _free(0)  # ranks that share one copy of the parameters (HSDP); 0: all of them


@dataclass(frozen=True)
class Model:
    base: str = _free("")  # SFT model of iteration 0; empty: <run.dir>/base/model, from `train.py --sft`
    save_dtype: str = "bfloat16"  # of exported weights
    attention: str = _free("auto")  # flash-attn, torch-flash or sdpa; auto: the first that is available


@dataclass(frozen=True)
class Data:
    path: str = _free("")  # prompts with responses: a .jsonl or .parquet file, a directory, or a pattern
    prompt_column: str = ""  # column names, if they are not among the known forms (spin/data.py)
    response_column: str = ""
    pairs: str = _free("")  # pairs to train on instead of generating, as data.path; preferences give DPO
    num_prompts: int = 0  # the first of a seeded order, for self-play; 0: all. SFT reads all
    seed: int = 0
    turns: str = "first"  # of a conversation, the response is the first assistant turn, or the last
    empty_system: bool = False  # insert an empty system turn if there is none, as the official code does
    max_length: int = 1024  # tokens of prompt and response
    max_prompt_length: int = 512  # last tokens of a prompt that are kept if max_length is exceeded
    empty: str = "refuse"  # an example with an empty prompt or response: "refuse", or "drop" (and count)


@dataclass(frozen=True)
class Generate:
    template: str = "plain"  # the opponent's prompt format: model (its own), zephyr, instruction, plain
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    max_new_tokens: int = 256
    samples: int = 1  # responses for each prompt; training uses all, and the mean of their losses
    share: float = 1.0  # of the prompts, answered again in each later iteration; others keep their responses
    seed: int = 0
    dtype: str = "bfloat16"  # of weights and cache while sampling
    slots: int = _free(0)  # sequences per batch and rank; 0: as many as memory holds, at most 512 (CPU: 128)
    fixed_slots: bool = False  # batch-invariant: text depends on `slots` and the longest prompt only


@dataclass(frozen=True)
class Optimization:
    """What SFT and self-play share."""

    template: str = "plain"  # format of prompt and response in training
    optimizer: str = "rmsprop"  # rmsprop or adamw (betas 0.9 and 0.999), both without weight decay
    lr: float = 5e-7  # peak learning rate
    batch_size: int = 64  # examples per step, over all ranks
    epochs: float = 2.0  # passes over the examples; may be fractional
    schedule_epochs: float = 0.0  # length of the learning rate schedule; 0: `epochs`
    export_every: float = _free(0.0)  # epochs between exports to <iteration>/epoch<E>; 0: only the last
    continue_to: float = _free(0.0)  # epochs to train after the model is exported, for more of these exports
    warmup: float = 0.1  # fraction of the schedule; linear decay to 0 follows
    max_grad_norm: float = 1.0
    dtype: str = "bfloat16"  # of compute; weights, optimizer and reductions are float32
    seed: int = 0  # order of the examples
    second_moment: str = "float32"  # of RMSProp; bfloat16 halves it, rounded stochastically (optimizer.py)
    heldout_pairs: int = 0  # examples not trained on, drawn by `seed`, to measure loss and margin
    heldout_every: int = _free(50)  # steps between two measurements; the last step has one too
    token_budget: int = _free(8192)  # packed tokens of one forward and backward pass on each rank
    logit_chunk: int = _free(256)  # rows whose logits exist at a time; thousands on a GPU, fewer on a CPU
    activation_checkpointing: str = _free("none")  # what the backward pass recomputes: none, selective, full
    compile: bool = _free(False)  # torch.compile each block before and after attention
    unsharded_gradients: bool = _free(False)  # reduce gradients once per step; 4 bytes per parameter
    checkpoint_every: int = _free(200)  # steps
    keep_checkpoints: int = _free(2)  # how many of the last checkpoints are kept
    tensorboard: bool = _free(False)  # also write TensorBoard events to <iteration>/tensorboard
    wandb: bool = _free(False)  # also log to Weights & Biases; WANDB_PROJECT and WANDB_MODE are its own


@dataclass(frozen=True)
class Train(Optimization):
    objective: str = "spin"  # spin; or sft, the control: the same steps on the real responses alone
    loss: str = "logistic"  # one of LOSSES in spin/loss.py
    beta: float = 0.1  # the paper's λ
    mu: float = 1.0  # second parameter of the losses gsil, space and t-spin
    reference: str = "opponent"  # whose log-probs are subtracted: opponent, base, mixture (of both) or none
    alpha: float = 0.5  # the opponent's share of a mixture: log p_ref = α log p_θt + (1 − α) log p_θ0
    replay: int = 1  # number of earlier iterations whose pairs are also trained on
    replay_share: str = "all"  # of their pairs; equal: as many in all as one iteration has, in equal shares


@dataclass(frozen=True)
class SFT(Optimization):
    init: str = _free("")  # a model directory to start from; empty: random weights of `architecture`
    tokenizer: str = _free("")  # a tokenizer file or its directory; empty: that of `init`
    architecture: dict = field(default_factory=dict)  # config.json's fields, without vocab_size, bos and eos
    optimizer: str = "adamw"
    lr: float = 2e-5
    epochs: float = 1.0


@dataclass(frozen=True)
class Evaluate:
    tasks: str = "heldout"  # with commas: heldout, leaderboard, arc_challenge, … (spin/evaluation), mt_bench
    data: str = _free("data/eval")  # directory of the benchmarks' data sets, as `hf download` writes them
    harness: str = "0.4.13"  # the lm-evaluation-harness whose numbers are given; the paper's is 0.4.0
    heldout: str = ""  # questions with right answers for the task heldout; a path like data.path
    limit: int = 0  # the first documents of each task; 0: all
    answer_pattern: str = ""  # regular expression whose last match has the answer as its group; "": all
    max_new_tokens: int = 256
    temperature: float = 1.0  # of the sampled answer; a greedy one is always given too
    seed: int = 1
    dtype: str = "bfloat16"
    slots: int = _free(0)  # as in [generate]
    token_budget: int = _free(8192)  # tokens scored in one forward pass on each rank
    logit_chunk: int = _free(256)  # as in [train]


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    generate: Generate = field(default_factory=Generate)
    train: Train = field(default_factory=Train)
    sft: SFT = field(default_factory=SFT)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @property
    def base(self) -> Path:
        """Directory of the base model, given or trained here."""
        return Path(self.model.base) if self.model.base else Path(self.run.dir) / "base" / "model"

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.evaluate.tasks) and (self.evaluate.tasks != "heldout" or bool(self.evaluate.heldout))

    def iteration_dir(self, iteration: int) -> Path:
        return Path(self.run.dir) / f"iter{iteration}"

    def model_dir(self, iteration: int) -> Path:
        """The exported model of an iteration; -1 is the base."""
        return self.base if iteration < 0 else self.iteration_dir(iteration) / "model"
