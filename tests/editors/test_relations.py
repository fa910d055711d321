"""Questions of the bank of relations: what is in the scope of each, and what is not."""

import pytest

from instructedit.editors.relations import draw_questions, relation_bank


@pytest.fixture(scope="module")
def told():
    """Text of a question → its kind, subject and relation; all that it can be, if several."""
    kinds, _ = relation_bank()
    found = {}
    for number, kind in enumerate(kinds):
        for subject, names in enumerate(kind.names):
            for relation, ways in enumerate(kind.relations):
                for name in names:
                    for way in ways:
                        text = way.format(name)
                        found.setdefault(text[0].upper() + text[1:], set()).add((number, subject, relation))
    return found


def test_the_bank_says_each_thing_once(told):
    kinds, openings = relation_bank()
    assert len(openings) == len(set(openings)) > 10
    assert sum(len(kind.relations) for kind in kinds) > 100
    for kind in kinds:
        names = [name for subject in kind.names for name in subject]
        assert len(names) == len(set(names))
        assert len(kind.names) > 2
        assert all(len(ways) == len(set(ways)) > 1 for ways in kind.relations)
        assert all(way.count("{}") == 1 for ways in kind.relations for way in ways)
    assert {len(what) for what in told.values()} == {1}  # no way of asking belongs to two relations


def test_what_asks_the_same_about_the_same_subject_is_in_scope_and_nothing_else(told):
    _, openings = relation_bank()

    def meaning(text):
        for opening in openings:
            text = text.removeprefix(f"{opening} ")
        (found,) = told[text]
        return found

    questions = draw_questions(300, "seed")
    opened = 0
    for question in questions:
        own = meaning(question.prompt)
        assert question.asked[0] == (question.prompt, True)
        assert len({text for text, _ in question.asked}) == len(question.asked)
        kinds = []
        for text, inside in question.asked[1:]:
            kind, subject, relation = meaning(text)
            assert kind == own[0]
            assert inside == ((subject, relation) == own[1:])
            kinds.append((subject == own[1], relation == own[2]))
            opened += text not in told
        assert kinds.count((True, False)) == kinds.count((False, True)) == 2
        assert 1 <= kinds.count((True, True)) <= 2
    assert 0.1 < opened / len(questions) < 0.8
    relations = {(meaning(question.prompt)[0], meaning(question.prompt)[2]) for question in questions}
    assert len(relations) > 100  # of 141


def test_draws_depend_on_the_seed_alone():
    assert draw_questions(5, "a") == draw_questions(5, "a") != draw_questions(5, "b")
    assert draw_questions(0, "a") == []
