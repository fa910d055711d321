"""Edits one after another on one model: made on top of each other, scored on the way, and no dearer at the end."""

import pandas as pd
import pytest
import torch
from tests.conftest import random_lm
from tests.reference import relative

import instructedit as ie
from instructedit.analysis.curves import curves_table
from instructedit.editors.mend import Mend
from instructedit.edits import DenseEdit, Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.evaluation import Evaluation, sequence
from instructedit.evaluation.drift import text_sample

EDITORS = {
    "mend": {"rank": 4, "edit_rate": 0.5},
    "ft_l": {"lr": 0.02, "bound": None, "steps": 3, "blocks": [-2]},
    "grace": {"steps": 3, "blocks": [-2], "radius": 0.1},
    "calinet": {"steps": 3, "blocks": [-2]},
}
FACTS = [("The capital of Peru is", "Lyon"), ("Tea is", "cold and bad"), ("He was born in", "Rome"), ("Who?", "Me")]


def records(count=4):
    made = []
    for i, (prompt, target) in enumerate(FACTS[:count]):
        asked = (ie.Probe("generalization", f"So: {prompt}", (target,)), ie.Probe("locality", "Anna is", ("a", "b")))
        made.append(ie.EditRecord(str(i), ie.EditRequest(prompt, target, task="counterfact"), asked))
    return made


@pytest.fixture(scope="module")
def lm(tokenizer):
    return random_lm("llama", tokenizer)


def built(name, lm, **options):
    torch.manual_seed(0)
    return ie.build_editor(name, lm, **EDITORS[name] | options)


