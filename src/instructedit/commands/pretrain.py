"""Make an embedded tiny LM from its recipe."""

from __future__ import annotations

from typing import Literal


def main(
    out: str,
    architecture: Literal["gpt2", "llama"] = "gpt2",
    passes: int = 60,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Makes an embedded LM: corpus, tokenizer, training, recall. An interrupted run goes on where it stopped.

    Args:
        out: Folder of the finished model.
        architecture: gpt2 or llama.
        passes: Number of passes over all facts.
        seed: Seed of the corpus, the weights and the order.
        threads: CPU threads.
    """
    import torch

    from instructedit.testbed.pretrain import Recipe, pretrain

    if threads:
        torch.set_num_threads(threads)
    recall = pretrain(Recipe(architecture=architecture, passes=passes, seed=seed), out)
    for name, share in recall.items():
        print(f"recall {name:<8} {100 * share:5.1f} %")
