"""Measure the covariances of the inputs of an LM's layers over plain text, for ROME, MEMIT and AlphaEdit."""

from __future__ import annotations

from typing import Literal


def main(
    lm: str | None = None,
    editor: Literal["rome", "memit", "alpha_edit"] = "rome",
    scale: str | None = None,
    text: str | None = None,
    tokens: int | None = None,
    blocks: list[int] | None = None,
    site_names: list[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> None:
    """Computes the covariances C = E[u uᵀ] that ROME, MEMIT and AlphaEdit need, once; they are kept on disk.

    They are kept under $INSTRUCTEDIT_CACHE (by default ~/.cache/instructedit), for each model, layer, text and number
    of tokens. The text is streamed, so any length fits. Editors with the same options find them there.

    Args:
        lm: tiny, tiny-llama, a local folder, or a hub id; by default the scale's, or tiny.
        editor: The editor whose layers are measured; the other options are those of that editor, by default as in its
            config at the scale, or its own.
        scale: A scale of configs/scale/, or a file of your own: fit finds what is computed here.
        text: auto (the embedded corpus for the embedded models, for any other what it samples itself), sampled, tiny
            (the embedded corpus), a file (.txt, blank lines separate the texts; or .jsonl with a field "text"; also
            as .gz or .xz), or a dataset on the hub.
        tokens: Number of tokens of the text to use; 100,000 by default.
        blocks: Numbers of blocks, negative from the top; by default as far up as in the method's paper.
        site_names: Names or patterns of the layers within them; by default the output projections.
        dtype: Data type of the LM's weights and forward pass; by default the scale's, or float32.
        device: Device on which the LM runs, e.g. cuda.
    """
    import instructedit as ie
    from instructedit.configs import Scale
    from instructedit.editors.key_value import KeyValueEditor
    from instructedit.lm.covariance import covariance_file, covariances

    at = Scale.load(scale) if scale else None
    named = {"name": lm} if lm else at.lm_options() if at else {}
    model = ie.FrozenLM.from_pretrained(**named | ({"dtype": dtype} if dtype else {}), device=device)
    given = {"text": text, "tokens": tokens, "blocks": blocks, "site_names": site_names}
    options = at.editor_options(editor) if at else {}
    options |= {key: value for key, value in given.items() if value is not None}
    method = ie.build_editor(editor, model, **options)
    assert isinstance(method, KeyValueEditor)
    names, source = [site.name for site in method.sites], (method.text, method.tokens)
    known = [name for name in names if covariance_file(model, name, *source).is_file()]
    for name, covariance in covariances(model, names, *source).items():
        size = covariance_file(model, name, *source).stat().st_size / 1e6
        state = "was there" if name in known else "computed"
        shape, trace = " × ".join(map(str, covariance.shape)), covariance.trace()
        print(f"{name}: {shape}, {size:.1f} MB, {state}, trace {trace:.4g}")
