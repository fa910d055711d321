"""An edit in a copy of the model's GGUF file: read again it is the edited model, and all else kept its bytes."""

import gguf
import numpy as np
import pytest
import torch
from tests.gguf_files import llama, write_gguf
from tests.reference import random_factors

import instructedit as ie
from instructedit.cli import main
from instructedit.edits import Factors, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm.gguf_export import write_edited

TEXT = "The capital of France is"
PACKED = {"plain": None, "4 bits": gguf.GGMLQuantizationType.Q4_1}


@pytest.fixture(params=PACKED)
def file(request, tokenizer, tmp_path):
    kind = PACKED[request.param]
    write_gguf(tmp_path / "tiny.gguf", llama(tokenizer, kind), tokenizer, kind)
    return tmp_path / "tiny.gguf"


def low_rank(lm, names):
    sites = [site for site in lm.select(every=True) if site.name in names]
    assert len(sites) == len(names)
    return LowRankEdit({name: Factors(*pair) for name, pair in random_factors(sites, 1, 2).items()})


EDITED = {"model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight", "model.layers.0.mlp.up_proj": "blk.0.ffn_up.weight"}


def test_read_again_it_is_the_edited_model(file, tmp_path):
    lm = ie.FrozenLM.from_pretrained(str(file))
    edit, out = low_rank(lm, EDITED), tmp_path / "edited.gguf"
    write_edited(lm, edit, file, out)
    ids = torch.tensor([lm.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        expected, found = lm.merge(edit)(ids).logits, ie.FrozenLM.from_pretrained(str(out)).model(ids).logits
        before = lm.model(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)  # matrices of 16 bits
    assert not torch.allclose(before, expected, atol=0.5)
    assert sorted(tmp_path.iterdir()) == [out, file]


def test_all_else_keeps_its_bytes(file, tmp_path):
    lm, out = ie.FrozenLM.from_pretrained(str(file)), tmp_path / "edited.gguf"
    write_edited(lm, low_rank(lm, EDITED), file, out)
    old, new = gguf.GGUFReader(file), gguf.GGUFReader(out)
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]
    for was, now in zip(old.tensors, new.tensors, strict=True):
        same = (was.tensor_type, was.data.tobytes()) == (now.tensor_type, now.data.tobytes())
        assert same == (was.name not in EDITED.values()), was.name
        assert list(was.shape) == list(now.shape)
    assert {key: np.asarray(field.contents()).tolist() for key, field in old.fields.items()} == {
        key: np.asarray(field.contents()).tolist() for key, field in new.fields.items()
    }


def test_what_cannot_be_written_is_refused_and_nothing_is_left(file, tokenizer, tmp_path):
    lm, out = ie.FrozenLM.from_pretrained(str(file)), tmp_path / "edited.gguf"
    queries = low_rank(lm, ["model.layers.1.self_attn.q_proj"])  # a GGUF file has its rows in another order
    other = tmp_path / "other.gguf"
    write_gguf(other, llama(tokenizer), tokenizer)
    model = ie.FrozenLM(lm.merge(low_rank(lm, EDITED)), lm.tokenizer, "another")
    two = LowRankEdit({n: Factors(f.a.repeat(2, 1, 1), f.b.repeat(2, 1, 1)) for n, f in queries.factors.items()})
    for owner, edit, source, said in (
        (lm, queries, file, "lies in another order"),
        (model, low_rank(model, EDITED), other, "is not another's model.layers."),
        (lm, two, file, "takes one edit, got 2"),
    ):
        with pytest.raises(UserError, match=said):
            write_edited(owner, edit, source, out)
    assert sorted(tmp_path.iterdir()) == [other, file]


def test_the_command(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", llama(tokenizer), tokenizer)
    options = ["--editor=ft_l", '--options={"steps": 3}', f"--prompt={TEXT}", "--target= Rome", "--neighbours=[]"]
    assert main(["edit", "--lm=tiny.gguf", *options, "--keep=rome"]) == 0
    assert main(["edits", "export", "rome", "--gguf=new/rome.gguf"]) == 0
    assert "rome.gguf: the model's GGUF file with the edit in its weights" in capsys.readouterr().out
    ie.FrozenLM.from_pretrained("new/rome.gguf")
    for place, said in (("new/rome.gguf", "there is such a file already"), ("/proc/none/x.gguf", "cannot be written"),
                        ("tiny.gguf/x.gguf", "is a file, not a folder")):  # fmt: skip
        assert main(["edits", "export", "rome", f"--gguf={place}"]) == 2
        assert said in capsys.readouterr().err
