"""Measure what an LM's layers see over plain text, for ROME and MEMIT."""

from __future__ import annotations

from typing import Literal


def main(
    lm: str = "tiny",
    editor: Literal["rome", "memit"] = "rome",
    text: str = "auto",
    tokens: int = 100_000,
    blocks: list[int] | None = None,
    site_names: list[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Computes the second moments C = E[u uᵀ] that ROME and MEMIT need, once; they are kept on disk.

    Kept under $INSTRUCTEDIT_CACHE (by default ~/.cache/instructedit), for each model, layer, text and number of tokens.
    The text is streamed, so any length fits. Editors with the same options find them there.

    Args:
        lm: tiny, tiny-llama, a local folder, or a hub id.
        editor: Whose layers; the other options are those of that editor.
        text: auto (the embedded corpus for the embedded models, for any other what it samples itself), sampled, tiny
            (the embedded corpus), a file (.txt, blank lines part the texts; or .jsonl with a field "text"; also
            as .gz or .xz), or a dataset on the hub.
        tokens: So many tokens of it.
        blocks: Blocks, negative from the top; by default as far up as in the method's paper.
        site_names: Names or patterns of the layers within them; by default the output projections.
        dtype: Of the LM's weights and forward pass.
        device: Where the LM runs, e.g. cuda.
    """
    import instructedit as ie
    from instructedit.lm.moments import moments_file, second_moments

    model = ie.FrozenLM.from_pretrained(lm, dtype, device)
    method = ie.build_editor(editor, model, text=text, tokens=tokens, blocks=blocks, site_names=site_names)
    names = [site.name for site in method.sites]
    known = [name for name in names if moments_file(model, name, text, tokens).is_file()]
    for name, moment in second_moments(model, names, text, tokens).items():
        size = moments_file(model, name, text, tokens).stat().st_size / 1e6
        state = "was there" if name in known else "computed"
        print(f"{name}: {moment.shape[0]} × {moment.shape[1]}, {size:.1f} MB, {state}, trace {moment.trace():.4g}")
