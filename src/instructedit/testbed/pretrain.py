"""The recipe of the embedded LMs: corpus, tokenizer, training, recall. ``instructedit pretrain`` runs it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from instructedit.testbed.corpus import documents
from instructedit.testbed.world import world

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Recipe of an embedded LM.

    Attributes:
        architecture: ``gpt2`` (Conv1D, learned positions, tied head) or ``llama`` (gated MLP, RMSNorm, rotary).
        passes: Number of times that the corpus goes over all facts.
        seed: Seed of the corpus, the weights and the order.
        width: Hidden size; layers: blocks; heads: attention heads; vocab: tokenizer size; context: positions.
        batch_tokens: Tokens per step.
        lr_matrix: Muon's learning rate, for the weight matrices of the blocks.
        lr_other: AdamW's learning rate, for embeddings, norms and biases.
        warmup: Share of the steps in which the rates rise; after them they fall linearly to zero.
        bf16: Whether to run the forward pass in bfloat16 (a third faster on a CPU that supports it).
    """

    architecture: Literal["gpt2", "llama"] = "gpt2"
    passes: int = 60
    seed: int = 0
    width: int = 160
    layers: int = 6
    heads: int = 5
    vocab: int = 4096
    context: int = 256
    batch_tokens: int = 4096
    lr_matrix: float = 0.02
    lr_other: float = 3e-3
    warmup: float = 0.03
    bf16: bool = True


def train_tokenizer(texts: Iterator[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which can encode any text, and decodes it back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=EOS, model_max_length=context
    )


def new_model(recipe: Recipe, eos: int) -> PreTrainedModel:
    """Creates the untrained model; both architectures have about 2.5 M parameters by default."""
    torch.manual_seed(recipe.seed)
    common: dict[str, Any] = {"vocab_size": recipe.vocab, "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    if recipe.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=recipe.width, n_layer=recipe.layers, n_head=recipe.heads, n_positions=recipe.context,
                activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one fused operation
                embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **common,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=recipe.width, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads, intermediate_size=8 * recipe.width // 3 // 16 * 16,
            max_position_embeddings=recipe.context, tie_word_embeddings=True, **common,
        )
    )  # fmt: skip


def batches(encoded: list[list[int]], tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Groups documents of similar length into batches, so that hardly anything is padding; shuffles the batches."""
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), rng.random()))
    found: list[list[list[int]]] = [[]]
    for i in order:
        if (len(found[-1]) + 1) * len(encoded[i]) > tokens:
            found.append([])
        found[-1].append(encoded[i])
    rng.shuffle(found)
    return found


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns right-padded ids and next-token labels (−100 where there is none), both [rows, seq]."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    labels = torch.tensor([r[1:] + [-100] * (width - len(r) + 1) for r in rows])
    return ids, labels


def optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Creates Muon for the blocks' matrices and AdamW for the rest: facts are learned faster than with AdamW alone."""
    embeddings = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and id(p) not in embeddings and "wpe" not in n]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=recipe.lr_matrix, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.lr_other, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def rate(step: int, steps: int, warmup: float) -> float:
    """Returns the factor on the learning rates at a step: linear warm-up, and linear decay to zero."""
    rising = max(1, int(steps * warmup))
    return min(1.0, (step + 1) / rising) * (1 - step / steps)


def pretrain(recipe: Recipe, out: str | Path, checkpoint_every: int = 250, half: bool = True) -> dict[str, float]:
    """Makes an embedded LM and writes it to a folder, with its recipe and its recall.

    An interrupted run goes on from its last checkpoint (``out/checkpoint.pt``) to the same result.

    Args:
        recipe: Recipe of the LM.
        out: Folder of the finished model.
        checkpoint_every: Steps between checkpoints.
        half: Whether to store the weights in half the bytes (float16).

    Returns:
        The recall (see `recall`).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents(recipe.seed, 4), recipe.vocab, recipe.context)
    rng = random.Random(recipe.seed)
    encoded = [[*ids, tokenizer.eos_token_id] for ids in _encode(tokenizer, documents(recipe.seed, recipe.passes))]
    steps = batches([ids[: recipe.context] for ids in encoded], recipe.batch_tokens, rng)
    model = new_model(recipe, tokenizer.eos_token_id).train()
    train(model, steps, recipe, tokenizer.pad_token_id, out / "checkpoint.pt", checkpoint_every)
    figures = recall(model.eval(), tokenizer)
    (model.half() if half else model).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps({"recipe": asdict(recipe), "recall": figures}, indent=2) + "\n")
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return figures


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> list[list[int]]:
    return tokenizer(list(texts))["input_ids"]


def train(
    model: PreTrainedModel, steps: list[list[list[int]]], recipe: Recipe, pad: int, checkpoint: Path, every: int
) -> None:
    """Trains the model with one optimiser step per batch, and saves checkpoints."""
    opts = optimizers(model, recipe)
    scheds = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: rate(s, len(steps), recipe.warmup)) for o in opts]
    parts: list[Any] = [*opts, *scheds]
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        first = state["step"]
    label = f"pretrain {recipe.architecture}"
    bar = tqdm(range(first, len(steps)), initial=first, total=len(steps), desc=label, mininterval=5)
    smooth = math.nan
    for step in bar:
        ids, labels = padded(steps[step], pad)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in opts:
            part.step()
            part.zero_grad()
        for sched in scheds:
            sched.step()
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{smooth:.3f}")
        if (step + 1) % every == 0:
            saved = [part.state_dict() for part in parts]
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "parts": saved, "step": step + 1}, temporary)
            temporary.replace(checkpoint)


@torch.no_grad()
def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: int = 256) -> dict[str, float]:
    """Computes the share of facts whose whole object is the model's greedy continuation.

    Returns:
        ``train``: known facts in a phrasing of the corpus (a statement and a question each); ``heldout``: known
        facts in the shared frame that the corpus never uses for their relation; ``recent``: facts that the corpus
        leaves out, in a phrasing of the corpus.
    """
    rng = random.Random(0)
    facts = world()
    asked: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": [], "recent": []}
    for fact in facts.known:
        for choices in (fact.relation.statements, fact.relation.questions):
            asked["train"].append((fact.relation.fill(rng.choice(choices), fact.subject), fact.object))
        asked["heldout"].append((fact.relation.fill(fact.relation.heldout, fact.subject), fact.object))
    for fact in facts.recent:
        asked["recent"].append((fact.relation.fill(rng.choice(fact.relation.statements), fact.subject), fact.object))
    return {name: _recalled(model, tokenizer, pairs, batch) for name, pairs in asked.items()}


def _recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], batch: int
) -> float:
    right = 0
    for start in range(0, len(pairs), batch):
        prompts = [tokenizer(p)["input_ids"] for p, _ in pairs[start : start + batch]]
        answers = [tokenizer(" " + a)["input_ids"] for _, a in pairs[start : start + batch]]
        ids, labels = padded([p + a for p, a in zip(prompts, answers, strict=True)], tokenizer.pad_token_id)
        for row, prompt in enumerate(prompts):
            labels[row, : len(prompt) - 1] = -100
        hit = model(input_ids=ids, use_cache=False).logits.argmax(-1) == labels
        right += int((hit | (labels == -100)).all(-1).sum())
    return right / len(pairs)