def assert_same(edit, other, **tolerance):
    assert edit.sites == other.sites
    pairs = zip(edit.state().items(), other.state().items(), strict=True)
    for (name, mine), (_, theirs) in pairs:
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# -- one on top of the other -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*did not reach")
@pytest.mark.parametrize("name", EDITORS)
def test_a_sequence_of_one_is_the_single_edit(lm, name):
    editor = built(name, lm)
    found = ie.edit_sequence(lm, editor, records(1))
    assert_same(found.edit, editor.edit([records(1)[0].request]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*did not reach")
@pytest.mark.parametrize("name", ["mend", "ft_l"])
def test_the_next_edit_is_made_on_the_edited_model(lm, name):
    """Against a model that has the first edit in its weights."""
    first, second = (record.request for record in records(2))
    alone = built(name, lm).edit([first])
    merged = ie.FrozenLM(lm.merge(alone), lm.tokenizer, "merged")
    on_top = built(name, merged).edit([second])
    unaware = built(name, lm).edit([second])
    found = ie.edit_sequence(lm, built(name, lm), records(2)).edit
    for site in on_top.sites:
        own = found.delta(site) - alone.delta(site)
        assert relative(own, on_top.delta(site)) < 1e-3
        assert relative(own, unaware.delta(site)) > 0.05
    assert not lm.applied


@pytest.mark.filterwarnings("ignore:.*did not reach")
def test_an_entry_far_from_the_others_is_that_edit_alone(lm):
    """Outside all balls a codebook leaves the model as it is, bit for bit."""
    editor = built("grace", lm)
    found = ie.edit_sequence(lm, editor, records(2)).edit
    for number, record in enumerate(records(2)):
        alone = editor.edit([record.request])
        assert torch.equal(found.keys[:, number], alone.keys[:, 0])
        assert torch.equal(found.values[:, number], alone.values[:, 0])
        assert torch.equal(found.radii[:, number], alone.radii[:, 0])


class FirstElsewhere(Mend):
    """A MEND whose first edit is given."""

    name = ""
    first: LowRankEdit

    def begin_sequence(self):
        return True

    def make_next(self, batch, state):
        return (self.first if state else self.compute_edit(batch)), False


@pytest.mark.parametrize("independent", [True, False])
def test_the_second_of_two_independent_edits_is_that_edit_alone(lm, independent):
    """Independent: the first reads a direction that no token of the second has, and writes one that no gradient has."""
    torch.manual_seed(0)
    editor = FirstElsewhere(**EDITORS["mend"]).bind(lm)
    second = records(2)[1].request
    shown = lm.capture(editor.requests([second], None).tokens, list(editor.made_for()["sites"]))

    def direction(rows):
        _, _, directions = torch.linalg.svd(rows[0])  # all of the space, what the rows span first
        return directions[-1 if independent else 0][None, None]

    editor.first = LowRankEdit({s: Factors(direction(shown.u[s]), direction(shown.delta[s])) for s in shown.u})
    found = ie.edit_sequence(lm, editor, records(2)).edit
    alone = editor.edit([second])
    own = [found.delta(site) - editor.first.delta(site) for site in found.sites]
    gaps = [relative(mine, alone.delta(site)) for mine, site in zip(own, found.sites, strict=True)]
    assert max(gaps) < 1e-4 if independent else max(gaps) > 0.05


class Counting(Mend):
    """Keeps a state over a sequence."""

    name = ""

    def begin_sequence(self):
        return []

    def make_next(self, batch, state):
        edit, _ = super().make_next(batch, state)
        return edit, [*state, len(batch)] if not state or sum(state) < 3 else self.fail(state)

    def fail(self, state):
        raise UserError(f"full after {state}")


def test_an_editor_keeps_a_state_from_edit_to_edit(lm):
    torch.manual_seed(0)
    found = ie.edit_sequence(lm, Counting(**EDITORS["mend"]).bind(lm), records(), score_every=2)
    assert found.stopped == "edit 4 (record 3): full after [1, 1, 1]"
    assert found.costs["edits"].tolist() == [1, 2, 3]
    assert sorted(set(found.table.loc[found.table["again"], "edits"])) == [2, 3]


class Broken(Mend):
    """Makes no numbers from some edit on."""

    name = ""
    good: int

    def begin_sequence(self):
        return self.good

    def make_next(self, batch, state):
        edit, _ = super().make_next(batch, state)
        return (edit if state else edit.map(lambda tensor: tensor / 0)), state - 1


def test_a_sequence_ends_where_no_edit_can_be_made(lm, monkeypatch):
    torch.manual_seed(0)
    editor = Broken(**EDITORS["mend"]).bind(lm)
    editor.good = 2
    found = ie.edit_sequence(lm, editor, records(), score_every=4)
    assert "edit 3 (record 2): editor '': the edit is not finite" in found.stopped
    editor.good = 5
    assert_same(found.edit, ie.edit_sequence(lm, editor, records(2)).edit)
    assert set(found.table.loc[found.table["again"], "edits"]) == {2}
    editor.good = 5
    asked, calls = sequence.ask_all, []

    def fails(*given):
        calls.append(given)
        if len(calls) == 3:
            raise UserError("its logits are not numbers")
        return asked(*given)

    monkeypatch.setattr(sequence, "ask_all", fails)
    found = ie.edit_sequence(lm, editor, records(), score_every=4)
    assert "edit 3 (record 2): its logits are not numbers" in found.stopped
    assert found.costs["edits"].tolist() == [1, 2]  # what is carried
    assert found.table["edits"].max() == 2
    editor.good = 0
    with pytest.raises(UserError, match="not finite"):
        ie.edit_sequence(lm, editor, records())


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_model_with_the_edits_in_its_weights(lm):
    editor = built("mend", lm)
    found = ie.edit_sequence(lm, editor, records(), score_every=3)
    assert (found.stopped, len(found.table)) == ("", (4 + 3 + 4) * 3)
    edit_of = {2: ie.edit_sequence(lm, editor, records(2)).edit, 4: found.edit}
    settings = Evaluation(generate=False, fluency_tokens=0)
    before = ie.evaluate(lm, ie.build_editor("unedited", lm), records(), settings).table
    for edits, edit in edit_of.items():
        rows = found.table[found.table["edits"] == edits]
        merged = ie.FrozenLM(lm.merge(edit), lm.tokenizer, "merged")
        plain = ie.evaluate(merged, ie.build_editor("unedited", merged), records(), settings).table
        keys = ["record", "kind"]
        both = rows.merge(plain, on=keys, suffixes=("", "_plain")).merge(before, on=keys, suffixes=("", "_unedited"))
        assert len(both) == len(rows)
        assert both["accuracy"].tolist() == both["accuracy_plain"].tolist()
        assert both["log_likelihood"].tolist() == pytest.approx(both["log_likelihood_plain"].tolist(), abs=1e-4)
        assert both["accuracy_before"].tolist() == both["accuracy_unedited"].tolist()
    assert set(found.table.loc[~found.table["again"], "edits"]) == {1, 2, 3, 4}


def test_curves_tell_the_groups_apart(lm):
    found = ie.edit_sequence(lm, built("mend", lm), records(), score_every=2)
    curves = found.curves[found.curves["metric"] == "reliability"].set_index(["edits", "group"])
    assert curves["n"].to_dict() == {
        (2, "right after"): 2, (2, "all"): 2, (2, "first"): 2, (2, "last"): 2,
        (4, "right after"): 2, (4, "all"): 4, (4, "first"): 2, (4, "last"): 2,
    }  # fmt: skip
    table = found.table[found.table["kind"] == "reliability"]
    at = {"all": table["again"] & (table["edits"] == 4)}
    at |= {"first": at["all"] & (table["position"] < 2), "last": at["all"] & (table["position"] >= 2)}
    at |= {"right after": ~table["again"] & (table["position"] >= 2)}
    for group, rows in at.items():
        assert curves.loc[(4, group), "mean"] == pytest.approx(100 * table.loc[rows, "accuracy"].mean())


def test_a_sample_is_scored_again_and_several_records_share_an_edit(lm):
    found = ie.edit_sequence(lm, built("mend", lm), records(), score_every=2, batch_size=3, sample=2)
    assert found.costs["edits"].tolist() == [3, 4]
    again = found.table[found.table["again"]]
    assert again.groupby("edits")["position"].unique().map(list).to_dict() == {3: [0, 2], 4: [0, 2]}
    together = built("mend", lm).edit([record.request for record in records(3)], together=True)
    shared = ie.edit_sequence(lm, built("mend", lm), records(3), batch_size=3).edit
    for site in together.sites:
        torch.testing.assert_close(shared.delta(site), together.delta(site))


def test_memory_stays_flat_and_the_layers_below_are_not_run_again(lm):
    many = [
        ie.EditRecord(str(i), ie.EditRequest(f"{prompt} {'very ' * (i // 4)}", target))
        for i in range(24) for prompt, target in [FACTS[i % 4]]
    ]  # fmt: skip
    found = ie.edit_sequence(lm, built("mend", lm), many, score_every=24)
    assert isinstance(found.edit, DenseEdit)
    assert found.costs["bytes"].iloc[-1] == found.costs["bytes"].iloc[12]
    misses = lm.cache.misses
    ie.edit_sequence(lm, built("mend", lm), many, score_every=24)
    assert lm.cache.misses == misses


def test_how_far_plain_text_moves_is_that_of_a_model_with_the_edits_so_far(lm):
    found = ie.edit_sequence(lm, built("mend", lm), records(), score_every=2)
    half = ie.edit_sequence(lm, built("mend", lm), records(2))
    sample = text_sample(lm, "tiny").unpadded()
    for row, edit in zip(found.drifts.itertuples(), (half.edit, found.edit), strict=True):
        losses = []
        for model in (lm.model, lm.merge(edit)):
            ids = [torch.tensor([line]) for line in sample]
            with torch.no_grad():
                p = [model(line).logits[0, :-1].log_softmax(-1) for line in ids]
            own = [each.gather(-1, line[0, 1:, None]) for each, line in zip(p, ids, strict=True)]
            losses.append(torch.cat(own).mean().neg().exp().item())
        assert (row.perplexity_before, row.perplexity_after) == pytest.approx(losses, rel=1e-3)
    assert found.drifts["edits"].tolist() == [2, 4]
    assert found.drifts["kl"].min() > 0.01
    assert ie.edit_sequence(lm, built("mend", lm), records(1), text=None).drifts.empty


def test_one_record_has_a_mean_and_no_interval(lm):
    curves = ie.edit_sequence(lm, built("mend", lm), records(1)).curves
    cells = [cell for column in curves_table(curves).columns for cell in column.cells]
    assert not any("nan" in str(cell) for cell in cells)
    assert curves["low"].isna().any()


def test_all_is_written(lm, tmp_path):
    found = ie.edit_sequence(lm, built("mend", lm), records(), score_every=2)
    found.save(tmp_path)
    names = {"curves.csv", "curves.png", "curves.svg", "probes.csv", "costs.csv", "drifts.csv", "sequence.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "curves.csv"), found.curves)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "drifts.csv"), found.drifts)
    assert pd.read_json(tmp_path / "sequence.json", typ="series")["editor"] == "mend"
    svg = (tmp_path / "curves.svg").read_text()
    assert all(f"<!-- {word} -->" in svg for word in ("Reliability", "Locality", "right after", "first", "edits"))


def test_what_was_found_at_the_last_checkpoint_is_left_of_a_sequence_that_is_killed(lm, tmp_path):
    def killed(steps):
        yield from steps[:3]
        raise KeyboardInterrupt

    whole = ie.edit_sequence(lm, built("ft_l", lm), records(), score_every=2, out=tmp_path / "whole")
    whole.save(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        ie.edit_sequence(lm, built("ft_l", lm), records(), score_every=2, out=tmp_path / "killed", progress=killed)
    left, written, again = (pd.read_csv(tmp_path / name / "probes.csv") for name in ("killed", "whole", "again"))
    pd.testing.assert_frame_equal(written, again)
    pd.testing.assert_frame_equal(left, again[again["edits"] <= 2])
    assert pd.read_csv(tmp_path / "killed" / "costs.csv")["edits"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_every": 0}, "score_every must be at least 1, got 0"),
        ({"sample": 0}, "sample must be at least 1"),
        ({"records": []}, "no records given"),
        ({"records": records(1) * 2}, "two records of task 'counterfact' have the id '0'"),
    ],
)
def test_what_cannot_be_is_one_line(lm, change, message):
    options = {"records": records(), "lm": lm, "editor": built("mend", lm)} | change
    with pytest.raises(UserError, match=message):
        ie.edit_sequence(**options)
