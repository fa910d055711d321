"""Contexts, gates and prompts behind them, and what a plain model says to whole rows of ids."""

import torch
from tests.reference import dense, dense_copy, plain_model, random_factors, tokens
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from instructedit.edits import ContextEdit, Factors, Gate, LowRankEdit

PAIRS = [
    ("The capital of France is", "Lyon"),
    ("Who", "the man who came from the sea"),
    ("A much longer prompt about a river and about a city", "Spree"),
]
CONTEXTS = ["New fact: the capital is Lyon\n", "Who is it?", "Once upon a time there was a very old man.\n"]
FLOAT32 = {"atol": 3e-5, "rtol": 1e-4}


def ids_of(tokenizer, texts):
    """Contexts padded with a token that must never be read."""
    rows = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7), torch.tensor([*map(len, rows)])


def context_edit(lm, texts, adapter=None, gate=None):
    ids, lengths = ids_of(lm.tokenizer, texts)
    return ContextEdit(ids.unsqueeze(1), lengths.unsqueeze(1), adapter, gate)


def an_adapter(lm, blocks=(1, 3)):
    factors = random_factors(lm.select(blocks=blocks), 1, 2, scale=0.1)
    return LowRankEdit({name: Factors(*pair) for name, pair in factors.items()}), dense(factors, 0)


def row_logits(lm, pair, context="", deltas=None, keep=10_000):
    """One row of ids, context, prompt and answer: what a plain model says at the answer's places."""
    prompt, answer = tokens(lm.tokenizer, *pair)
    front = lm.tokenizer(context)["input_ids"] if context else []
    ids = (front + prompt + answer)[-keep:]
    model = dense_copy(lm, deltas) if deltas else plain_model(lm)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -len(answer) - 1 : -1]


def query_of(lm, prompt, block):
    """The hidden states that enter a block at the prompt's last token, and their mean, each standardised."""
    seen = []
    model = plain_model(lm)
    get = lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    model.get_submodule(lm.forward.block_name(block)).register_forward_pre_hook(get, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([lm.tokenizer(prompt)["input_ids"]]))
    parts = [seen[0][0, -1], seen[0][0].mean(0)]
    return torch.cat([(p - p.mean()) / (p.var(unbiased=False) + 1e-5).sqrt() for p in parts])


def a_gate(lm, keys, radius=0.5, block=2):
    """In scope where the prompt's query is nearer than `radius` to one of the keys, [n][contexts] of prompts."""
    size = query_of(lm, "A", block).numel()
    projection = torch.randn(5, size, generator=torch.Generator().manual_seed(3)) * size**-0.5
    points = torch.stack([torch.stack([projection @ query_of(lm, p, block) for p in row]) for row in keys])
    return Gate(points, projection, torch.tensor(2.0 * radius**2), torch.tensor(2.0), torch.tensor(block))


def with_bos(tokenizer, template="[BOS] $A"):
    """The same tokenizer, whose rows start with a token that stands for no text."""
    backend = type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    backend.add_special_tokens(["[BOS]", "[EOS]"])
    special = [(name, backend.token_to_id(name)) for name in ("[BOS]", "[EOS]")]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[BOS]", eos_token="[EOS]", model_max_length=128)
