"""Editing areas against dense updates: norms, cosines, components, files, maps and separation scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from instructedit.analysis import EditingAreas, cosines, embed, fitting_perplexity, principal_components, separation
from instructedit.errors import UserError

SITE = "h.0.mlp.c_fc"


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Random factors of random shapes and scales; some records have fewer rows, some none."""
    records, rank, width, height = (draw(st.integers(1, top)) for top in (7, 5, 6, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    a = torch.randn(records, rank, width, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    b = torch.randn(records, rank, height, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    ranks = torch.tensor(draw(st.lists(st.integers(0, rank), min_size=records, max_size=records)))
    kept = torch.arange(rank) < ranks[:, None]
    a, b = a * kept[..., None], b * kept[..., None]
    # Rows that all but cancel amplify single precision's rounding, in the code and in the reference alike.
    terms = (a.norm(dim=2) * b.norm(dim=2)).norm(dim=1)
    assume(bool((dense(a, b).norm(dim=1) >= 0.1 * terms).all()))
    return a, b


def build(a: Tensor, b: Tensor, tasks: Sequence[str] | None = None) -> EditingAreas:
    ids = [f"record {i}" for i in range(len(a))]
    return EditingAreas.from_factors(ids, tasks or ["task"] * len(a), {SITE: (a, b)})


def dense(a: Tensor, b: Tensor) -> Tensor:
    """The updates as vectors, [records, out * in], in double precision."""
    return torch.einsum("nto,nti->noi", b.double(), a.double()).flatten(1)


def unit(a: Tensor, b: Tensor) -> Tensor:
    updates = dense(a, b)
    norms = updates.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, updates / norms, 0.0)


def planted(count: int = 20, tasks: Sequence[str] = ("counterfact", "recent", "zsre")) -> EditingAreas:
    """``count`` records a task, each task's updates about a direction of its own."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(len(tasks)).repeat_interleave(count)
    a = torch.eye(8)[label][:, None] + 0.3 * torch.randn(len(label), 3, 8, generator=generator)
    b = torch.eye(6)[label][:, None] + 0.3 * torch.randn(len(label), 3, 6, generator=generator)
    return build(a, b, [tasks[i] for i in label])


def scrambled(count: int = 40) -> EditingAreas:
    """Updates that have nothing to do with their task."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3 * count, 2, width, generator=generator) for width in (8, 6))
    return build(a, b, ["counterfact", "recent", "zsre"] * count)


@settings(max_examples=50, deadline=None)
@given(factors())
def test_norms_and_unit_updates_agree_with_dense_ones(pair: tuple[Tensor, Tensor]) -> None:
    areas = build(*pair)
    torch.testing.assert_close(areas.norms[SITE].double(), dense(*pair).norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(dense(*areas.factors[SITE]), unit(*pair), rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(factors(), st.integers(1, 9))
def test_cosines_agree_with_dense_ones_in_any_chunks(pair: tuple[Tensor, Tensor], chunk: int) -> None:
    areas, vectors = build(*pair), unit(*pair)
    expected = (vectors @ vectors.T).float()
    whole = cosines(areas, SITE)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(cosines(areas, SITE, chunk=chunk), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(cosines(areas, SITE, areas, chunk=chunk), whole, rtol=0, atol=1e-4)


def test_cosines_across_two_editors() -> None:
    ours, theirs = planted(), scrambled(5)
    expected = dense(*ours.factors[SITE]) @ dense(*theirs.factors[SITE]).T
    torch.testing.assert_close(cosines(ours, SITE, theirs, chunk=7), expected.float(), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(factors(), st.integers(1, 8))
def test_components_agree_with_a_dense_decomposition(pair: tuple[Tensor, Tensor], k: int) -> None:
    coordinates = principal_components(build(*pair), SITE, k)
    vectors = unit(*pair)
    left, values, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    count = min(k, len(vectors))
    assert coordinates.shape == (len(vectors), count)
    assert (coordinates.max(0) >= -coordinates.min(0) - 1e-9).all()
    # Other signs, and axes within equal variances, are arbitrary: variances and distances are not.
    reference = (left * values)[:, :count]
    spread = np.zeros(count)
    spread[: reference.shape[1]] = reference.square().sum(0)
    np.testing.assert_allclose((coordinates**2).sum(0), spread, atol=1e-4)
    if k >= len(vectors):
        np.testing.assert_allclose(coordinates @ coordinates.T, reference @ reference.T, atol=1e-4)


def test_rows_that_cancel_are_no_update() -> None:
    a = torch.randn(1, 1, 5).repeat(1, 2, 1)
    b = torch.randn(1, 1, 4) * torch.tensor([0.1, -0.1])[None, :, None]
    areas = build(a, b)
    assert areas.norms[SITE].item() == 0
    assert not areas.factors[SITE][1].any()


def test_half_precision_factors_are_normalised_in_single() -> None:
    a, b = torch.randn(3, 2, 5).bfloat16(), torch.randn(3, 2, 4).bfloat16()
    areas = build(a, b)
    assert {tensor.dtype for tensor in (*areas.factors[SITE], areas.norms[SITE])} == {torch.float32}
    torch.testing.assert_close(cosines(areas, SITE).diagonal(), torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_updates_that_are_not_finite_are_refused(value: float) -> None:
    a = torch.ones(3, 2, 5)
    a[1, 0, 0] = value
    with pytest.raises(UserError, match=r"h\.0\.mlp\.c_fc: the update of record record 1 is not finite"):
        build(a, torch.ones(3, 2, 4))


def test_lengths_and_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="one task for each record"):
        EditingAreas(["a"], [], {}, {})
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc: expected 2 x"):
        EditingAreas(["a", "b"], ["t", "t"], {SITE: (torch.ones(2, 3, 4), torch.ones(2, 2, 4))}, {SITE: torch.ones(2)})


def test_unknown_site_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no edited matrix named x; there are h\.0\.mlp\.c_fc"):
        cosines(planted(2), "x")


def test_concat_pads_the_rank() -> None:
    first, second = planted(3), build(torch.randn(2, 5, 8), torch.randn(2, 5, 6))
    both = EditingAreas.concat([first, second])
    assert (both.ids, both.tasks) == (first.ids + second.ids, first.tasks + second.tasks)
    assert both.factors[SITE][0].shape == (11, 5, 8)
    assert torch.equal(both.norms[SITE], torch.cat([first.norms[SITE], second.norms[SITE]]))
    torch.testing.assert_close(cosines(both, SITE)[:9, 9:], cosines(first, SITE, second), rtol=0, atol=1e-6)


def test_concat_needs_the_same_sites() -> None:
    other = EditingAreas.from_factors(["a"], ["t"], {"other": (torch.ones(1, 1, 2), torch.ones(1, 1, 2))})
    for parts in ([], [planted(2), other]):
        with pytest.raises(ValueError, match="same sites"):
            EditingAreas.concat(parts)


def test_saved_areas_come_back_bit_for_bit(tmp_path: Path) -> None:
    pairs = {name: (torch.randn(3, 2, 5), torch.randn(3, 2, 4)) for name in ("z", "a/b", "m")}
    areas = EditingAreas.from_factors(["1", "2", "ü"], ["zsre", "recent", "zsre"], pairs)
    areas.save(tmp_path / "new folder" / "areas.safetensors")
    loaded = EditingAreas.load(tmp_path / "new folder" / "areas.safetensors")
    assert (loaded.ids, loaded.tasks, loaded.site_names) == (areas.ids, areas.tasks, ["z", "a/b", "m"])
    for site in areas.site_names:
        for mine, read in zip(areas.factors[site], loaded.factors[site], strict=True):
            assert torch.equal(mine, read)
        assert torch.equal(areas.norms[site], loaded.norms[site])


def test_half_the_bytes_keep_three_digits(tmp_path: Path) -> None:
    areas = EditingAreas.from_factors(["1", "2"], ["a", "b"], {SITE: (torch.randn(2, 3, 200), torch.randn(2, 3, 300))})
    sizes = []
    for half in (False, True):
        areas.save(tmp_path / "areas.safetensors", half=half)
        sizes.append((tmp_path / "areas.safetensors").stat().st_size)
    loaded = EditingAreas.load(tmp_path / "areas.safetensors")
    assert sizes[1] < 0.6 * sizes[0]
    torch.testing.assert_close(cosines(loaded, SITE), cosines(areas, SITE), atol=2e-3, rtol=0)


def test_unreadable_files_give_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    planted(2).save(whole)
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-40])
    whole.unlink()
    (tmp_path / "text").write_text("ids\n\ntasks\n" * 30)
    (tmp_path / "empty").touch()
    mark = {"format": "instructedit-editing-areas", "version": "1"}
    index = {"index": json.dumps({"ids": ["a"], "tasks": ["t"], "sites": [SITE]})}
    later, odd = mark | index | {"version": "2"}, mark | {"index": "[1]"}
    for number, metadata in enumerate([None, index, mark, mark | index, later, odd]):
        save_file({"weight": torch.ones(2)}, tmp_path / f"foreign {number}", metadata)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match="cannot be read as editing areas") as caught:
            EditingAreas.load(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            EditingAreas.load(path)


def test_planted_tasks_are_far_apart() -> None:
    scores = separation(planted(), SITE)
    assert scores["silhouette"] > 0.5
    assert scores["variance_ratio"] > 1
    assert scores["probe_accuracy"] == 1
    assert scores["chance"] == pytest.approx(1 / 3)


def test_unrelated_tasks_are_at_chance() -> None:
    scores = separation(scrambled(), SITE)
    assert abs(scores["silhouette"]) < 0.05
    assert scores["variance_ratio"] < 0.05
    assert scores["probe_accuracy"] == pytest.approx(1 / 3, abs=0.12)


def test_variance_ratio_agrees_with_dense_means() -> None:
    areas = scrambled(4)
    vectors = dense(*areas.factors[SITE]).numpy()
    means = np.stack([vectors[[task == own for own in areas.tasks]].mean(0) for task in areas.tasks])
    expected = ((means - vectors.mean(0)) ** 2).sum() / ((vectors - means) ** 2).sum()
    assert separation(areas, SITE)["variance_ratio"] == pytest.approx(expected, rel=1e-4)


def test_separation_is_nan_where_it_is_not_defined() -> None:
    assert all(math.isnan(score) for score in separation(planted(4, ["zsre"]), SITE).values())
    assert all(math.isnan(score) for score in separation(planted(1), SITE).values())
    lonely = EditingAreas.concat([planted(3, ["zsre"]), planted(1, ["recent"])])
    assert math.isnan(separation(lonely, SITE)["probe_accuracy"])
    assert separation(lonely, SITE)["chance"] == 0.75


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_the_same_seed_gives_the_same_map(method: str) -> None:
    first, second = (embed(planted(8), SITE, method, perplexity=5) for _ in range(2))
    assert first.shape == (24, 2)
    assert np.array_equal(first, second)


def test_a_map_keeps_planted_tasks_together() -> None:
    areas = planted(10)
    points = embed(areas, SITE)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag([np.inf] * len(points))
    assert areas.tasks == [areas.tasks[nearest] for nearest in distances.argmin(1)]


@pytest.mark.parametrize("records", [1, 2, 3, 4])
def test_maps_of_very_few_records(records: int) -> None:
    assert np.isfinite(embed(build(torch.randn(records, 2, 5), torch.randn(records, 2, 4)), SITE)).all()


def test_map_of_editors_that_change_nothing() -> None:
    assert not embed(build(torch.zeros(5, 2, 5), torch.zeros(5, 2, 4)), SITE).any()


def test_arguments_of_a_map() -> None:
    assert [fitting_perplexity(records, 30) for records in (2, 31, 91, 1000)] == [1, 10, 30, 30]
    with pytest.raises(ValueError, match="tsne or pca, got umap"):
        embed(planted(2), SITE, "umap")
