"""A Llama of five million parameters, trained from scratch on Wikipedia text in minutes of one core."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from vllm_spense.evaluation.hidden import hidden_values
from vllm_spense.recovery.penalty import L1Penalty

VOCABULARY = 2048
SEQ_LEN = 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""As the paper's models in kind: gated MLPs, rotary positions, tied embeddings."""
BATCH = 4
LEARNING_RATE = 2e-3
WARM_UP = 0.05
FINAL = 0.1  # of the learning rate
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """One training run: the gate's ``activation``, the coefficient ``l1`` of the penalty, ``seed`` of weights
    and windows, and its length in ``steps`` of 1,024 tokens."""

    activation: Literal["silu", "relu"]
    l1: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        penalty = f"-{self.l1:g}" if self.l1 else ""
        return f"{self.activation}{penalty}/{self.seed}/{self.steps}"


@dataclass(frozen=True)
class Trained:
    """What a run leaves beside its directory: ``losses`` on the training text (mean of each twentieth, nats
    per token), ``seconds`` of its core."""

    losses: list[float]
    seconds: float
    parameters: int


def make_tokenizer(text: Path) -> Any:
    """Byte-level BPE of :data:`VOCABULARY` tokens, fitted to the file; equal files give equal tokenizers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def train(
    plan: Plan, ids: torch.Tensor, tokenizer: Any, out: Path, say: Callable[[str], None] = print
) -> Trained:
    """Train on random windows of ``ids [n]`` and write a Hugging Face directory in bf16 to ``out``.

    Plans that differ in activation and penalty alone start from the same weights and see the same windows.
    Matrices are multiplied in bf16, weights and AdamW's state are fp32.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    started, part = time.process_time(), max(1, plan.steps // 20)
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(
        LlamaConfig(**SIZES, hidden_act=plan.activation, attn_implementation="eager")
    ).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(plan.seed)
    penalty = L1Penalty()
    losses: list[float] = []
    means: list[float] = []
    with hidden_values(model, penalty.see):
        for step in range(plan.steps):
            starts = torch.randint(0, len(ids) - SEQ_LEN + 1, (BATCH,), generator=generator)
            windows = torch.stack([ids[start : start + SEQ_LEN] for start in starts.tolist()])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, plan.steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
            l1 = penalty.take()
            optimizer.zero_grad()
            (loss + plan.l1 * l1 if plan.l1 else loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            losses.append(float(loss.detach()))
            if (step + 1) % part == 0:
                means.append(round(sum(losses[-part:]) / part, 4))
                seconds = time.process_time() - started
                l1_now = float(l1.detach())
                say(f"  {plan.key}: step {step + 1}, loss {means[-1]:.4f}, L1 {l1_now:.2f}, {seconds:.0f} s")
    save(model, tokenizer, out)
    parameters = sum(p.numel() for p in model.parameters())
    return Trained(means, time.process_time() - started, parameters)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """The model in bf16; with a ReLU gate under the architecture by which the plugin serves it."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if model.config.hidden_act == "relu":
        config = out / "config.json"
        config.write_text(config.read_text().replace("LlamaForCausalLM", "SparseLlamaForCausalLM"))


def learning_rate(step: int, steps: int) -> float:
    """Rate of the 0-based ``step``: linear up, then half a cosine down to a tenth."""
    warm_up = math.ceil(WARM_UP * steps)
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    share = (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2
    return LEARNING_RATE * (FINAL + (1 - FINAL) * share)


def described(plan: Plan) -> dict[str, Any]:
    """The plan and everything beside it that decides the weights."""
    training = {"batch": BATCH, "seq_len": SEQ_LEN, "learning_rate": LEARNING_RATE, "betas": BETAS}
    return asdict(plan) | {"sizes": SIZES, **training, "weight_decay": WEIGHT_DECAY}
